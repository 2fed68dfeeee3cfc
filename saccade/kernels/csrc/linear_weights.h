// The rows of a weight as vectors: how each scheme's numbers are widened, and multiplied with x.
//
// A kind of weights says: Value, what x consists of; STEP columns at a time, ADVANCE elements from `address` on, taken by `at` as a Left
// and multiplied with the Right that `input` takes of the next VALUES of a row of x; Group, what a step's values stand for; `end`
// for the columns that are left at the end of a row, zeros beyond it, where HAS_END; `arrange`, which puts a row of x into the
// order `input` wants. Tiles also ask for `span`, the columns that share a group.
#pragma once

#include "linear_input.h"

namespace saccade::SACCADE_ISA {

// Rows of V, one after the other, without groups. Base: what is done with them.
template <class V, class Base>
struct RowMajor : Base {
  const V* values;
  int64_t columns;

  explicit RowMajor(const SaccadeLinear& layer) : values(static_cast<const V*>(layer.values)), columns(layer.in_features) {}

  struct Group {};
  int64_t span() const { return columns; }
  Group group(int64_t, int64_t) const { return {}; }
  static constexpr int64_t ADVANCE = Base::STEP, VALUES = Base::STEP;
  const V* address(int64_t row, int64_t column) const { return values + row * columns + column; }
};

// Groups are powers of two: their numbers come by shifts, for a division takes as long as a group's products.
struct Groups {
  int64_t columns, per_row;
  int shift;

  explicit Groups(const SaccadeLinear& layer)
      : columns(layer.in_features), per_row(layer.in_features / layer.group_size),
        shift(__builtin_ctzll(static_cast<uint64_t>(layer.group_size))) {}

  int64_t size() const { return int64_t{1} << shift; }
  int64_t number(int64_t row, int64_t column) const { return row * per_row + (column >> shift); }
  int64_t number_or_last(int64_t row, int64_t column) const {  // columns beyond the row count to its last group
    return row * per_row + smaller(column >> shift, per_row - 1);
  }
};

// What groups have lies apart from their values, too sparse for the processor to see it coming: a line of scales can serve several
// rows, and waiting for it took as long as multiplying them.
constexpr int64_t GROUPS_AHEAD = 512;  // bytes
template <class V>
inline V of_group(const V* all, int64_t number) {
  __builtin_prefetch(reinterpret_cast<const char*>(all + number) + GROUPS_AHEAD);
  return all[number];
}

// Rows of nibbles in groups (packing.py): of every 32 columns the first 16 are the low nibbles of 16 bytes, the others the high.
template <class Base>
struct NibbleRows : Base {
  const uint8_t* values;
  int64_t columns;
  Groups groups;

  explicit NibbleRows(const SaccadeLinear& layer)
      : values(static_cast<const uint8_t*>(layer.values)), columns(layer.in_features), groups(layer) {}

  const uint8_t* address(int64_t row, int64_t column) const { return values + (row * columns >> 1) + (column >> 1); }
};

inline Int8 load_packed(const uint8_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }
inline Int8 load_packed_part(const uint8_t* p, int64_t columns) {
  return load_part(reinterpret_cast<const int8_t*>(p), columns / 2);
}

// --- in whole numbers ---

struct Integers {
  using Number = int32_t;  // of a sum
  using Sum = SACCADE_ISA::Sum;
  using Right = SACCADE_ISA::Right;
  static constexpr int STEP = BYTES, PARTS = 2;
  static constexpr bool HAS_END = true;
  static Sum zero() { return zero_sum(); }
#if defined(SACCADE_PAIRS)
  using Value = int16_t;
  static Right input(const int16_t* x) { return {load(x), load(x + BYTES / 2)}; }
#else
  using Value = int8_t;
  static Right input(const int8_t* x) { return right(load(x)); }
#endif
  static void arrange(Value*, int64_t) {}
};

struct Bytes : RowMajor<int8_t, Integers> {
  using RowMajor::RowMajor;
  static Left at(const int8_t* from, Group) { return left(load(from)); }
  static Left end(const int8_t* from, int64_t count, Group) { return left(load_part(from, count)); }
};

#if defined(SACCADE_PAIRS)
template <int M>
void add_products(const Bytes&, Sum (&sum)[M], const int8_t* from, const Bytes::Group&, const int16_t* x) {
  const Left w = M <= 2 ? left(load(from)) : load_left(from);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m] = multiply_add(sum[m], w, Bytes::input(x + m * Bytes::VALUES));
}
#endif

