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
  const uint16_t* b;     // [depth, columns], or null where there are panels
  const void* panels;    // of b, from SaccadeOrderedPanels, or null
  const uint16_t* bias;  // [columns] or null
  uint16_t* y;           // [rows, columns]
  int64_t rows, columns, depth;
  int64_t a_stride, b_row_stride, b_column_stride;
};

// The rows of a weight as a product's panels. `scale`: each is first multiplied by it, then rounded to its 255 levels and back, as
// quantize/outlier_suppression.py does in bfloat16.
struct SaccadeOrderedPanels {
  const uint16_t* weight;  // [columns, depth]
  const uint16_t* scale;   // [depth] or null
  void* panels;            // as many bytes as a call with null says
  int64_t* bytes;
  int64_t columns, depth;
};

// y = x / scale in 256 levels of width `step` and back, each operation rounded to bfloat16. All are [rows, columns], scale [columns].
struct SaccadeOrderedLevels {
  const uint16_t *x, *scale;
  uint16_t* y;
  int64_t rows, columns;
  float step, zero;
};

// Squared distances of rows of silu(gate) * up to what they are exactly, in float32. bias is added to gate and up before, if any.
struct SaccadeOrderedGateUp {
  const uint16_t* both;   // [rows, 2 columns]
  const uint16_t* bias;   // [2 columns] or null
  const uint16_t* silu;   // [65536]: of each number of bfloat16
  const uint16_t* exact;  // [rows, columns]
  float* distances;       // [rows]
  int64_t rows, columns;
};

// One head's attention within segments, in bfloat16: a row's squared distance to what it is exactly, or the row itself.
// Rotation in float32; logits over `root`. Segments lie one after the other from row 0 on.
struct SaccadeOrderedSegments {
  const uint16_t* qkv;     // [rows, 3, head_dim]
  const float *cos, *sin;  // [rows, head_dim]
  const int64_t* bounds;   // [num_segments + 1], even
  const uint16_t* exact;   // [rows, head_dim]
  uint16_t* y;             // [rows, head_dim] or null
  float* distances;        // [rows] or null; before they are rounded to bfloat16
  int64_t num_segments, head_dim;
  float root;
};

// Causal softmax in float32, rounded to bfloat16: token `first + i % tokens` of row i sees as many columns as stand before it and itself.
struct SaccadeOrderedCausal {
  const float* logits;  // [rows, columns]
  uint16_t* y;          // [rows, columns]
  int64_t rows, columns, tokens, first;
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
SACCADE_KERNEL(ordered_panels, const SaccadeOrderedPanels&)
SACCADE_KERNEL(ordered_levels, const SaccadeOrderedLevels&)
SACCADE_KERNEL(ordered_gate_up, const SaccadeOrderedGateUp&)
SACCADE_KERNEL(ordered_segments, const SaccadeOrderedSegments&)
SACCADE_KERNEL(ordered_causal, const SaccadeOrderedCausal&)
SACCADE_KERNEL(ordered_attention, const SaccadeOrderedAttention&)
SACCADE_KERNEL(ordered_sum, const SaccadeOrderedRows&)
SACCADE_KERNEL(ordered_softmax, const SaccadeOrderedRows&)

}  // namespace saccade
