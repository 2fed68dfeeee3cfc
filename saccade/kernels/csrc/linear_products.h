// Products of some rows of x with panels of weights: by AMX tiles, or by vectors.
//
// A product says: Value, what words of x and weights consist of; Number, what it sums in; a block of ROWS times PANELS panels, whose
// sums are [ROWS, PANELS * 16]; how x is laid out; and multiply, which adds a block's products. Sums of floats are taken in the order
// of columns, whatever the number of rows.
#pragma once

#include "linear_stage.h"
#include "tiles.h"

namespace saccade::SACCADE_ISA {

// --- vectors ---

#if defined(__AVX512BW__)
constexpr int VECTOR_ROWS = 6, VECTOR_PANELS = 4, VECTOR_BYTES = 64;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int VECTOR_ROWS = 6, VECTOR_PANELS = 1, VECTOR_BYTES = 32;  // 12 sums in 16 registers
#else
constexpr int VECTOR_ROWS = 2, VECTOR_PANELS = 1, VECTOR_BYTES = 16;  // 8 sums in 16 registers
#endif
typedef int32_t PanelWords __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t WordsInMemory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef float PanelFloats __attribute__((vector_size(VECTOR_BYTES)));
constexpr int VECTOR_WORDS = VECTOR_BYTES / WORD, EACH_PANEL = PANEL / VECTOR_WORDS;  // vectors of a panel's word
constexpr int VECTORS = VECTOR_PANELS * EACH_PANEL, VECTOR_OUTPUTS = VECTOR_PANELS * PANEL;

constexpr int64_t TURN_WORDS = 256;  // turns begin at multiples of this many words, and so where groups of columns do

// Words of some rows of x, from word `first` on.
struct WordBlock {
  const uint32_t* words;   // of the first row
  int64_t stride;          // to those of the next, or from tiles to tiles
  const uint32_t* strays;  // of the first row, where a product has them (linear_strays.h)
  int64_t strays_stride;
  int64_t first;
};

inline WordsInMemory& words_at(void* p, int vector) { return static_cast<WordsInMemory*>(p)[vector]; }
inline PanelWords load_words_at(const void* p, int vector) { return static_cast<const WordsInMemory*>(p)[vector]; }

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

// Word after word of x and weights, added by W. Functions of their own: where they were inlined, sums had no registers left.
template <class W>
struct EachWord {
  using Value = typename W::Value;
  using Number = typename W::Number;
  static constexpr int OFFSET = W::OFFSET;
  static constexpr int64_t ROWS = VECTOR_ROWS;
  static constexpr bool HAS_STRAYS = false;

  template <int COUNT>
  [[gnu::noinline]] static void multiply_rows(const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                            Number* sums, bool is_first) {
    PanelWords sum[COUNT][VECTORS];
#pragma GCC unroll 8  // here and below: else sums live in memory
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = is_first ? PanelWords{} : load_words_at(sums + r * VECTOR_OUTPUTS, v);
    for (int64_t k = 0; k < count; ++k, w += PANEL) {
      PanelWords columns[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) columns[v] = load_words_at(w + v / EACH_PANEL * w_stride, v % EACH_PANEL);
#pragma GCC unroll 8
      for (int r = 0; r < COUNT; ++r) {
        const PanelWords row = PanelWords{} + static_cast<int32_t>(x[r * x_stride + k]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = W::add(sum[r][v], columns[v], row);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) words_at(sums + r * VECTOR_OUTPUTS, v) = sum[r][v];
  }
};

#if defined(SACCADE_PAIRS)
// Runs of nibbles: their columns are added up in 16 bits, before the group's scale (StagedRuns says why that fits).
template <int64_t COLUMNS>
struct EachRun {
  using Runs = StagedRuns<COLUMNS>;
  using Value = uint8_t;
  using Number = int32_t;
  static constexpr int OFFSET = 0;
  static constexpr int64_t ROWS = VECTOR_ROWS;
  static constexpr bool HAS_STRAYS = false;

  template <int COUNT>
  [[gnu::noinline]] static void multiply_rows(const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                            Number* sums, bool is_first) {
    if (is_first) memset(sums, 0, COUNT * VECTOR_OUTPUTS * sizeof(Number));
    const auto panel = [&](int v, int64_t word) { return load_words_at(w + v / EACH_PANEL * w_stride + word * PANEL, v % EACH_PANEL); };
    for (int64_t k = 0; k < count; k += Runs::RUN_WORDS, w += Runs::ALL * PANEL) {
      Int8 pairs[COUNT][VECTORS];
#pragma GCC unroll 8
      for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) pairs[r][v] = (Int8)panel(v, Runs::STARTS);
#pragma GCC unroll 1
      for (int64_t word = 0; word < Runs::RUN_WORDS; ++word) {
        Int8 columns[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) columns[v] = (Int8)panel(v, word);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
          const PanelWords row = PanelWords{} + static_cast<int32_t>(x[r * x_stride + k + word]);
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) add_pairs_to(pairs[r][v], multiply_pairs((Int8)row, columns[v]));
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const Int8 scales = (Int8)panel(v, Runs::SCALES);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
          WordsInMemory& sum = words_at(sums + r * VECTOR_OUTPUTS, v);
          sum = (PanelWords)multiply_words((Int8)(PanelWords)sum, pairs[r][v], scales);
        }
      }
    }
  }
};
#endif

