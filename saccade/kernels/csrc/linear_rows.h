// Products as sums along rows of the weight: for few rows of x, which are bound by reading the weight.
#pragma once

#include "linear_output.h"
#include "linear_weights.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t PIECE = 64;           // outputs a thread takes at once
constexpr int64_t WEIGHT_AHEAD = 4096;  // bytes of it that are fetched before they are multiplied
constexpr int64_t TURN_BYTES = 4096;    // of a row of x: STREAM_ROWS of them stay in the first-level cache, and what comes with them
constexpr int64_t LARGE_INPUT = 24 << 10;  // bytes of x that do not

// Of a loop over columns that are unrolled: few turns end as the processor foresees. (With vectors in software that takes minutes.)
#if defined(SACCADE_EMULATED)
constexpr int LOOPS = 1;
#else
constexpr int LOOPS = 4;
#endif

// Columns of x in TURN_BYTES: a power of two, so that turns begin where groups do.
template <class Weights>
constexpr int64_t turn_columns() {
  int64_t columns = Weights::STEP;
  while (2 * columns * int64_t{sizeof(typename Weights::Value)} * Weights::VALUES <= TURN_BYTES * Weights::STEP) columns *= 2;
  return columns;
}

// A step: what lies at `from` of the weight, taken once, times M rows of x.
template <int M, class Weights, class From>
void add_products(const Weights&, typename Weights::Sum (&sum)[M], const From* from, const typename Weights::Group& group,
                  const typename Weights::Value* x) {
  const auto w = Weights::at(from, group);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m] = multiply_add(sum[m], w, Weights::input(x + m * Weights::VALUES));
}

// Adds the products of columns [column, end) to sums[m * PIECE], of one output and M rows of x from `row` on; begins them at column 0.
// ahead: bytes from what is multiplied to what is fetched.
// A product waits for the sum before it, so sums are kept in parts that take turns: as many of floats for every M, so that a row's
// bits don't depend on others.
template <int M, class Weights>
void multiply(const Weights& weights, int64_t output, int64_t column, int64_t end, const Input<typename Weights::Value>& x,
              int64_t row, typename Weights::Number* sums, int64_t ahead) {
  constexpr int64_t STEP = Weights::STEP;
  constexpr bool IS_INTEGER = std::is_same_v<typename Weights::Number, int32_t>;
  constexpr int PARTS = IS_INTEGER && M > 1 ? 1 : Weights::PARTS;
  constexpr int64_t STEP_BYTES = Weights::ADVANCE * int64_t{sizeof(*weights.address(0, 0))};
  // Where memory is the bound, asking for a line four times brings more of it: a processor drops what it cannot take at once.
  constexpr int64_t FETCHED = M <= 2 ? LINE_BYTES / 4 : LINE_BYTES;
  typename Weights::Sum sum[PARTS][M];
  for (auto& part : sum)
    for (auto& each : part) each = Weights::zero();
  const bool is_first = column == 0;
  const typename Weights::Value* values = x.values + row * x.stride + column / STEP * M * Weights::VALUES;
  auto from = weights.address(output, column);
  const auto step = [&](int part) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < STEP_BYTES; line += FETCHED)
      __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead + line, 0, 2);
    add_products(weights, sum[part], from, weights.group(output, column), values);
    from += Weights::ADVANCE;
    values += M * Weights::VALUES;
    column += STEP;
  };
#pragma GCC unroll LOOPS
  while (column + PARTS * STEP <= end)
    for (int part = 0; part < PARTS; ++part) step(part);
  while (column + STEP <= end) step(0);
  if constexpr (Weights::HAS_END) {
    if (column < end) {
      const auto w = weights.end(from, end - column, weights.group(output, column));
      for (int m = 0; m < M; ++m) sum[0][m] = multiply_add(sum[0][m], w, Weights::input(values + m * Weights::VALUES));
    }
  }
  if constexpr (PARTS == 2)
    for (int m = 0; m < M; ++m) sum[0][m] = add(sum[0][m], sum[1][m]);
  typename Weights::Number all[M];
  totals(sum[0], all);
  for (int m = 0; m < M; ++m) {
    if (!is_first)
      all[m] += sums[m * PIECE];
    else if constexpr (PRODUCT_OFFSET != 0 && IS_INTEGER)
      all[m] -= x.offsets[row + m];
    sums[m * PIECE] = all[m];
  }
}

