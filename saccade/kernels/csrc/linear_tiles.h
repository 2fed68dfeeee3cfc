// Products of many rows with AMX: tiles of 16 rows of x times tiles of 16 outputs, 64 bytes of columns at a time.
//
// x is laid out as tiles once. A thread takes some outputs and stages their weights: widened to the type of the product and laid out
// as the processor wants its right operand (four bytes of each of 16 outputs, then the next four). What is staged stays in the
// second-level cache while all rows of x pass. Columns that are too many for that take turns: the sums of one are kept and
// added to by the next.
#pragma once

#include "linear_output.h"
#include "linear_weights.h"

#if defined(__AMX_INT8__)

namespace saccade::SACCADE_ISA {

// --- weights as the product takes them: 64 bytes of a row at a time ---

struct BytesTile : Bytes {
  using Bytes::Bytes;
  static constexpr bool IS_INTEGER = true;
  __m512i at(int64_t row, int64_t column, Group) const { return load(address(row, column)); }
  __m512i end(int64_t row, int64_t column, Group) const { return load_part(address(row, column), columns - column); }
};

// 64 nibbles of 32 bytes in the order of their columns; a group is of 32 columns or more.
struct NibblesTile : NibbleRows<Integers> {
  static constexpr bool IS_INTEGER = true;
  const int8_t* scales;

  explicit NibblesTile(const SaccadeLinear& layer) : NibbleRows(layer), scales(layer.group_scale) {}

  using Group = __m512i;  // a table for each 16 columns
  int64_t span() const { return groups.size() < STEP ? STEP : groups.size(); }
  __m256i table(int64_t row, int64_t column) const {
    const int8_t* at = NIBBLE_TABLES<0>.rows[scales[groups.number(row, column)] & 127];
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
  }
  Group group(int64_t row, int64_t column) const {
    const __m512i first = _mm512_castsi256_si512(table(row, column));
    return _mm512_inserti64x4(first, table(row, column + RUN), 1);
  }
  static __m512i looked_up(__m256i packed, Group table) {
    const __m512i order = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    const __m512i twice = _mm512_permutexvar_epi64(order, _mm512_castsi256_si512(packed));
    constexpr int64_t FOURS = 0x0004000400040004;
    const __m512i shifted = _mm512_srlv_epi16(twice, _mm512_setr_epi64(0, 0, FOURS, FOURS, 0, 0, FOURS, FOURS));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(shifted, _mm512_set1_epi8(15)));
  }
  __m512i at(int64_t row, int64_t column, Group table) const {
    return looked_up(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address(row, column))), table);
  }
  __m512i end(int64_t row, int64_t column, Group table) const {
    const auto run = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address(row, column)));
    return looked_up(_mm256_zextsi128_si256(run), table);
  }
};

struct DenseTile : DensePairs {
  using DensePairs::DensePairs;
  static constexpr bool IS_INTEGER = false;
};

struct BytesPairsTile : RowMajor<int8_t, Pairs> {  // every int8 is a bfloat16
  using RowMajor::RowMajor;
  static constexpr bool IS_INTEGER = false;
  static __m512i widened(__m256i bytes) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  __m512i at(int64_t row, int64_t column, Group) const {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address(row, column))));
  }
  __m512i end(int64_t row, int64_t column, Group) const {
    const auto mask = static_cast<__mmask32>((uint32_t{1} << (columns - column)) - 1);
    return widened(_mm256_maskz_loadu_epi8(mask, address(row, column)));
  }
};

struct NibblePairsTile : NibbleRows<Pairs> {  // value times scale, rounded to bfloat16
  static constexpr bool IS_INTEGER = false;
  const float* scales;
  const int8_t* zeros;

  explicit NibblePairsTile(const SaccadeLinear& layer) : NibbleRows(layer), scales(layer.scale), zeros(layer.zero) {}

