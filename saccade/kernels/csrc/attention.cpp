// Softmax attention in tiles: scores of some queries over a block of keys, their exponentials, and the sum of values so far,
// rescaled when a larger score turns up (FlashAttention, Dao et al. 2022; few queries split their keys as in Flash-Decoding).
//
// Letters: N query heads, K key heads, G = N / K query heads that read one key head, D head size. The G heads of all queries of
// a sequence are the rows of one product with the keys of their head. Knows where keys lie; knows no model.
//
// A row's result depends neither on the other rows of the step nor on the number of threads: blocks of keys begin at fixed
// places. So a token verified among others is computed exactly as one decoded alone.
#include "attention.h"

#include "attention_few.h"
#include "pool.h"
#include "tiles.h"
#include "vector.h"

namespace saccade::SACCADE_ISA {
namespace {

constexpr int64_t BLOCK = 256;      // keys packed at once: with D = 128 they and their values fill 128 KiB of the second cache
constexpr int64_t TILE = LANES == 8 ? 36 : 32;  // rows whose scores over a block are held at once
constexpr int64_t MAX_ROWS = 1024;  // rows of a job: their sums take 512 KiB
constexpr int64_t FEW_QUERIES = 16;  // up to here a sequence's keys are split between jobs,
constexpr int64_t PIECE = 512;       // so many to each: a multiple of BLOCK
constexpr int64_t PANEL = 16;        // columns of a packed matrix that lie together
constexpr int64_t FETCH_ROWS = 16;   // so many rows ahead, queries are fetched

#if defined(__AVX512BF16__)
using Fast = Bf16;  // what bfloat16 is multiplied in
#else
using Fast = float;
#endif

// Registers hold the sums of MOST_STEPS * ROW_STEP rows by MOST_PANELS panels, what is loaded of b, and a value of a: 24 + 3 + 1
// of 32 (AVX-512), 12 + 2 + 1 of 16 (AVX2), 8 + 4 + 1 of 16. So many sums also hide how long one of them takes.
constexpr int64_t ROW_STEP = LANES == 16 ? 4 : 2;
constexpr int64_t MOST_STEPS = LANES == 16 ? 2 : LANES == 8 ? 3 : 1;
constexpr int64_t MOST_PANELS = LANES == 16 ? 3 : 1;
#if defined(__AMX_BF16__)
constexpr int64_t ROW_MULTIPLE = 16;
#else
constexpr int64_t ROW_MULTIPLE = ROW_STEP;
#endif

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
constexpr int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Values are multiplied a word at a time: one float32, or two bfloat16.
template <class T>
constexpr int64_t per_word = sizeof(uint32_t) / sizeof(T);

// --- products ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
inline Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b, Bf16) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

inline Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b, float) {
  float factor;
  memcpy(&factor, &a, sizeof factor);
  return fma(splat(factor), load(reinterpret_cast<const float*>(b)), sum);
}

// c [ROWS, PANELS * PANEL] (+)= a b. a: rows of `depth` words; b: panels of `depth` rows of PANEL words. Loops over rows and columns
// are unrolled by order: left to itself, GCC 12 may keep sums in memory.
template <class T, int ROWS, int PANELS>
void multiply_rows(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, float* c,
                   int64_t c_stride, bool accumulate) {
  constexpr int VECTORS = PANEL / LANES, COLUMNS = PANELS * VECTORS;
  Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) sums[i][j] = accumulate ? load(c + i * c_stride + j * LANES) : Floats{};
  int64_t step = 0;
  do {  // at least once: a loop that may be empty costs a copy of all sums
    const uint32_t* right = b + step * PANEL;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j)
        sums[i][j] = multiply_add(sums[i][j], a[i * a_stride + step],
                                  right + j / VECTORS * b_stride + j % VECTORS * LANES, T{});
  } while (++step < depth);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) store(c + i * c_stride + j * LANES, sums[i][j]);
}