// All rows of x that are left, at most M.
template <int M, class Weights>
void multiply_rows(const Weights& weights, int64_t output, int64_t column, int64_t end,
                   const Input<typename Weights::Value>& x, int64_t row, int64_t rows, typename Weights::Number* sums,
                   int64_t ahead) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<M - 1>(weights, output, column, end, x, row, rows, sums, ahead);
  }
  multiply<M>(weights, output, column, end, x, row, sums, ahead);
}

// One output after the other, as the weight lies in memory: that is read fastest. Where x is too large for the first-level cache,
// a turn of columns is multiplied for all outputs of a piece, and more rows than STREAM_ROWS find it in the second-level cache.
template <class T, class Weights>
void multiply_by_rows(const LinearCall& call) {
  using Value = typename Weights::Value;
  const Weights weights(call.layer);
  const auto x = take_input<STREAM_ROWS, T, Weights>(call);
  const int64_t outputs = call.layer.out_features;
  // Sums of floats have one order for all numbers of rows, turns included (alike_rows).
  constexpr bool IS_INTEGER = std::is_same_v<typename Weights::Number, int32_t>;
  const bool is_large = STREAM_ROWS < FEW_ROWS && call.rows > 2 &&
                        call.rows * x.stride * int64_t{sizeof(Value)} > LARGE_INPUT;
  const int64_t turn = STREAM_ROWS < FEW_ROWS && (is_large || !IS_INTEGER) ? turn_columns<Weights>() : weights.columns;
  const int64_t next_output = reinterpret_cast<const char*>(weights.address(1, 0)) - reinterpret_cast<const char*>(weights.address(0, 0));
  // In turns what comes next is the same columns of later outputs: of as many as have WEIGHT_AHEAD bytes in a turn.
  const int64_t ahead = is_large ? round_up(WEIGHT_AHEAD * weights.columns / turn, next_output) : WEIGHT_AHEAD;
  Shares shares((outputs + PIECE - 1) / PIECE);
  parallel([&](int thread, int) {
    const auto sums = static_cast<typename Weights::Number*>(
        scratch(SCRATCH_SUMS, call.rows * PIECE * sizeof(typename Weights::Number)));
    for (int64_t piece; (piece = shares.next(thread)) >= 0;) {
      const int64_t first = piece * PIECE, count = smaller(outputs - first, PIECE);
      if (call.layer.scheme != SACCADE_W4A16 && call.layer.scale != nullptr)  // one for each output: wanted at the end
        for (int64_t n = 0; n < count; n += LINE_BYTES / sizeof(float)) __builtin_prefetch(call.layer.scale + first + n);
      const auto take_turn = [&](int64_t n, int64_t column, int64_t row) {
        const int64_t end = smaller(column + turn, weights.columns);
        multiply_rows<STREAM_ROWS>(weights, first + n, column, end, x, row, call.rows - row, sums + row * PIECE + n, ahead);
      };
      if (is_large) {
        for (int64_t column = 0; column < weights.columns; column += turn)
          for (int64_t row = 0; row < call.rows; row += STREAM_ROWS)
            for (int64_t n = 0; n < count; ++n) take_turn(n, column, row);
      } else {
        for (int64_t n = 0; n < count; ++n)
          for (int64_t row = 0; row < call.rows; row += STREAM_ROWS)
            for (int64_t column = 0; column < weights.columns; column += turn) take_turn(n, column, row);
      }
      for (int64_t row = 0; row < call.rows; ++row) finish<T>(call, x, sums + row * PIECE, row, first, count);
    }
  });
}

}  // namespace saccade::SACCADE_ISA
