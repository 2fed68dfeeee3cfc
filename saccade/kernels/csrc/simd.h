// Vectors of the instruction set this file is compiled for: loads, products of whole numbers, and sums. Knows no layers.
//
// A vector of int8 has BYTES columns. A product of int8 and int8 is exact: where the processor multiplies unsigned by signed
// (VNNI), the weight w becomes w + 128, and 128 times the sum of x is taken off again (PRODUCT_OFFSET). SACCADE_PAIRS: x86 without VNNI
// adds pairs of products, unsigned by signed, up in 16 bits (multiply_pairs). Those of nibbles fit; bytes are widened to 16 bits for few
// rows of x, and what might not fit is looked for in many (linear_strays.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include "lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace saccade::SACCADE_ISA {

#if defined(__AVX512BW__)

constexpr int BYTES = 64;
constexpr int STREAM_ROWS = 8;  // whose sums with one output fit the registers
using Int8 = __m512i;
using Sum = __m512i;

inline Int8 load(const int8_t* p) { return _mm512_loadu_si512(p); }
inline Int8 load_part(const int8_t* p, int64_t count) {  // zeros beyond count
  return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - count), p);
}
inline Sum zero_sum() { return _mm512_setzero_si512(); }
inline Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
inline int32_t total(Sum sum) { return _mm512_reduce_add_epi32(sum); }

inline Int8 low_nibbles(Int8 packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
inline Int8 high_nibbles(Int8 packed) { return low_nibbles(_mm512_srli_epi16(packed, 4)); }
using Table = __m512i;  // 16 values for each 16 nibbles
inline Table load_table(const int8_t* row) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
}
inline Table load_tables(const int8_t* const (&rows)[BYTES / 16]) {
  const auto at = [&](int i) { return _mm_load_si128(reinterpret_cast<const __m128i*>(rows[i])); };
  const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
  const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
inline Int8 look_up(Int8 nibbles, Table table) { return _mm512_shuffle_epi8(table, nibbles); }

#if defined(__AVX512VNNI__)
constexpr int32_t PRODUCT_OFFSET = 128;
using Left = __m512i;
using Right = __m512i;
inline Left left(Int8 w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
inline Left ready(Int8 w) { return w; }  // has PRODUCT_OFFSET already
inline Right right(Int8 x) { return x; }
inline Sum multiply_add(Sum sum, Left w, Right x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
#define SACCADE_PAIRS 1
constexpr int32_t PRODUCT_OFFSET = 0;
struct Left {
  __m512i low, high;
};
using Right = Left;
inline Left left(Int8 w) {
  return {_mm512_cvtepi8_epi16(_mm512_castsi512_si256(w)), _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(w, 1))};
}
inline Left load_left(const int8_t* p) {  // halves loaded by themselves: cheaper than taking a vector apart, but twice the loads
  const auto half = [&](int i) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i)); };
  return {half(0), half(1)};
}
inline Int8 multiply_pairs(Int8 u, Int8 s) { return _mm512_maddubs_epi16(u, s); }
inline Int8 add_pairs(Int8 a, Int8 b) { return _mm512_add_epi16(a, b); }
inline Int8 subtract_pairs(Int8 a, Int8 b) { return _mm512_sub_epi16(a, b); }
inline Int8 each_byte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
// Of every 8 bytes two sums of four: bytes 0, 1, 4 and 5, and the others. A bit for each 8 of them, LOUD_BITS apart, says whether the
// positive ones of a sum are more than `most` together, or the negative ones are.
constexpr int LOUD_BITS = 4;
inline uint64_t find_loud(Int8 x, int most) {
  const auto both = [](Int8 pairs) { return _mm512_add_epi16(pairs, _mm512_srli_epi64(pairs, 32)); };
  const Int8 sum = both(_mm512_maddubs_epi16(each_byte(1), x)), magnitude = both(_mm512_maddubs_epi16(_mm512_abs_epi8(x), each_byte(1)));
  const Int8 larger = _mm512_add_epi16(magnitude, _mm512_abs_epi16(sum));  // twice
  const uint64_t lanes = _mm512_cmpgt_epi16_mask(larger, _mm512_set1_epi16(static_cast<short>(2 * most)));
  return (lanes | lanes >> 1) & 0x11111111;
}
inline void store(void* p, Int8 values) { _mm512_storeu_si512(p, values); }
inline Int8 each_run(const int16_t (&values)[BYTES / 16]) {  // 16 bytes are a run of 32 columns
  const __m256i first = _mm256_inserti128_si256(_mm256_set1_epi16(values[0]), _mm_set1_epi16(values[1]), 1);
  const __m256i second = _mm256_inserti128_si256(_mm256_set1_epi16(values[2]), _mm_set1_epi16(values[3]), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
inline Int8 each_run(int16_t value) { return _mm512_set1_epi16(value); }
inline Sum multiply_add(Sum sum, const Left& w, const Right& x) {
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.low, x.low));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w.high, x.high));
}
#endif

