// Products of some rows of x with panels of weights: by AMX tiles, or by vectors.
//
// A product says: Value, what words of x and weights consist of; Number, what it sums in; a block of ROWS times PANELS panels, whose
// sums are [ROWS, PANELS * 16]; how x is laid out; and multiply, which adds a block's products. Sums of floats are taken in the order
// of columns, whatever the number of rows.
#pragma once

#include "linear_stage.h"

namespace saccade::SACCADE_ISA {

// --- vectors ---

#if defined(__AVX512BW__)
constexpr int VECTOR_ROWS = 6, VECTOR_PANELS = 4, VECTOR_BYTES = 64;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int VECTOR_ROWS = 6, VECTOR_PANELS = 1, VECTOR_BYTES = 32;  // 12 sums in 16 registers
#else
constexpr int VECTOR_ROWS = 2, VECTOR_PANELS = 1, VECTOR_BYTES = 16;  // 8 sums in 16 registers
#endif
typedef int32_t PanelWords __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef float PanelFloats __attribute__((vector_size(VECTOR_BYTES)));
constexpr int VECTOR_WORDS = VECTOR_BYTES / WORD;

// add(sum, w, x): the products of a vector of words of weights with one of x in all lanes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct WholeWords {
  using Value = int8_t;
  using Number = int32_t;
  static constexpr int OFFSET = PRODUCT_OFFSET;
  static PanelWords add(PanelWords sum, PanelWords w, PanelWords x) {
#if defined(__AVX512VNNI__)
    return (PanelWords)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
    return (PanelWords)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#endif
  }
};
#else
struct WholeWords {
  using Value = int16_t;
  using Number = int32_t;
  static constexpr int OFFSET = 0;
  static PanelWords add(PanelWords sum, PanelWords w, PanelWords x) {
#if defined(__AVX512BW__)
    return sum + (PanelWords)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    return sum + (PanelWords)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
    return sum + (PanelWords)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
    return sum + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
  }
};
#endif

struct FloatWords {
  using Value = float;
  using Number = float;
  static constexpr int OFFSET = 0;
  static PanelWords add(PanelWords sum, PanelWords w, PanelWords x) {
#if defined(__AVX512F__)
    return (PanelWords)_mm512_fmadd_ps((__m512)w, (__m512)x, (__m512)sum);
#elif defined(__FMA__)
    return (PanelWords)_mm256_fmadd_ps((__m256)w, (__m256)x, (__m256)sum);
#else
    return (PanelWords)((PanelFloats)sum + (PanelFloats)w * (PanelFloats)x);
#endif
  }
};

#if defined(__AVX512BF16__)
struct PairWords {
  using Value = BFloat16;
  using Number = float;
  static constexpr int OFFSET = 0;
  static PanelWords add(PanelWords sum, PanelWords w, PanelWords x) {
    return (PanelWords)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
};
#endif

template <class W>
struct VectorProduct {
  using Value = typename W::Value;
  using Number = typename W::Number;
  static constexpr int64_t ROWS = VECTOR_ROWS, PANELS = VECTOR_PANELS, OUTPUTS = PANELS * PANEL;
  static constexpr int64_t MOST_WORDS = 512;             // of each output that are staged: a block of x stays in the first-level cache
  static constexpr int64_t STAGED_BYTES = 256 << 10;     // of all outputs: they stay in the second
  static constexpr int64_t SUMMED_ROWS = 384;            // whose sums are kept where words take several turns: 192 KiB
  static constexpr int OFFSET = W::OFFSET;
  static constexpr int64_t INPUT_ROWS = 1;               // x: rows of words

  static void begin() {}
  static void end() {}

  // x: rows of x, x_stride words apart; w: panels, w_stride words apart; sums: [ROWS, OUTPUTS].
  template <class Between>
  static void multiply(int64_t rows, const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                       Number* sums, bool is_first, Between&&) {
    switch (rows) {
      case 1: return multiply_rows<1>(x, x_stride, w, w_stride, count, sums, is_first);
      case 2: return multiply_rows<2>(x, x_stride, w, w_stride, count, sums, is_first);
      case 3: return multiply_rows<smaller(3, ROWS)>(x, x_stride, w, w_stride, count, sums, is_first);
      case 4: return multiply_rows<smaller(4, ROWS)>(x, x_stride, w, w_stride, count, sums, is_first);
      case 5: return multiply_rows<smaller(5, ROWS)>(x, x_stride, w, w_stride, count, sums, is_first);
      default: return multiply_rows<ROWS>(x, x_stride, w, w_stride, count, sums, is_first);
    }
  }

 private:
  static constexpr int smaller(int a, int b) { return a < b ? a : b; }