#if defined(__AMX_BF16__)
// The same for 16 * ROWS rows of bfloat16; depth is a multiple of 16. Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b.
template <int ROWS, int PANELS>
void multiply_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, float* c,
                    int64_t c_stride, bool accumulate) {
  before_loading_tiles();
  if (accumulate) {
    _tile_loadd(0, c, c_stride * 4);
    if (PANELS == 2) _tile_loadd(1, c + PANEL, c_stride * 4);
    if (ROWS == 2) _tile_loadd(2, c + 16 * c_stride, c_stride * 4);
    if (ROWS == 2 && PANELS == 2) _tile_loadd(3, c + 16 * c_stride + PANEL, c_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < depth; step += 16) {
    _tile_loadd(4, a + step, a_stride * 4);
    _tile_loadd(6, b + step * PANEL, PANEL * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (PANELS == 2) {
      _tile_loadd(7, b + b_stride + step * PANEL, PANEL * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROWS == 2) {
      _tile_loadd(5, a + 16 * a_stride + step, a_stride * 4);
      _tile_dpbf16ps(2, 5, 6);
      if (PANELS == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride * 4);
  if (PANELS == 2) _tile_stored(1, c + PANEL, c_stride * 4);
  if (ROWS == 2) _tile_stored(2, c + 16 * c_stride, c_stride * 4);
  if (ROWS == 2 && PANELS == 2) _tile_stored(3, c + 16 * c_stride + PANEL, c_stride * 4);
}
#endif

using Product = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);

// c [rows, PANELS * PANEL] (+)= a b; rows, a multiple of ROW_STEP, are divided evenly.
template <class T, int PANELS>
void multiply_panels(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride, int64_t depth,
                     float* c, int64_t c_stride, bool accumulate) {
  const int64_t steps = rows / ROW_STEP, groups = (steps + MOST_STEPS - 1) / MOST_STEPS;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = steps * group / groups, count = steps * (group + 1) / groups - first;
    Product product = multiply_rows<T, ROW_STEP, PANELS>;
    if (MOST_STEPS > 1 && count > 1) product = multiply_rows<T, smaller_of(2, MOST_STEPS) * ROW_STEP, PANELS>;
    if (MOST_STEPS > 2 && count > 2) product = multiply_rows<T, smaller_of(3, MOST_STEPS) * ROW_STEP, PANELS>;
    const int64_t row = first * ROW_STEP;
    product(a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride, accumulate);
  }
}

#if defined(__AMX_BF16__)
template <int PANELS>
void multiply_panels_in_tiles(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride,
                              int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  const int64_t row_step = rows % 32 == 0 ? 32 : 16;
  const Product product = row_step == 32 ? multiply_tiles<2, PANELS> : multiply_tiles<1, PANELS>;
  for (int64_t row = 0; row < rows; row += row_step)
    product(a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride, accumulate);
}
#endif

// c [rows, panels * PANEL] (+)= a b; rows is a multiple of ROW_MULTIPLE.
template <class T>
void multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride, int64_t panels,
              int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  int64_t most = MOST_PANELS;
  auto three = multiply_panels<T, smaller_of(3, MOST_PANELS)>, two = multiply_panels<T, smaller_of(2, MOST_PANELS)>;
  auto one = multiply_panels<T, 1>;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {
    most = 2;
    three = two = multiply_panels_in_tiles<2>;
    one = multiply_panels_in_tiles<1>;
  }
#endif
  for (int64_t panel = 0; panel < panels; panel += most) {
    const int64_t count = smaller_of(panels - panel, most);
    (count == 3 ? three : count == 2 ? two : one)(a, a_stride, rows, b + panel * b_stride, b_stride, depth,
                                                  c + panel * PANEL, c_stride, accumulate);
  }
}

// --- packing -------------------------------------------------------------------------------------------------------------

// [count] of X -> [size] of T, zeros behind.
template <class T, class X>
void convert(const X* from, int64_t count, T* to, int64_t size) {
  if constexpr (std::is_same_v<T, X>) {
    memcpy(to, from, count * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
  }
  memset(static_cast<void*>(to + count), 0, (size - count) * sizeof(T));
}

// to[word][row] = from[row][word] for PANEL rows.
void transpose(const uint32_t* from, int64_t words, uint32_t* to) {
  int64_t word = 0;
#if defined(__AVX512F__)
  for (; word + 16 <= words; word += 16) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * words + word);
    for (int i = 0; i < 16; i += 2) {  // b[i]: words 0, 1 of each quarter, of two rows; b[i + 1]: words 2, 3
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + j]: word j of each quarter, of four rows
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)  // b[i + j]: word j of quarters 0 and 2, of eight rows; b[i + j + 4]: of quarters 1 and 3
      for (int j = 0; j < 4; ++j) {
        b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
        b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
      }
    for (int j = 0; j < 8; ++j) {
      _mm512_storeu_si512(to + (word + j) * PANEL, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
      _mm512_storeu_si512(to + (word + j + 8) * PANEL, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
    }
  }
#elif defined(__AVX__)
  for (; word + 8 <= words; word += 8)
    for (int64_t first = 0; first < PANEL; first += 8) {
      __m256 a[8], b[8];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // a[i]: words 0 to 3 of rows i and i + 4; a[i + 4]: words 4 to 7
        const float* low = reinterpret_cast<const float*>(from + (first + i) * words + word);
        const float* high = low + 4 * words;
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        a[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {  // b[i]: words 0, 1 (or 4, 5) of two rows of each half; b[i + 1]: words 2, 3
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      float* column = reinterpret_cast<float*>(to + word * PANEL + first);
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4, column += 4 * PANEL) {  // four rows of each half: a word of all eight
        _mm256_storeu_ps(column, _mm256_shuffle_ps(b[i], b[i + 2], 0x44));
        _mm256_storeu_ps(column + PANEL, _mm256_shuffle_ps(b[i], b[i + 2], 0xee));
        _mm256_storeu_ps(column + 2 * PANEL, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44));
        _mm256_storeu_ps(column + 3 * PANEL, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee));
      }
    }
#endif
  for (; word < words; ++word)
    for (int64_t row = 0; row < PANEL; ++row) to[word * PANEL + row] = from[row * words + word];
}

// PANEL columns of PANEL rows, each `stride` values long, as PANEL / per_word rows of PANEL words.
void interleave(const float* from, int64_t stride, uint32_t* to) {
  for (int64_t row = 0; row < PANEL; ++row) memcpy(to + row * PANEL, from + row * stride, PANEL * sizeof(float));
}

#if defined(__AVX512BF16__)
void interleave(const Bf16* from, int64_t stride, uint32_t* to) {
  for (int64_t row = 0; row < PANEL; row += 2, to += PANEL) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + row * stride)));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + (row + 1) * stride)));
    _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}
