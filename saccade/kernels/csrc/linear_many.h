// Products of many rows of x, block by block.
//
// x is laid out once as its product wants it. A thread takes some outputs and stages their weights in panels, which stay in the
// second-level cache while all rows of x pass. Columns that are too many for that take turns: the sums of one are kept and added to
// by the next.
#pragma once

#include "linear_output.h"
#include "linear_products.h"
#include "linear_strays.h"

namespace saccade::SACCADE_ISA {

// --- x ---

// The nearest e4m3 number (half to even; NaN stays NaN) of one that is at most 448.
inline float rounded_to_e4m3(float value) {
  constexpr float SMALLEST_NORMAL = 0x1p-6f, SMALLEST = 0x1p-9f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7FFFF + (bits >> 20 & 1)) & 0xFFF00000;  // three bits behind the first
  float normal;
  memcpy(&normal, &bits, sizeof normal);
  const float small = nearbyintf(value / SMALLEST) * SMALLEST;
  return value != value ? value : fabsf(value) < SMALLEST_NORMAL ? small : normal;
}

// A row of x in whole numbers, `out.stride` values at `values`.
template <class T, class V>
void take_whole(const SaccadeLinear& layer, const T* x, const Input<V>& out, V* values, int64_t row) {
  const auto narrow = static_cast<int8_t*>(scratch(SCRATCH_OTHER, out.stride));
  take_row(layer, x, Input<int8_t>{narrow, out.stride, out.scales, out.offsets}, narrow, row);
  for (int64_t i = 0; i < out.stride; ++i) widen_one(narrow[i], values + i);
}

template <class T, class V>
void take_float8(const SaccadeLinear& layer, const T* x, const Input<V>& out, V* values, int64_t row) {
  constexpr float LARGEST = 448;
  float scale = largest_magnitude(x, layer.in_features) / LARGEST;
  scale = scale < TINY ? TINY : scale;
  out.scales[row] = scale;
  for (int64_t i = 0; i < layer.in_features; ++i) {
    float value = to_float(x[i]) / scale;
    value = value < -LARGEST ? -LARGEST : value;
    value = value > LARGEST ? LARGEST : value;
    store(values + i, rounded_to_e4m3(value));
  }
  memset(static_cast<void*>(values + layer.in_features), 0, (out.stride - layer.in_features) * sizeof(V));
}

template <class T>
void take_words(const SaccadeLinear& layer, const T* x, const Input<int8_t>& out, int8_t* values, int64_t row) {
  take_row(layer, x, out, values, row);
}
template <class T>
void take_words(const SaccadeLinear& layer, const T* x, const Input<int16_t>& out, int16_t* values, int64_t row) {
  take_row(layer, x, out, values, row);
}
template <class T>
void take_words(const SaccadeLinear& layer, const T* x, const Input<uint8_t>& out, uint8_t* values, int64_t row) {
  const auto whole = reinterpret_cast<int8_t*>(values);
  take_row(layer, x, Input<int8_t>{whole, out.stride, out.scales, out.offsets}, whole, row);
  for (int64_t i = 0; i < out.stride; ++i) values[i] ^= 128;  // adds 128
}
template <class T, class V>
void take_words(const SaccadeLinear& layer, const T* x, const Input<V>& out, V* values, int64_t row) {
  switch (layer.scheme) {
    case SACCADE_W4A8_FLOAT: return take_whole(layer, x, out, values, row);
    case SACCADE_FP8: return take_float8(layer, x, out, values, row);
    default: return take_row(layer, x, out, values, row);
  }
}

// All rows, as words: rows of them, or tiles of Product::INPUT_ROWS by 16.
template <class Product>
struct WordInput {
  Input<typename Product::Value> scales;
  const uint32_t* words;
  int64_t row_words;  // of one row
  const uint32_t* strays;
  int64_t row_strays;