// What the 16 nibbles stand for (two's complement: nibble 9 is -7) times each scale a group may have, and OFFSET more.
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

#if defined(SACCADE_PAIRS)

struct PairsLeft {
  Int8 low, high, scale;
};
inline Sum multiply_add(Sum sum, const PairsLeft& w, const WholeBlock& x) {
  Int8 pairs = add_pairs(load(x.start), multiply_pairs(w.low, load(x.values[0])));
  pairs = add_pairs(pairs, multiply_pairs(w.high, load(x.values[1])));
  return multiply_words(sum, pairs, w.scale);
}

// Nibbles 8 too large are unsigned, so that their products add up in 16 bits; the group's scale follows once for each sum.
// IS_FINE: groups may have fewer columns than a vector of nibbles.
template <bool IS_FINE>
struct Nibbles : NibbleRows<Integers> {
  static constexpr bool HAS_END = IS_FINE;  // rows are whole groups
  const int8_t* scales;

  explicit Nibbles(const SaccadeLinear& layer) : NibbleRows(layer), scales(layer.group_scale) {}

  using Value = WholeBlock;
  using Right = const WholeBlock&;
  static constexpr int64_t STEP = PACKED_COLUMNS, ADVANCE = STEP / 2, VALUES = 1;
  static void arrange(WholeBlock*, int64_t) {}
  static Right input(const WholeBlock* x) { return *x; }

  using Group = Int8;
  Group group(int64_t row, int64_t column) const {
    if constexpr (!IS_FINE) return each_run(static_cast<int16_t>(of_group(scales, groups.number(row, column))));
    int16_t each[RUNS];
    for (int64_t run = 0; run < RUNS; ++run) each[run] = of_group(scales, groups.number_or_last(row, column + run * RUN));
    return each_run(each);
  }
  static PairsLeft split(Int8 packed, const Group& scale) {
    const Int8 unsigned_nibbles = flip_nibbles(packed);
    return {low_nibbles(unsigned_nibbles), high_nibbles(unsigned_nibbles), scale};
  }
  static PairsLeft at(const uint8_t* from, const Group& scale) { return split(load_packed(from), scale); }
  static PairsLeft end(const uint8_t* from, int64_t count, const Group& scale) {  // x is zero beyond the row
    return split(load_packed_part(from, count), scale);
  }
};

// VECTORS of nibbles at once, whose group is the same: up to 4, which add 8 products of pairs up in 16 bits.
template <int64_t VECTORS>
struct NibbleVectors : Nibbles<false> {
  static_assert(VECTORS <= 4);
  using Nibbles::Nibbles;
  static constexpr int PARTS = 1;
  static constexpr int64_t STEP = VECTORS * PACKED_COLUMNS, ADVANCE = STEP / 2, VALUES = VECTORS;
  static void arrange(WholeBlock* x, int64_t count) {  // the first block's start is that of all
    for (int64_t column = 0; column < count; column += STEP, x += VECTORS)
      for (int64_t v = 1; v < VECTORS; ++v)
        for (int64_t i = 0; i < BYTES / 2; ++i) x->start[i] = static_cast<int16_t>(x->start[i] + x[v].start[i]);
  }
};