#endif

// The keys and values of one head of one sequence.
template <class C>
struct Kept {
  const SaccadeAttention& op;
  int64_t sequence, head, first_token;

  int64_t slot(int64_t key) const {
    if (!op.block_tables) return first_token + key;
    return op.block_tables[sequence * op.table_width + key / op.block_size] * op.block_size + key % op.block_size;
  }
  const C* key(int64_t slot) const { return static_cast<const C*>(op.k) + slot * op.k_stride + head * size(); }
  const C* value(int64_t slot) const { return static_cast<const C*>(op.v) + slot * op.v_stride + head * size(); }
  // Where `count` keys from `first` on and their values lie, of bfloat16.
  void rows(int64_t first, int64_t count, const Bf16** keys, const Bf16** values) const {
    int64_t at = 0, left = 0;  // in its block: divisions for each key would take as long as its products
    for (int64_t i = 0; i < count; ++i, ++at, --left) {
      if (left == 0) {
        at = slot(first + i);
        left = op.block_tables ? op.block_size - (first + i) % op.block_size : count;
      }
      keys[i] = reinterpret_cast<const Bf16*>(key(at));
      values[i] = reinterpret_cast<const Bf16*>(value(at));
    }
  }
  int64_t size() const { return op.head_dim + (std::is_same_v<C, int8_t> ? sizeof(float) : 0); }
};

