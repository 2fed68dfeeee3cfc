// Linear layers: which way each scheme and number of rows takes.
//
// Weights are read as they lie, row after row, in memory or in a mapped file: nothing is packed or held twice.
// Letters: M rows of x, N rows of the weight (outputs), K columns.

#include "linear.h"

#include "linear_rows.h"

namespace saccade::SACCADE_ISA {
namespace {

template <class T>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<BFloat16> = true;

#if defined(__AVX512BF16__)
using DenseFew = DensePairs;
#else
using DenseFew = WideHalves;
#endif

// In fixed point what fits it, in floats what does not: each row as it would be alone.
template <class T, class Fixed, class Wide>
void multiply_fixed(const LinearCall& call, Fixed&& fixed, Wide&& wide) {
  if constexpr (IS_BFLOAT16<T>) {
    const T* x = static_cast<const T*>(call.x);
    T* y = static_cast<T*>(call.y);
    const auto fits = [&](int64_t row) { return fits_fixed_point(x + row * call.x_stride, call.layer.in_features); };
    for (int64_t first = 0, last; first < call.rows; first = last) {
      const bool is_fixed = fits(first);
      for (last = first + 1; last < call.rows && fits(last) == is_fixed;) ++last;
      const LinearCall some{call.layer, x + first * call.x_stride, call.x_stride, y + first * call.layer.out_features, last - first};
      is_fixed ? fixed(some) : wide(some);
    }
  } else {
    (void)fixed;
    wide(call);
  }
}

// IS_FINE: groups may have fewer columns than a vector of nibbles.
template <class T, bool IS_FINE>
void nibbles_by_rows(const LinearCall& call) {
  if (call.layer.scheme == SACCADE_W4A8) {
#if defined(SACCADE_PAIRS)
    if (call.layer.group_size >= 4 * PACKED_COLUMNS) return multiply_by_rows<T, NibbleVectors<4>>(call);
    if (call.layer.group_size >= 2 * PACKED_COLUMNS) return multiply_by_rows<T, NibbleVectors<2>>(call);
#endif
    return multiply_by_rows<T, Nibbles<IS_FINE>>(call);
  }
  multiply_fixed<T>(
      call,
      [](const LinearCall& some) {
        some.layer.zero != nullptr ? multiply_by_rows<T, FixedNibbles<IS_FINE, true>>(some)
                                   : multiply_by_rows<T, FixedNibbles<IS_FINE, false>>(some);
      },
      multiply_by_rows<T, WideNibbles>);
}

template <class T>
void linear_of(const LinearCall& call) {
  switch (call.layer.scheme) {
    case SACCADE_DENSE: return multiply_by_rows<T, DenseFew>(call);
    case SACCADE_W8A16: return multiply_fixed<T>(call, multiply_by_rows<T, FixedBytes>, multiply_by_rows<T, WideBytes>);
    case SACCADE_W8A8:
    case SACCADE_W8A8_DYNAMIC: return multiply_by_rows<T, Bytes>(call);
    case SACCADE_W4A16:
    case SACCADE_W4A8:
      return call.layer.group_size < PACKED_COLUMNS ? nibbles_by_rows<T, true>(call) : nibbles_by_rows<T, false>(call);
  }
}

}  // namespace

void linear_of_many(const LinearCall& call);  // linear_many.cpp

namespace {
// Rows of x from which on staging weights pays.
#if defined(SACCADE_PAIRS)
constexpr int64_t MANY_ROWS = 9;
#else
constexpr int64_t MANY_ROWS = 5;
#endif
constexpr int64_t MANY_ROWS_DENSE = 9;  // as fast either way from 5 on; up to here a row has the bits it has alone (alike_rows)

// Some layers are staged for any number of rows.
int64_t many_rows(const SaccadeLinear& layer) {
  switch (layer.scheme) {
    case SACCADE_DENSE: return MANY_ROWS_DENSE;
    case SACCADE_W4A8_FLOAT:
    case SACCADE_FP8: return 1;
    default: return MANY_ROWS;
  }
}
}  // namespace

void linear(const LinearCall& call) {
  if (call.rows == 0) return;
  if (call.rows >= many_rows(call.layer)) return linear_of_many(call);
  switch (call.layer.dtype) {
    case SACCADE_FLOAT32: return linear_of<float>(call);
    case SACCADE_BFLOAT16: return linear_of<BFloat16>(call);
    case SACCADE_FLOAT16: return linear_of<Float16>(call);
  }
}

}  // namespace saccade::SACCADE_ISA