template <int M, int64_t VECTORS>
void add_products(const NibbleVectors<VECTORS>&, Sum (&sum)[M], const uint8_t* from, const Int8& scale, const WholeBlock* x) {
  Int8 pairs[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) pairs[m] = load(x[m * VECTORS].start);
#pragma GCC unroll 4
  for (int64_t v = 0; v < VECTORS; ++v) {
    const PairsLeft w = Nibbles<false>::at(from + v * BYTES, scale);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const WholeBlock& block = x[m * VECTORS + v];
      add_pairs_to(pairs[m], multiply_pairs(w.low, load(block.values[0])));
      add_pairs_to(pairs[m], multiply_pairs(w.high, load(block.values[1])));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m] = multiply_words(sum[m], pairs[m], scale);
}

#else

struct TwoLeft {
  Left low, high;
};
struct TwoRight {
  Right low, high;
};
inline Sum multiply_add(Sum sum, const TwoLeft& w, const TwoRight& x) {
  return multiply_add(multiply_add(sum, w.low, x.low), w.high, x.high);
}

// A vector of nibbles gives two of int8: the first half of each run, and the second. x is put into that order.
// IS_FINE: groups may have fewer columns than a vector of nibbles.
template <bool IS_FINE>
struct Nibbles : NibbleRows<Integers> {
  static constexpr bool HAS_END = IS_FINE;  // rows are whole groups
  const int8_t* scales;

  explicit Nibbles(const SaccadeLinear& layer) : NibbleRows(layer), scales(layer.group_scale) {}

  using Right = TwoRight;
  static constexpr int64_t STEP = PACKED_COLUMNS, ADVANCE = STEP / 2, VALUES = STEP;
  static void arrange(int8_t* x, int64_t count) {
    int8_t block[STEP];
    for (int64_t column = 0; column < count; column += STEP, x += STEP) {
      memcpy(block, x, STEP);
      for (int64_t run = 0; run < RUNS; ++run) {
        memcpy(x + run * RUN / 2, block + run * RUN, RUN / 2);
        memcpy(x + STEP / 2 + run * RUN / 2, block + run * RUN + RUN / 2, RUN / 2);
      }
    }
  }
  static Right input(const int8_t* x) { return {right(load(x)), right(load(x + STEP / 2))}; }

  using Group = Table;
  const int8_t* table(int64_t group) const { return NIBBLE_TABLES<PRODUCT_OFFSET>.rows[of_group(scales, group) & 127]; }
  Group group(int64_t row, int64_t column) const {
    if constexpr (!IS_FINE) return load_table(table(groups.number(row, column)));
    const int8_t* rows[RUNS];
    for (int64_t run = 0; run < RUNS; ++run) rows[run] = table(groups.number_or_last(row, column + run * RUN));
    return load_tables(rows);
  }
  static TwoLeft looked_up(Int8 packed, const Group& table) {
    return {ready(look_up(low_nibbles(packed), table)), ready(look_up(high_nibbles(packed), table))};
  }
  static TwoLeft at(const uint8_t* from, const Group& table) { return looked_up(load_packed(from), table); }
  static TwoLeft end(const uint8_t* from, int64_t count, const Group& table) {
    return looked_up(load_packed_part(from, count), table);
  }
};

#endif

// --- in float32 ---

struct Floats {
  using Value = float;
  using Number = float;
  using Sum = Float;
  using Right = Float;
  static constexpr int STEP = FLOATS, PARTS = 2;
  static constexpr bool HAS_END = true;
  static Sum zero() { return zero_float(); }
  static void arrange(float*, int64_t) {}
  static Right input(const float* x) { return load(x); }
};

// For w8a16.
struct WideBytes : RowMajor<int8_t, Floats> {
  using RowMajor::RowMajor;
  static Float at(const int8_t* from, Group) { return widen(from); }
  static Float end(const int8_t* from, int64_t count, Group) { return widen_part(from, count); }
};

