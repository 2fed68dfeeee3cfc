// Products of many rows with AMX: tiles of 16 rows of x times tiles of 16 outputs, 64 bytes of columns at a time.
//
// A thread takes some outputs and, block of columns by block of columns, stages their weights: widened to the type of the product
// and laid out as the processor wants its right operand (four bytes of each of 16 outputs, then the next four). What is staged
// stays in the second-level cache while all rows of x pass; the sums of a block are kept and added to by the next.
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

struct NibblesTile : NibblesWith<0> {
  using NibblesWith::NibblesWith;
  static constexpr bool IS_INTEGER = true;
};

struct DenseTile : DensePairs {
  using DensePairs::DensePairs;
  static constexpr bool IS_INTEGER = false;
};

struct BytesPairsTile : Pairs {  // every int8 is a bfloat16
  static constexpr bool IS_INTEGER = false;
  const int8_t* values;
  int64_t columns;

  explicit BytesPairsTile(const SaccadeLinear& layer)
      : values(static_cast<const int8_t*>(layer.values)), columns(layer.in_features) {}

  struct Group {};
  int64_t span() const { return columns; }
  Group group(int64_t, int64_t) const { return {}; }

  const int8_t* address(int64_t row, int64_t column) const { return values + row * columns + column; }
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

struct NibblePairsTile : Pairs {  // value times scale, rounded to bfloat16
  static constexpr bool IS_INTEGER = false;
  const uint8_t* values;
  const float* scales;
  const int8_t* zeros;
  int64_t columns;
  Groups groups;

  explicit NibblePairsTile(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), scales(layer.scale), zeros(layer.zero),
        columns(layer.in_features), groups(layer) {}

  using Group = __m512i;  // what the 16 nibbles stand for, twice
  int64_t span() const { return groups.size(); }
  Group group(int64_t row, int64_t column) const {
    const int64_t group = groups.number(row, column);
    const __m256i table =
        (__m256i)_mm512_cvtneps_pbh(float_table(scales[group], zeros == nullptr ? 0.0f : zeros[group]));
    return _mm512_broadcast_i64x4(table);
  }
  const uint8_t* address(int64_t row, int64_t column) const { return values + ((row * columns + column) >> 1); }
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

// A block of sums, [ROW_TILES * 16, 32]: x's rows times two tiles of outputs over `count` tiles of columns. Tiles of one
// output tile follow each other at w; those of the next lie w_stride bytes further on.
template <bool IS_INTEGER, int ROW_TILES>
void multiply_block(const void* x, int64_t x_stride, const int8_t* w, int64_t w_stride, int64_t count, void* sums,
                    int64_t sums_stride, bool is_first) {
  const auto x_low = static_cast<const int8_t*>(x), x_high = x_low + TILE * x_stride;
  const auto low = static_cast<int8_t*>(sums), high = low + TILE * sums_stride;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (ROW_TILES == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, low, sums_stride);
    _tile_loadd(1, low + TILE_BYTES, sums_stride);
    if constexpr (ROW_TILES == 2) {
      _tile_loadd(2, high, sums_stride);
      _tile_loadd(3, high + TILE_BYTES, sums_stride);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    _tile_loadd(6, w + k * TILE_SIZE, TILE_BYTES);
    _tile_loadd(4, x_low + k * TILE_BYTES, x_stride);
    SACCADE_MULTIPLY_TILES(0, 4, 6);
    _tile_loadd(7, w + w_stride + k * TILE_SIZE, TILE_BYTES);
    SACCADE_MULTIPLY_TILES(1, 4, 7);
    if constexpr (ROW_TILES == 2) {
      _tile_loadd(5, x_high + k * TILE_BYTES, x_stride);
      SACCADE_MULTIPLY_TILES(2, 5, 6);
      SACCADE_MULTIPLY_TILES(3, 5, 7);
    }
  }
  _tile_stored(0, low, sums_stride);
  _tile_stored(1, low + TILE_BYTES, sums_stride);
  if constexpr (ROW_TILES == 2) {
    _tile_stored(2, high, sums_stride);
    _tile_stored(3, high + TILE_BYTES, sums_stride);
  }
}

#undef SACCADE_MULTIPLY_TILES

constexpr int64_t TILE_OUTPUTS = 256;      // a thread takes at once, at most, and
constexpr int64_t TILE_COLUMNS = 32;       // tiles of columns of them that are staged: 512 KiB
constexpr int64_t TILE_INPUT_ROWS = 1024;  // rows of x whose sums are kept: 1 MiB

template <class T, class Weights>
void multiply_by_tiles(const LinearCall& call) {
  constexpr bool IS_INTEGER = Weights::IS_INTEGER;
  using Value = typename Weights::Value;
  using Number = typename Weights::Number;
  const Weights weights(call.layer);
  const auto x = take_input<T, Value>(call);
  const int64_t outputs = call.layer.out_features;
  const int64_t column_tiles = round_up(call.layer.in_features * sizeof(Value), TILE_BYTES) / TILE_BYTES;
  // As many pieces for each thread.
  const int64_t least = round_up((outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS, num_threads());
  const int64_t block_outputs = round_up((outputs + least - 1) / least, 2 * TILE);
  const int64_t sums_stride = block_outputs * sizeof(Number);
  Pieces pieces((outputs + block_outputs - 1) / block_outputs);
  parallel([&](int, int) {
    const TileConfig config;
    _tile_loadconfig(&config);
    const auto staged = static_cast<int8_t*>(scratch(SCRATCH_PANEL, block_outputs * TILE_COLUMNS * TILE_BYTES));
    const int64_t most_rows = smaller(round_up(call.rows, FILL_ROWS), TILE_INPUT_ROWS);
    const auto sums = static_cast<int8_t*>(scratch(SCRATCH_SUMS, most_rows * sums_stride));
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t output = piece * block_outputs, count = smaller(outputs - output, block_outputs);
      for (int64_t first_row = 0; first_row < call.rows; first_row += TILE_INPUT_ROWS) {
        const int64_t last_row = smaller(first_row + TILE_INPUT_ROWS, call.rows);
        for (int64_t tile = 0; tile < column_tiles; tile += TILE_COLUMNS) {
          const int64_t tiles = smaller(column_tiles - tile, TILE_COLUMNS);
          const int64_t first = tile * Weights::STEP, last = first + tiles * Weights::STEP;
          for (int64_t n = 0; n < round_up(count, 2 * TILE); n += TILE)
            stage(weights, output + n, smaller(count - n, TILE), first, last, staged + n * tiles * TILE_BYTES);
          for (int64_t row = first_row; row < last_row; row += 2 * TILE) {
            const Value* const x_row = x.values + row * x.stride + first;
            const auto multiply_some = last_row - row > TILE ? multiply_block<IS_INTEGER, 2> : multiply_block<IS_INTEGER, 1>;
            for (int64_t n = 0; n < count; n += 2 * TILE)
              multiply_some(x_row, x.stride * sizeof(Value), staged + n * tiles * TILE_BYTES, tiles * TILE_SIZE, tiles,
                            sums + (row - first_row) * sums_stride + n * sizeof(Number), sums_stride, tile == 0);
          }
        }
        for (int64_t row = first_row; row < last_row; ++row)
          finish<T>(call, x, reinterpret_cast<Number*>(sums + (row - first_row) * sums_stride), row, output, count);
      }
    }
    _tile_release();
  });
}

}  // namespace saccade::SACCADE_ISA

#endif
