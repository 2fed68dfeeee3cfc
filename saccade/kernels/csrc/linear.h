// y = x W^T + bias for every scheme: what Python hands over. The meaning is that of `Linear` in record.py.
#pragma once

#include <stdint.h>

#include "dispatch.h"

extern "C" {

enum SaccadeDtype : int32_t { SACCADE_FLOAT32, SACCADE_BFLOAT16, SACCADE_FLOAT16 };

enum SaccadeScheme : int32_t {
  SACCADE_DENSE,         // bfloat16 values, x of the same
  SACCADE_W8A16,         // int8 values, a scale for each row
  SACCADE_W4A16,         // 4 bits, a float scale for each group, maybe a zero point
  SACCADE_W8A8,          // int8 values, static activations
  SACCADE_W8A8_DYNAMIC,  // int8 values, a scale for each row of x
  SACCADE_W4A8,          // 4 bits, a whole-number scale for each group and a float one for each row; x as before
  SACCADE_W4A8_FLOAT,    // 4 bits, a float scale for each group; x as before
  SACCADE_FP8,           // e4m3 values, a scale for each row; x e4m3 too, with a scale for each row
};

// The weight of one linear layer, as Weight in scheme.py has it: rows as they lie, nothing packed. Pointers a scheme has no use
// for are null.
struct SaccadeLinear {
  int32_t scheme;
  int32_t dtype;  // of x, bias and y
  int64_t out_features, in_features;
  int64_t group_size;          // 0 without groups
  const void* values;          // [O, H]; of 4 bits [O, H/2], see packing.py
  const float* scale;          // [O], or [O, H / group_size] where groups have float scales
  const int8_t* group_scale;   // [O, H / group_size]
  const int8_t* zero;          // [O, H / group_size]
  const void* bias;            // [O]
  const int32_t* quant_bias;   // static: [O]
  const float* deq_scale;      // static: [O]
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
