// x as the products want it: whole numbers, bfloat16 or float32, rows filled up with zeros.
#pragma once

#include <math.h>

#include "linear.h"
#include "pool.h"
#include "simd.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t FILL_BYTES = 64;  // rows are filled up to a multiple of this
constexpr int64_t FILL_ROWS = 32;   // and there is room for so many: what lies there is read, its products are not
constexpr int64_t FEW_ROWS = 8;     // up to here the caller does it alone: waking others would take longer
constexpr float TINY = 1.17549435e-38f;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// V: int8_t, BFloat16 or float.
template <class V>
struct Input {
  V* values;         // [M, stride]
  int64_t stride;    // K filled up, in elements
  float* scales;     // [M], dynamic only
  int32_t* offsets;  // [M], int8 only: what the products have too much (see PRODUCT_OFFSET)
};

template <class T>
float largest_magnitude(const T* x, int64_t count) {
  uint32_t largest = 0;  // of the bits without the sign, which order like the numbers, infinity and NaN above them
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(x[i]);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  float value;
  memcpy(&value, &largest, 4);
  return value;
}

inline int8_t rounded(float value, float low, float high) {  // half to even
  value = value < low ? low : value;
  value = value > high ? high : value;
  return static_cast<int8_t>(static_cast<int32_t>(nearbyintf(value)));
}

template <class T>
void take_row(const SaccadeLinear& layer, const T* x, const Input<int8_t>& out, int64_t row) {
  const int64_t count = layer.in_features;
  int8_t* values = out.values + row * out.stride;
  if (layer.scheme == SACCADE_W8A8) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = nearbyintf(to_float(x[i]) / layer.static_scale + layer.static_zero);
      values[i] = rounded(value == value ? value : 0.0f, -128.0f, 127.0f);
    }
  } else {
    float scale = largest_magnitude(x, count) / 127.0f;
    scale = scale < TINY ? TINY : scale;
    out.scales[row] = scale;
    if (scale - scale == 0.0f) {
      for (int64_t i = 0; i < count; ++i) values[i] = rounded(to_float(x[i]) / scale, -127.0f, 127.0f);
    } else {  // infinity or NaN: zero times that scale is NaN
      memset(values, 0, count);
    }
  }
  memset(values + count, 0, out.stride - count);
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  out.offsets[row] = PRODUCT_OFFSET * sum;
}

template <class T, class V>
void take_row(const SaccadeLinear& layer, const T* x, const Input<V>& out, int64_t row) {
  const int64_t count = layer.in_features;
  V* values = out.values + row * out.stride;
  for (int64_t i = 0; i < count; ++i) store(values + i, to_float(x[i]));
  memset(static_cast<void*>(values + count), 0, (out.stride - count) * sizeof(V));
}

// All rows of x, in memory of this thread that lives until its next linear.
template <class T, class V>
Input<V> take_input(const LinearCall& call) {
  // An odd multiple: rows a power of two apart would fall into the same few sets of the first-level cache.
  const int64_t stride = (round_up(call.layer.in_features * sizeof(V), FILL_BYTES) | FILL_BYTES) / sizeof(V);
  Input<V> out;
  out.stride = stride;
  out.values = static_cast<V*>(scratch(SCRATCH_INPUT, round_up(call.rows, FILL_ROWS) * stride * sizeof(V)));
  out.scales = static_cast<float*>(scratch(SCRATCH_INPUT_SCALES, call.rows * 8));
  out.offsets = reinterpret_cast<int32_t*>(out.scales + call.rows);
  const T* x = static_cast<const T*>(call.x);
  if (call.rows <= FEW_ROWS) {
    for (int64_t row = 0; row < call.rows; ++row) take_row(call.layer, x + row * call.x_stride, out, row);
    return out;
  }
  parallel([&](int thread, int count) {
    for (int64_t row = thread; row < call.rows; row += count) take_row(call.layer, x + row * call.x_stride, out, row);
  });
  return out;
}

}  // namespace saccade::SACCADE_ISA
