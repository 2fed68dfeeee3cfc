// Products whose sums are added in one order: rows of one factor with panels of the other.
//
// A product of two bfloat16 numbers is exact in float32, so a sum of them has one rounding for each addition, fused or not: what
// counts is the order of additions alone.
#pragma once

#include "ordered_numbers.h"

namespace saccade::SACCADE_ISA::ordered {

#if SACCADE_LANES == 16
constexpr int64_t ROWS = 12;  // whose sums fit the registers
#else
constexpr int64_t ROWS = 6;
#endif
constexpr int64_t COLUMNS = 2 * LANES;  // of a panel
constexpr int64_t STEPS = 256;          // of a panel that stay in the nearest cache
constexpr int64_t BLOCK = 96;           // rows that meet these before the next ones do
constexpr int64_t PANELS = 64;          // that stay in a farther cache

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

}  // namespace saccade::SACCADE_ISA::ordered
