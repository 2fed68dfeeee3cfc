// What an attention needs to know; see Kernels.attention_varlen and attention_paged in record.py.
#pragma once

#include <stdint.h>

#include "dispatch.h"
#include "linear.h"

extern "C" {

// Letters: T tokens of all sequences, N query heads, K key heads, D head size. A stride counts values from one token to the
// next; the heads of a token lie one after the other.
struct SaccadeAttention {
  const void* q;  // [T, N, D] of dtype
  const void* k;  // [tokens or slots, K, D] of dtype; int8: [slots, K, D + 4], the scale's four bytes last
  const void* v;
  void* out;                       // [T, N, D] of dtype, without gaps
  const int64_t* query_lengths;    // [num_sequences]
  const int64_t* context_lengths;  // [num_sequences]
  const int64_t* block_tables;     // [num_sequences, table_width]; null: keys lie as queries do, as many of them
  int64_t table_width;
  int64_t block_size;
  int64_t num_sequences;
  int64_t q_stride, k_stride, v_stride;
  int64_t num_heads, num_kv_heads, head_dim;
  float scale;
  int32_t causal;
  int32_t dtype;
  int32_t is_int8;  // what k and v are
};
}

namespace saccade {

SACCADE_KERNEL(attention, const SaccadeAttention&)

}  // namespace saccade
