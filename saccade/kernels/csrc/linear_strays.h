// Bytes times bytes on x86 without VNNI: pairs of products are added up in 16 bits, and never leave them.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs of products in 16 bits, which saturate. Two of its results are added there
// before 32 bits take them: five instructions for what takes eight where bytes are widened first. As w + 128 is at most 255, it is
// enough that of the four numbers of x that meet, the positive ones are no more than LOUD together, and neither are the negative ones.
// Most of x is small beside its row's largest number, so nearly all words and their neighbours are. What others have too much is taken
// from the row and multiplied by itself: a stray. A row of too many stays as it is, and its bytes are multiplied one by one.
#pragma once

#include "linear_products.h"

#if defined(SACCADE_PAIRS)

namespace saccade::SACCADE_ISA {

constexpr int LOUD = 128;  // times 255 it fits 16 bits

// The strays of a row of x: where those of each turn of TURN_WORDS begin, in words from here, and where the last end; then groups, whose
// products 16 bits hold, too: where their words begin in a panel, in bytes, then what they hold. The first is 0 for a row that stays as it is.
constexpr int GROUP = 4;
inline int64_t stray_starts(int64_t num_words) { return (num_words + TURN_WORDS - 1) / TURN_WORDS + 1; }
inline int64_t strays_size(int64_t num_words) { return stray_starts(num_words) + num_words / (2 * GROUP) * (2 * GROUP); }

// How much meets in 16 bits, of both signs, in either half of a word.
struct Loudness {
  int left[2][2] = {{LOUD, LOUD}, {LOUD, LOUD}};

  // As much of the bytes as there is room for; they keep the rest.
  void take(const int8_t (&bytes)[4], int8_t (&taken)[4]) {
    for (int i = 0; i < 4; ++i) {
      const int value = bytes[i];
      int& room = left[i / 2][value < 0];
      const int magnitude = value < 0 ? -value : value, fits = magnitude < room ? magnitude : room;
      room -= fits;
      taken[i] = static_cast<int8_t>(value < 0 ? -fits : fits);
    }
  }
};

class StrayGroups {
 public:
  StrayGroups(uint32_t* strays, int64_t num_words)
      : strays_(strays), start_(strays), next_(strays + stray_starts(num_words)), end_(strays + strays_size(num_words)) {}

  void begin_turn() {
    filled_ = GROUP;
    *start_++ = static_cast<uint32_t>(next_ - strays_);
  }

  // False where memory for groups ends.
  bool put(int64_t word, const int8_t (&bytes)[4]) {
    const auto place = static_cast<uint32_t>(word * PANEL * WORD);
    int8_t rest[4];
    memcpy(rest, bytes, sizeof rest);
    for (uint32_t left; memcpy(&left, rest, sizeof left), left != 0;) {
      int8_t taken[4];
      Loudness room = room_;
      if (filled_ < GROUP) room.take(rest, taken);
      if (filled_ == GROUP || memcmp(taken, rest, sizeof rest) != 0) {  // a new group, and of what not even that has room for, the next
        if (next_ == end_) return false;
        for (int i = 0; i < GROUP; ++i) next_[i] = place, next_[GROUP + i] = 0;
        next_ += 2 * GROUP;
        filled_ = 0;
        room = Loudness();
        room.take(rest, taken);
      }
      room_ = room;
      next_[filled_ - 2 * GROUP] = place;
      memcpy(next_ + filled_ - GROUP, taken, sizeof taken);
      ++filled_;
      for (int i = 0; i < 4; ++i) rest[i] = static_cast<int8_t>(rest[i] - taken[i]);
    }
    return true;
  }

