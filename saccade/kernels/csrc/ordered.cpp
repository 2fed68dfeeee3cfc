// A product of two bfloat16 numbers is exact in float32, so a sum of them has one rounding for each addition, fused or not: what
// counts is the order of additions alone.
#include "ordered.h"

#include "pool.h"
#include "vector.h"

namespace saccade::SACCADE_ISA {
namespace {

#if SACCADE_LANES == 16
constexpr int64_t ROWS = 12;  // whose sums fit the registers
#else
constexpr int64_t ROWS = 6;
#endif
constexpr int64_t COLUMNS = 2 * LANES;  // of a panel
constexpr int64_t STEPS = 256;          // of a panel that stay in the nearest cache
constexpr int64_t BLOCK = 96;           // rows that meet these before the next ones do
constexpr int64_t PANELS = 64;          // that stay in a farther cache
constexpr int64_t PIECE_OF_ROWS = 16;   // rows a thread takes at once

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float wide(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return value == value ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fc0;
}

// As torch computes in bfloat16: in float32, each result rounded.
inline Floats rounded(Floats v) { return (Floats)bf16_words(v); }

// Halves to even, for |v| < 2^22; larger ones are off by a few.
inline Floats whole(Floats v) { return v + splat(12582912.0f) - splat(12582912.0f); }

inline Floats within(Floats v, float low, float high) { return smaller(splat(high), larger(splat(low), v)); }

inline const Bf16* values(const uint16_t* bits) { return reinterpret_cast<const Bf16*>(bits); }
inline Bf16* values(uint16_t* bits) { return reinterpret_cast<Bf16*>(bits); }

// function(i, count): LANES of `count` at a time, the last time fewer.
template <class Function>
void each_vector(int64_t count, Function&& function) {
  for (int64_t i = 0; i < count; i += LANES) function(i, least(count - i, LANES));
}

template <class T>
inline Floats load_some(const T* at, int64_t count) { return count == LANES ? load(at) : load_first(at, count); }

// v: in bfloat16 already.
inline void store_some(uint16_t* at, Floats v, int64_t count) {
  const Halves halves = upper((Words)v);
  count == LANES ? memcpy(at, &halves, sizeof halves) : memcpy(at, &halves, count * sizeof *at);
}

// --- products --------------------------------------------------------------------------------------------------------

// How factors lie: `steps` values of 4 bytes for a row's depth; what a value of a row and LANES values of a panel add to the sums.

inline float without_subnormals(float value) { return fabsf(value) < 1.17549435e-38f ? 0.0f : value; }

// Column by column.
struct InTurn {
  using Value = float;
  static int64_t steps(int64_t depth) { return depth; }
  static void put(float* row, int64_t stride, int64_t i, uint16_t bits) { row[i * stride] = wide(bits); }
  static void fill(const uint16_t* from, int64_t depth, float* to) {
    for (int64_t i = 0; i < depth; ++i) to[i] = wide(from[i]);
  }
  static Floats add(Floats sums, float factor, const float* panel) { return fma(splat(factor), load(panel), sums); }
};

// Two at a time, the odd one first: vdpbf16ps, which takes a subnormal number for zero.
#if defined(__AVX512BF16__)
struct ByPairs {
  using Value = uint32_t;
  static int64_t steps(int64_t depth) { return (depth + 1) / 2; }
  static void put(uint32_t* row, int64_t stride, int64_t i, uint16_t bits) {
    uint32_t& pair = row[i / 2 * stride];
    pair = i % 2 ? (pair & 0xffff) | static_cast<uint32_t>(bits) << 16 : bits;
  }
  static void fill(const uint16_t* from, int64_t depth, uint32_t* to) {
    memcpy(to, from, depth / 2 * sizeof *to);
    if (depth % 2) put(to, 1, depth - 1, from[depth - 1]);
  }
  static Floats add(Floats sums, uint32_t factor, const uint32_t* panel) {
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(static_cast<int>(factor)),
                                    (__m512bh)_mm512_loadu_si512(panel));
  }
};
#else
struct ByPairs {
  using Value = float;
  static int64_t steps(int64_t depth) { return round_up(depth, 2); }
  static void put(float* row, int64_t stride, int64_t i, uint16_t bits) {
    row[(i ^ 1) * stride] = without_subnormals(wide(bits));
    if (i % 2 == 0) row[i * stride] = 0.0f;  // where there is no odd one
  }
  static void fill(const uint16_t* from, int64_t depth, float* to) {
    for (int64_t i = 0; i + 1 < depth; i += 2) {
      uint32_t pair;
      memcpy(&pair, from + i, sizeof pair);
      const uint64_t both = static_cast<uint64_t>(pair) << 48 | (pair & 0xffff0000u);
      memcpy(to + i, &both, sizeof both);
    }
    for (int64_t i = 0; i < depth / 2 * 2; ++i) to[i] = without_subnormals(to[i]);
    if (depth % 2) put(to, 1, depth - 1, from[depth - 1]);
  }
  static Floats add(Floats sums, float factor, const float* panel) { return InTurn::add(sums, factor, panel); }
};
#endif

// From one row of `steps` values to the next. Rows a power of two apart would take turns in one place of the cache.
inline int64_t row_stride(int64_t steps) { return steps + 16; }

// to[i, j] = from[j, i] for COLUMNS rows of words.
template <class Word>
void turn(const Word* from, int64_t stride, int64_t steps, Word* to) {
  int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 4 <= steps; i += 4)
    for (int64_t j = 0; j < COLUMNS; j += 4) {
      __m128 rows[4];
      for (int64_t k = 0; k < 4; ++k) memcpy(&rows[k], from + (j + k) * stride + i, sizeof rows[k]);
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int64_t k = 0; k < 4; ++k) memcpy(to + (i + k) * COLUMNS + j, &rows[k], sizeof rows[k]);
    }