// A thread's buffers for one job, one after the other in its memory.
template <class T>
struct Buffers {
  int64_t depth, width;  // values of a packed query or key, and of a packed value: zeros fill what the head lacks
  T* q;                  // [rows, depth]
  T* keys;               // [BLOCK / PANEL] panels of depth / per_word rows of PANEL words
  T* values;             // [width / PANEL] panels of BLOCK / per_word rows of PANEL words
  T* unpacked;           // [PANEL] rows of either
  T* weights;            // [TILE, BLOCK]
  float* scores;         // [TILE, BLOCK]
  float* sums;           // [rows, width]
  float *key_scale, *value_scale;  // [BLOCK], for int8
  float *largest, *total;          // [rows]: the largest score so far, and the sum of weights

  Buffers(int64_t head_dim, int64_t num_rows) : depth(round_up(head_dim, PANEL * per_word<T>)), width(round_up(head_dim, PANEL)) {
    const int64_t narrow = num_rows * depth + BLOCK * depth + BLOCK * width + PANEL * depth + TILE * BLOCK;
    const int64_t wide = TILE * BLOCK + num_rows * width + 2 * BLOCK + 2 * num_rows;
    q = static_cast<T*>(scratch(SCRATCH_ATTENTION, narrow * sizeof(T) + wide * sizeof(float)));
    keys = q + num_rows * depth;
    values = keys + BLOCK * depth;
    unpacked = values + BLOCK * width;
    weights = unpacked + PANEL * depth;
    scores = reinterpret_cast<float*>(weights + TILE * BLOCK);
    sums = scores + TILE * BLOCK;
    key_scale = sums + num_rows * width;
    value_scale = key_scale + BLOCK;
    largest = value_scale + BLOCK;
    total = largest + num_rows;
  }
};

// Keys first..first+count of a sequence and their values; zeros behind, up to a multiple of 32.
template <class T, class C>
void pack(const Kept<C>& kept, int64_t first, int64_t count, Buffers<T>& buffers) {
  const int64_t head_dim = kept.op.head_dim, depth = buffers.depth, width = buffers.width;
  int64_t all_slots[BLOCK];
  for (int64_t i = 0; i < count; ++i) all_slots[i] = kept.slot(first + i);
  for (int64_t base = 0; base < round_up(count, 32); base += PANEL) {
    const int64_t present = count - base < 0 ? 0 : smaller_of(count - base, PANEL);
    const int64_t* slots = all_slots + base;

    if (present < PANEL) memset(static_cast<void*>(buffers.unpacked), 0, PANEL * depth * sizeof(T));
    for (int64_t i = 0; i < present; ++i) {
      fetch(kept.value(slots[i]), kept.size() * sizeof(C));
      convert(kept.key(slots[i]), head_dim, buffers.unpacked + i * depth, depth);
    }
    transpose(reinterpret_cast<uint32_t*>(buffers.unpacked), depth / per_word<T>,
              reinterpret_cast<uint32_t*>(buffers.keys + base * depth));

    if (present < PANEL) memset(static_cast<void*>(buffers.unpacked), 0, PANEL * width * sizeof(T));
    for (int64_t i = 0; i < present; ++i) {
      if (base + PANEL + i < count) fetch(kept.key(slots[PANEL + i]), kept.size() * sizeof(C));
      convert(kept.value(slots[i]), head_dim, buffers.unpacked + i * width, width);
    }
    for (int64_t column = 0; column < width; column += PANEL)
      interleave(buffers.unpacked + column, width,
                 reinterpret_cast<uint32_t*>(buffers.values + column * BLOCK + base * PANEL));

    if constexpr (std::is_same_v<C, int8_t>)
      for (int64_t i = 0; i < PANEL; ++i) {
        buffers.key_scale[base + i] = buffers.value_scale[base + i] = 1;  // scores beyond the last are -infinity: 0 would make NaN
        if (i >= present) continue;
        memcpy(buffers.key_scale + base + i, kept.key(slots[i]) + head_dim, sizeof(float));
        memcpy(buffers.value_scale + base + i, kept.value(slots[i]) + head_dim, sizeof(float));
      }
  }
}

// --- softmax -------------------------------------------------------------------------------------------------------------

