// Vectors of floats as wide as the instruction set, and numbers kept narrower than they are computed in.
//
// Written in the compiler's vector types, so that one source serves every instruction set. For files of KERNELS; knows no kernel.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SACCADE_LANES 16
#elif defined(__AVX__)
#define SACCADE_LANES 8
#else
#define SACCADE_LANES 4
#endif

namespace saccade::SACCADE_ISA {

constexpr int LANES = SACCADE_LANES;
typedef float Floats __attribute__((vector_size(4 * SACCADE_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * SACCADE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * SACCADE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * SACCADE_LANES)));
typedef int8_t Bytes __attribute__((vector_size(SACCADE_LANES)));

struct Bf16 {
  uint16_t bits;
};
using Fp16 = _Float16;
typedef Fp16 Fp16s __attribute__((vector_size(2 * SACCADE_LANES)));

// A loop over the lanes would be compiled to an insertion for each.
inline Floats splat(float value) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(value);
#elif defined(__AVX__)
  return (Floats)_mm256_set1_ps(value);
#else
  return Floats{value, value, value, value};
#endif
}

// a * b + c, rounded once where the instruction set can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Floats load(const float* at) {
  Floats v;
  memcpy(&v, at, sizeof v);
  return v;
}

inline Floats load(const Bf16* at) {
#if SACCADE_LANES == 8 && defined(__AVX2__)
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return (Floats)_mm256_slli_epi32(words, 16);
#endif
  Halves halves;
  memcpy(&halves, at, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline Floats load(const Fp16* at) {
  Fp16s halves;
  memcpy(&halves, at, sizeof halves);
  return __builtin_convertvector(halves, Floats);
}

inline Floats load(const int8_t* at) {
  Bytes bytes;
  memcpy(&bytes, at, sizeof bytes);
  return __builtin_convertvector(bytes, Floats);
}

// To the nearest of bfloat16, halves to even, NaN to the quiet one, in the upper half of each word: what torch does.
inline Words bf16_words(Floats v) {
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (v == v ? rounded : Words{} + 0x7fc00000u) & 0xffff0000u;
}

// The upper half of each word.
inline Halves upper(Words words) {
  const Words high = words >> 16;
#if SACCADE_LANES == 8 && defined(__AVX2__)
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)high), _mm256_extracti128_si256((__m256i)high, 1));
#else
  return __builtin_convertvector(high, Halves);
#endif
}

// v to the nearest of bfloat16, as above; but the processor's own instruction makes zeros of numbers below 2^-126.
inline Halves to_bf16(Floats v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  return upper(bf16_words(v));
#endif
}

inline void store(float* at, Floats v) { memcpy(at, &v, sizeof v); }

inline void store(Bf16* at, Floats v) {
  Halves halves = to_bf16(v);
  memcpy(at, &halves, sizeof halves);
}

inline void store(Fp16* at, Floats v) {
  const Fp16s halves = __builtin_convertvector(v, Fp16s);
  memcpy(at, &halves, sizeof halves);
}

// The first `count` lanes, the others zero; for the end of a row.
template <class T>
inline Floats load_first(const T* at, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Floats)_mm512_maskz_loadu_ps(mask, at);
  if constexpr (sizeof(T) == 2) {
    T whole[LANES];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(mask, at));
    return load(whole);
  }
#endif
  T padded[LANES] = {};
  memcpy(padded, at, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_first(T* at, Floats v, int64_t count) {
  T padded[LANES];
  store(padded, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(at, mask, (__m512)v);
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(at, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
#endif
  memcpy(at, padded, count * sizeof(T));
}

// v as a value of type T has it.
template <class T>
inline Floats rounded_to(Floats v) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) return (Floats)(__builtin_convertvector(to_bf16(v), Words) << 16);
#else
  if constexpr (std::is_same_v<T, Bf16>) return (Floats)bf16_words(v);
#endif
  if constexpr (std::is_same_v<T, Fp16>) return __builtin_convertvector(__builtin_convertvector(v, Fp16s), Floats);
  return v;
}

// 1 / v, within two units of the last place.
inline Floats reciprocal(Floats v) {
#if defined(__AVX512F__)
  const Floats about = (Floats)_mm512_rcp14_ps((__m512)v);
  return fma(about, fma(-v, about, splat(1.0f)), about);
#else
  return splat(1.0f) / v;
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
#endif
}

// Of a NaN and a number, b.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// 2^x, off by 1e-7 of it at most; 2^-126 below -126, 2^127 above 127, NaN for NaN. Adding 1.5 * 2^23, whose last bit is worth 1,
// splits off the whole part. The polynomial is fitted to 2^x on [-1/2, 1/2], and is 1 at 0.
inline Floats power_of_two(Floats x) {
  x = smaller(splat(127.0f), larger(splat(-126.0f), x));
#if defined(__AVX512F__)
  const __m512 exponent = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats rest = x - (Floats)exponent;
#else
  const Floats shifted = x + 12582912.0f;
  const Floats rest = x - (shifted - 12582912.0f);
  const Ints exponent = ((Ints)shifted - 0x4b400000 + 127) << 23;
#endif
  Floats y = splat(0x1.444004p-13f);
  y = fma(y, rest, splat(0x1.5f0896p-10f));
  y = fma(y, rest, splat(0x1.3b2a1cp-7f));
  y = fma(y, rest, splat(0x1.c6af6cp-5f));
  y = fma(y, rest, splat(0x1.ebfbe0p-3f));
  y = fma(y, rest, splat(0x1.62e430p-1f));
  y = fma(y, rest, splat(1.0f));
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)y, exponent);
#else
  return y * (Floats)exponent;
#endif
}

constexpr float LOG2_E = 1.44269504f;

}  // namespace saccade::SACCADE_ISA