#elif defined(__AVX2__)

constexpr int BYTES = 32;
constexpr int STREAM_ROWS = 4;
using Int8 = __m256i;
using Sum = __m256i;

inline Int8 load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Int8 load_part(const int8_t* p, int64_t count) {
  alignas(32) int8_t whole[BYTES] = {};
  memcpy(whole, p, count);
  return load(whole);
}
inline Sum zero_sum() { return _mm256_setzero_si256(); }
inline Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
inline int32_t total(Sum sum) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
inline void totals(const Sum (&sum)[4], int32_t (&all)[4]) { four_sums(sum, all); }

inline Int8 low_nibbles(Int8 packed) { return _mm256_and_si256(packed, _mm256_set1_epi8(15)); }
inline Int8 high_nibbles(Int8 packed) { return low_nibbles(_mm256_srli_epi16(packed, 4)); }
using Table = __m256i;
inline Table load_table(const int8_t* row) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
}
inline Table load_tables(const int8_t* const (&rows)[BYTES / 16]) {
  const auto at = [&](int i) { return _mm_load_si128(reinterpret_cast<const __m128i*>(rows[i])); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
}
inline Int8 look_up(Int8 nibbles, Table table) { return _mm256_shuffle_epi8(table, nibbles); }

#if defined(__AVXVNNI__)
constexpr int32_t PRODUCT_OFFSET = 128;
using Left = __m256i;
using Right = __m256i;
inline Left left(Int8 w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
inline Left ready(Int8 w) { return w; }  // has PRODUCT_OFFSET already
inline Right right(Int8 x) { return x; }
inline Sum multiply_add(Sum sum, Left w, Right x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
#define SACCADE_PAIRS 1
constexpr int32_t PRODUCT_OFFSET = 0;
struct Left {
  __m256i low, high;
};
using Right = Left;
inline Left left(Int8 w) {
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1))};
}
inline Left load_left(const int8_t* p) {  // halves loaded by themselves: cheaper than taking a vector apart, but twice the loads
  const auto half = [&](int i) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i)); };
  return {half(0), half(1)};
}
inline Int8 multiply_pairs(Int8 u, Int8 s) { return _mm256_maddubs_epi16(u, s); }
inline Int8 add_pairs(Int8 a, Int8 b) { return _mm256_add_epi16(a, b); }
inline Int8 subtract_pairs(Int8 a, Int8 b) { return _mm256_sub_epi16(a, b); }
inline Int8 each_byte(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
constexpr int LOUD_BITS = 8;
inline uint64_t find_loud(Int8 x, int most) {
  const auto both = [](Int8 pairs) { return _mm256_add_epi16(pairs, _mm256_srli_epi64(pairs, 32)); };
  const Int8 sum = both(_mm256_maddubs_epi16(each_byte(1), x)), magnitude = both(_mm256_maddubs_epi16(_mm256_abs_epi8(x), each_byte(1)));
  const Int8 larger = _mm256_add_epi16(magnitude, _mm256_abs_epi16(sum));  // twice
  const Int8 lanes = _mm256_cmpgt_epi16(larger, _mm256_set1_epi16(static_cast<short>(2 * most)));
  const auto bytes = static_cast<uint32_t>(_mm256_movemask_epi8(lanes));
  return (bytes | bytes >> 2) & 0x01010101;
}
inline void store(void* p, Int8 values) { _mm256_storeu_si256(static_cast<__m256i*>(p), values); }
inline Int8 each_run(const int16_t (&values)[BYTES / 16]) {  // 16 bytes are a run of 32 columns
  return _mm256_inserti128_si256(_mm256_set1_epi16(values[0]), _mm_set1_epi16(values[1]), 1);
}
inline Int8 each_run(int16_t value) { return _mm256_set1_epi16(value); }
inline Sum multiply_add(Sum sum, const Left& w, const Right& x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.low, x.low));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w.high, x.high));
}
#endif