  WordBlock block(int64_t row, int64_t word) const {
    return {words + row * row_words + word * Product::INPUT_ROWS, row_words * Product::INPUT_ROWS, strays + row * row_strays, row_strays,
            word};
  }
};

#if defined(SACCADE_PAIRS)
// What products of w + 128 and a row of x, `count` bytes, have too much.
inline int32_t too_much(const int8_t* values, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return EachTwoWords::OFFSET * sum;
}
#endif

template <class T, class Product>
WordInput<Product> take_all_words(const LinearCall& call) {
  using Value = typename Product::Value;
  constexpr int64_t TOGETHER = Product::INPUT_ROWS;
  const int64_t num_words = round_up(call.layer.in_features, per_word<Value>) / per_word<Value>;
  // Rows a power of two apart would fall into the same few sets of the first-level cache: an odd number of lines.
  const int64_t row_words = TOGETHER == 1 ? round_up(num_words, 16) | 16 : round_up(num_words, 16);
  int64_t row_strays = 0;
#if defined(SACCADE_PAIRS)
  if constexpr (Product::HAS_STRAYS) row_strays = strays_size(num_words);
#endif
  const int64_t all_words = round_up(call.rows, Product::ROWS) * row_words;
  const auto words = static_cast<uint32_t*>(scratch(SCRATCH_INPUT, (all_words + call.rows * row_strays) * WORD));
  uint32_t* const strays = words + all_words;
  const auto scales = input_scales<Value>(call.rows);
  const int64_t num_groups = (call.rows + TOGETHER - 1) / TOGETHER;
  const auto take = [&](int64_t group) {
    Input<Value> one = scales;
    one.stride = row_words * per_word<Value>;
    one.values = static_cast<Value*>(scratch(SCRATCH_ROWS, row_words * WORD));
    for (int64_t row = group * TOGETHER; row < smaller(call.rows, (group + 1) * TOGETHER); ++row) {
      take_words(call.layer, static_cast<const T*>(call.x) + row * call.x_stride, one, one.values, row);
      uint32_t* to = words + group * TOGETHER * row_words + row % TOGETHER * 16;
      for (int64_t word = 0; word < row_words; word += 16)
        memcpy(to + word * TOGETHER, reinterpret_cast<const uint32_t*>(one.values) + word, 16 * WORD);
#if defined(SACCADE_PAIRS)
      if constexpr (Product::HAS_STRAYS) {
        one.offsets[row] = too_much(one.values, call.layer.in_features);
        uint32_t* const parted = strays + row * row_strays;
        if (!part_strays(to, num_words, parted)) {
          memcpy(to, one.values, row_words * WORD);
          parted[0] = 0;
        }
      }
#endif
    }
  };
  if (call.rows <= FEW_ROWS) {
    for (int64_t group = 0; group < num_groups; ++group) take(group);
  } else {
    Pieces pieces(num_groups);
    parallel([&](int, int) {
      for (int64_t group; (group = pieces.next()) >= 0;) take(group);
    });
  }
  return {scales, words, row_words, strays, row_strays};
}

// --- blocks ---

// A block of sums that waits to be finished.
template <class T, class Product>
class Waiting {
  using Number = typename Product::Number;

 public:
  explicit Waiting(const Finisher<T, Number, Product::OFFSET>& finisher) : finisher_(finisher) {}
  void begin(const Number* sums, int64_t row, int64_t rows, int64_t column) {
    sums_ = sums, row_ = row, left_ = rows, column_ = column;
  }
  void some() {
    if (left_ > 0) take(smaller(left_, SOME));
  }
  void rest() {
    if (left_ > 0) take(left_);
  }

 private:
  static constexpr int64_t SOME = 2;  // rows: with 16 tiles of columns a block is done
  void take(int64_t rows) {
    finisher_.finish(sums_, Product::OUTPUTS, row_, rows, column_, Product::OUTPUTS);
    sums_ += rows * Product::OUTPUTS, row_ += rows, left_ -= rows;
  }