// Turns the scores of one row over a block into weights, zero from `visible` up to `count`, and brings its largest score and its
// total up to date; `factor` makes of scores exponents of two. Returns what the row's sums so far are to be multiplied by.
template <class T, bool is_int8>
float weigh(float* scores, int64_t visible, int64_t count, float factor, const float* key_scale, const float* value_scale,
            float& row_largest, float& row_total, T* weights) {
  for (int64_t i = visible; i < round_up(visible, LANES); ++i) scores[i] = -INFINITY;
  Floats top = splat(-INFINITY);
  for (int64_t i = 0; i < visible; i += LANES) {
    Floats score = load(scores + i);
    if constexpr (is_int8) {
      score *= load(key_scale + i);
      store(scores + i, score);
    }
    top = larger(score, top);
  }
  const float before = row_largest, now = largest(top);
  row_largest = now > before ? now : before;
  const bool is_same = before == row_largest || before == -INFINITY;  // nothing has been summed yet
  const float shrink = is_same ? 1.0f : exp2f((before - row_largest) * factor);
  const Floats offset = splat(-row_largest * factor);
  Floats sums = {};
  for (int64_t i = 0; i < visible; i += LANES) {
    Floats weight = power_of_two(fma(load(scores + i), splat(factor), offset));
    sums += weight;
    if constexpr (is_int8) weight *= load(value_scale + i);
    store(weights + i, weight);
  }
  for (int64_t i = round_up(visible, LANES); i < count; i += LANES) store(weights + i, Floats{});
  row_total = row_total * shrink + sum(sums);
  return shrink;
}

// --- jobs ----------------------------------------------------------------------------------------------------------------

// Rows of one key head of one sequence over some of its keys. Row r is query r / G for head r % G of the key head's.
struct Job {
  int64_t sequence, head;
  int64_t first_token;  // of the sequence's queries
  int64_t first_row, num_rows;
  int64_t first_key, end_key;
  int64_t num_pieces;  // the jobs, this one first, that share these rows
  float* partial;      // null: the result goes to op.out. Else [num_rows, width + 2]: sums, largest score, total
};

template <class X>
X* output(const SaccadeAttention& op, const Job& job, int64_t row) {
  const int64_t group = op.num_heads / op.num_kv_heads;
  const int64_t token = job.first_token + (job.first_row + row) / group;
  const int64_t head = job.head * group + (job.first_row + row) % group;
  return static_cast<X*>(op.out) + (token * op.num_heads + head) * op.head_dim;
}

