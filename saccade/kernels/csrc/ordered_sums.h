// Exponentials to the bit, sums of rows in the order of ATen's, and softmax from both.
#pragma once

#include "ordered_numbers.h"

namespace saccade::SACCADE_ISA::ordered {

// --- exponentials ---

// 2^(v log2 e) by the bits of the sum of a whole part and a cubic of the rest: arXiv:1409.2328 with the cubic torch takes for
// softmax in flash attention.
inline float rough_exp(float v) {
  const float scaled = v * LOG2_E;
  const float rest = scaled - floorf(scaled);
  float off = __builtin_fmaf(rest, -0.079204240219773236f, -0.22433836478672356f);
  off = __builtin_fmaf(rest, off, 0.30354260500649682f);
  off = __builtin_fmaf(rest, off, 0.00010703434948458272f);
  const float shifted = __builtin_fmaf(8388608.0f, scaled - off, 8388608.0f * 127.0f);
  const auto bits = static_cast<int32_t>(v < -87.3365479f ? 0.0f : shifted);
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

// a * b + c rounded once, on every processor.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__) || defined(__AVX512F__)
  return fma(a, b, c);
#else
  for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

inline Floats two_to(Ints power) { return (Floats)((power + 127) << 23); }

// e^v for v <= 0 within one unit of the last place: SLEEF's expf_u10, in the order of its operations. Adding 1.5 * 2^23, whose last
// bit is worth 1, rounds to a whole number, halves to even.
inline Floats fine_exp(Floats v) {
  v = larger(splat(-110.0f), v);  // from -104 on the result rounds to zero
  const Floats shifted = v * splat(LOG2_E) + splat(12582912.0f);
  const Floats whole = shifted - splat(12582912.0f);
  const Ints power = (Ints)shifted - 0x4b400000;
  Floats rest = fused(whole, splat(-0.693145751953125f), v);
  rest = fused(whole, splat(-1.428606765330187045e-06f), rest);
  Floats y = fused(splat(0.000198527617612853646278381f), rest, splat(0.00139304355252534151077271f));
  y = fused(y, rest, splat(0.00833336077630519866943359f));
  y = fused(y, rest, splat(0.0416664853692054748535156f));
  y = fused(y, rest, splat(0.166666671633720397949219f));
  y = fused(y, rest, splat(0.5f));
  y = splat(1.0f) + fused(rest * rest, y, rest);
  return y * two_to(power >> 1) * two_to(power - (power >> 1));
}

// --- sums ---

// The lanes of a vector as a tree: halves are added to each other.
inline float folded(float* sums, int64_t lanes) {
  for (int64_t width = lanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// ATen's sum of a row: four vectors side by side; every 2^power of them their sums go up to the next of four levels.
template <int64_t VECTOR>
struct Cascade {
  static constexpr int64_t LEVELS = 4, WIDTH = 4 * VECTOR;
  float sums[LEVELS][WIDTH];

  // at(i, sums): adds the i-th of `count` vectors to VECTOR sums.
  template <class At>
  void add(int64_t count, At&& at) {
    memset(sums, 0, sizeof sums);
    const int64_t rounds = count / 4;
    int64_t bits = 0;
    while ((int64_t{1} << bits) < rounds) ++bits;
    const int64_t power = bits / LEVELS > 4 ? bits / LEVELS : 4;
    const int64_t step = int64_t{1} << power;
    const auto take = [&](int64_t round) {
      for (int64_t i = 0; i < 4; ++i) at(round * 4 + i, sums[0] + i * VECTOR);
    };
    int64_t round = 0;
    while (round + step <= rounds) {
      for (int64_t i = 0; i < step; ++i) take(round++);
      for (int64_t level = 1; level < LEVELS; ++level) {
        for (int64_t i = 0; i < WIDTH; ++i) {
          sums[level][i] += sums[level - 1][i];
          sums[level - 1][i] = 0.0f;
        }
        if (round & (step - 1) << level * power) break;
      }
    }
    while (round < rounds) take(round++);
    for (int64_t level = 1; level < LEVELS; ++level)
      for (int64_t i = 0; i < WIDTH; ++i) sums[0][i] += sums[level][i];
    for (int64_t i = rounds * 4; i < count; ++i) at(i, sums[0]);
    for (int64_t part = 1; part < 4; ++part)
      for (int64_t i = 0; i < VECTOR; ++i) sums[0][i] += sums[0][part * VECTOR + i];
  }
};

// at(i, sums): adds vector i of `vectors`; rest(i): the values after the last vector, up to `count`.
template <int64_t VECTOR, class At, class Rest>
float cascaded(int64_t vectors, int64_t first, int64_t count, At&& at, Rest&& rest) {
  Cascade<VECTOR> cascade;
  cascade.add(vectors, at);
  float sum = 0.0f;
  for (int64_t i = first; i < count; ++i) sum += rest(i);
  for (int64_t i = 0; i < VECTOR; ++i) sum += cascade.sums[0][i];
  return sum;
}

template <int64_t VECTOR>
float sum_row(const float* x, int64_t count) {
  const int64_t vectors = count / VECTOR;
  const auto at = [&](int64_t i, float* sums) {
    for (int64_t j = 0; j < VECTOR; ++j) sums[j] += x[i * VECTOR + j];
  };
  return cascaded<VECTOR>(vectors, vectors * VECTOR, count, at, [&](int64_t i) { return x[i]; });
}

// A vector of bfloat16 has twice the lanes: its halves are added to each other first.
template <int64_t VECTOR>
float sum_row(const uint16_t* x, int64_t count) {
  const int64_t vectors = count / (2 * VECTOR);
  const auto at = [&](int64_t i, float* sums) {
    for (int64_t j = 0; j < VECTOR; ++j) sums[j] += wide(x[i * 2 * VECTOR + j]) + wide(x[(i * 2 + 1) * VECTOR + j]);
  };
  return cascaded<VECTOR>(vectors, vectors * 2 * VECTOR, count, at, [&](int64_t i) { return wide(x[i]); });
}

// y = e^(x - the largest).
inline void exponentials(const float* x, float* y, int64_t count) {
  Floats tops = splat(x[0]);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) tops = larger(tops, load(x + i));
  float top = largest(tops);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  for (i = 0; i + LANES <= count; i += LANES) store(y + i, fine_exp(load(x + i) - splat(top)));
  if (i < count) store_first(y + i, fine_exp(load_first(x + i, count - i) - splat(top)), count - i);
}

// By one vector of sums. In which of its lanes y begins makes no difference: folding pairs them all round.
template <int64_t VECTOR>
float lane_sum(const float* y, int64_t count) {
  float sums[VECTOR] = {};
  int64_t i = 0;
  for (; i + VECTOR <= count; i += VECTOR)
    for (int64_t j = 0; j < VECTOR; ++j) sums[j] += y[i + j];
  for (int64_t j = 0; i < count; ++i, ++j) sums[j] += y[i];
  return folded(sums, VECTOR);
}

// y: [count]. A row shorter than a vector is summed in order.
inline void softmax_row(const float* x, float* y, int64_t count, int64_t lanes) {
  exponentials(x, y, count);
  float sum = 0.0f;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) sum += y[i];
  } else {
    sum = lanes == 16 ? lane_sum<16>(y, count) : lane_sum<8>(y, count);
  }
  const float part = 1.0f / sum;
  for (int64_t i = 0; i < count; ++i) y[i] *= part;
}

// --- softmax ---

// The part of a longer row's softmax that is not zero, rounded to bfloat16. exps: [count] to work in; y may lie where these do.
inline void rounded_softmax(const float* x, float* exps, int64_t count, uint16_t* y) {
  exponentials(x, exps, count);
  const float part = 1.0f / lane_sum<16>(exps, count);
  each_vector(count, [&](int64_t i, int64_t some) {
    store_some(y + i, rounded(load_some(exps + i, some) * splat(part)), some);
  });
}

}  // namespace saccade::SACCADE_ISA::ordered
