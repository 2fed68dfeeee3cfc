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
constexpr int64_t COLUMNS = 2 * LANES;   // of a panel
constexpr int64_t PIECE_OF_ROWS = 16;    // rows a thread takes at once

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

// --- products --------------------------------------------------------------------------------------------------------

// How factors lie: `steps` values for a row's depth, and what a value of a row and LANES values of a panel add to the sums.

// Column by column.
struct InTurn {
  using Value = float;
  static int64_t steps(int64_t depth) { return depth; }
  static void put(float* row, int64_t stride, int64_t i, uint16_t bits) { row[i * stride] = wide(bits); }
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
    const float value = wide(bits);
    row[(i ^ 1) * stride] = fabsf(value) < 1.17549435e-38f ? 0.0f : value;
    if (i % 2 == 0) row[i * stride] = 0.0f;  // where there is no odd one
  }
  static Floats add(Floats sums, float factor, const float* panel) { return InTurn::add(sums, factor, panel); }
};
#endif

template <class Form>
void fill_row(const uint16_t* from, int64_t depth, typename Form::Value* to) {
  for (int64_t i = 0; i < depth; ++i) Form::put(to, 1, i, from[i]);
}

// [steps, COLUMNS] of b's columns from `b` on; zeros beyond `count` of them.
template <class Form>
void fill_panel(const uint16_t* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t count,
                typename Form::Value* panel) {
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t j = 0; j < COLUMNS; ++j)
      Form::put(panel + j, COLUMNS, i, j < count ? b[i * row_stride + j * column_stride] : 0);
}

// a: N rows; sums: [N, COLUMNS].
template <class Form, int64_t N>
void multiply_rows(const typename Form::Value* a, int64_t stride, const typename Form::Value* panel, int64_t steps,
                   float* sums) {
  Floats all[N][2] = {};
  for (int64_t i = 0; i < steps; ++i)
    for (int64_t row = 0; row < N; ++row)
      for (int64_t half = 0; half < 2; ++half)
        all[row][half] = Form::add(all[row][half], a[row * stride + i], panel + i * COLUMNS + half * LANES);
  for (int64_t row = 0; row < N; ++row)
    for (int64_t half = 0; half < 2; ++half) store(sums + row * COLUMNS + half * LANES, all[row][half]);
}

// function(row, sums) for each of a's rows with the COLUMNS of the panel.
template <class Form, class Function>
void multiply(const typename Form::Value* a, int64_t stride, int64_t rows, const typename Form::Value* panel,
              int64_t steps, Function&& function) {
  float sums[ROWS * COLUMNS];
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) {
    multiply_rows<Form, ROWS>(a + row * stride, stride, panel, steps, sums);
    for (int64_t i = 0; i < ROWS; ++i) function(row + i, sums + i * COLUMNS);
  }
  for (; row < rows; ++row) {
    multiply_rows<Form, 1>(a + row * stride, stride, panel, steps, sums);
    function(row, sums);
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

// y: [count]. One vector of sums; a row shorter than it is summed in order.
void softmax_row(const float* x, float* y, int64_t count, int64_t lanes) {
  float top = x[0];
  for (int64_t i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(y + i, fine_exp(load(x + i) - splat(top)));
  if (i < count) store_first(y + i, fine_exp(load_first(x + i, count - i) - splat(top)), count - i);
  float sums[16] = {}, sum = 0.0f;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) sum += y[i];
  } else {
    for (int64_t first = 0; first < count; first += lanes)
      for (int64_t i = 0; i < lanes && first + i < count; ++i) sums[i] += y[first + i];
    sum = folded(sums, lanes);
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
      fill_row<InTurn>(at(op.q, first + row), depth, queries + row * depth);
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

void ordered_product(const SaccadeOrderedProduct& op) {
  using Value = ByPairs::Value;
  const int64_t steps = ByPairs::steps(op.depth);
  const auto a = static_cast<Value*>(scratch(SCRATCH_INPUT, op.rows * steps * sizeof(Value)));
  each_row(op.rows, [&](int64_t row) { fill_row<ByPairs>(op.a + row * op.a_stride, op.depth, a + row * steps); });
  Pieces pieces((op.columns + COLUMNS - 1) / COLUMNS);
  parallel([&](int, int) {
    const auto panel = static_cast<Value*>(scratch(SCRATCH_PANEL, steps * COLUMNS * sizeof(Value)));
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first = piece * COLUMNS;
      const int64_t count = op.columns - first < COLUMNS ? op.columns - first : COLUMNS;
      const uint16_t* const b = op.b + first * op.b_column_stride;
      fill_panel<ByPairs>(b, op.b_row_stride, op.b_column_stride, op.depth, count, panel);
      multiply<ByPairs>(a, steps, op.rows, panel, steps, [&](int64_t row, const float* sums) {
        uint16_t* const y = op.y + row * op.columns + first;
        for (int64_t i = 0; i < count; ++i)
          y[i] = narrow(op.bias ? sums[i] + wide(op.bias[first + i]) : sums[i]);
      });
    }
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