#else  // any processor: loops that compilers turn into vectors

constexpr int BYTES = 32;
constexpr int STREAM_ROWS = 1;
constexpr int32_t PRODUCT_OFFSET = 0;
struct Int8 {
  int8_t values[BYTES];
};
using Left = Int8;
using Right = Int8;
using Sum = int32_t;

inline Int8 load(const int8_t* p) {
  Int8 all;
  memcpy(all.values, p, BYTES);
  return all;
}
inline Int8 load_part(const int8_t* p, int64_t count) {
  Int8 all = {};
  memcpy(all.values, p, count);
  return all;
}
inline Sum zero_sum() { return 0; }
inline Sum add(Sum a, Sum b) { return a + b; }
inline int32_t total(Sum sum) { return sum; }
inline Int8 low_nibbles(Int8 packed) {
  for (int8_t& value : packed.values) value &= 15;
  return packed;
}
inline Int8 high_nibbles(Int8 packed) {
  for (int8_t& value : packed.values) value = static_cast<int8_t>(static_cast<uint8_t>(value) >> 4);
  return packed;
}
struct Table {
  const int8_t* rows[BYTES / 16];
};
inline Table load_table(const int8_t* row) { return {{row, row}}; }
inline Table load_tables(const int8_t* const (&rows)[BYTES / 16]) { return {{rows[0], rows[1]}}; }
inline Int8 look_up(Int8 nibbles, const Table& table) {
  for (int i = 0; i < BYTES; ++i) nibbles.values[i] = table.rows[i / 16][nibbles.values[i]];
  return nibbles;
}
inline const Int8& left(const Int8& w) { return w; }
inline const Int8& ready(const Int8& w) { return w; }
inline const Int8& right(const Int8& x) { return x; }
inline Sum multiply_add(Sum sum, const Int8& w, const Int8& x) {
  for (int i = 0; i < BYTES; ++i) sum += static_cast<int16_t>(w.values[i]) * static_cast<int16_t>(x.values[i]);
  return sum;
}

#endif

#if defined(SACCADE_PAIRS)
// Written out: told otherwise to keep sums in registers, compilers make products far ahead of them, or copy each sum first.
inline void add_pairs_to(Int8& sum, Int8 pairs) {
#if defined(SACCADE_EMULATED)  // whose vectors fit no register
  sum = add_pairs(sum, pairs);
#else
  asm("vpaddw %1, %0, %0" : "+v"(sum) : "v"(pairs));
#endif
}
#endif

// --- floating-point types of the model ---

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline float to_float(float value) { return value; }
inline float to_float(Float16 value) { return static_cast<float>(value); }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

inline void store(float* p, float value) { *p = value; }
inline void store(Float16* p, float value) { *p = static_cast<Float16>(value); }
inline void store(BFloat16* p, float value) {  // half to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  p->bits = static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

// --- float32: a vector of FLOATS columns ---

#if defined(__AVX512BW__)

constexpr int FLOATS = 16;
using Float = __m512;

inline Float zero_float() { return _mm512_setzero_ps(); }
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline Float multiply_add(Float sum, Float w, Float x) { return _mm512_fmadd_ps(w, x, sum); }
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
inline float total(Float sum) { return _mm512_reduce_add_ps(sum); }
inline Float widen(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}
inline Float widen(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Float widen_part(const BFloat16* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
}
inline Float widen_even(Int8 bfloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16, 16)); }
inline Float widen_odd(Int8 bfloat16) { return _mm512_castsi512_ps(_mm512_and_si512(bfloat16, _mm512_set1_epi32(-0x10000))); }
inline Float widen(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Float widen_part(const int8_t* p, int64_t count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), p)));
}