#endif
  for (; i < steps; ++i)
    for (int64_t j = 0; j < COLUMNS; ++j) to[i * COLUMNS + j] = from[j * stride + i];
}

// [steps, COLUMNS] of b's columns from `b` on; zeros beyond `count` of them.
template <class Form>
void fill_panel(const uint16_t* b, int64_t b_row_stride, int64_t column_stride, int64_t depth, int64_t count,
                typename Form::Value* panel) {
  if (b_row_stride == 1) {
    const int64_t steps = Form::steps(depth), stride = row_stride(steps);
    const size_t bytes = COLUMNS * stride * sizeof(typename Form::Value);
    const auto rows = static_cast<typename Form::Value*>(scratch(SCRATCH_OTHER, bytes));
    for (int64_t j = 0; j < COLUMNS; ++j)
      if (j < count)
        Form::fill(b + j * column_stride, depth, rows + j * stride);
      else
        memset(rows + j * stride, 0, steps * sizeof *rows);
    return turn(rows, stride, steps, panel);
  }
  for (int64_t i = 0; i < depth; ++i) {
    const uint16_t* const row = b + i * b_row_stride;
    if (column_stride == 1 && count == COLUMNS)
      for (int64_t j = 0; j < COLUMNS; ++j) Form::put(panel + j, COLUMNS, i, row[j]);
    else
      for (int64_t j = 0; j < COLUMNS; ++j) Form::put(panel + j, COLUMNS, i, j < count ? row[j * column_stride] : 0);
  }
}

// a: N rows; sums: [N, COLUMNS], begun here or before.
template <class Form, int64_t N>
void multiply_rows(const typename Form::Value* a, int64_t stride, const typename Form::Value* panel, int64_t steps,
                   bool is_begun, float* sums) {
  Floats all[N][2] = {};
  if (is_begun)
    for (int64_t row = 0; row < N; ++row)
      for (int64_t half = 0; half < 2; ++half) all[row][half] = load(sums + row * COLUMNS + half * LANES);
  for (int64_t i = 0; i < steps; ++i)
    for (int64_t row = 0; row < N; ++row)
      for (int64_t half = 0; half < 2; ++half)
        all[row][half] = Form::add(all[row][half], a[row * stride + i], panel + i * COLUMNS + half * LANES);
  for (int64_t row = 0; row < N; ++row)
    for (int64_t half = 0; half < 2; ++half) store(sums + row * COLUMNS + half * LANES, all[row][half]);
}

// The same for `rows` of them, at most N.
template <class Form, int64_t N>
void multiply_some(int64_t rows, const typename Form::Value* a, int64_t stride, const typename Form::Value* panel,
                   int64_t steps, bool is_begun, float* sums) {
  if (rows >= N) return multiply_rows<Form, N>(a, stride, panel, steps, is_begun, sums);
  if constexpr (N > 1) multiply_some<Form, N - 1>(rows, a, stride, panel, steps, is_begun, sums);
}

