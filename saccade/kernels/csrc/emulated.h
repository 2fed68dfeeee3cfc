// AVX-512, VNNI, BF16 and AMX in software, so that any processor with AVX2 runs the kernels written for them: see SACCADE_EMULATE in
// CMakeLists.txt, which puts this file in front of each of them. For tests: it is slow.
//
// The functions have the names of the intrinsics, and hide these, as they are found first from within namespace saccade: one that is
// missing here does not compile. Each does what Intel's manual says of its instruction. What the manual leaves undefined is garbage
// here, and what it forbids ends the program, as it would there.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// Only now: the compiler's own header would take these for its options.
#if defined(EMULATE_AVXVNNI)
#define __AVXVNNI__ 1
#endif
#if defined(EMULATE_AVX512)
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#endif
#if defined(EMULATE_AVX512VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(EMULATE_AVX512BF16)
#define __AVX512BF16__ 1
#endif
#if defined(EMULATE_AMX)
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#endif
#undef _mm512_setr_epi32  // and these are macros
#undef _mm512_setr_ps
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps

namespace saccade {
namespace {

inline void require(bool is_allowed) {
  if (!is_allowed) __builtin_trap();
}
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// The bits of a vector as numbers of type T, and back.
template <class T, int BYTES = 64>
struct Lanes {
  static constexpr int COUNT = BYTES / sizeof(T), QUARTER = 16 / sizeof(T);  // the latter of 128 bits
  alignas(64) T at[COUNT];

  Lanes() = default;
  template <class V>
  explicit Lanes(const V& vector) {
    static_assert(sizeof(V) == BYTES);
    memcpy(at, &vector, BYTES);
  }
  template <class V>
  operator V() const {
    static_assert(sizeof(V) == BYTES);
    V vector;
    memcpy(&vector, at, BYTES);
    return vector;
  }
};
using Floats16 = Lanes<float>;
using Words16 = Lanes<uint32_t>;
using Halves32 = Lanes<uint16_t>;
using Bytes64 = Lanes<uint8_t>;

// --- memory ---

inline __m512i _mm512_loadu_si512(const void* p) { return Bytes64(*static_cast<const uint8_t(*)[64]>(p)); }
inline __m512i _mm512_load_si512(const void* p) { return require(is_aligned(p)), _mm512_loadu_si512(p); }
inline __m512 _mm512_loadu_ps(const void* p) { return (__m512)_mm512_loadu_si512(p); }
inline void _mm512_storeu_si512(void* p, __m512i v) { memcpy(p, &v, 64); }
inline void _mm512_store_si512(void* p, __m512i v) { require(is_aligned(p)), _mm512_storeu_si512(p, v); }

// Touches no memory whose bit is not set.
template <class T, int BYTES>
inline Lanes<T, BYTES> load_masked(uint64_t mask, const void* p) {
  Lanes<T, BYTES> to;
  for (int i = 0; i < to.COUNT; ++i) {
    to.at[i] = 0;
    if (mask >> i & 1) memcpy(to.at + i, static_cast<const T*>(p) + i, sizeof(T));
  }
  return to;
}
template <class T, int BYTES>
inline void store_masked(void* p, uint64_t mask, const Lanes<T, BYTES>& v) {
  for (int i = 0; i < v.COUNT; ++i)
    if (mask >> i & 1) memcpy(static_cast<T*>(p) + i, v.at + i, sizeof(T));
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) { return load_masked<uint32_t, 64>(mask, p); }
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) { return load_masked<uint16_t, 64>(mask, p); }
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) { return load_masked<uint8_t, 64>(mask, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) { return load_masked<uint16_t, 32>(mask, p); }
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* p) { return load_masked<uint8_t, 16>(mask, p); }
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) { store_masked(p, mask, Words16(v)); }
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) { store_masked(p, mask, Lanes<uint16_t, 32>(v)); }

// --- the same in all lanes, parts of vectors ---

inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_set1_epi8(char value) { return (__m512i)(__v64qi{} + value); }
inline __m512i _mm512_set1_epi16(short value) { return (__m512i)(__v32hi{} + value); }
inline __m512i _mm512_set1_epi32(int value) { return (__m512i)(__v16si{} + value); }
inline __m512 _mm512_set1_ps(float value) {
  return __m512{value, value, value, value, value, value, value, value, value, value, value, value, value, value, value, value};
}
template <class... Values>
inline __m512i _mm512_setr_epi32(Values... values) {
  return (__m512i)__v16si{values...};
}
template <class... Values>
inline __m512 _mm512_setr_ps(Values... values) {
  return __m512{static_cast<float>(values)...};
}

inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  __m256i to;
  memcpy(&to, reinterpret_cast<const char*>(&v) + 32 * (half & 1), 32);
  return to;
}
inline __m512i _mm512_inserti64x4(__m512i v, __m256i half, int place) {
  memcpy(reinterpret_cast<char*>(&v) + 32 * (place & 1), &half, 32);
  return v;
}
inline __m512i garbage() { return _mm512_set1_epi32(static_cast<int>(0xFFA5A5A5)); }  // as floats: NaN
inline __m512i _mm512_castsi256_si512(__m256i v) { return _mm512_inserti64x4(garbage(), v, 0); }
inline __m512 _mm512_castps128_ps512(__m128 v) {
  __m512i to = garbage();
  memcpy(&to, &v, 16);
  return (__m512)to;
}
inline __m256i _mm512_castsi512_si256(__m512i v) { return _mm512_extracti64x4_epi64(v, 0); }
inline __m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }
inline __m512i _mm512_broadcast_i32x4(__m128i v) {
  __m512i to;
  for (int i = 0; i < 4; ++i) memcpy(reinterpret_cast<char*>(&to) + 16 * i, &v, 16);
  return to;
}

// --- lanes change places: within 128 bits, or anywhere ---

template <class T>
inline Lanes<T> unpack(const Lanes<T>& a, const Lanes<T>& b, int first) {
  Lanes<T> to;
  for (int start = 0; start < to.COUNT; start += to.QUARTER)
    for (int i = 0; i < to.QUARTER / 2; ++i) {
      to.at[start + 2 * i] = a.at[start + first + i];
      to.at[start + 2 * i + 1] = b.at[start + first + i];
    }
  return to;
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpack(Words16(a), Words16(b), 0); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpack(Words16(a), Words16(b), 2); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpack(Lanes<uint64_t>(a), Lanes<uint64_t>(b), 0); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpack(Lanes<uint64_t>(a), Lanes<uint64_t>(b), 1); }

inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {  // two quarters of a, then two of b
  __m512i to;
  for (int i = 0; i < 4; ++i)
    memcpy(reinterpret_cast<char*>(&to) + 16 * i, reinterpret_cast<const char*>(i < 2 ? &a : &b) + 16 * (which >> 2 * i & 3), 16);
  return to;
}
inline __m512i _mm512_shuffle_epi8(__m512i table, __m512i places) {
  const Bytes64 from(table), at(places);
  Bytes64 to;
  for (int i = 0; i < 64; ++i) to.at[i] = at.at[i] & 0x80 ? 0 : from.at[i / 16 * 16 + (at.at[i] & 15)];
  return to;
}
inline __m512 _mm512_permutexvar_ps(__m512i places, __m512 v) {
  const Words16 from(v), at(places);
  Words16 to;
  for (int i = 0; i < 16; ++i) to.at[i] = from.at[at.at[i] & 15];
  return to;
}

// --- whole numbers ---

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((__v32hu)a + (__v32hu)b); }
inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return (__m512i)((__v32hu)a - (__v32hu)b); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((__v16su)a + (__v16su)b); }
inline __m512i _mm512_slli_epi32(__m512i v, unsigned by) { return by < 32 ? (__m512i)((__v16su)v << by) : __m512i{}; }
inline __m512i _mm512_srli_epi32(__m512i v, unsigned by) { return by < 32 ? (__m512i)((__v16su)v >> by) : __m512i{}; }
inline __m512i _mm512_srli_epi16(__m512i v, unsigned by) { return by < 16 ? (__m512i)((__v32hu)v >> by) : __m512i{}; }

