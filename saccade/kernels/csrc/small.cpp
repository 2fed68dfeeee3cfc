// The ops between products, row by row. They round where the reference rounds.
#include "small.h"

#include "pool.h"
#include "vector.h"

namespace saccade::SACCADE_ISA {
namespace {

constexpr int64_t PIECE = 16384;  // values a thread takes at once; fewer are not worth waking one

constexpr float TINY = 1.17549435e-38f;
constexpr float HALF_EVEN = 12582912.0f;  // 1.5 * 2^23: added and taken off again, it leaves whole numbers, halves to even

// function(row) for every row of `columns` values.
template <class Function>
void each_row(int64_t rows, int64_t columns, Function&& function) {
  const int64_t together = columns < PIECE ? PIECE / (columns + 1) + 1 : 1;
  if (rows <= together) {
    for (int64_t row = 0; row < rows; ++row) function(row);
    return;
  }
  Pieces pieces((rows + together - 1) / together);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;)
      for (int64_t row = piece * together; row < rows && row < (piece + 1) * together; ++row) function(row);
  });
}

// function(column, count) for every LANES columns; the last may be fewer.
template <class Function>
inline void each_vector(int64_t columns, Function&& function) {
  int64_t column = 0;
  for (; column + LANES <= columns; column += LANES) function(column, std::true_type{});
  if (column < columns) function(column, std::false_type{});
}

template <class T, class IsWhole>
inline Floats take(const T* at, int64_t count, IsWhole) {
  if constexpr (IsWhole::value) return load(at);
  return load_first(at, count);
}

template <class T, class IsWhole>
inline void put(T* at, Floats v, int64_t count, IsWhole) {
  if constexpr (IsWhole::value) return store(at, v);
  store_first(at, v, count);
}

template <class T>
void norm_row(const SaccadeNorm& op, int64_t row) {
  const int64_t columns = op.columns;
  const T* x = static_cast<const T*>(op.x) + row * op.x_stride;
  const T* gain = static_cast<const T*>(op.gain);
  T* y = static_cast<T*>(op.y) + row * columns;
  Floats squares = {};
  if (op.residual) {
    const T* residual = static_cast<const T*>(op.residual) + row * columns;
    T* total = static_cast<T*>(op.sum) + row * columns;
    each_vector(columns, [&](int64_t i, auto whole) {
      const Floats v = take(x + i, columns - i, whole) + take(residual + i, columns - i, whole);
      put(total + i, v, columns - i, whole);
      const Floats kept = rounded_to<T>(v);
      squares = fma(kept, kept, squares);
    });
    x = total;
  } else {
    each_vector(columns, [&](int64_t i, auto whole) {
      const Floats v = take(x + i, columns - i, whole);
      squares = fma(v, v, squares);
    });
  }
  const Floats scale = splat(1.0f / sqrtf(sum(squares) / static_cast<float>(columns) + op.eps));
  each_vector(columns, [&](int64_t i, auto whole) {
    const Floats normed = rounded_to<T>(take(x + i, columns - i, whole) * scale);
    put(y + i, take(gain + i, columns - i, whole) * normed, columns - i, whole);
  });
}

template <class T>
void gate_row(const SaccadeSiluMul& op, int64_t row) {
  const int64_t columns = op.columns;
  const T* gate = static_cast<const T*>(op.gate_up) + row * op.stride;
  const T* up = gate + columns;
  T* y = static_cast<T*>(op.y) + row * columns;
  each_vector(columns, [&](int64_t i, auto whole) {
    const Floats g = take(gate + i, columns - i, whole);
    const Floats product = g * reciprocal(power_of_two(g * splat(-LOG2_E)) + splat(1.0f));
    const Floats silu = rounded_to<T>(g < splat(-104.0f) ? Floats{} : product);  // below, e^g is no float32
    put(y + i, silu * take(up + i, columns - i, whole), columns - i, whole);
  });
}

template <class T>
void rotate_row(const SaccadeRope& op, int64_t row) {
  const int64_t half = op.head_dim / 2;
  const float *cos = op.cos + row * half, *sin = op.sin + row * half;
  for (int64_t head = 0; head < op.heads; ++head) {
    const T* x = static_cast<const T*>(op.x) + row * op.x_stride + head * op.head_dim;
    T* y = static_cast<T*>(op.y) + row * op.y_stride + head * op.head_dim;
    each_vector(half, [&](int64_t i, auto whole) {
      const int64_t count = half - i;
      const Floats low = take(x + i, count, whole), high = take(x + half + i, count, whole);
      const Floats c = take(cos + i, count, whole), s = take(sin + i, count, whole);
      put(y + i, low * c - high * s, count, whole);
      put(y + half + i, high * c + low * s, count, whole);
    });
  }
}

// A head's values as whole numbers of a 127th of the largest, and that 127th behind them.
template <class T>
void quantize_head(const T* x, int64_t count, int8_t* out) {
  Floats top = {};
  each_vector(count, [&](int64_t i, auto whole) {
    const Floats v = take(x + i, count - i, whole);
    top = larger(v < splat(0.0f) ? -v : v, top);
  });
  float scale = largest(top) / 127.0f;
  scale = scale < TINY ? TINY : scale;
  each_vector(count, [&](int64_t i, auto whole) {
    const Floats steps = take(x + i, count - i, whole) / splat(scale);
    const Floats rounded = (steps + splat(HALF_EVEN)) - splat(HALF_EVEN);
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Ints), Bytes);
    memcpy(out + i, &bytes, whole ? LANES : count - i);
  });
  memcpy(out + count, &scale, sizeof scale);
}

template <class T>
void store_row(const SaccadeStore& op, int64_t row) {
  const T* x = static_cast<const T*>(op.x) + row * op.x_stride;
  const int64_t columns = op.heads * op.head_dim;
  if (!op.is_int8) {
    memcpy(static_cast<T*>(op.cache) + op.slots[row] * columns, x, columns * sizeof(T));
    return;
  }
  const int64_t size = op.head_dim + sizeof(float);
  int8_t* out = static_cast<int8_t*>(op.cache) + op.slots[row] * op.heads * size;
  for (int64_t head = 0; head < op.heads; ++head)
    quantize_head(x + head * op.head_dim, op.head_dim, out + head * size);
}

// function(zero) with a zero of the type that dtype stands for.
template <class Function>
void with_type(int32_t dtype, Function&& function) {
  switch (dtype) {
    case SACCADE_FLOAT32: return function(float{});
    case SACCADE_BFLOAT16: return function(Bf16{});
    case SACCADE_FLOAT16: return function(Fp16{});
  }
}

}  // namespace

void rms_norm(const SaccadeNorm& op) {
  with_type(op.dtype, [&](auto zero) {
    each_row(op.rows, op.columns, [&](int64_t row) { norm_row<decltype(zero)>(op, row); });
  });
}

void silu_mul(const SaccadeSiluMul& op) {
  with_type(op.dtype, [&](auto zero) {
    each_row(op.rows, op.columns, [&](int64_t row) { gate_row<decltype(zero)>(op, row); });
  });
}

void rope(const SaccadeRope& op) {
  with_type(op.dtype, [&](auto zero) {
    each_row(op.rows, op.heads * op.head_dim, [&](int64_t row) { rotate_row<decltype(zero)>(op, row); });
  });
}

void store_rows(const SaccadeStore& op) {
  with_type(op.dtype, [&](auto zero) {
    each_row(op.rows, op.heads * op.head_dim, [&](int64_t row) { store_row<decltype(zero)>(op, row); });
  });
}

}  // namespace saccade::SACCADE_ISA
