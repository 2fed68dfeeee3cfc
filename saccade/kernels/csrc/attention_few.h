// Attention of few rows over keys and values of bfloat16, read where they lie: for them, packing takes as long as multiplying.
//
// Sums are kept of ROWS rows by two vectors, or by two keys: 8 of them, as many as hide how long one takes. A vector of bfloat16 is
// widened where it lies, the even numbers by a shift, the odd ones by a mask; queries and sums are in that order too.
#pragma once

#include "lanes.h"
#include "vector.h"

namespace saccade::SACCADE_ISA {

constexpr int64_t PAIR = 2 * LANES;  // numbers of bfloat16 in a vector: heads are whole ones
constexpr int64_t FEW_ROWS_AT_ONCE = 4;
constexpr int64_t VALUES_AT_ONCE = 64;  // keys whose values stay in the first-level cache

struct EvenOdd {
  Floats even, odd;
};
inline EvenOdd widen_pairs(const Bf16* at) {
  Words words;
  memcpy(&words, at, sizeof words);
  return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

// Fetches what is read soon: rows of a head lie pages apart, where the processor does not guess.
inline void fetch(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
  __builtin_prefetch(at + bytes - 1);
}

// scores[r * scores_stride + k] = q[r] . keys[k], for ROWS rows of q, `q_stride` floats apart, and KEYS keys.
template <int ROWS, int KEYS>
void score(const float* q, int64_t q_stride, const Bf16* const* keys, int64_t head_dim, float* scores, int64_t scores_stride) {
  Floats sums[ROWS][KEYS] = {};
  for (int64_t i = 0; i < head_dim; i += PAIR) {
    EvenOdd key[KEYS];
#pragma GCC unroll 2
    for (int k = 0; k < KEYS; ++k) key[k] = widen_pairs(keys[k] + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats even = load(q + r * q_stride + i), odd = load(q + r * q_stride + i + LANES);
#pragma GCC unroll 2
      for (int k = 0; k < KEYS; ++k) sums[r][k] = fma(key[k].odd, odd, fma(key[k].even, even, sums[r][k]));
    }
  }
#if SACCADE_LANES == 8 && defined(__AVX2__)
  if constexpr (ROWS == 4) {  // with the bits of sum()
#pragma GCC unroll 2
    for (int k = 0; k < KEYS; ++k) {
      const __m256 of_key[4] = {(__m256)sums[0][k], (__m256)sums[1][k], (__m256)sums[2][k], (__m256)sums[3][k]};
      float all[4];
      four_sums(of_key, all);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) scores[r * scores_stride + k] = all[r];
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int k = 0; k < KEYS; ++k) scores[r * scores_stride + k] = sum(sums[r][k]);
}

// sums[r] += weights[r][k] * values[k] over `count` keys, for ROWS rows and one PAIR of columns.
template <int ROWS>
void add_values(const float* weights, int64_t weights_stride, const Bf16* const* values, int64_t column, int64_t count, float* sums,
                int64_t sums_stride) {
  EvenOdd all[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) all[r] = {load(sums + r * sums_stride), load(sums + r * sums_stride + LANES)};
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    const EvenOdd value = widen_pairs(values[k] + column);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats weight = splat(weights[r * weights_stride + k]);
      all[r].even = fma(weight, value.even, all[r].even);
      all[r].odd = fma(weight, value.odd, all[r].odd);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    store(sums + r * sums_stride, all[r].even);
    store(sums + r * sums_stride + LANES, all[r].odd);
  }
}

// Calls take<ROWS>(first row) for groups of at most FEW_ROWS_AT_ONCE rows. A row's bits don't depend on its group.
template <class Take>
void by_groups(int64_t rows, Take&& take) {
  for (int64_t row = 0; row < rows; row += FEW_ROWS_AT_ONCE) {
    const int64_t left = rows - row;
    if (left == 1) take(std::integral_constant<int, 1>{}, row);
    else if (left == 2) take(std::integral_constant<int, 2>{}, row);
    else if (left == 3) take(std::integral_constant<int, 3>{}, row);
    else take(std::integral_constant<int, 4>{}, row);
  }
}

// scores [rows, scores_stride] of `count` keys; q: [rows, q_stride], parted. Fetches the values.
inline void score_few(const float* q, int64_t q_stride, int64_t rows, const Bf16* const* keys, const Bf16* const* values,
                      int64_t count, int64_t head_dim, float* scores, int64_t scores_stride) {
  constexpr int64_t KEYS_AHEAD = 16;
  int64_t key = 0;
  for (; key + 2 <= count; key += 2) {
    for (int64_t k = key; k < key + 2; ++k) {
      if (k + KEYS_AHEAD < count) fetch(keys[k + KEYS_AHEAD], head_dim * sizeof(Bf16));
      fetch(values[k], head_dim * sizeof(Bf16));
    }
    by_groups(rows, [&](auto size, int64_t row) {
      score<size(), 2>(q + row * q_stride, q_stride, keys + key, head_dim, scores + row * scores_stride + key, scores_stride);
    });
  }
  if (key < count)
    by_groups(rows, [&](auto size, int64_t row) {
      score<size(), 1>(q + row * q_stride, q_stride, keys + key, head_dim, scores + row * scores_stride + key, scores_stride);
    });
}

// sums [rows, sums_stride] += weights [rows, weights_stride] times `count` values; sums are parted.
inline void add_few(const float* weights, int64_t weights_stride, int64_t rows, const Bf16* const* values, int64_t count,
                    int64_t head_dim, float* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < count; first += VALUES_AT_ONCE) {
    const int64_t some = count - first < VALUES_AT_ONCE ? count - first : VALUES_AT_ONCE;
    for (int64_t column = 0; column < head_dim; column += PAIR)
      by_groups(rows, [&](auto size, int64_t row) {
        add_values<size()>(weights + row * weights_stride + first, weights_stride, values + first, column, some,
                           sums + row * sums_stride + column, sums_stride);
      });
  }
}

}  // namespace saccade::SACCADE_ISA