inline __m512i _mm512_srli_epi64(__m512i v, unsigned by) { return by < 64 ? (__m512i)((__v8du)v >> by) : __m512i{}; }
template <class T>
inline __m512i magnitudes(__m512i v) {  // the smallest stays as it is
  Lanes<T> to(v);
  for (T& each : to.at) each = static_cast<T>(each < 0 ? -each : each);
  return to;
}
inline __m512i _mm512_abs_epi8(__m512i v) { return magnitudes<int8_t>(v); }
inline __m512i _mm512_abs_epi16(__m512i v) { return magnitudes<int16_t>(v); }
inline __mmask32 _mm512_cmpgt_epi16_mask(__m512i a, __m512i b) {
  const Lanes<int16_t> left(a), right(b);
  __mmask32 greater = 0;
  for (int i = 0; i < 32; ++i) greater |= static_cast<__mmask32>(left.at[i] > right.at[i]) << i;
  return greater;
}

template <class To, class From, class V>
inline __m512i widened(const V& v) {
  const Lanes<From, sizeof(V)> from(v);
  Lanes<To> to;
  for (int i = 0; i < to.COUNT; ++i) to.at[i] = from.at[i];
  return to;
}
inline __m512i _mm512_cvtepi8_epi16(__m256i v) { return widened<int16_t, int8_t>(v); }
inline __m512i _mm512_cvtepi8_epi32(__m128i v) { return widened<int32_t, int8_t>(v); }
inline __m512i _mm512_cvtepu8_epi32(__m128i v) { return widened<int32_t, uint8_t>(v); }
inline __m512i _mm512_cvtepu16_epi32(__m256i v) { return widened<int32_t, uint16_t>(v); }

// sums[i] += the products of A and B that lie in word i; sums wrap around.
template <class A, class B, class V>
inline V add_products(const V& sums, const V& a, const V& b) {
  constexpr int EACH = 4 / sizeof(A);
  const Lanes<A, sizeof(V)> left(a);
  const Lanes<B, sizeof(V)> right(b);
  Lanes<uint32_t, sizeof(V)> to(sums);
  for (int i = 0; i < to.COUNT; ++i)
    for (int j = 0; j < EACH; ++j) to.at[i] += static_cast<uint32_t>(int32_t{left.at[EACH * i + j]} * right.at[EACH * i + j]);
  return to;
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) { return add_products<int16_t, int16_t>(__m512i{}, a, b); }
inline __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) { return add_products<int16_t, int16_t>(sums, a, b); }
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i u, __m512i s) { return add_products<uint8_t, int8_t>(sums, u, s); }
inline __m256i _mm256_dpwssd_avx_epi32(__m256i sums, __m256i a, __m256i b) { return add_products<int16_t, int16_t>(sums, a, b); }
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sums, __m256i u, __m256i s) { return add_products<uint8_t, int8_t>(sums, u, s); }

inline __m512i _mm512_maddubs_epi16(__m512i u, __m512i s) {  // saturates
  const Bytes64 left(u);
  const Lanes<int8_t> right(s);
  Lanes<int16_t> to;
  for (int i = 0; i < 32; ++i) {
    const int sum = left.at[2 * i] * right.at[2 * i] + left.at[2 * i + 1] * right.at[2 * i + 1];
    to.at[i] = static_cast<int16_t>(sum < -32768 ? -32768 : sum > 32767 ? 32767 : sum);
  }
  return to;
}