// function(row, sums) for each of a's rows with the COLUMNS of the panel.
template <class Form, class Function>
void multiply(const typename Form::Value* a, int64_t stride, int64_t rows, const typename Form::Value* panel,
              int64_t steps, Function&& function) {
  float sums[BLOCK * COLUMNS];
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t some = least(rows - first, BLOCK);
    if (steps == 0) memset(sums, 0, sizeof sums);
    for (int64_t step = 0; step < steps; step += STEPS)
      for (int64_t row = 0; row < some; row += ROWS)
        multiply_some<Form, ROWS>(some - row, a + (first + row) * stride + step, stride, panel + step * COLUMNS,
                                  least(steps - step, STEPS), step > 0, sums + row * COLUMNS);
    for (int64_t row = 0; row < some; ++row) function(first + row, sums + row * COLUMNS);
  }
}

// --- exponentials ----------------------------------------------------------------------------------------------------

// 2^(v log2 e) by the bits of the sum of a whole part and a cubic of the rest: arXiv:1409.2328 with the cubic torch takes for
// softmax in flash attention.
inline float rough_exp(float v) {
  const float scaled = v * LOG2_E;
  const float rest = scaled - floorf(scaled);
  float off = __builtin_fmaf(rest, -0.079204240219773236f, -0.22433836478672356f);
  off = __builtin_fmaf(rest, off, 0.30354260500649682f);
  off = __builtin_fmaf(rest, off, 0.00010703434948458272f);
  const float shifted = __builtin_fmaf(8388608.0f, scaled - off, 8388608.0f * 127.0f);
  const auto bits = static_cast<int32_t>(v < -87.3365479f ? 0.0f : shifted);
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

// a * b + c rounded once, on every processor.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__) || defined(__AVX512F__)
  return fma(a, b, c);
#else
  for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

inline Floats two_to(Ints power) { return (Floats)((power + 127) << 23); }

// e^v for v <= 0 within one unit of the last place: SLEEF's expf_u10, in the order of its operations. Adding 1.5 * 2^23, whose last
// bit is worth 1, rounds to a whole number, halves to even.
inline Floats fine_exp(Floats v) {
  v = larger(splat(-110.0f), v);  // from -104 on the result rounds to zero
  const Floats shifted = v * splat(LOG2_E) + splat(12582912.0f);
  const Floats whole = shifted - splat(12582912.0f);
  const Ints power = (Ints)shifted - 0x4b400000;
  Floats rest = fused(whole, splat(-0.693145751953125f), v);
  rest = fused(whole, splat(-1.428606765330187045e-06f), rest);
  Floats y = fused(splat(0.000198527617612853646278381f), rest, splat(0.00139304355252534151077271f));
  y = fused(y, rest, splat(0.00833336077630519866943359f));
  y = fused(y, rest, splat(0.0416664853692054748535156f));
  y = fused(y, rest, splat(0.166666671633720397949219f));
  y = fused(y, rest, splat(0.5f));
  y = splat(1.0f) + fused(rest * rest, y, rest);
  return y * two_to(power >> 1) * two_to(power - (power >> 1));
}

// --- sums ------------------------------------------------------------------------------------------------------------

// The lanes of a vector as a tree: halves are added to each other.
inline float folded(float* sums, int64_t lanes) {
  for (int64_t width = lanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// ATen's sum of a row: four vectors side by side; every 2^power of them their sums go up to the next of four levels.
template <int64_t VECTOR>
struct Cascade {
  static constexpr int64_t LEVELS = 4, WIDTH = 4 * VECTOR;
  float sums[LEVELS][WIDTH];

  // at(i, sums): adds the i-th of `count` vectors to VECTOR sums.
  template <class At>
  void add(int64_t count, At&& at) {
    memset(sums, 0, sizeof sums);
    const int64_t rounds = count / 4;
    int64_t bits = 0;
    while ((int64_t{1} << bits) < rounds) ++bits;
    const int64_t power = bits / LEVELS > 4 ? bits / LEVELS : 4;
    const int64_t step = int64_t{1} << power;
    const auto take = [&](int64_t round) {
      for (int64_t i = 0; i < 4; ++i) at(round * 4 + i, sums[0] + i * VECTOR);
    };
    int64_t round = 0;
    while (round + step <= rounds) {
      for (int64_t i = 0; i < step; ++i) take(round++);
      for (int64_t level = 1; level < LEVELS; ++level) {
        for (int64_t i = 0; i < WIDTH; ++i) {
          sums[level][i] += sums[level - 1][i];
          sums[level - 1][i] = 0.0f;
        }
        if (round & (step - 1) << level * power) break;
      }
    }
    while (round < rounds) take(round++);
    for (int64_t level = 1; level < LEVELS; ++level)
      for (int64_t i = 0; i < WIDTH; ++i) sums[0][i] += sums[level][i];
    for (int64_t i = rounds * 4; i < count; ++i) at(i, sums[0]);
    for (int64_t part = 1; part < 4; ++part)
      for (int64_t i = 0; i < VECTOR; ++i) sums[0][i] += sums[0][part * VECTOR + i];
  }
};

// at(i, sums): adds vector i of `vectors`; rest(i): the values after the last vector, up to `count`.
template <int64_t VECTOR, class At, class Rest>
float cascaded(int64_t vectors, int64_t first, int64_t count, At&& at, Rest&& rest) {
  Cascade<VECTOR> cascade;
  cascade.add(vectors, at);
  float sum = 0.0f;
  for (int64_t i = first; i < count; ++i) sum += rest(i);
  for (int64_t i = 0; i < VECTOR; ++i) sum += cascade.sums[0][i];
  return sum;
}

template <int64_t VECTOR>
float sum_row(const float* x, int64_t count) {
  const int64_t vectors = count / VECTOR;
  const auto at = [&](int64_t i, float* sums) {
    for (int64_t j = 0; j < VECTOR; ++j) sums[j] += x[i * VECTOR + j];
  };
  return cascaded<VECTOR>(vectors, vectors * VECTOR, count, at, [&](int64_t i) { return x[i]; });
}

// A vector of bfloat16 has twice the lanes: its halves are added to each other first.
template <int64_t VECTOR>
float sum_row(const uint16_t* x, int64_t count) {
  const int64_t vectors = count / (2 * VECTOR);
  const auto at = [&](int64_t i, float* sums) {
    for (int64_t j = 0; j < VECTOR; ++j) sums[j] += wide(x[i * 2 * VECTOR + j]) + wide(x[(i * 2 + 1) * VECTOR + j]);
  };
  return cascaded<VECTOR>(vectors, vectors * 2 * VECTOR, count, at, [&](int64_t i) { return wide(x[i]); });
}

// y = e^(x - the largest).
void exponentials(const float* x, float* y, int64_t count) {
  Floats tops = splat(x[0]);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) tops = larger(tops, load(x + i));
  float top = largest(tops);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  for (i = 0; i + LANES <= count; i += LANES) store(y + i, fine_exp(load(x + i) - splat(top)));
  if (i < count) store_first(y + i, fine_exp(load_first(x + i, count - i) - splat(top)), count - i);
}

// By one vector of sums. In which of its lanes y begins makes no difference: folding pairs them all round.
template <int64_t VECTOR>
float lane_sum(const float* y, int64_t count) {
  float sums[VECTOR] = {};
  int64_t i = 0;
  for (; i + VECTOR <= count; i += VECTOR)
    for (int64_t j = 0; j < VECTOR; ++j) sums[j] += y[i + j];
  for (int64_t j = 0; i < count; ++i, ++j) sums[j] += y[i];
  return folded(sums, VECTOR);
}

// y: [count]. A row shorter than a vector is summed in order.
void softmax_row(const float* x, float* y, int64_t count, int64_t lanes) {
  exponentials(x, y, count);
  float sum = 0.0f;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) sum += y[i];
  } else {
    sum = lanes == 16 ? lane_sum<16>(y, count) : lane_sum<8>(y, count);
  }
  const float part = 1.0f / sum;
  for (int64_t i = 0; i < count; ++i) y[i] *= part;
}