// A vector of bfloat16 is widened where it lies: the even ones by a shift, the odd ones by a mask. x is put into that order.
struct WideHalves : RowMajor<BFloat16, Floats> {
  using RowMajor::RowMajor;
  using Sum = TwoFloats;
  using Right = const float*;
  static constexpr int STEP = BYTES / 2, PARTS = 1;
  static constexpr int64_t ADVANCE = STEP, VALUES = STEP;
  static Sum zero() { return {zero_float(), zero_float()}; }
  static Right input(const float* x) { return x; }
  static void arrange(float* x, int64_t count) { part_pairs<FLOATS>(x, (count + STEP - 1) / STEP * STEP); }
  static TwoFloats widened(Int8 halves) { return {widen_even(halves), widen_odd(halves)}; }
  static TwoFloats at(const BFloat16* from, Group) { return widened(load(reinterpret_cast<const int8_t*>(from))); }
  static TwoFloats end(const BFloat16* from, int64_t count, Group) {
    return widened(load_part(reinterpret_cast<const int8_t*>(from), 2 * count));
  }
};

inline TwoFloats multiply_add(TwoFloats sum, const TwoFloats& w, const float* x) {
  return {multiply_add(sum.even, w.even, load(x)), multiply_add(sum.odd, w.odd, load(x + FLOATS))};
}

struct WideLeft {
  Float values[RUN / FLOATS];
};

// A run of 32 columns at a time.
struct WideNibbles : NibbleRows<Floats> {
  const float* scales;
  const int8_t* zeros;

  explicit WideNibbles(const SaccadeLinear& layer) : NibbleRows(layer), scales(layer.scale), zeros(layer.zero) {}

  static constexpr int64_t STEP = RUN, ADVANCE = RUN / 2, VALUES = RUN;
  static constexpr bool HAS_END = false;  // rows are whole groups
  using Right = const float*;
  static Right input(const float* x) { return x; }

  using Group = FloatTable;
  Group group(int64_t row, int64_t column) const {
    const int64_t group = groups.number(row, column);
    return float_table(of_group(scales, group), zeros == nullptr ? 0.0f : of_group(zeros, group));
  }
  static WideLeft at(const uint8_t* from, const Group& table) {
    WideLeft all;
    for (int i = 0; i < RUN / FLOATS; ++i) all.values[i] = look_up(from, i * FLOATS, table);
    return all;
  }
};

inline Float multiply_add(Float sum, const WideLeft& w, const float* x) {
  for (int i = 0; i < RUN / FLOATS; ++i) sum = multiply_add(sum, w.values[i], load(x + i * FLOATS));
  return sum;
}

// --- in fixed point ---

struct FourWords {
  Int8 parts[4];
};

// For w8a16.
struct FixedBytes : RowMajor<int8_t, Floats> {
  using RowMajor::RowMajor;
  using Value = FixedWords;
  using Right = const FixedWords&;
  static constexpr int64_t STEP = PACKED_COLUMNS, ADVANCE = STEP, VALUES = 1, PARTS = 1;
  static void arrange(FixedWords*, int64_t) {}
  static Right input(const FixedWords* x) { return *x; }
  static FourWords at(const int8_t* from, Group) {
    constexpr int64_t EACH = BYTES / 2;
    return {widen_words(from), widen_words(from + EACH), widen_words(from + 2 * EACH), widen_words(from + 3 * EACH)};
  }
  static FourWords end(const int8_t* from, int64_t count, Group group) {
    int8_t whole[STEP] = {};
    memcpy(whole, from, count);
    return at(whole, group);
  }
};

inline Float multiply_add(Float sum, const FourWords& w, const FixedWords& x) {
  Words whole = zero_words();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) whole = multiply_words(whole, w.parts[i], load(x.values + i * (BYTES / 2)));
  return multiply_add(sum, load(x.scale), widen(whole));
}

template <bool HAS_ZEROS>
struct FixedGroup {
  Float scale, zero;
};
template <>
struct FixedGroup<false> {
  Float scale;
};
template <bool HAS_ZEROS>
struct FixedLeft {
  Int8 packed;
  FixedGroup<HAS_ZEROS> group;
};