 private:
  uint32_t *strays_, *start_, *next_, *end_;
  Loudness room_;
  int filled_ = GROUP;  // of the last group
};

// Takes the strays out of a row, which zeros fill up to whole vectors. False, and the row is spoilt, where they are too many.
inline bool part_strays(uint32_t* words, int64_t num_words, uint32_t* strays) {
  constexpr int64_t VECTOR = BYTES / WORD;
  StrayGroups groups(strays, num_words);
  for (int64_t first = 0; first < num_words; first += VECTOR) {
    if (first % TURN_WORDS == 0) groups.begin_turn();
    for (uint64_t loud = find_loud(load(reinterpret_cast<int8_t*>(words + first)), LOUD); loud != 0; loud &= loud - 1) {
      const int64_t low = first + __builtin_ctzll(loud) / LOUD_BITS * 2;
      Loudness room;
      for (int64_t word = low; word < low + 2; ++word) {
        int8_t bytes[4], kept[4];
        memcpy(bytes, words + word, sizeof bytes);
        room.take(bytes, kept);
        memcpy(words + word, kept, sizeof kept);
        for (int i = 0; i < 4; ++i) bytes[i] = static_cast<int8_t>(bytes[i] - kept[i]);
        if (!groups.put(word, bytes)) return false;
      }
    }
  }
  groups.begin_turn();
  return true;
}

// Bytes of x and w + 128, one by one.
struct ByteWords {
  using Value = int8_t;
  using Number = int32_t;
  static constexpr int OFFSET = 128;
  typedef int16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
  static PanelWords add(PanelWords sum, PanelWords w, PanelWords x) {
    const auto left = (Halves)w, right = (Halves)x;
    const Int8 even = multiply_words((Int8)sum, (Int8)(left & 255), (Int8)(right << 8 >> 8));
    return (PanelWords)multiply_words(even, (Int8)(left >> 8 & 255), (Int8)(right >> 8));
  }
};

// Two words of x and weights at once.
struct EachTwoWords {
  using Value = int8_t;
  using Number = int32_t;
  using Whole = EachWord<ByteWords>;
  static constexpr int OFFSET = 128;
  static constexpr int64_t ROWS = 4;  // with as many panels as fit, all sums and two words of weights have registers
  static constexpr bool HAS_STRAYS = true;

  static Int8 at(const uint32_t* w, int64_t w_stride, int v) { return (Int8)load_words_at(w + v / EACH_PANEL * w_stride, v % EACH_PANEL); }
  static Int8 each(uint32_t word) { return (Int8)(PanelWords{} + static_cast<int32_t>(word)); }

  template <int COUNT>
  [[gnu::noinline]] static void multiply_rows(const uint32_t* x, int64_t x_stride, const uint32_t* w, int64_t w_stride, int64_t count,
                            Number* sums, bool is_first) {
    Int8 sum[COUNT][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = is_first ? zero_sum() : (Int8)load_words_at(sums + r * VECTOR_OUTPUTS, v);
    const Int8 ones = each_run(int16_t{1});
    for (int64_t k = 0; k < count; k += 2, w += 2 * PANEL) {
      Int8 low[VECTORS], high[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) low[v] = at(w, w_stride, v), high[v] = at(w + PANEL, w_stride, v);
#pragma GCC unroll 8
      for (int r = 0; r < COUNT; ++r) {
        const Int8 first = each(x[r * x_stride + k]), second = each(x[r * x_stride + k + 1]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
          sum[r][v] = multiply_words(sum[r][v], add_pairs(multiply_pairs(low[v], first), multiply_pairs(high[v], second)), ones);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) words_at(sums + r * VECTOR_OUTPUTS, v) = (PanelWords)sum[r][v];
  }

  static bool is_whole(const uint32_t* strays) { return strays[0] == 0; }

  // One row's, of `count` words from `first` on.
  [[gnu::noinline]] static void add_strays(const uint32_t* strays, int64_t first, int64_t count, const uint32_t* w, int64_t w_stride, Number* sums) {
    const uint32_t *next = strays + strays[first / TURN_WORDS], *end = strays + strays[(first + count + TURN_WORDS - 1) / TURN_WORDS];
    Int8 sum[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[v] = (Int8)load_words_at(sums, v);
    const Int8 ones = each_run(int16_t{1});
    const auto panel = reinterpret_cast<const char*>(w - first * PANEL);
    for (; next < end; next += 2 * GROUP) {
      Int8 pairs[VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < GROUP; ++i) {
        const auto from = reinterpret_cast<const uint32_t*>(panel + next[i]);
        const Int8 x = each(next[GROUP + i]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
          const Int8 both = multiply_pairs(at(from, w_stride, v), x);
          pairs[v] = i == 0 ? both : add_pairs(pairs[v], both);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[v] = multiply_words(sum[v], pairs[v], ones);
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) words_at(sums, v) = (PanelWords)sum[v];
  }
};

}  // namespace saccade::SACCADE_ISA

#endif
