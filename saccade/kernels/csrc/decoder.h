// A step of the whole decoder in one call: what is fixed of a model, and what a step brings. See DecoderStep in record.py.
#pragma once

#include <stdint.h>

#include "linear.h"

extern "C" {

// Letters: T tokens, H width, N query heads, K key heads, D head size, I width of the gate.
struct SaccadeDecoderLayer {
  const void* input_gain;  // [H]
  const void* post_gain;   // [H]
  const SaccadeLinear* qkv;
  const SaccadeLinear* output;
  const SaccadeLinear* gate_up;
  const SaccadeLinear* down;
  void* k_cache;  // [slots, K, D], int8 [slots, K, D + 4]
  void* v_cache;
};

struct SaccadeDecoder {
  const SaccadeDecoderLayer* layers;
  int64_t num_layers;
  const void* gain;  // [H], of the last norm
  int64_t hidden_size, intermediate_size;
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t block_size;
  float eps;
  int32_t dtype;
  int32_t has_int8_cache;
};

struct SaccadeStep {
  const void* x;           // [T, H]
  void* hidden;            // [T, H], the result
  void* workspace;         // [T, 2 H + larger of (2 N + 2 K) D and 3 I] of the decoder's dtype
  const float *cos, *sin;  // [T, D / 2]
  const int64_t* slots;    // [T]
  const int64_t* query_lengths;    // [num_sequences]
  const int64_t* context_lengths;  // [num_sequences]
  const int64_t* block_tables;     // [num_sequences, table_width]
  int64_t table_width;
  int64_t num_sequences, num_tokens;
};
}

namespace saccade {

void decode(const SaccadeDecoder& decoder, const SaccadeStep& step);

}  // namespace saccade
