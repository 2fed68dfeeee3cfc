// Vectors of the instruction set this file is compiled for: loads, products of whole numbers, and sums. Knows no layers.
//
// A vector of int8 has BYTES columns. A product of int8 and int8 is exact: where the processor multiplies unsigned by signed
// (VNNI), the weight w becomes w + 128, and 128 times the sum of x is taken off again (PRODUCT_OFFSET).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace saccade::SACCADE_ISA {

#if defined(__AVX512BW__)

constexpr int BYTES = 64;
constexpr int BLOCK_OUTPUTS = 4, BLOCK_ROWS = 4;  // accumulators that fit the registers
using Int8 = __m512i;
using Sum = __m512i;

inline Int8 load(const int8_t* p) { return _mm512_loadu_si512(p); }
inline Int8 load_part(const int8_t* p, int64_t count) {  // zeros beyond count
  return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - count), p);
}
inline Sum zero_sum() { return _mm512_setzero_si512(); }
inline int32_t total(Sum sum) { return _mm512_reduce_add_epi32(sum); }

#if defined(__AVX512VNNI__)
constexpr int32_t PRODUCT_OFFSET = 128;
using Left = __m512i;
using Right = __m512i;
inline Left left(Int8 w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
inline Right right(Int8 x) { return x; }
inline Sum multiply_add(Sum sum, Left w, Right x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
constexpr int32_t PRODUCT_OFFSET = 0;
struct Left {
  __m512i low, high;
};
using Right = Left;
inline Left left(Int8 w) {
  return {_mm512_cvtepi8_epi16(_mm512_castsi512_si256(w)), _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(w, 1))};
}
inline Right right(Int8 x) { return left(x); }
inline Sum multiply_add(Sum sum, const Left& w, const Right& x) {
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.low, x.low));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w.high, x.high));
}
#endif

#elif defined(__AVX2__)

constexpr int BYTES = 32;
constexpr int BLOCK_OUTPUTS = 2, BLOCK_ROWS = 4;
using Int8 = __m256i;
using Sum = __m256i;

inline Int8 load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Int8 load_part(const int8_t* p, int64_t count) {
  alignas(32) int8_t whole[BYTES] = {};
  memcpy(whole, p, count);
  return load(whole);
}
inline Sum zero_sum() { return _mm256_setzero_si256(); }
inline int32_t total(Sum sum) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

#if defined(__AVXVNNI__)
constexpr int32_t PRODUCT_OFFSET = 128;
using Left = __m256i;
using Right = __m256i;
inline Left left(Int8 w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
inline Right right(Int8 x) { return x; }
inline Sum multiply_add(Sum sum, Left w, Right x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
constexpr int32_t PRODUCT_OFFSET = 0;
struct Left {
  __m256i low, high;
};
using Right = Left;
inline Left left(Int8 w) {
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1))};
}
inline Right right(Int8 x) { return left(x); }
inline Sum multiply_add(Sum sum, const Left& w, const Right& x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.low, x.low));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w.high, x.high));
}
#endif

#else  // any processor: loops that compilers turn into vectors

constexpr int BYTES = 32;
constexpr int BLOCK_OUTPUTS = 1, BLOCK_ROWS = 1;
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
inline int32_t total(Sum sum) { return sum; }
inline const Int8& left(const Int8& w) { return w; }
inline const Int8& right(const Int8& x) { return x; }
inline Sum multiply_add(Sum sum, const Int8& w, const Int8& x) {
  for (int i = 0; i < BYTES; ++i) sum += static_cast<int16_t>(w.values[i]) * static_cast<int16_t>(x.values[i]);
  return sum;
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

}  // namespace saccade::SACCADE_ISA
