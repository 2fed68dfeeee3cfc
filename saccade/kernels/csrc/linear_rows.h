// Products as sums along rows of the weight: for few rows of x, which are bound by reading the weight, and for many where the
// processor has nothing better.
#pragma once

#include "linear_output.h"
#include "linear_weights.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t PIECE = 64;           // outputs a thread takes at once
constexpr int64_t WEIGHT_AHEAD = 4096;  // bytes of it that are fetched before they are multiplied
constexpr int64_t MOST_ROWS = STREAM_ROWS > BLOCK_ROWS ? STREAM_ROWS : BLOCK_ROWS;

// sums[m * PIECE + n] of N outputs from `output` on and M rows of x from `row` on. A single sum of whole numbers is kept in two parts
// that take turns, as each product waits for the one before.
template <int N, int M, class Weights>
void multiply(const Weights& weights, int64_t output, const Input<typename Weights::Value>& x, int64_t row,
              typename Weights::Number* sums) {
  constexpr int64_t STEP = Weights::STEP;
  constexpr bool IS_INTEGER = sizeof(typename Weights::Value) == 1;
  constexpr int PARTS = IS_INTEGER && N * M == 1 ? 2 : 1;
  typename Weights::Sum sum[PARTS][N][M];
  for (auto& part : sum)
    for (auto& of_output : part)
      for (auto& each : of_output) each = Weights::zero();
  const typename Weights::Value* values = x.values + row * x.stride;
  decltype(weights.address(0, 0)) from[N];
  for (int n = 0; n < N; ++n) from[n] = weights.address(output + n, 0);
  int64_t column = 0, value = 0;  // of x's row, in columns and in its own elements
  const auto step = [&](int part) {
    decltype(weights.at(from[0], weights.group(0, 0))) w[N];
    for (int n = 0; n < N; ++n) {
      w[n] = weights.at(from[n], weights.group(output + n, column));
      __builtin_prefetch(reinterpret_cast<const char*>(from[n]) + WEIGHT_AHEAD, 0, 2);
      from[n] += Weights::ADVANCE;
    }
    for (int m = 0; m < M; ++m) {
      const auto& x_m = Weights::input(values + m * x.stride + value);
      for (int n = 0; n < N; ++n) sum[part][n][m] = multiply_add(sum[part][n][m], w[n], x_m);
    }
    column += STEP;
    value += Weights::VALUES;
  };
  while (column + PARTS * STEP <= weights.columns)
    for (int part = 0; part < PARTS; ++part) step(part);
  while (column + STEP <= weights.columns) step(0);
  if constexpr (Weights::HAS_END) {
    if (column < weights.columns)
      for (int n = 0; n < N; ++n) {
        const auto w = weights.end(from[n], weights.columns - column, weights.group(output + n, column));
        for (int m = 0; m < M; ++m)
          sum[0][n][m] = multiply_add(sum[0][n][m], w, Weights::input(values + m * x.stride + value));
      }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      typename Weights::Number all = total(sum[0][n][m]);
      if constexpr (PARTS == 2) all += total(sum[1][n][m]);
      if constexpr (PRODUCT_OFFSET != 0 && IS_INTEGER) all -= x.offsets[row + m];
      sums[m * PIECE + n] = all;
    }
}

// All rows of x that are left, at most MOST_ROWS.
template <int N, int M, class Weights>
void multiply_rows(const Weights& weights, int64_t output, const Input<typename Weights::Value>& x, int64_t row,
                   int64_t rows, typename Weights::Number* sums) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<N, M - 1>(weights, output, x, row, rows, sums);
  }
  multiply<N, M>(weights, output, x, row, sums);
}

// Few rows go with one output after the other, as the weight lies in memory: that is read fastest. Of many, blocks with several
// outputs share what is loaded of x.
template <class T, class Weights>
void multiply_by_rows(const LinearCall& call) {
  using Value = typename Weights::Value;
  const Weights weights(call.layer);
  const auto x = take_input<T, Value>(call, [&](Value* row) { Weights::arrange(row, weights.columns); });
  const int64_t outputs = call.layer.out_features;
  const bool is_stream = call.rows <= STREAM_ROWS;
  const int64_t together = is_stream ? STREAM_ROWS : BLOCK_ROWS;
  Shares shares((outputs + PIECE - 1) / PIECE);
  parallel([&](int thread, int) {
    typename Weights::Number sums[MOST_ROWS * PIECE];
    for (int64_t piece; (piece = shares.next(thread)) >= 0;) {
      const int64_t first = piece * PIECE, count = smaller(outputs - first, PIECE);
      if (call.layer.scheme != SACCADE_W4A16 && call.layer.scale != nullptr)  // one for each output: wanted at the end
        for (int64_t n = 0; n < count; n += LINE_BYTES / sizeof(float)) __builtin_prefetch(call.layer.scale + first + n);
      for (int64_t row = 0; row < call.rows; row += together) {
        const int64_t rows = smaller(call.rows - row, together);
        int64_t n = 0;
        if (!is_stream)
          for (; n + BLOCK_OUTPUTS <= count; n += BLOCK_OUTPUTS)
            multiply_rows<BLOCK_OUTPUTS, BLOCK_ROWS>(weights, first + n, x, row, rows, sums + n);
        for (; n < count; ++n) multiply_rows<1, MOST_ROWS>(weights, first + n, x, row, rows, sums + n);
        for (int64_t m = 0; m < rows; ++m) finish<T>(call, x, sums + m * PIECE, row + m, first, count);
      }
    }
  });
}

}  // namespace saccade::SACCADE_ISA