template <class Function>
void each_row(int64_t rows, Function&& function) {
  Pieces pieces((rows + PIECE_OF_ROWS - 1) / PIECE_OF_ROWS);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;)
      for (int64_t row = piece * PIECE_OF_ROWS; row < rows && row < (piece + 1) * PIECE_OF_ROWS; ++row) function(row);
  });
}

// --- what m2's search rounds and compares ----------------------------------------------------------------------------

// y = w c in 255 levels and back, the row's largest at the outermost.
void round_weight(const uint16_t* w, const uint16_t* c, int64_t count, uint16_t* y) {
  Floats largest_of = {};
  each_vector(count, [&](int64_t i, int64_t some) {
    const Floats v = rounded(load_some(values(w + i), some) * load_some(values(c + i), some));
    largest_of = larger(largest_of, (Floats)((Words)v & 0x7fffffffu));
    store_some(y + i, v, some);
  });
  const float share = wide(narrow(largest(largest_of) / 127.0f));
  const Floats step = splat(share < 0x1p-23f ? 0x1p-23f : share);
  each_vector(count, [&](int64_t i, int64_t some) {
    const Floats level = within(whole(rounded(load_some(values(y + i), some) / step)), -127.0f, 127.0f);
    store_some(y + i, rounded(level * step), some);
  });
}

