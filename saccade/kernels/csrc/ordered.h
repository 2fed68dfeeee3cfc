// Products, attention and sums in one fixed order: the same bits on every processor.
//
// The order is that of torch 2.13 on a processor with AVX-512 and bfloat16 instructions but no AMX, with one thread: what msModelSlim's
// checkpoints were written on. docs/quantization-exact.md says how each was found.
#pragma once

#include <stdint.h>

#include "dispatch.h"

extern "C" {

// y = a b + bias, in bfloat16. Sums go two columns at a time, as vdpbf16ps adds them: the odd one, then the even one.
struct SaccadeOrderedProduct {
  const uint16_t* a;     // [rows, depth]
  const uint16_t* b;     // [depth, columns]
  const uint16_t* bias;  // [columns] or null
  uint16_t* y;           // [rows, columns]
  int64_t rows, columns, depth;
  int64_t a_stride, b_row_stride, b_column_stride;
};

// Causal attention of one sequence in bfloat16, scaled by the root of D: torch's flash attention. All are [heads, tokens, D].
// lanes: 8 or 16, how many partial sums a vector has.
struct SaccadeOrderedAttention {
  const uint16_t *q, *k, *v;
  uint16_t* y;
  int64_t heads, tokens, head_dim;
  int32_t lanes;
};

// Of each row: its sum, or its softmax. lanes: as above.
struct SaccadeOrderedRows {
  const void* x;  // [rows, columns] float32; of sums, bfloat16 as well
  float* y;       // [rows]; of softmax [rows, columns]
  int64_t rows, columns;
  int32_t lanes;
  int32_t is_bf16;
};
}

namespace saccade {

SACCADE_KERNEL(ordered_product, const SaccadeOrderedProduct&)
SACCADE_KERNEL(ordered_attention, const SaccadeOrderedAttention&)
SACCADE_KERNEL(ordered_sum, const SaccadeOrderedRows&)
SACCADE_KERNEL(ordered_softmax, const SaccadeOrderedRows&)

}  // namespace saccade
