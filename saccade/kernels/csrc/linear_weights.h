// The rows of a weight as vectors: how each scheme's numbers are widened, and multiplied with x.
//
// A kind of weights says: Value, what x consists of; STEP columns at a time, taken by `at` as a Left and multiplied with the
// Right that `input` takes of x; `span` columns that share a Group, which holds what their values stand for; `end` for the
// columns that are left at the end of a row, zeros beyond it.
#pragma once

#include "linear_input.h"

namespace saccade::SACCADE_ISA {

// --- in whole numbers ---

struct Integers {
  using Value = int8_t;
  using Number = int32_t;  // of a sum
  using Sum = SACCADE_ISA::Sum;
  using Right = SACCADE_ISA::Right;
  static constexpr int STEP = BYTES;
  static Sum zero() { return zero_sum(); }
  static Right input(const int8_t* x) { return right(load(x)); }
};

struct Bytes : Integers {
  const int8_t* values;
  int64_t columns;

  explicit Bytes(const SaccadeLinear& layer)
      : values(static_cast<const int8_t*>(layer.values)), columns(layer.in_features) {}

  struct Group {};
  int64_t span() const { return columns; }
  Group group(int64_t, int64_t) const { return {}; }

  const int8_t* address(int64_t row, int64_t column) const { return values + row * columns + column; }
  Left at(int64_t row, int64_t column, Group) const { return left(load(address(row, column))); }
  Left end(int64_t row, int64_t column, Group) const { return left(load_part(address(row, column), columns - column)); }
};

// What the 16 nibbles stand for (two's complement: nibble 9 is -7) times each scale a group may have, as a Left wants it.
template <int OFFSET>
struct NibbleTables {
  alignas(64) int8_t rows[128][16];
  constexpr NibbleTables() : rows() {
    for (int scale = 0; scale < 128; ++scale)
      for (int nibble = 0; nibble < 16; ++nibble)
        rows[scale][nibble] = static_cast<int8_t>((nibble < 8 ? nibble : nibble - 16) * scale + OFFSET);
  }
};
template <int OFFSET>
constexpr NibbleTables<OFFSET> NIBBLE_TABLES;

// Groups are powers of two: their numbers come by shifts, for a division takes as long as a group's products.
struct Groups {
  int64_t columns, per_row;
  int shift;

  explicit Groups(const SaccadeLinear& layer)
      : columns(layer.in_features), per_row(layer.in_features / layer.group_size),
        shift(__builtin_ctzll(static_cast<uint64_t>(layer.group_size))) {}

  int64_t size() const { return int64_t{1} << shift; }
  int64_t number(int64_t row, int64_t column) const { return row * per_row + smaller(column >> shift, per_row - 1); }
};

// OFFSET is what each number has too much, as PRODUCT_OFFSET wants it for sums along rows.
template <int OFFSET>
struct NibblesWith : Integers {
  const uint8_t* values;
  const int8_t* scales;
  int64_t columns;
  Groups groups;

  explicit NibblesWith(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), scales(layer.group_scale), columns(layer.in_features),
        groups(layer) {}

  using Group = Table;
  int64_t span() const { return groups.size() < STEP ? STEP : groups.size(); }
  Group group(int64_t row, int64_t column) const {
    return load_table(NIBBLE_TABLES<OFFSET>.rows[scales[groups.number(row, column)] & 127],
                      NIBBLE_TABLES<OFFSET>.rows[scales[groups.number(row, column + STEP / 2)] & 127]);
  }

  const uint8_t* address(int64_t row, int64_t column) const { return values + ((row * columns + column) >> 1); }
  Int8 at(int64_t row, int64_t column, const Group& table) const {
    return look_up(load_nibbles(address(row, column)), table);
  }
  Int8 end(int64_t row, int64_t column, const Group& table) const {
    return look_up(load_nibbles_part(address(row, column)), table);
  }
};

struct Nibbles : NibblesWith<PRODUCT_OFFSET> {
  using NibblesWith::NibblesWith;
  Left at(int64_t row, int64_t column, const Group& table) const { return ready(NibblesWith::at(row, column, table)); }
  Left end(int64_t row, int64_t column, const Group& table) const { return ready(NibblesWith::end(row, column, table)); }
};

// --- in float32 ---

struct Floats {
  using Value = float;
  using Number = float;
  using Sum = Float;
  using Right = Float;
  static constexpr int STEP = FLOATS;
  static Sum zero() { return zero_float(); }
  static Right input(const float* x) { return load(x); }
};

// V: int8_t for w8a16, BFloat16 for dense.
template <class V>
struct Wide : Floats {
  const V* values;
  int64_t columns;

  explicit Wide(const SaccadeLinear& layer) : values(static_cast<const V*>(layer.values)), columns(layer.in_features) {}

  struct Group {};
  int64_t span() const { return columns; }
  Group group(int64_t, int64_t) const { return {}; }