// What the 16 nibbles stand for: (value - zero) * scale.
using FloatTable = __m512;
inline FloatTable float_table(float scale, float zero) {
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_mul_ps(_mm512_sub_ps(values, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
}
// FLOATS columns of a run: its first half lies in low nibbles, its second in high ones.
inline Float look_up(const uint8_t* run, int column, FloatTable table) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
  return _mm512_permutexvar_ps(column < 16 ? wide : _mm512_srli_epi32(wide, 4), table);  // looks at four bits only
}

#elif defined(__AVX2__)

constexpr int FLOATS = 8;
using Float = __m256;

inline Float zero_float() { return _mm256_setzero_ps(); }
inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline Float multiply_add(Float sum, Float w, Float x) { return _mm256_fmadd_ps(w, x, sum); }
inline float total(Float sum) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void totals(const Float (&sum)[4], float (&all)[4]) { four_sums(sum, all); }  // the bits of `total`
inline Float widen(const BFloat16* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
inline Float widen_even(Int8 bfloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16, 16)); }
inline Float widen_odd(Int8 bfloat16) { return _mm256_castsi256_ps(_mm256_and_si256(bfloat16, _mm256_set1_epi32(-0x10000))); }
inline Float widen(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <class V>
inline Float widen_part(const V* p, int64_t count) {
  V whole[FLOATS] = {};
  memcpy(static_cast<void*>(whole), p, count * sizeof(V));
  return widen(whole);
}

struct FloatTable {
  __m256 scale, offset;
};
inline FloatTable float_table(float scale, float zero) {
  return {_mm256_set1_ps(scale), _mm256_set1_ps((-8.0f - zero) * scale)};
}
inline Float look_up(const uint8_t* run, int column, FloatTable table) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(run + column % 16));
  const __m128i nibbles = _mm_and_si128(column < 16 ? bytes : _mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_xor_si128(nibbles, _mm_set1_epi8(8)));  // value + 8
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), table.scale, table.offset);
}

#else

constexpr int FLOATS = 8;
struct Float {
  float values[FLOATS];
};

inline Float zero_float() { return {}; }
inline Float load(const float* p) {
  Float all;
  memcpy(all.values, p, sizeof(all.values));
  return all;
}
inline Float multiply_add(Float sum, const Float& w, const Float& x) {
  for (int i = 0; i < FLOATS; ++i) sum.values[i] += w.values[i] * x.values[i];
  return sum;
}
inline Float add(Float a, const Float& b) {
  for (int i = 0; i < FLOATS; ++i) a.values[i] += b.values[i];
  return a;
}
inline float total(const Float& sum) {
  float s = 0;
  for (int i = 0; i < FLOATS; ++i) s += sum.values[i];
  return s;
}
inline float widen(BFloat16 value) { return to_float(value); }
inline float widen(int8_t value) { return value; }
inline Float widen_half(const Int8& bfloat16, int first) {
  BFloat16 halves[BYTES / 2];
  memcpy(static_cast<void*>(halves), bfloat16.values, BYTES);
  Float all;
  for (int i = 0; i < FLOATS; ++i) all.values[i] = to_float(halves[2 * i + first]);
  return all;
}
inline Float widen_even(const Int8& bfloat16) { return widen_half(bfloat16, 0); }
inline Float widen_odd(const Int8& bfloat16) { return widen_half(bfloat16, 1); }
template <class V>
inline Float widen_part(const V* p, int64_t count) {
  Float all = {};
  for (int i = 0; i < count; ++i) all.values[i] = widen(p[i]);
  return all;
}
template <class V>
inline Float widen(const V* p) {
  return widen_part(p, FLOATS);
}

struct FloatTable {
  float scale, zero;
};
inline FloatTable float_table(float scale, float zero) { return {scale, zero}; }
inline Float look_up(const uint8_t* run, int column, FloatTable table) {
  Float all;
  for (int i = 0; i < FLOATS; ++i) {
    const int nibble = column < 16 ? run[column + i] & 15 : run[column % 16 + i] >> 4;
    all.values[i] = (static_cast<float>(nibble < 8 ? nibble : nibble - 16) - table.zero) * table.scale;
  }
  return all;
}

#endif

// Two sums that take turns.
struct TwoFloats {
  Float even, odd;
};
inline float total(const TwoFloats& sum) { return total(add(sum.even, sum.odd)); }

template <int M, class S, class N>
void totals(const S (&sum)[M], N (&all)[M]) {
  for (int m = 0; m < M; ++m) all[m] = total(sum[m]);
}

// --- words of 16 bits, and sums of their products in lanes of 32, as many as FLOATS ---

#if defined(__AVX512BW__)

using Words = __m512i;