// --- floats ---

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // b where one is NaN
inline __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
inline __m512 _mm512_cvtepi32_ps(__m512i v) { return __builtin_convertvector((__v16si)v, __m512); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Floats16 x(a), y(b);
  Floats16 to(c);
  for (int i = 0; i < 16; ++i) to.at[i] = __builtin_fmaf(x.at[i], y.at[i], to.at[i]);
  return to;
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }
inline __m512 _mm512_roundscale_ps(__m512 v, int how) {  // to whole numbers
  require((how & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEAREST_INT);
  Floats16 to(v);
  for (float& each : to.at) each = __builtin_nearbyintf(each);
  return to;
}
// a * 2^floor(b), rounded once: double holds what the product is before.
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  Floats16 to(a);
  const Floats16 exponents(b);
  for (int i = 0; i < 16; ++i) {
    const float exponent = __builtin_floorf(exponents.at[i]);
    double factor = exponent;  // infinity or NaN
    if (exponent == -__builtin_inff()) factor = 0;
    if (exponent - exponent == 0) {
      const float most = 400;
      const float clamped = exponent < -most ? -most : exponent > most ? most : exponent;
      const int64_t bits = (int64_t{1023} + static_cast<int64_t>(clamped)) << 52;
      memcpy(&factor, &bits, sizeof bits);
    }
    to.at[i] = static_cast<float>(to.at[i] * factor);
  }
  return to;
}
// 1 / v, off by less than 2^-14 of it: 14 bits behind the first, the others cut off.
inline __m512 _mm512_rcp14_ps(__m512 v) {
  Words16 to(_mm512_set1_ps(1.0f) / v);
  for (uint32_t& each : to.at)
    if ((each & 0x7F800000) != 0x7F800000) each &= ~uint32_t{0x1FF};
  return to;
}

// Sums and the largest: halves are combined until one number is left.
template <class T, class Combine>
inline T reduce(Lanes<T> v, Combine&& combine) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v.at[i] = combine(v.at[i], v.at[i + width]);
  return v.at[0];
}
inline int _mm512_reduce_add_epi32(__m512i v) {
  return static_cast<int>(reduce(Words16(v), [](uint32_t a, uint32_t b) { return a + b; }));
}
inline float _mm512_reduce_add_ps(__m512 v) {
  return reduce(Floats16(v), [](float a, float b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 v) {
  return reduce(Floats16(v), [](float a, float b) { return a > b ? a : b; });
}

// --- bfloat16: numbers below 2^-126 are zeros, whether they come in or go out ---

inline uint32_t flushed_bits(uint32_t bits) { return bits & 0x7F800000 ? bits : bits & 0x80000000; }
inline float flushed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = flushed_bits(bits);
  memcpy(&value, &bits, sizeof bits);
  return value;
}
inline float of_bfloat16(uint32_t upper_half) {
  const uint32_t bits = flushed_bits(upper_half);
  float value;
  memcpy(&value, &bits, sizeof bits);
  return value;
}
inline float low_half(uint32_t word) { return of_bfloat16(word << 16); }
inline float high_half(uint32_t word) { return of_bfloat16(word & 0xFFFF0000); }
inline float flushing_fma(float a, float b, float sum) { return flushed(__builtin_fmaf(a, b, flushed(sum))); }

inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const Words16 left(a), right(b);
  Floats16 to(sums);
  for (int i = 0; i < 16; ++i) {
    to.at[i] = flushing_fma(high_half(left.at[i]), high_half(right.at[i]), to.at[i]);
    to.at[i] = flushing_fma(low_half(left.at[i]), low_half(right.at[i]), to.at[i]);
  }
  return to;
}
inline __m256bh _mm512_cvtneps_pbh(__m512 v) {  // half to even; NaN keeps its upper bits and becomes quiet
  const Words16 from(v);
  Lanes<uint16_t, 32> to;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = flushed_bits(from.at[i]), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    to.at[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
  }
  return to;
}

// --- tiles ---