  const V* address(int64_t row, int64_t column) const { return values + row * columns + column; }
  Float at(int64_t row, int64_t column, Group) const { return widen(address(row, column)); }
  Float end(int64_t row, int64_t column, Group) const { return widen_part(address(row, column), columns - column); }
};

struct WideNibbles : Floats {
  const uint8_t* values;
  const float* scales;
  const int8_t* zeros;
  int64_t columns;
  Groups groups;

  explicit WideNibbles(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), scales(layer.scale), zeros(layer.zero),
        columns(layer.in_features), groups(layer) {}

  using Group = FloatTable;
  int64_t span() const { return groups.size(); }
  Group group(int64_t row, int64_t column) const {
    const int64_t group = groups.number(row, column);
    return float_table(scales[group], zeros == nullptr ? 0.0f : zeros[group]);
  }

  const uint8_t* address(int64_t row, int64_t column) const { return values + ((row * columns + column) >> 1); }
  Float at(int64_t row, int64_t column, const Group& table) const {
    return look_up(values + ((row * columns + (column & ~int64_t{31})) >> 1), column & 31, table);
  }
  Float end(int64_t, int64_t, const Group&) const { return zero_float(); }  // groups are multiples of STEP
};

// --- in pairs of bfloat16, summed in float32 ---

#if defined(__AVX512BF16__)
struct Pairs {
  using Value = BFloat16;
  using Number = float;
  using Sum = Float;
  using Right = __m512i;
  static constexpr int STEP = 32;
  static Sum zero() { return zero_float(); }
  static Right input(const BFloat16* x) { return _mm512_loadu_si512(x); }
};

struct DensePairs : Pairs {
  const BFloat16* values;
  int64_t columns;

  explicit DensePairs(const SaccadeLinear& layer)
      : values(static_cast<const BFloat16*>(layer.values)), columns(layer.in_features) {}

  struct Group {};
  int64_t span() const { return columns; }
  Group group(int64_t, int64_t) const { return {}; }

  const BFloat16* address(int64_t row, int64_t column) const { return values + row * columns + column; }
  __m512i at(int64_t row, int64_t column, Group) const { return _mm512_loadu_si512(address(row, column)); }
  __m512i end(int64_t row, int64_t column, Group) const {
    return _mm512_maskz_loadu_epi16((uint32_t{1} << (columns - column)) - 1, address(row, column));
  }
};

// Values times their scales, rounded to bfloat16. A vector of 64 nibbles gives two of 32 columns: those of the low nibbles (0 to
// 15 and 32 to 47), then those of the high ones; x is taken in the same order.
struct NibblePairs : Pairs {
  const uint8_t* values;
  const float* scales;
  const int8_t* zeros;
  int64_t columns;
  Groups groups;

  explicit NibblePairs(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), scales(layer.scale), zeros(layer.zero),
        columns(layer.in_features), groups(layer) {}

  struct Two {
    __m512i low, high;
  };
  using Right = Two;
  using Group = __m512i;  // 16 values for the first 32 columns, 16 for the next
  static constexpr int STEP = 64;
  static Right input(const BFloat16* x) {
    const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + 32);
    return {_mm512_shuffle_i64x2(first, second, 0x44), _mm512_shuffle_i64x2(first, second, 0xEE)};
  }

  int64_t span() const { return groups.size() < STEP ? STEP : groups.size(); }
  __m256i table(int64_t group) const {
    return (__m256i)_mm512_cvtneps_pbh(float_table(scales[group], zeros == nullptr ? 0.0f : zeros[group]));
  }
  Group group(int64_t row, int64_t column) const {
    const __m512i first = _mm512_castsi256_si512(table(groups.number(row, column)));
    return _mm512_inserti64x4(first, table(groups.number(row, column + 32)), 1);
  }
  static Two looked_up(__m256i packed, Group table) {  // a look-up takes five bits: the nibble, and which half
    const __m512i words = _mm512_cvtepu8_epi16(packed), nibble = _mm512_set1_epi16(15);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    constexpr int A_AND_B_OR_C = 0xEA;
    const __m512i low = _mm512_ternarylogic_epi64(words, nibble, half, A_AND_B_OR_C);
    const __m512i high = _mm512_ternarylogic_epi64(_mm512_srli_epi16(words, 4), nibble, half, A_AND_B_OR_C);
    return {_mm512_permutexvar_epi16(low, table), _mm512_permutexvar_epi16(high, table)};
  }
  const uint8_t* address(int64_t row, int64_t column) const { return values + ((row * columns + column) >> 1); }
  Two at(int64_t row, int64_t column, Group table) const {
    return looked_up(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address(row, column))), table);
  }
  Two end(int64_t row, int64_t column, Group table) const {  // x is zero beyond the row
    const auto run = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address(row, column)));
    return looked_up(_mm256_zextsi128_si256(run), table);
  }
};

inline Float multiply_add(Float sum, const NibblePairs::Two& w, const NibblePairs::Two& x) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)w.low, (__m512bh)x.low);
  return _mm512_dpbf16_ps(sum, (__m512bh)w.high, (__m512bh)x.high);
}

inline Float multiply_add(Float sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}
#endif

}  // namespace saccade::SACCADE_ISA