// W says how rows of x and vectors of panels are multiplied.
template <class W>
struct VectorProduct : W {
  using typename W::Number;
  static constexpr int64_t ROWS = W::ROWS, PANELS = VECTOR_PANELS, OUTPUTS = VECTOR_OUTPUTS;
  static constexpr bool IS_WIDE = VECTOR_BYTES == 64;  // processors with larger caches, too
  static constexpr int64_t MOST_WORDS = IS_WIDE ? 512 : 1024;  // of each output that are staged: a block of x stays in the first-level cache
  static constexpr int64_t STAGED_BYTES = IS_WIDE ? 256 << 10 : 192 << 10;  // of all outputs: they stay in the second
  static constexpr int64_t SUMMED_ROWS = IS_WIDE ? 384 : 192;               // whose sums are kept where words take several turns
  static constexpr int64_t INPUT_ROWS = 1;                                  // x: rows of words

  static void begin() {}
  static void end() {}

  // w: panels, w_stride words apart; sums: [ROWS, OUTPUTS].
  template <class Between>
  static void multiply(int64_t rows, const WordBlock& x, const uint32_t* w, int64_t w_stride, int64_t count, Number* sums,
                       bool is_first, Between&&) {
    if constexpr (W::HAS_STRAYS) {
      bool is_any_whole = false;
      for (int64_t r = 0; r < rows; ++r) is_any_whole |= W::is_whole(x.strays + r * x.strays_stride);
      is_any_whole ? multiply_by<typename W::Whole>(rows, x, w, w_stride, count, sums, is_first)
                   : multiply_by<W>(rows, x, w, w_stride, count, sums, is_first);
      for (int64_t r = 0; r < rows; ++r)
        if (const uint32_t* strays = x.strays + r * x.strays_stride; !W::is_whole(strays))
          W::add_strays(strays, x.first, count, w, w_stride, sums + r * OUTPUTS);
    } else {
      multiply_by<W>(rows, x, w, w_stride, count, sums, is_first);
    }
  }

 private:
  template <class By>
  static void multiply_by(int64_t rows, const WordBlock& x, const uint32_t* w, int64_t w_stride, int64_t count, Number* sums,
                          bool is_first) {
    switch (rows) {
      case 1: return By::template multiply_rows<1>(x.words, x.stride, w, w_stride, count, sums, is_first);
      case 2: return By::template multiply_rows<2>(x.words, x.stride, w, w_stride, count, sums, is_first);
      case 3: return By::template multiply_rows<smaller(3, ROWS)>(x.words, x.stride, w, w_stride, count, sums, is_first);
      case 4: return By::template multiply_rows<smaller(4, ROWS)>(x.words, x.stride, w, w_stride, count, sums, is_first);
      case 5: return By::template multiply_rows<smaller(5, ROWS)>(x.words, x.stride, w, w_stride, count, sums, is_first);
      default: return By::template multiply_rows<ROWS>(x.words, x.stride, w, w_stride, count, sums, is_first);
    }
  }
  static constexpr int smaller(int a, int b) { return a < b ? a : b; }
};

// --- AMX: tiles of 16 rows or outputs and 16 words ---

#if defined(__AMX_INT8__)
constexpr int64_t TILE = 16, TILE_BYTES = 64;
constexpr int64_t TILE_WORDS = 256;

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
  static constexpr bool HAS_STRAYS = false;
  static constexpr int64_t INPUT_ROWS = TILE;   // x: tiles, those of 16 rows one after the other: memory is read in order

  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  // x: two rows of tiles. between() is other work, done while tiles multiply.
  template <class Between>
  static void multiply(int64_t rows, const WordBlock& x, const uint32_t* w, int64_t w_stride, int64_t count, Number* sums,
                       bool is_first, Between&& between) {
    if (rows > TILE)
      multiply_tiles<2>(x.words, x.stride, w, w_stride, count, sums, is_first, between);
    else
      multiply_tiles<1>(x.words, x.stride, w, w_stride, count, sums, is_first, between);
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
    before_loading_tiles();
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