// T: what products are computed in; X: what queries and results are; C: what keys and values are kept in.
template <class T, class X, class C>
void attend(const SaccadeAttention& op, const Job& job) {
  const int64_t head_dim = op.head_dim, group = op.num_heads / op.num_kv_heads;
  const int64_t num_rows = round_up(job.num_rows, ROW_MULTIPLE);
  const int64_t queries = op.query_lengths[job.sequence], context = op.context_lengths[job.sequence];
  const float factor = op.scale * LOG2_E;
  const Kept<C> kept{op, job.sequence, job.head, job.first_token};
  const auto end_of = [&](int64_t row) {  // the keys that a row sees
    return op.causal ? context - queries + (job.first_row + row) / group + 1 : context;
  };

  Buffers<T> buffers(head_dim, num_rows);
  const int64_t depth = buffers.depth, width = buffers.width;
  // Whether few queries read keys and values where they lie.
  const bool is_read = std::is_same_v<T, float> && std::is_same_v<C, Bf16> && queries <= FEW_QUERIES && head_dim % PAIR == 0;
  const auto query = [&](int64_t row) {
    const int64_t token = job.first_token + (job.first_row + row) / group;
    const int64_t head = job.head * group + (job.first_row + row) % group;
    return static_cast<const X*>(op.q) + token * op.q_stride + head * head_dim;
  };
  for (int64_t row = 0; row < job.num_rows; ++row) {
    if (row + FETCH_ROWS < job.num_rows) fetch(query(row + FETCH_ROWS), head_dim * sizeof(X));
    convert(query(row), head_dim, buffers.q + row * depth, depth);
    if (is_read) part_pairs<LANES>(reinterpret_cast<float*>(buffers.q + row * depth), depth);
  }
  memset(static_cast<void*>(buffers.q + job.num_rows * depth), 0, (num_rows - job.num_rows) * depth * sizeof(T));
  memset(buffers.sums, 0, num_rows * width * sizeof(float));
  for (int64_t row = 0; row < num_rows; ++row) {
    buffers.largest[row] = -INFINITY;
    buffers.total[row] = 0;
  }

  begin_tiles();
  for (int64_t key = job.first_key; key < job.end_key; key += BLOCK) {
    const int64_t count = smaller_of(BLOCK, job.end_key - key);
    const Bf16 *keys[BLOCK], *values[BLOCK];
    if (is_read)
      kept.rows(key, count, keys, values);
    else
      pack(kept, key, count, buffers);
    for (int64_t row = 0; row < num_rows; row += TILE) {
      const int64_t rows = smaller_of(TILE, num_rows - row), real = smaller_of(TILE, job.num_rows - row);
      const int64_t seen = round_up(smaller_of(count, end_of(row + real - 1) - key), 32);
      if (seen <= 0) continue;
      const int64_t read = smaller_of(count, seen);  // keys, where they are read
      if (is_read)
        score_few(reinterpret_cast<float*>(buffers.q + row * depth), depth, real, keys, values, read, head_dim, buffers.scores, BLOCK);
      else
        multiply<T>(reinterpret_cast<uint32_t*>(buffers.q + row * depth), depth / per_word<T>, rows,
                    reinterpret_cast<uint32_t*>(buffers.keys), depth / per_word<T> * PANEL, seen / PANEL,
                    depth / per_word<T>, buffers.scores, BLOCK, false);
      for (int64_t i = 0; i < rows; ++i) {
        T* weights = buffers.weights + i * BLOCK;
        const int64_t visible = i < real ? smaller_of(count, end_of(row + i) - key) : 0;
        if (visible <= 0) {
          memset(static_cast<void*>(weights), 0, seen * sizeof(T));
          continue;
        }
        const float shrink = weigh<T, std::is_same_v<C, int8_t>>(
            buffers.scores + i * BLOCK, visible, seen, factor, buffers.key_scale, buffers.value_scale,
            buffers.largest[row + i], buffers.total[row + i], weights);
        float* sums = buffers.sums + (row + i) * width;
        if (shrink != 1.0f)
          for (int64_t j = 0; j < width; j += LANES) store(sums + j, load(sums + j) * splat(shrink));
      }
      if (is_read)
        add_few(reinterpret_cast<float*>(buffers.weights), BLOCK, real, values, read, head_dim, buffers.sums + row * width, width);
      else
        multiply<T>(reinterpret_cast<uint32_t*>(buffers.weights), BLOCK / per_word<T>, rows,
                    reinterpret_cast<uint32_t*>(buffers.values), BLOCK / per_word<T> * PANEL, width / PANEL,
                    seen / per_word<T>, buffers.sums + row * width, width, true);
    }
  }
  end_tiles();

  for (int64_t row = 0; row < job.num_rows; ++row) {
    float* sums = buffers.sums + row * width;
    if (is_read) join_pairs<LANES>(sums, width);
    if (job.partial) {
      float* to = job.partial + row * (width + 2);
      memcpy(to, sums, width * sizeof(float));
      to[width] = buffers.largest[row];
      to[width + 1] = buffers.total[row];
    } else {
      const Floats share = splat(1.0f / buffers.total[row]);
      for (int64_t i = 0; i < width; i += LANES) store(sums + i, load(sums + i) * share);
      convert(sums, head_dim, output<X>(op, job, row), head_dim);
    }
  }
}

