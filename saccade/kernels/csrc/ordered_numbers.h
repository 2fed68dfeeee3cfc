// bfloat16 in vectors of float32, each result rounded, and rows that threads share: what everything of a fixed order is made of.
#pragma once

#include "ordered.h"
#include "pool.h"
#include "vector.h"

namespace saccade::SACCADE_ISA::ordered {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float wide(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return value == value ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fc0;
}

// As torch computes in bfloat16: in float32, each result rounded.
inline Floats rounded(Floats v) { return (Floats)bf16_words(v); }

// Halves to even, for |v| < 2^22; larger ones are off by a few.
inline Floats whole(Floats v) { return v + splat(12582912.0f) - splat(12582912.0f); }

inline Floats within(Floats v, float low, float high) { return smaller(splat(high), larger(splat(low), v)); }

inline const Bf16* values(const uint16_t* bits) { return reinterpret_cast<const Bf16*>(bits); }
inline Bf16* values(uint16_t* bits) { return reinterpret_cast<Bf16*>(bits); }

// function(i, count): LANES of `count` at a time, the last time fewer.
template <class Function>
void each_vector(int64_t count, Function&& function) {
  for (int64_t i = 0; i < count; i += LANES) function(i, least(count - i, LANES));
}

template <class T>
inline Floats load_some(const T* at, int64_t count) { return count == LANES ? load(at) : load_first(at, count); }

// v: in bfloat16 already.
inline void store_some(uint16_t* at, Floats v, int64_t count) {
  const Halves halves = upper((Words)v);
  count == LANES ? memcpy(at, &halves, sizeof halves) : memcpy(at, &halves, count * sizeof *at);
}

constexpr int64_t PIECE_OF_ROWS = 16;   // rows a thread takes at once

template <class Function>
void each_row(int64_t rows, Function&& function) {
  Pieces pieces((rows + PIECE_OF_ROWS - 1) / PIECE_OF_ROWS);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;)
      for (int64_t row = piece * PIECE_OF_ROWS; row < rows && row < (piece + 1) * PIECE_OF_ROWS; ++row) function(row);
  });
}

}  // namespace saccade::SACCADE_ISA::ordered
