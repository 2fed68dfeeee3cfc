// The ops between products: norm, rotary angles, gate, and the way into the cache. Their meaning is in record.py.
//
// Letters: T tokens, H width, N query heads, K key heads, D head size. A stride counts values from one token to the next; heads
// and columns of a token lie one after the other. dtype: of all tensors without another one.
#pragma once

#include <stdint.h>

#include "dispatch.h"
#include "linear.h"

extern "C" {

struct SaccadeNorm {
  const void* x;         // [T, H]
  const void* residual;  // [T, H] or null
  const void* gain;      // [H]
  void* y;               // [T, H]
  void* sum;             // [T, H]: x + residual; not written without a residual. May be the residual itself
  int64_t rows, columns;
  int64_t x_stride;
  float eps;
  int32_t dtype;
};

struct SaccadeSiluMul {
  const void* gate_up;  // [T, 2 I]
  void* y;              // [T, I]
  int64_t rows, columns;  // columns: I
  int64_t stride;         // of gate_up
  int32_t dtype;
};

struct SaccadeRope {
  const void* x;           // [T, heads, D]
  void* y;                 // [T, heads, D]; may be x
  const float *cos, *sin;  // [T, D / 2]
  int64_t rows, heads, head_dim;
  int64_t x_stride, y_stride;
  int32_t dtype;
};

struct SaccadeStore {
  const void* x;         // [T, K, D]
  void* cache;           // [slots, K, D]; int8: [slots, K, D + 4], see StoreKv
  const int64_t* slots;  // [T]
  int64_t rows, heads, head_dim;
  int64_t x_stride;
  int32_t dtype;    // of x
  int32_t is_int8;  // what the cache is
};
}

namespace saccade {

SACCADE_KERNEL(rms_norm, const SaccadeNorm&)
SACCADE_KERNEL(silu_mul, const SaccadeSiluMul&)
SACCADE_KERNEL(rope, const SaccadeRope&)
SACCADE_KERNEL(store_rows, const SaccadeStore&)

}  // namespace saccade