// Makes one result of the pieces of some rows: each piece's weights are seen from the largest score of all.
template <class X>
void merge(const SaccadeAttention& op, const Job& job) {
  const int64_t width = round_up(op.head_dim, PANEL), piece_size = job.num_rows * (width + 2);
  const float factor = op.scale * LOG2_E;
  float* sums = static_cast<float*>(scratch(SCRATCH_ATTENTION, width * sizeof(float)));
  for (int64_t row = 0; row < job.num_rows; ++row) {
    const float* pieces = job.partial + row * (width + 2);
    float top = -INFINITY, total = 0;
    for (int64_t p = 0; p < job.num_pieces; ++p)
      if (pieces[p * piece_size + width] > top) top = pieces[p * piece_size + width];
    memset(sums, 0, width * sizeof(float));
    for (int64_t p = 0; p < job.num_pieces; ++p) {
      const float* piece = pieces + p * piece_size;
      if (piece[width + 1] == 0) continue;  // the row sees none of its keys
      const float share = exp2f((piece[width] - top) * factor);
      total += share * piece[width + 1];
      for (int64_t i = 0; i < width; i += LANES) store(sums + i, fma(splat(share), load(piece + i), load(sums + i)));
    }
    const Floats whole = splat(1.0f / total);
    for (int64_t i = 0; i < width; i += LANES) store(sums + i, load(sums + i) * whole);
    convert(sums, op.head_dim, output<X>(op, job, row), op.head_dim);
  }
}

// Calls take(job) for every job of the step.
template <class Take>
void each_job(const SaccadeAttention& op, Take&& take) {
  const int64_t group = op.num_heads / op.num_kv_heads;
  int64_t first_token = 0;
  for (int64_t s = 0; s < op.num_sequences; ++s) {
    const int64_t queries = op.query_lengths[s], context = op.context_lengths[s], rows = queries * group;
    const int64_t num_pieces = queries <= FEW_QUERIES ? (context + PIECE - 1) / PIECE : 1;
    for (int64_t head = 0; head < op.num_kv_heads; ++head) {
      if (num_pieces > 1) {
        for (int64_t key = 0; key < context; key += PIECE)
          take({s, head, first_token, 0, rows, key, smaller_of(key + PIECE, context), num_pieces, nullptr});
      } else {
        for (int64_t row = 0; row < rows; row += MAX_ROWS) {
          const int64_t count = smaller_of(MAX_ROWS, rows - row);
          const int64_t end = op.causal ? context - queries + (row + count - 1) / group + 1 : context;
          take({s, head, first_token, row, count, 0, end, 1, nullptr});
        }
      }
    }
    first_token += queries;
  }
}

template <class T, class X, class C>
void attend_all(const SaccadeAttention& op) {
  const int64_t row_size = round_up(op.head_dim, PANEL) + 2;
  int64_t num_jobs = 0, partial_size = 0;
  each_job(op, [&](const Job& job) {
    num_jobs += 1;
    if (job.num_pieces > 1) partial_size += job.num_rows * row_size;
  });
  Job* jobs = static_cast<Job*>(scratch(SCRATCH_JOBS, num_jobs * sizeof(Job) + partial_size * sizeof(float)));
  float* partial = reinterpret_cast<float*>(jobs + num_jobs);
  int64_t count = 0;
  each_job(op, [&](const Job& job) {
    jobs[count] = job;
    if (job.num_pieces > 1) {
      jobs[count].partial = partial;
      partial += job.num_rows * row_size;
    }
    count += 1;
  });

  Pieces pieces(num_jobs);
  parallel([&](int, int) {
    // The last rows of a prompt see the most keys, so they begin.
    for (int64_t i; (i = pieces.next()) >= 0;) attend<T, X, C>(op, jobs[num_jobs - 1 - i]);
  });
  if (partial_size == 0) return;
  Pieces merges(num_jobs);
  parallel([&](int, int) {
    for (int64_t i; (i = merges.next()) >= 0;)
      if (jobs[i].num_pieces > 1 && jobs[i].first_key == 0) merge<X>(op, jobs[i]);
  });
}

template <class T, class X>
void attend_kept(const SaccadeAttention& op) {
  if (op.is_int8) return attend_all<T, X, int8_t>(op);
  attend_all<T, X, X>(op);
}

}  // namespace

void attention(const SaccadeAttention& op) {
  switch (op.dtype) {
    case SACCADE_FLOAT32: return attend_kept<float, float>(op);
    case SACCADE_BFLOAT16: return attend_kept<Fast, Bf16>(op);
    case SACCADE_FLOAT16: return attend_kept<float, Fp16>(op);
  }
}

}  // namespace saccade::SACCADE_ISA