  using Group = __m512i;  // what the 16 nibbles stand for, twice
  int64_t span() const { return groups.size(); }
  Group group(int64_t row, int64_t column) const {
    const int64_t group = groups.number(row, column);
    const __m256i table =
        (__m256i)_mm512_cvtneps_pbh(float_table(scales[group], zeros == nullptr ? 0.0f : zeros[group]));
    return _mm512_broadcast_i64x4(table);
  }
  __m512i at(int64_t row, int64_t column, Group table) const {
    const __m128i run = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address(row, column)));
    const __m256i low = _mm256_cvtepu8_epi16(run);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
    return _mm512_permutexvar_epi16(both, table);  // looks at five bits: the table is there twice
  }
  __m512i end(int64_t, int64_t, Group) const { return _mm512_setzero_si512(); }  // groups are multiples of STEP
};

// --- staging ---

constexpr int64_t TILE = 16;         // rows and outputs of a tile
constexpr int64_t TILE_BYTES = 64;   // columns of a tile
constexpr int64_t TILE_SIZE = 1024;  // bytes

// 16 rows of 16 words of 4 bytes become their columns.
inline void transpose(__m512i (&rows)[16]) {
  __m512i half[16];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    half[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xDD);
    half[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    half[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(half[i], half[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(half[i], half[8 + i], 0xDD);
    rows[4 + i] = _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0x88);
    rows[12 + i] = _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0xDD);
  }
}

// Columns [first, last) of 16 outputs from `output` on, of which `count` exist, as tiles one after the other.
template <class Weights>
void stage(const Weights& weights, int64_t output, int64_t count, int64_t first, int64_t last, int8_t* tiles) {
  typename Weights::Group group[TILE];
  const int64_t span = weights.span();
  int64_t next = first;  // column where groups change; blocks begin where a group does, or within the only one
  for (int64_t column = first; column < last; column += Weights::STEP, tiles += TILE_SIZE) {
    if (column == next) {
      for (int64_t n = 0; n < count; ++n) group[n] = weights.group(output + n, column);
      next += span;
    }
    __m512i rows[TILE];
    const bool is_whole = column + Weights::STEP <= weights.columns;
    if (count == TILE && is_whole) {
      for (int64_t n = 0; n < TILE; ++n) {
        rows[n] = weights.at(output + n, column, group[n]);
        __builtin_prefetch(weights.address(output + TILE + n, column), 0, 2);
      }
    } else {
      for (int64_t n = 0; n < TILE; ++n)
        rows[n] = n >= count ? _mm512_setzero_si512()
                  : is_whole ? weights.at(output + n, column, group[n])
                             : weights.end(output + n, column, group[n]);
    }
    transpose(rows);
    for (int64_t n = 0; n < TILE; ++n) _mm512_store_si512(tiles + n * TILE_BYTES, rows[n]);
  }
}

// --- products ---

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A macro, as the numbers of tiles must be literals.
#define SACCADE_MULTIPLY_TILES(sum, x, w) \
  if constexpr (IS_INTEGER)               \
    _tile_dpbssd(sum, x, w);              \
  else                                    \
    _tile_dpbf16ps(sum, x, w)

constexpr int64_t BLOCK_TILES = 2;                    // of rows and of outputs: four sums fill the registers with their factors
constexpr int64_t BLOCK_SIZE = 32;                    // rows and outputs
constexpr int64_t SUMS_BYTES = BLOCK_SIZE * BLOCK_SIZE * 4;
constexpr int64_t SUMS_STRIDE = BLOCK_SIZE * 4;

// A block of sums, [ROW_TILES * 16, 32]: x's rows times two tiles of outputs over `count` tiles of columns. Tiles of one row or
// output tile follow each other at x and w; those of the next lie x_stride and w_stride bytes further on. between(k) is other work,
// done while the tiles multiply.
template <bool IS_INTEGER, int ROW_TILES, class Between>
void multiply_block(const int8_t* x, int64_t x_stride, const int8_t* w, int64_t w_stride, int64_t count, int8_t* sums,
                    bool is_first, Between&& between) {
  int8_t *const low = sums, *const high = sums + TILE * SUMS_STRIDE;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (ROW_TILES == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, low, SUMS_STRIDE);
    _tile_loadd(1, low + TILE_BYTES, SUMS_STRIDE);
    if constexpr (ROW_TILES == 2) {
      _tile_loadd(2, high, SUMS_STRIDE);
      _tile_loadd(3, high + TILE_BYTES, SUMS_STRIDE);
    }
  }
  for (int64_t k = 0; k < count; ++k, x += TILE_SIZE, w += TILE_SIZE) {
    _tile_loadd(6, w, TILE_BYTES);
    _tile_loadd(4, x, TILE_BYTES);
    SACCADE_MULTIPLY_TILES(0, 4, 6);
    _tile_loadd(7, w + w_stride, TILE_BYTES);
    SACCADE_MULTIPLY_TILES(1, 4, 7);
    if constexpr (ROW_TILES == 2) {
      _tile_loadd(5, x + x_stride, TILE_BYTES);
      SACCADE_MULTIPLY_TILES(2, 5, 6);
      SACCADE_MULTIPLY_TILES(3, 5, 7);
    }
    between(k);
  }
  _tile_stored(0, low, SUMS_STRIDE);
  _tile_stored(1, low + TILE_BYTES, SUMS_STRIDE);
  if constexpr (ROW_TILES == 2) {
    _tile_stored(2, high, SUMS_STRIDE);
    _tile_stored(3, high + TILE_BYTES, SUMS_STRIDE);
  }
}

