// y = x W^T + bias for every scheme: what Python hands over. The meaning is that of `Linear` in record.py.
#pragma once

#include <stdint.h>

#include "dispatch.h"

extern "C" {

enum SaccadeDtype : int32_t { SACCADE_FLOAT32, SACCADE_BFLOAT16, SACCADE_FLOAT16 };

enum SaccadeScheme : int32_t {
  SACCADE_W8A8,          // static activations
  SACCADE_W8A8_DYNAMIC,  // a scale for each row of x
};

// The weight of one linear layer, as Weight in scheme.py has it: rows as they lie, nothing packed. Pointers a scheme has no use
// for are null.
struct SaccadeLinear {
  int32_t scheme;
  int32_t dtype;  // of x, bias and y
  int64_t out_features, in_features;
  const void* values;
  const float* scale;         // [O]
  const void* bias;           // [O] or null
  const int32_t* quant_bias;  // static: [O]
  const float* deq_scale;     // static: [O]
  float static_scale, static_zero;
};
}

namespace saccade {

struct LinearCall {
  const SaccadeLinear& layer;
  const void* x;  // [rows, in_features], rows x_stride elements apart
  int64_t x_stride;
  void* y;  // [rows, out_features]
  int64_t rows;
};

SACCADE_KERNEL(linear, const LinearCall&)

}  // namespace saccade
