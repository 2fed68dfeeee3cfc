// Weights as products of many rows want them: panels of 16 outputs, word after word of their columns.
//
// A word is four bytes: four int8 (as w + 128 where the product wants that), two int16 or bfloat16, or one float32. A panel
// holds the first word of each of 16 outputs, then the second of each, and so on: a vector of it times one word of x is 16 sums,
// and 16 words of it are a tile of AMX. Rows are widened by plain loops, which compilers turn into vectors, and transposed.
//
// A kind of weights says: Value, what a word consists of; widen(row, first, count, to), which writes `count` values of a row;
// `first` is a multiple of 64, and so is `count` but at the end of a row; and STAGED, how many words of a panel 64 columns take.
#pragma once

#include "linear_weights.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t PANEL = 16;
constexpr int64_t WORD = 4;  // bytes
template <class V>
constexpr int64_t per_word = WORD / static_cast<int64_t>(sizeof(V));

constexpr int64_t STAGE_COLUMNS = 64;  // of each output at once
template <class V>
constexpr int64_t STAGE_WORDS = STAGE_COLUMNS / per_word<V>;

// --- widening ---

struct Float8 {  // e4m3: a sign, four bits of exponent, three of mantissa; all of them set are NaN, there is no infinity
  uint8_t bits;
};
inline float to_float(Float8 value) {
  const uint32_t magnitude = value.bits & 0x7Fu, sign = uint32_t(value.bits & 0x80u) << 24;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  uint32_t bits;
  memcpy(&bits, &small, sizeof bits);
  bits = magnitude < 8 ? bits : magnitude == 0x7F ? 0x7FC00000u : (magnitude << 20) + (120u << 23);
  bits |= sign;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void widen_one(int8_t from, int8_t* to) { *to = from; }
inline void widen_one(int8_t from, int16_t* to) { *to = from; }
inline void widen_one(BFloat16 from, BFloat16* to) { *to = from; }
template <class From>
void widen_one(From from, float* to) { *to = to_float(from); }
inline void widen_one(int8_t from, float* to) { *to = from; }
template <class From>
void widen_one(From from, BFloat16* to) {  // a number with eight significant bits or fewer
  float wide;
  widen_one(from, &wide);
  uint32_t bits;
  memcpy(&bits, &wide, sizeof bits);
  to->bits = static_cast<uint16_t>(bits >> 16);
}

// V: what products take; S: what is stored; OFFSET: added to whole numbers.
template <class V, class S, int OFFSET = 0>
struct StagedRows {
  using Value = V;
  static constexpr int64_t STAGED = STAGE_WORDS<V>;
  const S* values;
  int64_t columns;

  explicit StagedRows(const SaccadeLinear& layer)
      : values(static_cast<const S*>(layer.values)), columns(layer.in_features) {}

  const void* address(int64_t row, int64_t column) const { return values + row * columns + column; }
  void widen(int64_t row, int64_t first, int64_t count, V* to) const {
    const S* from = values + row * columns + first;
    for (int64_t i = 0; i < count; ++i) {
      widen_one(from[i], to + i);
      if constexpr (OFFSET != 0) to[i] = static_cast<V>(to[i] ^ OFFSET);  // of 128: the same as adding it
    }
  }
};

constexpr int64_t NIBBLE_RUN = 32;  // columns in 16 bytes: the first half in low nibbles, the other in high ones

// The 32 nibbles of a run, each replaced by what stands for it in a table of 16.
inline void look_up_run(const uint8_t* from, const int8_t* table, int8_t* to) {
#if defined(__AVX2__)
  const __m128i run = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(run), _mm_srli_epi16(run, 4), 1);
  const __m256i tables = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i values = _mm256_shuffle_epi8(tables, _mm256_and_si256(both, _mm256_set1_epi8(15)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
#else
  for (int i = 0; i < NIBBLE_RUN / 2; ++i) {
    to[i] = table[from[i] & 15];
    to[NIBBLE_RUN / 2 + i] = table[from[i] >> 4];
  }
#endif
}

// Nibbles and the number of their group. Groups are powers of two.
struct StagedNibbles {
  const uint8_t* values;
  int64_t columns, groups_per_row;
  int shift;

  explicit StagedNibbles(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), columns(layer.in_features),
        groups_per_row(layer.in_features / layer.group_size),
        shift(__builtin_ctzll(static_cast<uint64_t>(layer.group_size))) {}

  const uint8_t* address(int64_t row, int64_t column) const { return values + (row * columns + column) / 2; }
  int64_t group(int64_t row, int64_t column) const { return row * groups_per_row + (column >> shift); }
};

template <class V, int OFFSET>
struct StagedWholeNibbles : StagedNibbles {  // times their group's scale, which fits int8
  using Value = V;
  static constexpr int64_t STAGED = STAGE_WORDS<V>;
  const int8_t* scales;
  explicit StagedWholeNibbles(const SaccadeLinear& layer) : StagedNibbles(layer), scales(layer.group_scale) {}

  void widen(int64_t row, int64_t first, int64_t count, V* to) const {
    for (int64_t i = 0; i < count; i += NIBBLE_RUN) {
      const int8_t* table = NIBBLE_TABLES<OFFSET>.rows[scales[group(row, first + i)] & 127];
      if constexpr (std::is_same_v<V, int8_t>) {
        look_up_run(address(row, first + i), table, to + i);
      } else {
        int8_t run[NIBBLE_RUN];
        look_up_run(address(row, first + i), table, run);
        for (int64_t j = 0; j < NIBBLE_RUN; ++j) widen_one(run[j], to + i + j);
      }
    }
  }
};

#if defined(SACCADE_PAIRS)
// Nibbles as they are, and how the products of some COLUMNS become whole numbers: 32 or 64, whose group is the same. Of each such run a
// panel has its words of int8, then the group's scale in both halves of a word, then what sums of pairs start with where x is 128 too
// large: -128 times the run's nibbles that meet in 16 bits. With that, 16 products of a pair end within 16 bits, whatever happens on
// the way: each is at most 2 * 127 * 8.
template <int64_t COLUMNS>
struct StagedRuns : StagedNibbles {
  using Value = uint8_t;
  static constexpr int64_t RUN_WORDS = COLUMNS / WORD, SCALES = RUN_WORDS, STARTS = RUN_WORDS + 1, ALL = RUN_WORDS + 2;
  static constexpr int64_t STAGED = STAGE_COLUMNS / COLUMNS * ALL;
  const int8_t* scales;
  explicit StagedRuns(const SaccadeLinear& layer) : StagedNibbles(layer), scales(layer.group_scale) {}

  void widen(int64_t row, int64_t first, int64_t count, uint8_t* to) const {
    for (int64_t i = 0; i < count; i += NIBBLE_RUN)
      look_up_run(address(row, first + i), NIBBLE_TABLES<0>.rows[1], reinterpret_cast<int8_t*>(to) + i);
  }
};
#endif

template <class V>
struct StagedFloatNibbles : StagedNibbles {  // times their group's scale, rounded to V
  using Value = V;
  static constexpr int64_t STAGED = STAGE_WORDS<V>;
  const float* scales;
  const int8_t* zeros;
  explicit StagedFloatNibbles(const SaccadeLinear& layer)
      : StagedNibbles(layer), scales(layer.scale), zeros(layer.zero) {}

  void widen(int64_t row, int64_t first, int64_t count, V* to) const {
    for (int64_t i = 0; i < count; i += NIBBLE_RUN) {
      const int64_t number = group(row, first + i);
      const float scale = scales[number], zero = zeros == nullptr ? 0.0f : zeros[number];
      int8_t run[NIBBLE_RUN];
      look_up_run(address(row, first + i), NIBBLE_TABLES<0>.rows[1], run);
      for (int64_t j = 0; j < NIBBLE_RUN; ++j) store(to + i + j, (static_cast<float>(run[j]) - zero) * scale);
    }
  }
};

// --- panels ---

// to[word][row] = from[row][word] of 16 rows of 16 words; rows of `from` lie `stride` words apart.
// After every 8 words GAP others are left out.
template <int64_t GAP = 0>
void transpose_words(const uint32_t* from, int64_t stride, uint32_t* to) {
  const auto at = [&](int64_t word) { return to + (word + word / 8 * GAP) * PANEL; };
#if defined(__AVX512F__)
  __m512i rows[16], half[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(from + i * stride);
  for (int i = 0; i < 16; i += 2) {  // words 0, 1 of each quarter, of two rows; words 2, 3
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // word j of each quarter, of four rows
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
    _mm512_store_si512(at(i), _mm512_shuffle_i32x4(half[i], half[8 + i], 0x88));
    _mm512_store_si512(at(8 + i), _mm512_shuffle_i32x4(half[i], half[8 + i], 0xDD));
    _mm512_store_si512(at(4 + i), _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0x88));
    _mm512_store_si512(at(12 + i), _mm512_shuffle_i32x4(half[4 + i], half[12 + i], 0xDD));
  }
#elif defined(__AVX2__)
  for (int row = 0; row < 16; row += 8)
    for (int word = 0; word < 16; word += 8) {
      __m256 rows[8], half[8];
      for (int i = 0; i < 8; ++i) rows[i] = _mm256_load_ps(reinterpret_cast<const float*>(from + (row + i) * stride + word));
      for (int i = 0; i < 8; i += 2) {
        half[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        half[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_shuffle_ps(half[i], half[i + 2], 0x44);
        rows[i + 1] = _mm256_shuffle_ps(half[i], half[i + 2], 0xEE);
        rows[i + 2] = _mm256_shuffle_ps(half[i + 1], half[i + 3], 0x44);
        rows[i + 3] = _mm256_shuffle_ps(half[i + 1], half[i + 3], 0xEE);
      }
      for (int i = 0; i < 4; ++i) {
        const auto out = [&](int j) { return reinterpret_cast<float*>(at(word + j) + row); };
        _mm256_store_ps(out(i), _mm256_permute2f128_ps(rows[i], rows[4 + i], 0x20));
        _mm256_store_ps(out(4 + i), _mm256_permute2f128_ps(rows[i], rows[4 + i], 0x31));
      }
    }
#else
  for (int word = 0; word < 16; ++word)
    for (int row = 0; row < 16; ++row) at(word)[row] = from[row * stride + word];
#endif
}

// Of a panel that stages `count` words of each output.
template <class Weights>
int64_t staged_words(int64_t count) {
  constexpr int64_t EACH = STAGE_WORDS<typename Weights::Value>;
  return (count + EACH - 1) / EACH * Weights::STAGED;
}

// Words [first, first + count) of 16 outputs from `output` on, of which `present` exist. Zeros fill words up to a multiple of
// STAGE_WORDS, and outputs.
template <class Weights>
void stage(const Weights& weights, int64_t output, int64_t present, int64_t first, int64_t count, uint32_t* panel) {
  using Value = typename Weights::Value;
  constexpr int64_t WORDS = STAGE_WORDS<Value>;
  alignas(64) uint32_t rows[PANEL][WORDS];
  if (present < PANEL) memset(rows, 0, sizeof rows);
  for (int64_t word = 0; word < count; word += WORDS) {
    const int64_t column = (first + word) * per_word<Value>;
    if (column + STAGE_COLUMNS <= weights.columns) {
      for (int64_t n = 0; n < present; ++n) {
        weights.widen(output + n, column, STAGE_COLUMNS, reinterpret_cast<Value*>(rows[n]));
        __builtin_prefetch(weights.address(output + PANEL + n, column), 0, 2);
      }
    } else {
      memset(rows, 0, sizeof rows);
      for (int64_t n = 0; n < present; ++n)
        weights.widen(output + n, column, weights.columns - column, reinterpret_cast<Value*>(rows[n]));
    }
    for (int64_t some = 0; some < WORDS; some += 16, panel += 16 * PANEL) transpose_words(&rows[0][some], WORDS, panel);
  }
}

#if defined(SACCADE_PAIRS)
template <int64_t COLUMNS>
void stage(const StagedRuns<COLUMNS>& weights, int64_t output, int64_t present, int64_t first, int64_t count, uint32_t* panel) {
  using Runs = StagedRuns<COLUMNS>;
  constexpr int64_t VECTOR = BYTES / WORD;
  alignas(64) uint32_t rows[PANEL][STAGE_COLUMNS / WORD] = {};
  for (int64_t column = first * WORD; column < (first + count) * WORD; column += STAGE_COLUMNS) {
    const int64_t width = weights.columns - column < STAGE_COLUMNS ? weights.columns - column : STAGE_COLUMNS;
    if (width < STAGE_COLUMNS) memset(rows, 0, sizeof rows);
    for (int64_t n = 0; n < present; ++n) {
      weights.widen(output + n, column, width, reinterpret_cast<uint8_t*>(rows[n]));
      __builtin_prefetch(weights.address(output + PANEL + n, column), 0, 2);
    }
    transpose_words<COLUMNS == NIBBLE_RUN ? Runs::ALL - Runs::RUN_WORDS : 0>(&rows[0][0], STAGE_COLUMNS / WORD, panel);
    for (int64_t run = 0; run < STAGE_COLUMNS; run += COLUMNS, panel += Runs::ALL * PANEL) {
      uint32_t* const scales = panel + Runs::SCALES * PANEL;
      memset(scales, 0, PANEL * WORD);
      if (run < width)
        for (int64_t n = 0; n < present; ++n)
          scales[n] = 0x10001u * static_cast<uint8_t>(weights.scales[weights.group(output + n, column + run)]);
      for (int64_t n = 0; n < PANEL; n += VECTOR) {
        Int8 sums = zero_sum();
        for (int64_t word = 0; word < Runs::RUN_WORDS; ++word)
          sums = add_pairs(sums, multiply_pairs(each_byte(128), load(reinterpret_cast<int8_t*>(panel + word * PANEL + n))));
        store(panel + Runs::STARTS * PANEL + n, subtract_pairs(zero_sum(), sums));
      }
    }
  }
}
#endif

}  // namespace saccade::SACCADE_ISA
