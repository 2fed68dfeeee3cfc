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

// What the 16 nibbles stand for (two's complement: nibble 9 is -7) times each scale a group may have.
struct NibbleTables {
  alignas(64) int8_t rows[128][16];
  constexpr NibbleTables() : rows() {
    for (int scale = 0; scale < 128; ++scale)
      for (int nibble = 0; nibble < 16; ++nibble)
        rows[scale][nibble] = static_cast<int8_t>((nibble < 8 ? nibble : nibble - 16) * scale);
  }
};
constexpr NibbleTables NIBBLE_TABLES;

struct Nibbles : Integers {
  const uint8_t* values;
  const int8_t* scales;
  int64_t columns, group_size, groups;

  explicit Nibbles(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), scales(layer.group_scale), columns(layer.in_features),
        group_size(layer.group_size), groups(layer.in_features / layer.group_size) {}

  using Group = Table;
  int64_t span() const { return group_size < STEP ? STEP : group_size; }
  Group group(int64_t row, int64_t column) const {
    const int64_t first = column / group_size, second = smaller((column + STEP / 2) / group_size, groups - 1);
    return load_table(NIBBLE_TABLES.rows[scales[row * groups + first] & 127],
                      NIBBLE_TABLES.rows[scales[row * groups + second] & 127]);
  }

  const uint8_t* address(int64_t row, int64_t column) const { return values + (row * columns + column) / 2; }
  Left at(int64_t row, int64_t column, const Group& table) const {
    return left(look_up(load_nibbles(address(row, column)), table));
  }
  Left end(int64_t row, int64_t column, const Group& table) const {
    return left(look_up(load_nibbles_part(address(row, column)), table));
  }
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
  int64_t columns, group_size, groups;

  explicit WideNibbles(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), scales(layer.scale), zeros(layer.zero),
        columns(layer.in_features), group_size(layer.group_size), groups(layer.in_features / layer.group_size) {}

  using Group = FloatTable;
  int64_t span() const { return group_size; }
  Group group(int64_t row, int64_t column) const {
    const int64_t group = row * groups + column / group_size;
    return float_table(scales[group], zeros == nullptr ? 0.0f : zeros[group]);
  }

  Float at(int64_t row, int64_t column, const Group& table) const {
    return look_up(values + (row * columns + column / 32 * 32) / 2, column % 32, table);
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

inline Float multiply_add(Float sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}
#endif

}  // namespace saccade::SACCADE_ISA