// Squared distance of a row of silu(gate) * up to `exact`. squares: [columns] to work in.
float gate_up_distance(const SaccadeOrderedGateUp& op, int64_t row, float* squares) {
  const uint16_t *const gate = op.both + row * 2 * op.columns, *const up = gate + op.columns;
  const uint16_t* const exact = op.exact + row * op.columns;
  each_vector(op.columns, [&](int64_t i, int64_t some) {
    Floats g = load_some(values(gate + i), some), u = load_some(values(up + i), some);
    if (op.bias) {
      g = rounded(g + load_some(values(op.bias + i), some));
      u = rounded(u + load_some(values(op.bias + op.columns + i), some));
    }
    const Words bits = (Words)g >> 16;
    uint16_t found[LANES];
    for (int j = 0; j < LANES; ++j) found[j] = op.silu[bits[j]];
    const Floats off = rounded(load(values(found)) * u) - load_some(values(exact + i), some);
    store_first(squares + i, off * off, some);
  });
  return sum_row<16>(squares, op.columns);
}

// The part of a longer row's softmax that is not zero, rounded to bfloat16. exps: [count] to work in; y may lie where these do.
void rounded_softmax(const float* x, float* exps, int64_t count, uint16_t* y) {
  exponentials(x, exps, count);
  const float part = 1.0f / lane_sum<16>(exps, count);
  each_vector(count, [&](int64_t i, int64_t some) {
    store_some(y + i, rounded(load_some(exps + i, some) * splat(part)), some);
  });
}

// Patches of one segment, from `first` on, attend to all of it.
struct SegmentBlock {
  const SaccadeOrderedSegments& op;
  const uint16_t *q, *k;  // [rows, head_dim], rotated
  int64_t start, end, first, rows;
  using Value = ByPairs::Value;

  void run() const {
    const int64_t count = end - start, depth = op.head_dim, width = round_up(count, COLUMNS);
    const int64_t steps = ByPairs::steps(depth), stride = row_stride(steps);
    const int64_t weight_steps = ByPairs::steps(count), weight_stride = row_stride(weight_steps);
    const auto floats = [](Scratch slot, int64_t of) { return static_cast<float*>(scratch(slot, of * sizeof(float))); };
    const auto queries = static_cast<Value*>(scratch(SCRATCH_INPUT, rows * stride * sizeof(Value)));
    float* const logits = floats(SCRATCH_SUMS, rows * width);
    for (int64_t row = 0; row < rows; ++row) ByPairs::fill(q + (first + row) * depth, depth, queries + row * stride);
    const auto panel = static_cast<Value*>(
        scratch(SCRATCH_PANEL, (weight_steps > steps ? weight_steps : steps) * COLUMNS * sizeof(Value)));
    for (int64_t column = 0; column < count; column += COLUMNS) {
      fill_panel<ByPairs>(k + (start + column) * depth, 1, depth, depth, least(count - column, COLUMNS), panel);
      multiply<ByPairs>(queries, stride, rows, panel, steps, [&](int64_t row, const float* sums) {
        for (int64_t i = 0; i < COLUMNS; i += LANES)
          store(logits + row * width + column + i, rounded(rounded(load(sums + i)) / splat(op.root)));
      });
    }
    const auto weights = static_cast<Value*>(scratch(SCRATCH_ROWS, rows * weight_stride * sizeof(Value)));
    for (int64_t row = 0; row < rows; ++row) weigh(logits + row * width, count, weights + row * weight_stride);
    const auto out = reinterpret_cast<uint16_t*>(logits);  // whose place is free again
    for (int64_t column = 0; column < depth; column += COLUMNS) {
      const int64_t some = least(depth - column, COLUMNS);
      const uint16_t* const v = op.qkv + start * 3 * depth + 2 * depth + column;
      fill_panel<ByPairs>(v, 3 * depth, 1, count, some, panel);
      multiply<ByPairs>(weights, weight_stride, rows, panel, weight_steps, [&](int64_t row, const float* sums) {
        each_vector(some, [&](int64_t i, int64_t few) {
          store_some(out + row * depth + column + i, rounded(load(sums + i)), few);
        });
      });
    }
    if (op.y) memcpy(op.y + first * depth, out, rows * depth * sizeof *out);
    if (op.distances)
      for (int64_t row = 0; row < rows; ++row) op.distances[first + row] = distance(out + row * depth, first + row);
  }