struct TileRegisters {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
  } config;
  uint8_t tiles[8][16][64];

  void require_tile(int tile) const {
    require(config.palette == 1 && 0 <= tile && tile < 8 && config.rows[tile] > 0 && config.start_row == 0);
  }
  // sums, a, b: the numbers of three tiles that fit each other; b has a row for each word of a's.
  void require_product(int sums, int a, int b) const {
    require_tile(sums), require_tile(a), require_tile(b);
    require(sums != a && sums != b && a != b);
    require(config.rows[sums] == config.rows[a] && config.bytes[sums] == config.bytes[b]);
    require(config.bytes[a] == 4 * config.rows[b] && config.bytes[b] % 4 == 0);
  }
};
inline thread_local TileRegisters TILES = {};

inline void _tile_loadconfig(const void* p) {
  TILES = {};
  memcpy(&TILES.config, p, sizeof TILES.config);
  const auto& config = TILES.config;
  require(config.palette == 1);
  for (uint8_t byte : config.reserved) require(byte == 0);
  for (int tile = 0; tile < 16; ++tile) {
    require(config.rows[tile] <= (tile < 8 ? 16 : 0) && config.bytes[tile] <= (tile < 8 ? 64 : 0));
    require((config.rows[tile] == 0) == (config.bytes[tile] == 0));
  }
}
inline void _tile_release() { TILES = {}; }
inline void _tile_zero(int tile) {
  TILES.require_tile(tile);
  memset(TILES.tiles[tile], 0, sizeof TILES.tiles[tile]);
}
inline void _tile_loadd(int tile, const void* p, int64_t stride) {
  _tile_zero(tile);
  for (int row = 0; row < TILES.config.rows[tile]; ++row)
    memcpy(TILES.tiles[tile][row], static_cast<const char*>(p) + row * stride, TILES.config.bytes[tile]);
}
inline void _tile_stored(int tile, void* p, int64_t stride) {
  TILES.require_tile(tile);
  for (int row = 0; row < TILES.config.rows[tile]; ++row)
    memcpy(static_cast<char*>(p) + row * stride, TILES.tiles[tile][row], TILES.config.bytes[tile]);
}

inline void _tile_dpbssd(int sums, int a, int b) {
  TILES.require_product(sums, a, b);
  for (int row = 0; row < TILES.config.rows[a]; ++row) {
    Words16 sum(TILES.tiles[sums][row]);
    for (int word = 0; word < TILES.config.rows[b]; ++word) {
      uint32_t left;
      memcpy(&left, TILES.tiles[a][row] + 4 * word, 4);
      sum = Words16(add_products<int8_t, int8_t>(__m512i(sum), _mm512_set1_epi32(static_cast<int>(left)),
                                                 _mm512_loadu_si512(TILES.tiles[b][word])));
    }
    memcpy(TILES.tiles[sums][row], sum.at, TILES.config.bytes[sums]);
  }
}

// Each row's products are summed from zero, those of the low halves of words and those of the high ones; then both are added.
inline void _tile_dpbf16ps(int sums, int a, int b) {
  TILES.require_product(sums, a, b);
  for (int row = 0; row < TILES.config.rows[a]; ++row) {
    Floats16 low(__m512{}), high(__m512{}), sum(TILES.tiles[sums][row]);
    for (int word = 0; word < TILES.config.rows[b]; ++word) {
      uint32_t left;
      memcpy(&left, TILES.tiles[a][row] + 4 * word, 4);
      const Words16 right(TILES.tiles[b][word]);
      for (int i = 0; i < 16; ++i) {
        low.at[i] = flushing_fma(low_half(left), low_half(right.at[i]), low.at[i]);
        high.at[i] = flushing_fma(high_half(left), high_half(right.at[i]), high.at[i]);
      }
    }
    for (int i = 0; i < 16; ++i) sum.at[i] = flushed(flushed(sum.at[i]) + flushed(low.at[i] + high.at[i]));
    memcpy(TILES.tiles[sums][row], sum.at, TILES.config.bytes[sums]);
  }
}

}  // namespace
}  // namespace saccade