#undef SACCADE_MULTIPLY_TILES

// x as tiles: those of 16 rows follow each other, so that whoever reads them reads memory in order.
template <class T, class V>
Input<V> take_tiles(const LinearCall& call, int64_t column_tiles, int8_t* tiles) {
  const auto out = input_scales<V>(call.rows);
  const int64_t num_tiles = (call.rows + TILE - 1) / TILE;
  const auto take = [&](int64_t tile) {
    Input<V> rows = out;
    rows.stride = column_tiles * TILE_BYTES / sizeof(V);
    rows.values = static_cast<V*>(scratch(SCRATCH_ROWS, column_tiles * TILE_BYTES));
    for (int64_t row = tile * TILE; row < smaller(call.rows, tile * TILE + TILE); ++row) {
      take_row(call.layer, static_cast<const T*>(call.x) + row * call.x_stride, rows, rows.values, row);
      const auto from = reinterpret_cast<const int8_t*>(rows.values);
      int8_t* to = tiles + tile * column_tiles * TILE_SIZE + row % TILE * TILE_BYTES;
      for (int64_t k = 0; k < column_tiles; ++k) memcpy(to + k * TILE_SIZE, from + k * TILE_BYTES, TILE_BYTES);
    }
  };
  if (call.rows <= FEW_ROWS) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) take(tile);
    return out;
  }
  Pieces pieces(num_tiles);
  parallel([&](int, int) {
    for (int64_t tile; (tile = pieces.next()) >= 0;) take(tile);
  });
  return out;
}

// A block of sums that waits to be finished.
template <class T, class Number>
class Finished {
 public:
  explicit Finished(const Finisher<T, Number>& finisher) : finisher_(finisher) {}
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
    finisher_.finish(sums_, BLOCK_SIZE, row_, rows, column_, BLOCK_SIZE);
    sums_ += rows * BLOCK_SIZE, row_ += rows, left_ -= rows;
  }

  const Finisher<T, Number>& finisher_;
  const Number* sums_ = nullptr;
  int64_t row_ = 0, left_ = 0, column_ = 0;
};

constexpr int64_t MOST_COLUMN_TILES = 64;     // tiles of columns of some outputs that are staged,
constexpr int64_t STAGED_BYTES = 768 << 10;   // so many bytes of them,
constexpr int64_t MOST_BLOCKS = 8;            // and so many blocks of outputs
constexpr int64_t SUMMED_ROWS = 1024;         // rows of x whose sums are kept where columns take several turns: 768 KiB