  // Logits become weights; they are rounded where the logits were.
  void weigh(float* x, int64_t count, Value* to) const {
    const auto narrowed = reinterpret_cast<uint16_t*>(x);
    rounded_softmax(x, x, count, narrowed);
    ByPairs::fill(narrowed, count, to);
  }

  float distance(uint16_t* y, int64_t row) const {
    each_vector(op.head_dim, [&](int64_t i, int64_t some) {
      const Floats exact = load_some(values(op.exact + row * op.head_dim + i), some);
      const Floats off = rounded(load_some(values(y + i), some) - exact);
      store_some(y + i, rounded(off * off), some);
    });
    return sum_row<16>(y, op.head_dim);
  }
};

// y = x cos + (x turned by half) sin
void rotate(const uint16_t* x, const float* cos, const float* sin, int64_t count, uint16_t* y) {
  const int64_t half = count / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = wide(x[i]), high = wide(x[half + i]);
    y[i] = narrow(low * cos[i] + -high * sin[i]);
    y[half + i] = narrow(high * cos[half + i] + low * sin[half + i]);
  }
}

// --- attention -------------------------------------------------------------------------------------------------------

constexpr int64_t KEYS = 512;  // taken at once

inline int64_t queries_at_once(int64_t tokens) { return tokens >= 768 ? 256 : tokens >= 192 ? 64 : 32; }

// `rows` queries of one head, from `first` on: softmax over blocks of KEYS, the sums of earlier blocks scaled to the larger maximum.
struct QueryBlock {
  const SaccadeOrderedAttention& op;
  int64_t head, first, rows;
  float *queries = {}, *scores = {}, *outputs = {}, *panel = {};
  float tops[256] = {}, sums[256] = {};

  const uint16_t* at(const uint16_t* of, int64_t token) const { return of + (head * op.tokens + token) * op.head_dim; }

  void run() {
    const int64_t depth = op.head_dim;
    queries = static_cast<float*>(scratch(SCRATCH_INPUT, rows * depth * sizeof(float)));
    scores = static_cast<float*>(scratch(SCRATCH_SUMS, rows * KEYS * sizeof(float)));
    outputs = static_cast<float*>(scratch(SCRATCH_ROWS, rows * op.head_dim * sizeof(float)));
    panel = static_cast<float*>(scratch(SCRATCH_PANEL, (depth > KEYS ? depth : KEYS) * COLUMNS * sizeof(float)));
    for (int64_t row = 0; row < rows; ++row) {
      tops[row] = -INFINITY;
      sums[row] = 0.0f;
      InTurn::fill(at(op.q, first + row), depth, queries + row * depth);
    }
    for (int64_t key = 0; key < first + rows; key += KEYS) {
      const int64_t count = op.tokens - key < KEYS ? op.tokens - key : KEYS;
      score(key, count, depth);
      for (int64_t row = 0; row < rows; ++row) weigh(row, key, count);
      gather(key, count);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float part = 1.0f / sums[row];
      uint16_t* const y = op.y + (head * op.tokens + first + row) * op.head_dim;
      for (int64_t i = 0; i < op.head_dim; ++i) y[i] = narrow(outputs[row * op.head_dim + i] * part);
    }
  }

  void score(int64_t key, int64_t count, int64_t depth) {
    const float scale = static_cast<float>(1.0 / sqrt(static_cast<double>(op.head_dim)));
    for (int64_t column = 0; column < count; column += COLUMNS) {
      const int64_t some = count - column < COLUMNS ? count - column : COLUMNS;
      fill_panel<InTurn>(at(op.k, key + column), 1, op.head_dim, depth, some, panel);
      multiply<InTurn>(queries, depth, rows, panel, depth, [&](int64_t row, const float* of) {
        for (int64_t i = 0; i < some; ++i)
          scores[row * KEYS + column + i] = key + column + i > first + row ? -INFINITY : of[i] * scale;
      });
    }
  }

  // A row's scores become weights, rounded to bfloat16; their sum is of what they were before.
  void weigh(int64_t row, int64_t key, int64_t count) {
    float* const x = scores + row * KEYS;
    float top = tops[row];
    for (int64_t i = 0; i < count; ++i) top = x[i] > top ? x[i] : top;
    const int64_t vectors = count / op.lanes * op.lanes;
    float parts[16] = {};
    for (int64_t i = 0; i < vectors; i += op.lanes)
      for (int64_t j = 0; j < op.lanes; ++j) {
        const float weight = rough_exp(x[i + j] - top);
        parts[j] += weight;
        x[i + j] = wide(narrow(weight));
      }
    float sum = folded(parts, op.lanes);
    for (int64_t i = vectors; i < count; ++i) {
      const float weight = expf(x[i] - top);
      sum += weight;
      x[i] = wide(narrow(weight));
    }
    const float shrink = expf(tops[row] - top);
    sums[row] = sum + shrink * sums[row];
    tops[row] = top;
    if (key > 0)
      for (int64_t i = 0; i < op.head_dim; ++i) outputs[row * op.head_dim + i] *= shrink;
  }

