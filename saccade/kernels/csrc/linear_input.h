// x as the products want it: whole numbers, bfloat16 or float32, rows filled up with zeros.
#pragma once

#include <math.h>

#include <type_traits>

#include "linear.h"
#include "pool.h"
#include "simd.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t LINE_BYTES = 64;
constexpr int64_t FEW_ROWS = 8;  // up to here the caller does it alone: waking others would take longer
constexpr int64_t SHARED_INPUT = 1 << 15;  // values of x that are worth it for few rows, too
constexpr float TINY = 1.17549435e-38f;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t RUN = 32;                     // columns whose nibbles share 16 bytes (packing.py)
constexpr int64_t PACKED_COLUMNS = 2 * BYTES;   // columns of a vector of nibbles
constexpr int64_t RUNS = PACKED_COLUMNS / RUN;  // in it

// x as numbers of 16 bits, as many columns as a vector of nibbles has with one scale: off by at most 2^-16 of the largest of
// them. `values` stand in the order in which nibbles come out of words: of each word the lowest, the second, the third, the last.
struct FixedBlock {
  alignas(64) int16_t values[4][BYTES / 2];
  int32_t start[FLOATS];  // -8 times `sums`: nibbles are taken 8 too large
  float sums[FLOATS];     // of the values that meet in a lane: what its products have too much for each unit of the zero point
  float scale[FLOATS];    // the same in all
};

// The same in the order of columns, for weights of bytes.
struct FixedWords {
  alignas(64) int16_t values[PACKED_COLUMNS];
  float scale[FLOATS];  // the same in all
};

#if defined(SACCADE_PAIRS)
// x in whole numbers, as many columns as a vector of nibbles has: those of the low nibbles, then those of the high ones.
struct WholeBlock {
  alignas(BYTES) int8_t values[2][BYTES];
  int16_t start[BYTES / 2];  // -8 times the sums of what meets in 16 bits, as nibbles are taken 8 too large
};
#endif

// V: int8_t, int16_t for the same numbers, BFloat16, float or a block.
template <class V>
struct Input {
  V* values;         // [M, stride]
  int64_t stride;    // K filled up, in elements
  float* scales;     // [M], dynamic only
  int32_t* offsets;  // [M], int8 only: what the products have too much (see PRODUCT_OFFSET)
};

constexpr int64_t AHEAD = 2048;  // bytes of x prefetched: the processor's own prefetching stops at pages

// The bits without the sign order like the numbers, infinity and NaN above them.
inline uint32_t magnitude_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits & 0x7FFFFFFF;
}
inline float magnitude_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class T>
float largest_magnitude(const T* x, int64_t count) {
  uint32_t largest = 0;
  const auto take = [&](int64_t i) {
    const uint32_t bits = magnitude_bits(to_float(x[i]));
    largest = bits > largest ? bits : largest;
  };
  constexpr int64_t TOGETHER = 256 / sizeof(T);
  int64_t first = 0;
  for (; first + TOGETHER <= count; first += TOGETHER) {
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(x + first) + AHEAD + line);
    for (int64_t i = first; i < first + TOGETHER; ++i) take(i);
  }
  for (; first < count; ++first) take(first);
  return magnitude_of(largest);
}

inline int8_t rounded(float value, float low, float high) {  // half to even
  value = value < low ? low : value;
  value = value > high ? high : value;
  return static_cast<int8_t>(static_cast<int32_t>(nearbyintf(value)));
}

// x / divisor rounded once, as a division does it, without one: what the product with the inverse leaves over is exact, and corrects
// it (Markstein, IBM J. Res. Dev. 34, 1990). For an inverse that is 1 / divisor rounded, and numbers that do not underflow.
inline float divided(float x, float divisor, float inverse) {
#if defined(__FMA__)
  const float quotient = x * inverse;
  return __builtin_fmaf(__builtin_fmaf(-quotient, divisor, x), inverse, quotient);
#else
  (void)inverse;
  return x / divisor;
#endif
}
constexpr float SMALLEST_DIVISOR = 0x1p-90f;  // from here on, what underflows belongs to quotients that round to zero

