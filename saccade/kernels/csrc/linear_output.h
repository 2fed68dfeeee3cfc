// y from the sums of products: scales, bias, and rounding to the type of y. Each operation rounds by itself, as the reference's.
#pragma once

#include "linear_input.h"

namespace saccade::SACCADE_ISA {

// `count` outputs of one row of y, from `output` on.
template <class T, class V>
void finish(const LinearCall& call, const Input<V>& x, const int32_t* sums, int64_t row, int64_t output, int64_t count) {
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

// FINISHED outputs at once, in the compiler's vector types: two or four of the processor's where its own are shorter.
constexpr int64_t FINISHED = 16;
typedef float Outputs __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t OutputSums __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t OutputWords __attribute__((vector_size(64), may_alias));
typedef uint16_t OutputHalves __attribute__((vector_size(32), aligned(2), may_alias));
typedef Float16 OutputFloat16s __attribute__((vector_size(32), aligned(2), may_alias));

inline void narrow(const Outputs& y, float* to) { *reinterpret_cast<Outputs*>(to) = y; }
inline void narrow(const Outputs& y, Float16* to) {
  *reinterpret_cast<OutputFloat16s*>(to) = __builtin_convertvector(y, OutputFloat16s);
}
inline void narrow(const Outputs& y, BFloat16* to) {  // as store does it
  const auto bits = (OutputWords)y, is_nan = (OutputWords)(y != y);
  const OutputWords rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  *reinterpret_cast<OutputHalves*>(to) = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), OutputHalves);
}

// What makes outputs of some columns from their sums, in vectors that wait ready: a stage of many rows is finished between the
// products of the next, and must not wait for memory written just before.
template <class T, class Number, int OFFSET>
class Finisher {
 public:
  // `count` outputs from `first` on. memory: [3, round_up(count, FINISHED)] words.
  // row_scales, row_offsets: [rows]; what products have too much is in the offsets if OFFSET says so.
  Finisher(const LinearCall& call, const float* row_scales, const int32_t* row_offsets, int64_t first, int64_t count,
           void* memory)
      : first_(first), count_(count), y_(static_cast<T*>(call.y)), y_stride_(call.layer.out_features),
        row_scales_(row_scales), row_offsets_(row_offsets), scale_(static_cast<float*>(memory)) {
    const SaccadeLinear& layer = call.layer;
    const int64_t size = round_up(count, FINISHED);
    bias_ = scale_ + size;
    added_ = reinterpret_cast<int32_t*>(bias_ + size);
    memset(memory, 0, 3 * size * sizeof(float));
    is_static_ = layer.scheme == SACCADE_W8A8;
    has_bias_ = layer.bias != nullptr && !is_static_;
    has_scale_ = std::is_same_v<Number, int32_t> || layer.scheme == SACCADE_W8A16 || layer.scheme == SACCADE_FP8;
    has_row_scale_ = layer.scheme == SACCADE_FP8 || layer.scheme == SACCADE_W4A8_FLOAT;
    if (has_scale_) memcpy(scale_, (is_static_ ? layer.deq_scale : layer.scale) + first, count * sizeof(float));
    if (is_static_) memcpy(added_, layer.quant_bias + first, count * sizeof(int32_t));
    if (has_bias_)
      for (int64_t i = 0; i < count; ++i) bias_[i] = to_float(static_cast<const T*>(layer.bias)[first + i]);
  }

  // Rows [row, row + rows) of the outputs from `column` on, `width` of them or as many as there are; whole runs of FINISHED sums
  // are readable.
  void finish(const Number* sums, int64_t sums_stride, int64_t row, int64_t rows, int64_t column, int64_t width) const {
    T* y = y_ + row * y_stride_ + first_ + column;
    width = smaller(width, count_ - column);
    for (int64_t r = 0; r < rows; ++r, sums += sums_stride, y += y_stride_)
      for (int64_t i = 0; i < width; i += FINISHED) {
        const Outputs finished = number(sums + i, row + r, column + i);
        if (width - i >= FINISHED) {
          narrow(finished, y + i);
        } else {
          T all[FINISHED];
          narrow(finished, all);
          memcpy(static_cast<void*>(y + i), all, (width - i) * sizeof(T));
        }
      }
  }

 private:
  Outputs number(const int32_t* sums, int64_t row, int64_t column) const {
    auto sum = *reinterpret_cast<const OutputSums*>(sums);
    if constexpr (OFFSET != 0) sum = (OutputSums)((OutputWords)sum - static_cast<uint32_t>(row_offsets_[row]));
    if (is_static_) {
      const auto added = *reinterpret_cast<const OutputSums*>(added_ + column);
      return __builtin_convertvector((OutputSums)((OutputWords)sum + (OutputWords)added), Outputs) * at(scale_ + column);
    }
    return with_bias(__builtin_convertvector(sum, Outputs) * row_scales_[row] * at(scale_ + column), column);
  }
  Outputs number(const float* sums, int64_t row, int64_t column) const {
    Outputs sum = at(sums);
    if (has_row_scale_) sum *= row_scales_[row];
    if (has_scale_) sum *= at(scale_ + column);
    return with_bias(sum, column);
  }
  Outputs with_bias(const Outputs& number, int64_t column) const {
    return has_bias_ ? number + at(bias_ + column) : number;
  }
  static Outputs at(const float* from) { return *reinterpret_cast<const Outputs*>(from); }

  int64_t first_, count_;
  T* y_;
  int64_t y_stride_;
  const float* row_scales_;
  const int32_t* row_offsets_;
  float *scale_, *bias_;
  int32_t* added_;
  bool is_static_, has_bias_, has_scale_, has_row_scale_;
};

}  // namespace saccade::SACCADE_ISA