  void gather(int64_t key, int64_t count) {
    for (int64_t column = 0; column < op.head_dim; column += COLUMNS) {
      const int64_t some = op.head_dim - column < COLUMNS ? op.head_dim - column : COLUMNS;
      fill_panel<InTurn>(at(op.v, key) + column, op.head_dim, 1, count, some, panel);
      multiply<InTurn>(scores, KEYS, rows, panel, count, [&](int64_t row, const float* of) {
        float* const y = outputs + row * op.head_dim + column;
        for (int64_t i = 0; i < some; ++i) y[i] = key > 0 ? y[i] + of[i] : of[i];
      });
    }
  }
};

}  // namespace

void ordered_panels(const SaccadeOrderedPanels& op) {
  const int64_t steps = ByPairs::steps(op.depth);
  Pieces pieces((op.columns + COLUMNS - 1) / COLUMNS);
  *op.bytes = (op.columns + COLUMNS - 1) / COLUMNS * COLUMNS * steps * sizeof(ByPairs::Value);
  if (!op.panels) return;
  parallel([&](int, int) {
    const auto row = static_cast<uint16_t*>(scratch(SCRATCH_ROWS, COLUMNS * op.depth * sizeof(uint16_t)));
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first = piece * COLUMNS, count = least(op.columns - first, COLUMNS);
      const uint16_t* from = op.weight + first * op.depth;
      if (op.scale) {
        for (int64_t j = 0; j < count; ++j) round_weight(from + j * op.depth, op.scale, op.depth, row + j * op.depth);
        from = row;
      }
      fill_panel<ByPairs>(from, 1, op.depth, op.depth, count, static_cast<ByPairs::Value*>(op.panels) + first * steps);
    }
  });
}

namespace {

// b's columns from one panel to another as panels.
const ByPairs::Value* panels_of(const SaccadeOrderedProduct& op, int64_t first, int64_t count) {
  const int64_t steps = ByPairs::steps(op.depth);
  if (op.panels) return static_cast<const ByPairs::Value*>(op.panels) + first * COLUMNS * steps;
  const auto panels = static_cast<ByPairs::Value*>(
      scratch(SCRATCH_PANEL, count * COLUMNS * steps * sizeof(ByPairs::Value)));
  Pieces pieces(count);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t column = (first + piece) * COLUMNS;
      fill_panel<ByPairs>(op.b + column * op.b_column_stride, op.b_row_stride, op.b_column_stride, op.depth,
                          least(op.columns - column, COLUMNS), panels + piece * COLUMNS * steps);
    }
  });
  return panels;
}

}  // namespace

void ordered_product(const SaccadeOrderedProduct& op) {
  using Value = ByPairs::Value;
  const int64_t steps = ByPairs::steps(op.depth), stride = row_stride(steps);
  const auto a = static_cast<Value*>(scratch(SCRATCH_INPUT, op.rows * stride * sizeof(Value)));
  each_row(op.rows, [&](int64_t row) { ByPairs::fill(op.a + row * op.a_stride, op.depth, a + row * stride); });
  const int64_t all = (op.columns + COLUMNS - 1) / COLUMNS, blocks = (op.rows + BLOCK - 1) / BLOCK;
  for (int64_t start = 0; start < all; start += PANELS) {
    const int64_t some = least(all - start, PANELS);
    const Value* const panels = panels_of(op, start, some);
    Pieces pieces(blocks * some);
    parallel([&](int, int) {
      for (int64_t piece; (piece = pieces.next()) >= 0;) {
        const int64_t first = (start + piece % some) * COLUMNS, top = piece / some * BLOCK;
        const int64_t count = least(op.columns - first, COLUMNS);
        const Value* const panel = panels + piece % some * COLUMNS * steps;
        multiply<ByPairs>(a + top * stride, stride, least(op.rows - top, BLOCK), panel, steps,
                          [&](int64_t row, float* sums) {
                            if (op.bias)
                              for (int64_t i = 0; i < count; ++i) sums[i] += wide(op.bias[first + i]);
                            each_vector(count, [&](int64_t i, int64_t some) {
                              store_some(op.y + (top + row) * op.columns + first + i, rounded(load(sums + i)), some);
                            });
                          });
      }
    });
  }
}