inline Words zero_words() { return _mm512_setzero_si512(); }
inline Words load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Int8 widen_words(const int8_t* p) {  // BYTES / 2 of them
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Int8 load(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Int8 flip_nibbles(Int8 packed) { return _mm512_xor_si512(packed, _mm512_set1_epi8(-0x78)); }  // value + 8
template <int I>
inline Int8 nibble_of_words(Int8 packed) {
  const __m512i low = I == 0 ? packed : _mm512_srli_epi16(packed, 4 * I);
  return I == 3 ? low : _mm512_and_si512(low, _mm512_set1_epi16(15));
}
inline Words multiply_words(Words sum, Int8 w, Int8 x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, w, x);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}
inline Float widen(Words sum) { return _mm512_cvtepi32_ps(sum); }
inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float multiply_subtract(Float from, Float a, Float b) { return _mm512_fnmadd_ps(a, b, from); }
inline Float each_run(const float (&values)[BYTES / 16]) {  // four lanes are a run of 32 columns
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                               _mm512_castps128_ps512(_mm_loadu_ps(values)));
}
inline Float each_run(float value) { return _mm512_set1_ps(value); }

#elif defined(__AVX2__)

using Words = __m256i;

inline Words zero_words() { return _mm256_setzero_si256(); }
inline Words load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Int8 widen_words(const int8_t* p) {  // BYTES / 2 of them
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Int8 load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Int8 flip_nibbles(Int8 packed) { return _mm256_xor_si256(packed, _mm256_set1_epi8(-0x78)); }
template <int I>
inline Int8 nibble_of_words(Int8 packed) {
  const __m256i low = I == 0 ? packed : _mm256_srli_epi16(packed, 4 * I);
  return I == 3 ? low : _mm256_and_si256(low, _mm256_set1_epi16(15));
}
inline Words multiply_words(Words sum, Int8 w, Int8 x) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, w, x);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
#endif
}
inline Float widen(Words sum) { return _mm256_cvtepi32_ps(sum); }
inline Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float multiply_subtract(Float from, Float a, Float b) { return _mm256_fnmadd_ps(a, b, from); }
inline Float each_run(const float (&values)[BYTES / 16]) {
  return _mm256_insertf128_ps(_mm256_set1_ps(values[0]), _mm_set1_ps(values[1]), 1);
}
inline Float each_run(float value) { return _mm256_set1_ps(value); }

#else

struct Words {
  int32_t values[FLOATS];
};

inline Words zero_words() { return {}; }
inline Int8 widen_words(const int8_t* p) {  // BYTES / 2 of them
  int16_t words[BYTES / 2];
  for (int i = 0; i < BYTES / 2; ++i) words[i] = p[i];
  Int8 all;
  memcpy(all.values, words, BYTES);
  return all;
}
inline Words load_words(const int32_t* p) {
  Words all;
  memcpy(all.values, p, sizeof(all.values));
  return all;
}
inline Int8 load(const int16_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }
inline Int8 flip_nibbles(Int8 packed) {
  for (int8_t& value : packed.values) value = static_cast<int8_t>(value ^ 0x88);
  return packed;
}
template <int I>
inline Int8 nibble_of_words(Int8 packed) {
  uint16_t words[BYTES / 2];
  memcpy(words, packed.values, BYTES);
  for (uint16_t& word : words) word = word >> 4 * I & 15;
  memcpy(packed.values, words, BYTES);
  return packed;
}
inline Words multiply_words(Words sum, const Int8& w, const Int8& x) {
  int16_t left[BYTES / 2], right[BYTES / 2];
  memcpy(left, w.values, BYTES);
  memcpy(right, x.values, BYTES);
  for (int i = 0; i < FLOATS; ++i) sum.values[i] += left[2 * i] * right[2 * i] + left[2 * i + 1] * right[2 * i + 1];
  return sum;
}
inline Float widen(const Words& sum) {
  Float all;
  for (int i = 0; i < FLOATS; ++i) all.values[i] = static_cast<float>(sum.values[i]);
  return all;
}
inline Float multiply(Float a, const Float& b) {
  for (int i = 0; i < FLOATS; ++i) a.values[i] *= b.values[i];
  return a;
}
inline Float multiply_subtract(Float from, const Float& a, const Float& b) {
  for (int i = 0; i < FLOATS; ++i) from.values[i] -= a.values[i] * b.values[i];
  return from;
}
inline Float each_run(const float (&values)[BYTES / 16]) {
  Float all;
  for (int i = 0; i < FLOATS; ++i) all.values[i] = values[i / 4];
  return all;
}
inline Float each_run(float value) { return each_run({value, value}); }

#endif

}  // namespace saccade::SACCADE_ISA