  const Finisher<T, Number, Product::OFFSET>& finisher_;
  const Number* sums_ = nullptr;
  int64_t row_ = 0, left_ = 0, column_ = 0;
};

template <class T, class Product, class Weights>
void multiply_many(const LinearCall& call) {
  using Value = typename Product::Value;
  using Number = typename Product::Number;
  constexpr int64_t OUTPUTS = Product::OUTPUTS, ROWS = Product::ROWS, BLOCK = ROWS * OUTPUTS;
  const Weights weights(call.layer);
  const int64_t outputs = call.layer.out_features;
  const auto x = take_all_words<T, Product>(call);

  const int64_t num_words = round_up(call.layer.in_features, per_word<Value>) / per_word<Value>;
  const int64_t least_turns = (num_words + Product::MOST_WORDS - 1) / Product::MOST_WORDS;
  const int64_t turn = round_up((num_words + least_turns - 1) / least_turns, TURN_WORDS);
  const bool is_one_turn = turn >= num_words;
  const int64_t staged = staged_words<Weights>(smaller(turn, num_words));
  // Blocks of outputs in as many pieces for each thread, none larger than what is staged.
  const int64_t blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
  const int64_t fit = Product::STAGED_BYTES / (staged * WORD * OUTPUTS);
  const int64_t most = fit < 1 ? 1 : smaller(fit, 256 / OUTPUTS);
  const int64_t num_pieces = smaller(blocks, round_up((blocks + most - 1) / most, num_threads()));
  const int64_t chunk = is_one_turn ? call.rows : Product::SUMMED_ROWS;

  Pieces pieces(num_pieces);
  parallel([&](int, int) {
    Product::begin();
    const auto panels = static_cast<uint32_t*>(scratch(SCRATCH_PANEL, most * OUTPUTS * staged * WORD));
    const int64_t kept_blocks = is_one_turn ? 2 : round_up(smaller(chunk, call.rows), ROWS) / ROWS * most;
    const auto sums = static_cast<Number*>(scratch(SCRATCH_SUMS, kept_blocks * BLOCK * sizeof(Number)));
    void* const finishing = scratch(SCRATCH_ROWS, 3 * most * OUTPUTS * sizeof(float));
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first_block = piece * blocks / num_pieces, num_blocks = (piece + 1) * blocks / num_pieces - first_block;
      const int64_t first = first_block * OUTPUTS, width = smaller(outputs - first, num_blocks * OUTPUTS);
      const Finisher<T, Number, Product::OFFSET> finisher(call, x.scales.scales, x.scales.offsets, first, width, finishing);
      Waiting<T, Product> waiting(finisher);
      for (int64_t first_row = 0; first_row < call.rows; first_row += chunk) {
        const int64_t last_row = smaller(first_row + chunk, call.rows);
        for (int64_t word = 0; word < num_words; word += turn) {
          const int64_t count = smaller(turn, num_words - word), w_stride = staged_words<Weights>(count) * PANEL;
          for (int64_t n = 0; n < num_blocks * OUTPUTS; n += PANEL)
            stage(weights, first + n, smaller(width - n, PANEL), word, count, panels + n / PANEL * w_stride);
          int64_t turned = 0;  // blocks of this turn
          for (int64_t row = first_row; row < last_row; row += ROWS) {
            const int64_t rows = smaller(last_row - row, ROWS);
            for (int64_t n = 0; n < num_blocks; ++n, ++turned) {
              Number* const kept = sums + (is_one_turn ? turned % 2 : turned) * BLOCK;
              Product::multiply(rows, x.block(row, word), panels + n * Product::PANELS * w_stride, w_stride, count, kept, word == 0,
                                [&] { waiting.some(); });
              waiting.rest();
              if (word + count == num_words) waiting.begin(kept, row, rows, n * OUTPUTS);
            }
          }
          waiting.rest();
        }
      }
    }
    Product::end();
  });
}

}  // namespace saccade::SACCADE_ISA