// A row of x, `out.stride` values at `values`.
template <class T>
void take_row(const SaccadeLinear& layer, const T* x, const Input<int8_t>& out, int8_t* values, int64_t row) {
  const int64_t count = layer.in_features;
  if (layer.scheme == SACCADE_W8A8) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = nearbyintf(to_float(x[i]) / layer.static_scale + layer.static_zero);
      values[i] = rounded(value == value ? value : 0.0f, -128.0f, 127.0f);
    }
  } else {
    float scale = largest_magnitude(x, count) / 127.0f;
    scale = scale < TINY ? TINY : scale;
    out.scales[row] = scale;
    if (scale - scale != 0.0f) {  // infinity or NaN: zero times that scale is NaN
      memset(values, 0, count);
    } else if (scale >= SMALLEST_DIVISOR) {
      const float inverse = 1.0f / scale;
      for (int64_t i = 0; i < count; ++i)
        values[i] = static_cast<int8_t>(static_cast<int32_t>(nearbyintf(divided(to_float(x[i]), scale, inverse))));
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = rounded(to_float(x[i]) / scale, -127.0f, 127.0f);
    }
  }
  memset(values + count, 0, out.stride - count);
  if constexpr (PRODUCT_OFFSET != 0) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    out.offsets[row] = PRODUCT_OFFSET * sum;
  }
}

// The same in 16 bits.
template <class T>
void take_row(const SaccadeLinear& layer, const T* x, const Input<int16_t>& out, int16_t* values, int64_t row) {
  const auto narrow = static_cast<int8_t*>(scratch(SCRATCH_OTHER, out.stride));
  take_row(layer, x, Input<int8_t>{narrow, out.stride, out.scales, out.offsets}, narrow, row);
  for (int64_t i = 0; i < out.stride; ++i) values[i] = narrow[i];
}

#if defined(SACCADE_PAIRS)
template <class T>
void take_row(const SaccadeLinear& layer, const T* x, const Input<WholeBlock>& out, WholeBlock* block, int64_t row) {
  const int64_t stride = out.stride * PACKED_COLUMNS;
  const auto narrow = static_cast<int8_t*>(scratch(SCRATCH_OTHER, stride));
  take_row(layer, x, Input<int8_t>{narrow, stride, out.scales, out.offsets}, narrow, row);
  constexpr int64_t HALF = RUN / 2;
  for (const int8_t* from = narrow; from < narrow + stride; from += PACKED_COLUMNS, ++block) {
    for (int64_t run = 0; run < RUNS; ++run) {
      memcpy(block->values[0] + run * HALF, from + run * RUN, HALF);
      memcpy(block->values[1] + run * HALF, from + run * RUN + HALF, HALF);
    }
    const auto& [low, high] = block->values;
    for (int64_t i = 0; i < BYTES / 2; ++i)
      block->start[i] = static_cast<int16_t>(-8 * (low[2 * i] + low[2 * i + 1] + high[2 * i] + high[2 * i + 1]));
  }
}
#endif

// whole: what `count` columns of a row, at most PACKED_COLUMNS, are in units of the scale that is returned; zeros behind.
template <class T>
float to_fixed_point(const T* x, int64_t count, int16_t* whole) {
  float wide[PACKED_COLUMNS] = {};
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    wide[i] = to_float(x[i]);
    const uint32_t bits = magnitude_bits(wide[i]);
    largest = bits > largest ? bits : largest;
  }
  float scale = magnitude_of(largest) / 32767.0f;
  scale = scale < TINY ? TINY : scale;
  const float inverse = 1.0f / scale;
  memset(whole, 0, PACKED_COLUMNS * sizeof *whole);
  if (scale - scale == 0.0f)  // infinity or NaN: zero times that scale is NaN
    for (int64_t i = 0; i < PACKED_COLUMNS; ++i)
      whole[i] = static_cast<int16_t>(static_cast<int32_t>(nearbyintf(wide[i] * inverse)));
  return scale;
}

template <class T>
void take_block(const T* x, int64_t count, FixedWords& block) {
  const float scale = to_fixed_point(x, count, block.values);
  for (float& each : block.scale) each = scale;
}

template <class T>
void take_block(const T* x, int64_t count, FixedBlock& block) {
  int16_t whole[PACKED_COLUMNS];
  const float scale = to_fixed_point(x, count, whole);
  constexpr int64_t HALF = RUN / 2, QUARTER = RUN / 4, EIGHTH = RUN / 8;
  for (int64_t run = 0; run < RUNS; ++run) {
    const int16_t *low = whole + run * RUN, *high = low + HALF;
    for (int64_t i = 0; i < QUARTER; ++i) {
      block.values[0][run * QUARTER + i] = low[2 * i];
      block.values[1][run * QUARTER + i] = high[2 * i];
      block.values[2][run * QUARTER + i] = low[2 * i + 1];
      block.values[3][run * QUARTER + i] = high[2 * i + 1];
    }
    for (int64_t i = 0; i < EIGHTH; ++i) {
      int32_t sum = 0;
      for (int64_t j = 4 * i; j < 4 * i + 4; ++j) sum += low[j] + high[j];
      block.start[run * EIGHTH + i] = -8 * sum;
      block.sums[run * EIGHTH + i] = static_cast<float>(sum);
    }
  }
  for (float& each : block.scale) each = scale;
}

