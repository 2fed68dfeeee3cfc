// What is done with the lanes of vectors, for simd.h and vector.h alike.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace saccade::SACCADE_ISA {

// A row of `count` floats, a multiple of 2 * LANES: of each so many, the even ones before the odd ones; and back. A vector of bfloat16 is
// widened into two in that order, where it lies: by a shift, and by a mask.
template <int LANES>
void part_pairs(float* row, int64_t count) {
  for (int64_t first = 0; first < count; first += 2 * LANES, row += 2 * LANES) {
    float joined[2 * LANES];
    memcpy(joined, row, sizeof joined);
    for (int i = 0; i < LANES; ++i) {
      row[i] = joined[2 * i];
      row[LANES + i] = joined[2 * i + 1];
    }
  }
}
template <int LANES>
void join_pairs(float* row, int64_t count) {
  for (int64_t first = 0; first < count; first += 2 * LANES, row += 2 * LANES) {
    float parted[2 * LANES];
    memcpy(parted, row, sizeof parted);
    for (int i = 0; i < LANES; ++i) {
      row[2 * i] = parted[i];
      row[2 * i + 1] = parted[LANES + i];
    }
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The sums of four vectors at once: a third of the instructions of four sums. Each is added up as
// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
inline void four_sums(const __m256 (&v)[4], float (&sums)[4]) {
  const auto half = [&](int i) { return _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1)); };
  const auto quarters = [](__m128 a, __m128 b) { return _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)); };
  const __m128 low = quarters(half(0), half(1)), high = quarters(half(2), half(3));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low)));
}

inline void four_sums(const __m256i (&v)[4], int32_t (&sums)[4]) {
  const auto half = [&](int i) { return _mm_add_epi32(_mm256_castsi256_si128(v[i]), _mm256_extracti128_si256(v[i], 1)); };
  const auto quarters = [](__m128i a, __m128i b) { return _mm_add_epi32(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)); };
  const __m128i low = quarters(half(0), half(1)), high = quarters(half(2), half(3));
  const __m128i all = _mm_add_epi32(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), all);
}

#endif

}  // namespace saccade::SACCADE_ISA
