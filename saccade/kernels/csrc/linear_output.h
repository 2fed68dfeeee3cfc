// y from the sums of products: scales, bias, and rounding to the type of y. Each operation rounds by itself, as the reference's.
#pragma once

#include "linear_input.h"

namespace saccade::SACCADE_ISA {

// `count` outputs of one row of y, from `output` on.
template <class T>
void finish(const LinearCall& call, const Input<int8_t>& x, const int32_t* sums, int64_t row, int64_t output,
            int64_t count) {
  const SaccadeLinear& layer = call.layer;
  T* y = static_cast<T*>(call.y) + row * layer.out_features + output;
  if (layer.scheme == SACCADE_W8A8) {
    const int32_t* bias = layer.quant_bias + output;
    const float* scale = layer.deq_scale + output;
    for (int64_t i = 0; i < count; ++i)
      store(y + i, static_cast<float>(static_cast<int32_t>(uint32_t(sums[i]) + uint32_t(bias[i]))) * scale[i]);
    return;
  }
  const float* scale = layer.scale + output;
  const float row_scale = x.scales[row];
  if (layer.bias == nullptr) {
    for (int64_t i = 0; i < count; ++i) store(y + i, static_cast<float>(sums[i]) * row_scale * scale[i]);
    return;
  }
  const T* bias = static_cast<const T*>(layer.bias) + output;
  for (int64_t i = 0; i < count; ++i)
    store(y + i, static_cast<float>(sums[i]) * row_scale * scale[i] + to_float(bias[i]));
}

template <class T, class V>
void finish(const LinearCall& call, const Input<V>&, float* sums, int64_t row, int64_t output, int64_t count) {
  const SaccadeLinear& layer = call.layer;
  T* y = static_cast<T*>(call.y) + row * layer.out_features + output;
  if (layer.scheme == SACCADE_W8A16) {
    const float* scale = layer.scale + output;
    for (int64_t i = 0; i < count; ++i) sums[i] *= scale[i];
  }
  if (layer.bias == nullptr) {
    for (int64_t i = 0; i < count; ++i) store(y + i, sums[i]);
    return;
  }
  const T* bias = static_cast<const T*>(layer.bias) + output;
  for (int64_t i = 0; i < count; ++i) store(y + i, sums[i] + to_float(bias[i]));
}

}  // namespace saccade::SACCADE_ISA