// Whether fixed point leaves every column its digits: the largest of a block must not outweigh all its others together. They lose up to
// 2^-16 of it each, which is then no more than 2^-9 of their mean.
template <class T>
bool fits_fixed_point(const T* x, int64_t columns) {
  for (int64_t first = 0; first < columns; first += PACKED_COLUMNS) {
    constexpr int64_t LANES = 16;  // as many sums, as compilers keep the order of a single one
    const int64_t end = smaller(first + PACKED_COLUMNS, columns);
    float largest[LANES] = {}, sums[LANES] = {};
    const auto take = [&](int64_t column, int64_t lane) {
      const float magnitude = magnitude_of(magnitude_bits(to_float(x[column])));
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
      sums[lane] += magnitude;
    };
    int64_t start = first;
    for (; start + LANES <= end; start += LANES)
      for (int64_t i = 0; i < LANES; ++i) take(start + i, i);
    for (int64_t i = 0; start + i < end; ++i) take(start + i, i);
    for (int64_t i = 1; i < LANES; ++i) {
      largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
      sums[0] += sums[i];
    }
    if (!(sums[0] >= 2.0f * largest[0] && sums[0] - sums[0] == 0.0f)) return false;  // infinity and NaN, too
  }
  return true;
}

template <class T, class Block>
void take_blocks(const SaccadeLinear& layer, const T* x, Block* block) {
  for (int64_t first = 0; first < layer.in_features; first += PACKED_COLUMNS, ++block)
    take_block(x + first, smaller(layer.in_features - first, PACKED_COLUMNS), *block);
}
template <class T>
void take_row(const SaccadeLinear& layer, const T* x, const Input<FixedBlock>&, FixedBlock* block, int64_t) {
  take_blocks(layer, x, block);
}
template <class T>
void take_row(const SaccadeLinear& layer, const T* x, const Input<FixedWords>&, FixedWords* block, int64_t) {
  take_blocks(layer, x, block);
}

template <class T, class V>
void take_row(const SaccadeLinear& layer, const T* x, const Input<V>& out, V* values, int64_t) {
  const int64_t count = layer.in_features;
  if constexpr (std::is_same_v<T, V>)
    memcpy(static_cast<void*>(values), x, count * sizeof(V));
  else
    for (int64_t i = 0; i < count; ++i) store(values + i, to_float(x[i]));
  memset(static_cast<void*>(values + count), 0, (out.stride - count) * sizeof(V));
}

// Room for what belongs to whole rows; their values are elsewhere.
template <class V>
Input<V> input_scales(int64_t rows) {
  Input<V> out;
  out.scales = static_cast<float*>(scratch(SCRATCH_INPUT_SCALES, rows * 8));
  out.offsets = reinterpret_cast<int32_t*>(out.scales + rows);
  return out;
}

// All rows of x, in memory of this thread that lives until its next linear: TOGETHER of them side by side, a step of Weights of each
// after the other. So they are read as one stream, and none share a set of the cache because of their distance.
template <int64_t TOGETHER, class T, class Weights>
Input<typename Weights::Value> take_input(const LinearCall& call) {
  using V = typename Weights::Value;
  constexpr int64_t EACH = Weights::VALUES;
  const int64_t columns = call.layer.in_features, steps = (columns + Weights::STEP - 1) / Weights::STEP;
  auto out = input_scales<V>(call.rows);
  out.stride = steps * EACH;
  out.values = static_cast<V*>(scratch(SCRATCH_INPUT, call.rows * out.stride * sizeof(V)));
  const auto take = [&](int64_t row) {
    const int64_t first = row / TOGETHER * TOGETHER, together = smaller(call.rows - first, TOGETHER);
    V* const group = out.values + first * out.stride;
    V* const values = together == 1 ? group : static_cast<V*>(scratch(SCRATCH_ROWS, out.stride * sizeof(V)));
    take_row(call.layer, static_cast<const T*>(call.x) + row * call.x_stride, out, values, row);
    Weights::arrange(values, columns);
    if (together == 1) return;
    for (int64_t step = 0; step < steps; ++step)
      memcpy(static_cast<void*>(group + (step * together + row - first) * EACH), values + step * EACH, EACH * sizeof(V));
  };
  if (call.rows == 1 || call.rows * columns < SHARED_INPUT) {
    for (int64_t row = 0; row < call.rows; ++row) take(row);
  } else {
    Pieces pieces(call.rows);
    parallel([&](int, int) {
      for (int64_t row; (row = pieces.next()) >= 0;) take(row);
    });
  }
  return out;
}

}  // namespace saccade::SACCADE_ISA