  template <int COUNT>
  static void multiply_rows(const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                            Number* sums, bool is_first) {
    constexpr int EACH = PANEL / VECTOR_WORDS, VECTORS = PANELS * EACH;
    PanelWords sum[COUNT][VECTORS];
    for (int r = 0; r < COUNT; ++r)
      for (int v = 0; v < VECTORS; ++v)
        sum[r][v] = is_first ? PanelWords{} : *reinterpret_cast<const PanelWords*>(sums + r * OUTPUTS + v * VECTOR_WORDS);
    for (int64_t k = 0; k < count; ++k, w += PANEL) {
      PanelWords columns[VECTORS];
      for (int v = 0; v < VECTORS; ++v)
        columns[v] = *reinterpret_cast<const PanelWords*>(w + v / EACH * w_stride + v % EACH * VECTOR_WORDS);
      for (int r = 0; r < COUNT; ++r) {
        const PanelWords row = PanelWords{} + static_cast<int32_t>(x[r * x_stride + k]);
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = W::add(sum[r][v], columns[v], row);
      }
    }
    for (int r = 0; r < COUNT; ++r)
      for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<PanelWords*>(sums + r * OUTPUTS + v * VECTOR_WORDS) = sum[r][v];
  }
};

// --- AMX: tiles of 16 rows or outputs and 16 words ---

#if defined(__AMX_INT8__)
constexpr int64_t TILE = 16, TILE_BYTES = 64;
constexpr int64_t TILE_WORDS = 256;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// V: int8_t or BFloat16.
template <class V>
struct TileProduct {
  static constexpr bool IS_INTEGER = std::is_same_v<V, int8_t>;
  using Value = V;
  using Number = std::conditional_t<IS_INTEGER, int32_t, float>;
  static constexpr int64_t ROWS = 2 * TILE, PANELS = 2, OUTPUTS = 2 * TILE;  // four sums and their factors fill the registers
  static constexpr int64_t MOST_WORDS = 1024;
  static constexpr int64_t STAGED_BYTES = 768 << 10;
  static constexpr int64_t SUMMED_ROWS = 1024;  // 768 KiB
  static constexpr int OFFSET = 0;
  static constexpr int64_t INPUT_ROWS = TILE;   // x: tiles, those of 16 rows one after the other: memory is read in order

  static void begin() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // x: two rows of tiles, x_stride words apart. between() is other work, done while tiles multiply.
  template <class Between>
  static void multiply(int64_t rows, const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                       Number* sums, bool is_first, Between&& between) {
    if (rows > TILE)
      multiply_tiles<2>(x, x_stride, w, w_stride, count, sums, is_first, between);
    else
      multiply_tiles<1>(x, x_stride, w, w_stride, count, sums, is_first, between);
  }

 private:
// A macro, as the numbers of tiles must be literals.
#define SACCADE_MULTIPLY_TILES(sum, x, w) \
  if constexpr (IS_INTEGER)               \
    _tile_dpbssd(sum, x, w);              \
  else                                    \
    _tile_dpbf16ps(sum, x, w)

  template <int ROW_TILES, class Between>
  static void multiply_tiles(const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                             Number* sums, bool is_first, Between&& between) {
    constexpr int64_t SUMS_STRIDE = OUTPUTS * WORD;
    Number *const low = sums, *const high = sums + TILE * OUTPUTS;
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (ROW_TILES == 2) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, low, SUMS_STRIDE);
      _tile_loadd(1, low + TILE, SUMS_STRIDE);
      if constexpr (ROW_TILES == 2) {
        _tile_loadd(2, high, SUMS_STRIDE);
        _tile_loadd(3, high + TILE, SUMS_STRIDE);
      }
    }
    for (int64_t k = 0; k < count; k += TILE, x += TILE_WORDS, w += TILE_WORDS) {
      _tile_loadd(6, w, TILE_BYTES);
      _tile_loadd(4, x, TILE_BYTES);
      SACCADE_MULTIPLY_TILES(0, 4, 6);
      _tile_loadd(7, w + w_stride, TILE_BYTES);
      SACCADE_MULTIPLY_TILES(1, 4, 7);
      if constexpr (ROW_TILES == 2) {
        _tile_loadd(5, x + x_stride, TILE_BYTES);
        SACCADE_MULTIPLY_TILES(2, 5, 6);
        SACCADE_MULTIPLY_TILES(3, 5, 7);
      }
      between();
    }
    _tile_stored(0, low, SUMS_STRIDE);
    _tile_stored(1, low + TILE, SUMS_STRIDE);
    if constexpr (ROW_TILES == 2) {
      _tile_stored(2, high, SUMS_STRIDE);
      _tile_stored(3, high + TILE, SUMS_STRIDE);
    }
  }

#undef SACCADE_MULTIPLY_TILES
};
#endif

}  // namespace saccade::SACCADE_ISA