template <class T, class Weights>
void multiply_by_tiles(const LinearCall& call) {
  constexpr bool IS_INTEGER = Weights::IS_INTEGER;
  using Value = typename Weights::Value;
  using Number = typename Weights::Number;
  const Weights weights(call.layer);
  const int64_t outputs = call.layer.out_features;
  const int64_t column_tiles = round_up(call.layer.in_features * sizeof(Value), TILE_BYTES) / TILE_BYTES;
  const int64_t row_size = column_tiles * TILE_SIZE;
  const auto tiles = static_cast<int8_t*>(scratch(SCRATCH_INPUT, round_up(call.rows, BLOCK_SIZE) / TILE * row_size));
  const auto x = take_tiles<T, Value>(call, column_tiles, tiles);

  // Turns begin where groups do: the largest have 256 columns, 8 tiles of bfloat16.
  const int64_t least_turns = (column_tiles + MOST_COLUMN_TILES - 1) / MOST_COLUMN_TILES;
  const int64_t turn = round_up((column_tiles + least_turns - 1) / least_turns, 8);
  const bool is_one_turn = turn >= column_tiles;
  // Blocks of outputs in as many pieces for each thread, none larger than what is staged.
  const int64_t blocks = (outputs + BLOCK_SIZE - 1) / BLOCK_SIZE;
  const int64_t most = smaller(MOST_BLOCKS, STAGED_BYTES / (smaller(turn, column_tiles) * TILE_BYTES * BLOCK_SIZE));
  const int64_t num_pieces = smaller(blocks, round_up((blocks + most - 1) / most, num_threads()));
  const int64_t chunk = is_one_turn ? call.rows : SUMMED_ROWS;

  Pieces pieces(num_pieces);
  parallel([&](int, int) {
    const TileConfig config;
    _tile_loadconfig(&config);
    const auto staged = static_cast<int8_t*>(scratch(SCRATCH_PANEL, most * BLOCK_TILES * turn * TILE_SIZE));
    const int64_t kept_blocks = is_one_turn ? 2 : round_up(smaller(chunk, call.rows), BLOCK_SIZE) / BLOCK_SIZE * most;
    const auto sums = static_cast<int8_t*>(scratch(SCRATCH_SUMS, kept_blocks * SUMS_BYTES));
    void* const finishing = scratch(SCRATCH_ROWS, 3 * most * BLOCK_SIZE * sizeof(float));
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first_block = piece * blocks / num_pieces, num_blocks = (piece + 1) * blocks / num_pieces - first_block;
      const int64_t first = first_block * BLOCK_SIZE, width = smaller(outputs - first, num_blocks * BLOCK_SIZE);
      const Finisher<T, Number> finisher(call, x.scales, first, width, finishing);
      Finished<T, Number> waiting(finisher);
      for (int64_t first_row = 0; first_row < call.rows; first_row += chunk) {
        const int64_t last_row = smaller(first_row + chunk, call.rows);
        for (int64_t tile = 0; tile < column_tiles; tile += turn) {
          const int64_t count = smaller(turn, column_tiles - tile), w_stride = count * TILE_SIZE;
          for (int64_t n = 0; n < num_blocks * BLOCK_TILES; ++n)
            stage(weights, first + n * TILE, smaller(width - n * TILE, TILE), tile * Weights::STEP,
                  (tile + count) * Weights::STEP, staged + n * w_stride);
          int64_t turned = 0;  // blocks of this turn
          for (int64_t row = first_row; row < last_row; row += BLOCK_SIZE) {
            const int64_t rows = smaller(last_row - row, BLOCK_SIZE);
            const int8_t* const x_row = tiles + row / TILE * row_size + tile * TILE_SIZE;
            for (int64_t n = 0; n < num_blocks; ++n, ++turned) {
              int8_t* const kept = sums + (is_one_turn ? turned % 2 : turned) * SUMS_BYTES;
              const int8_t* const w = staged + n * BLOCK_TILES * w_stride;
              const auto between = [&](int64_t) { waiting.some(); };
              if (rows > TILE)
                multiply_block<IS_INTEGER, 2>(x_row, row_size, w, w_stride, count, kept, tile == 0, between);
              else
                multiply_block<IS_INTEGER, 1>(x_row, row_size, w, w_stride, count, kept, tile == 0, between);
              waiting.rest();
              if (tile + count == column_tiles) waiting.begin(reinterpret_cast<Number*>(kept), row, rows, n * BLOCK_SIZE);
            }
          }
          waiting.rest();
        }
      }
    }
    _tile_release();
  });
}

}  // namespace saccade::SACCADE_ISA

#endif
