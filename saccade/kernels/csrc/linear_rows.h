// Products as sums along rows of the weight: for few rows of x, which are bound by reading the weight.
#pragma once

#include "linear_output.h"
#include "linear_weights.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t PIECE = 64;           // outputs a thread takes at once
constexpr int64_t WEIGHT_AHEAD = 4096;  // bytes of it that are fetched before they are multiplied
constexpr int64_t TURN_COLUMNS = 512;   // of 8 rows of x, four bytes each, fit the first-level cache

// Adds the products of columns [column, end) to sums[m * PIECE], of one output and M rows of x from `row` on; begins them at column 0.
// A product waits for the sum before it, so sums are kept in parts that take turns: as many of floats for every M, so that a row's
// bits don't depend on others.
template <int M, class Weights>
void multiply(const Weights& weights, int64_t output, int64_t column, int64_t end, const Input<typename Weights::Value>& x,
              int64_t row, typename Weights::Number* sums) {
  constexpr int64_t STEP = Weights::STEP;
  constexpr bool IS_INTEGER = std::is_same_v<typename Weights::Number, int32_t>;
  constexpr int PARTS = IS_INTEGER && M > 1 ? 1 : Weights::PARTS;
  typename Weights::Sum sum[PARTS][M];
  for (auto& part : sum)
    for (auto& each : part) each = Weights::zero();
  const bool is_first = column == 0;
  const typename Weights::Value* values = x.values + row * x.stride + column / STEP * Weights::VALUES;
  auto from = weights.address(output, column);
  const auto step = [&](int part) {
    const auto w = weights.at(from, weights.group(output, column));
    __builtin_prefetch(reinterpret_cast<const char*>(from) + WEIGHT_AHEAD, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[part][m] = multiply_add(sum[part][m], w, Weights::input(values + m * x.stride));
    from += Weights::ADVANCE;
    values += Weights::VALUES;
    column += STEP;
  };
  while (column + PARTS * STEP <= end)
    for (int part = 0; part < PARTS; ++part) step(part);
  while (column + STEP <= end) step(0);
  if constexpr (Weights::HAS_END) {
    if (column < end) {
      const auto w = weights.end(from, end - column, weights.group(output, column));
      for (int m = 0; m < M; ++m) sum[0][m] = multiply_add(sum[0][m], w, Weights::input(values + m * x.stride));
    }
  }
  for (int m = 0; m < M; ++m) {
    typename Weights::Number all = total(sum[0][m]);
    if constexpr (PARTS == 2) all += total(sum[1][m]);
    if (!is_first)
      all += sums[m * PIECE];
    else if constexpr (PRODUCT_OFFSET != 0 && IS_INTEGER)
      all -= x.offsets[row + m];
    sums[m * PIECE] = all;
  }
}

// All rows of x that are left, at most M.
template <int M, class Weights>
void multiply_rows(const Weights& weights, int64_t output, int64_t column, int64_t end,
                   const Input<typename Weights::Value>& x, int64_t row, int64_t rows, typename Weights::Number* sums) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<M - 1>(weights, output, column, end, x, row, rows, sums);
  }
  multiply<M>(weights, output, column, end, x, row, sums);
}

// One output after the other, as the weight lies in memory: that is read fastest. More rows of x than STREAM_ROWS pass over the weight
// more than once, and over a few columns of all outputs of a piece at a time: they must stay in the first-level cache.
template <class T, class Weights>
void multiply_by_rows(const LinearCall& call) {
  using Value = typename Weights::Value;
  const Weights weights(call.layer);
  const auto x = take_input<T, Value>(call, [&](Value* row) { Weights::arrange(row, weights.columns); });
  const int64_t outputs = call.layer.out_features;
  // Whole rows where one pass serves all rows of x; but sums of floats have one order for all numbers of rows (alike_rows).
  constexpr bool IS_INTEGER = std::is_same_v<typename Weights::Number, int32_t>;
  const bool takes_turns = STREAM_ROWS < FEW_ROWS && (call.rows > STREAM_ROWS || !IS_INTEGER);
  const int64_t turn = takes_turns ? TURN_COLUMNS : weights.columns;
  Shares shares((outputs + PIECE - 1) / PIECE);
  parallel([&](int thread, int) {
    const auto sums = static_cast<typename Weights::Number*>(
        scratch(SCRATCH_SUMS, call.rows * PIECE * sizeof(typename Weights::Number)));
    for (int64_t piece; (piece = shares.next(thread)) >= 0;) {
      const int64_t first = piece * PIECE, count = smaller(outputs - first, PIECE);
      if (call.layer.scheme != SACCADE_W4A16 && call.layer.scale != nullptr)  // one for each output: wanted at the end
        for (int64_t n = 0; n < count; n += LINE_BYTES / sizeof(float)) __builtin_prefetch(call.layer.scale + first + n);
      const auto take_turn = [&](int64_t n, int64_t column) {
        const int64_t end = smaller(column + turn, weights.columns);
        for (int64_t row = 0; row < call.rows; row += STREAM_ROWS)
          multiply_rows<STREAM_ROWS>(weights, first + n, column, end, x, row, call.rows - row, sums + row * PIECE + n);
      };
      if (call.rows <= STREAM_ROWS) {
        for (int64_t n = 0; n < count; ++n)
          for (int64_t column = 0; column < weights.columns; column += turn) take_turn(n, column);
      } else {
        for (int64_t column = 0; column < weights.columns; column += turn)
          for (int64_t n = 0; n < count; ++n) take_turn(n, column);
      }
      for (int64_t row = 0; row < call.rows; ++row) finish<T>(call, x, sums + row * PIECE, row, first, count);
    }
  });
}

}  // namespace saccade::SACCADE_ISA