// Nibbles as they come out of words of 16 bits, 8 too large: FixedBlock's sums begin with what that will be too much. The sum of a
// step then loses the zero point's share and gets the scales of its group and of x. IS_FINE as above.
template <bool IS_FINE, bool HAS_ZEROS>
struct FixedNibbles : NibbleRows<Floats> {
  static constexpr bool HAS_END = IS_FINE;
  const float* scales;
  const int8_t* zeros;

  explicit FixedNibbles(const SaccadeLinear& layer) : NibbleRows(layer), scales(layer.scale), zeros(layer.zero) {}

  using Value = FixedBlock;
  using Right = const FixedBlock&;
  static constexpr int64_t STEP = PACKED_COLUMNS, ADVANCE = STEP / 2, VALUES = 1, PARTS = 1;
  static void arrange(FixedBlock*, int64_t) {}
  static Right input(const FixedBlock* x) { return *x; }

  using Group = FixedGroup<HAS_ZEROS>;
  template <class V>
  Float each_group(const V* of_groups, int64_t row, int64_t column) const {
    if constexpr (!IS_FINE) return each_run(static_cast<float>(of_group(of_groups, groups.number(row, column))));
    float each[RUNS];
    for (int64_t run = 0; run < RUNS; ++run)
      each[run] = static_cast<float>(of_group(of_groups, groups.number_or_last(row, column + run * RUN)));
    return each_run(each);
  }
  Group group(int64_t row, int64_t column) const {
    if constexpr (HAS_ZEROS) return {each_group(scales, row, column), each_group(zeros, row, column)};
    else return {each_group(scales, row, column)};
  }
  static FixedLeft<HAS_ZEROS> at(const uint8_t* from, const Group& group) {
    return {flip_nibbles(load_packed(from)), group};
  }
  static FixedLeft<HAS_ZEROS> end(const uint8_t* from, int64_t count, const Group& group) {  // x is zero beyond the row
    return {flip_nibbles(load_packed_part(from, count)), group};
  }
};

template <bool HAS_ZEROS>
inline Float multiply_add(Float sum, const FixedLeft<HAS_ZEROS>& w, const FixedBlock& x) {
  Words whole = multiply_words(load_words(x.start), nibble_of_words<0>(w.packed), load(x.values[0]));
  whole = multiply_words(whole, nibble_of_words<1>(w.packed), load(x.values[1]));
  whole = multiply_words(whole, nibble_of_words<2>(w.packed), load(x.values[2]));
  whole = multiply_words(whole, nibble_of_words<3>(w.packed), load(x.values[3]));
  Float exact = widen(whole);
  if constexpr (HAS_ZEROS) exact = multiply_subtract(exact, w.group.zero, load(x.sums));
  return multiply_add(sum, multiply(w.group.scale, load(x.scale)), exact);
}

// --- in pairs of bfloat16, summed in float32 ---

#if defined(__AVX512BF16__)
struct Pairs {
  using Value = BFloat16;
  using Number = float;
  using Sum = Float;
  using Right = __m512i;
  static constexpr int STEP = 32, PARTS = 1;
  static constexpr bool HAS_END = true;
  static Sum zero() { return zero_float(); }
  static void arrange(BFloat16*, int64_t) {}
  static Right input(const BFloat16* x) { return _mm512_loadu_si512(x); }
};

struct DensePairs : RowMajor<BFloat16, Pairs> {
  using RowMajor::RowMajor;
  static __m512i at(const BFloat16* from, Group) { return _mm512_loadu_si512(from); }
  static __m512i end(const BFloat16* from, int64_t count, Group) {
    return _mm512_maskz_loadu_epi16((uint32_t{1} << count) - 1, from);
  }
};

inline Float multiply_add(Float sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}
#endif

}  // namespace saccade::SACCADE_ISA