void ordered_levels(const SaccadeOrderedLevels& op) {
  const Floats step = splat(op.step), zero = splat(op.zero);
  each_row(op.rows, [&](int64_t row) {
    const int64_t at = row * op.columns;
    each_vector(op.columns, [&](int64_t i, int64_t some) {
      const Floats x = rounded(load_some(values(op.x + at + i), some) / load_some(values(op.scale + i), some));
      const Floats level = within(rounded(whole(rounded(x / step)) + zero), 0.0f, 255.0f);
      store_some(op.y + at + i, rounded(rounded(level - zero) * step), some);
    });
  });
}

void ordered_gate_up(const SaccadeOrderedGateUp& op) {
  each_row(op.rows, [&](int64_t row) {
    const auto squares = static_cast<float*>(scratch(SCRATCH_SUMS, op.columns * sizeof(float)));
    op.distances[row] = gate_up_distance(op, row, squares);
  });
}

void ordered_segments(const SaccadeOrderedSegments& op) {
  const int64_t rows = op.bounds[op.num_segments], depth = op.head_dim;
  const auto q = static_cast<uint16_t*>(scratch(SCRATCH_ATTENTION, 2 * rows * depth * sizeof(uint16_t)));
  uint16_t* const k = q + rows * depth;
  each_row(rows, [&](int64_t row) {
    const uint16_t* const of = op.qkv + row * 3 * depth;
    rotate(of, op.cos + row * depth, op.sin + row * depth, depth, q + row * depth);
    rotate(of + depth, op.cos + row * depth, op.sin + row * depth, depth, k + row * depth);
  });
  int64_t blocks = 0;
  for (int64_t i = 0; i < op.num_segments; ++i) blocks += (op.bounds[i + 1] - op.bounds[i] + BLOCK - 1) / BLOCK;
  Pieces pieces(blocks);
  parallel([&](int, int) {
    int64_t segment = 0, passed = 0;  // pieces of earlier segments
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const auto of_segment = [&] { return (op.bounds[segment + 1] - op.bounds[segment] + BLOCK - 1) / BLOCK; };
      while (piece >= passed + of_segment()) passed += of_segment(), ++segment;
      const int64_t start = op.bounds[segment], end = op.bounds[segment + 1], first = start + (piece - passed) * BLOCK;
      SegmentBlock{op, q, k, start, end, first, least(end - first, BLOCK)}.run();
    }
  });
}

void ordered_causal(const SaccadeOrderedCausal& op) {
  each_row(op.rows, [&](int64_t row) {
    const int64_t seen = least(op.first + row % op.tokens + 1, op.columns);
    const auto exps = static_cast<float*>(scratch(SCRATCH_SUMS, op.columns * sizeof(float)));
    uint16_t* const y = op.y + row * op.columns;
    rounded_softmax(op.logits + row * op.columns, exps, seen, y);
    memset(y + seen, 0, (op.columns - seen) * sizeof *y);
  });
}

void ordered_attention(const SaccadeOrderedAttention& op) {
  const int64_t most = queries_at_once(op.tokens), blocks = (op.tokens + most - 1) / most;
  Pieces pieces(op.heads * blocks);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first = piece % blocks * most;
      QueryBlock block = {op, piece / blocks, first, op.tokens - first < most ? op.tokens - first : most};
      block.run();
    }
  });
}

template <int64_t VECTOR, class T>
void sum_rows(const SaccadeOrderedRows& op) {
  const auto x = static_cast<const T*>(op.x);
  each_row(op.rows, [&](int64_t row) { op.y[row] = sum_row<VECTOR>(x + row * op.columns, op.columns); });
}

void ordered_sum(const SaccadeOrderedRows& op) {
  if (op.is_bf16) return op.lanes == 16 ? sum_rows<16, uint16_t>(op) : sum_rows<8, uint16_t>(op);
  op.lanes == 16 ? sum_rows<16, float>(op) : sum_rows<8, float>(op);
}

void ordered_softmax(const SaccadeOrderedRows& op) {
  each_row(op.rows, [&](int64_t row) {
    const int64_t at = row * op.columns;
    softmax_row(static_cast<const float*>(op.x) + at, op.y + at, op.columns, op.lanes);
  });
}

}  // namespace saccade::SACCADE_ISA
