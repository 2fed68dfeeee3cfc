// Linear layers: rows of x become what the scheme multiplies, then every thread takes pieces of the weight's rows.
//
// Weights are read as they lie, row after row: a product is a sum along a row, so nothing is packed or held twice.
// Letters: M rows of x, N rows of the weight (outputs), K columns.

#include "linear.h"

#include <math.h>

#include "pool.h"
#include "simd.h"

namespace saccade::SACCADE_ISA {
namespace {

constexpr int64_t PIECE = 64;     // outputs a thread takes at once
constexpr int64_t ALIGN = 64;     // rows of quantized x are filled up with zeros to a multiple of this
constexpr int64_t FEW_ROWS = 8;   // up to here the caller quantizes alone: waking others would take longer
constexpr float TINY = 1.17549435e-38f;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// --- x in whole numbers ---

struct Quantized {
  int8_t* values;    // [M, stride]
  int64_t stride;    // K filled up
  float* scales;     // [M], dynamic only
  int32_t* offsets;  // [M]: what the products have too much (see PRODUCT_OFFSET)
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

int8_t rounded(float value, float low, float high) {
  value = value < low ? low : value;
  value = value > high ? high : value;
  return static_cast<int8_t>(static_cast<int32_t>(nearbyintf(value)));
}

template <class T>
void quantize_row(const SaccadeLinear& layer, const T* x, const Quantized& out, int64_t row) {
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

template <class T>
void quantize(const LinearCall& call, const Quantized& out) {
  const T* x = static_cast<const T*>(call.x);
  if (call.rows <= FEW_ROWS) {
    for (int64_t row = 0; row < call.rows; ++row) quantize_row(call.layer, x + row * call.x_stride, out, row);
    return;
  }
  parallel([&](int thread, int count) {
    for (int64_t row = thread; row < call.rows; row += count)
      quantize_row(call.layer, x + row * call.x_stride, out, row);
  });
}

// --- products ---

// Weights of 8 bits: rows of whole numbers.
struct Bytes {
  const int8_t* values;
  int64_t columns;

  Int8 at(int64_t row, int64_t column) const { return load(values + row * columns + column); }
  Int8 end(int64_t row, int64_t column) const {
    return load_part(values + row * columns + column, columns - column);
  }
};

// sums[m * PIECE + n] of N outputs from `output` on and M rows of x from `row` on.
template <int N, int M, class Weights>
void multiply(const Weights& weights, int64_t output, const Quantized& x, int64_t row, int32_t* sums) {
  Sum sum[N][M];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) sum[n][m] = zero_sum();
  const int8_t* values = x.values + row * x.stride;
  int64_t column = 0;
  for (; column + BYTES <= weights.columns; column += BYTES) {
    Left w[N];
    for (int n = 0; n < N; ++n) w[n] = left(weights.at(output + n, column));
    for (int m = 0; m < M; ++m) {
      const Right right_m = right(load(values + m * x.stride + column));
      for (int n = 0; n < N; ++n) sum[n][m] = multiply_add(sum[n][m], w[n], right_m);
    }
  }
  if (column < weights.columns)
    for (int n = 0; n < N; ++n) {
      const Left w = left(weights.end(output + n, column));
      for (int m = 0; m < M; ++m)
        sum[n][m] = multiply_add(sum[n][m], w, right(load(values + m * x.stride + column)));
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m * PIECE + n] = total(sum[n][m]) - x.offsets[row + m];
}

template <int N, class Weights>
void multiply_rows(const Weights& weights, int64_t output, const Quantized& x, int64_t row, int64_t rows, int32_t* sums) {
  if constexpr (BLOCK_ROWS > 1) {
    switch (rows) {
      case 4: return multiply<N, 4>(weights, output, x, row, sums);
      case 3: return multiply<N, 3>(weights, output, x, row, sums);
      case 2: return multiply<N, 2>(weights, output, x, row, sums);
    }
  }
  multiply<N, 1>(weights, output, x, row, sums);
}

// --- y ---

template <class T>
void finish(const LinearCall& call, const Quantized& x, const int32_t* sums, int64_t row, int64_t output, int64_t count) {
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

template <class T, class Weights>
void multiply_all(const LinearCall& call, const Weights& weights, const Quantized& x) {
  const int64_t outputs = call.layer.out_features;
  Pieces pieces(round_up(outputs, PIECE) / PIECE);
  parallel([&](int, int) {
    int32_t sums[BLOCK_ROWS * PIECE];
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first = piece * PIECE, count = outputs - first < PIECE ? outputs - first : PIECE;
      for (int64_t row = 0; row < call.rows; row += BLOCK_ROWS) {
        const int64_t rows = call.rows - row < BLOCK_ROWS ? call.rows - row : BLOCK_ROWS;
        int64_t n = 0;
        for (; n + BLOCK_OUTPUTS <= count; n += BLOCK_OUTPUTS)
          multiply_rows<BLOCK_OUTPUTS>(weights, first + n, x, row, rows, sums + n);
        for (; n < count; ++n) multiply_rows<1>(weights, first + n, x, row, rows, sums + n);
        for (int64_t m = 0; m < rows; ++m) finish<T>(call, x, sums + m * PIECE, row + m, first, count);
      }
    }
  });
}

template <class T>
void linear_of(const LinearCall& call) {
  const SaccadeLinear& layer = call.layer;
  const int64_t stride = round_up(layer.in_features, ALIGN);
  const auto scales = static_cast<float*>(scratch(SCRATCH_INPUT_SCALES, call.rows * 8));
  const Quantized x{static_cast<int8_t*>(scratch(SCRATCH_INPUT, call.rows * stride)), stride, scales,
                    reinterpret_cast<int32_t*>(scales + call.rows)};
  quantize<T>(call, x);
  multiply_all<T>(call, Bytes{static_cast<const int8_t*>(layer.values), layer.in_features}, x);
}

}  // namespace

void linear(const LinearCall& call) {
  if (call.rows == 0) return;
  switch (call.layer.dtype) {
    case SACCADE_FLOAT32: return linear_of<float>(call);
    case SACCADE_BFLOAT16: return linear_of<BFloat16>(call);
    case SACCADE_FLOAT16: return linear_of<Float16>(call);
  }
}

}  // namespace saccade::SACCADE_ISA
