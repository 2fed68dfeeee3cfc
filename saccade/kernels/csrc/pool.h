// A small pool of threads: the caller and its workers run a task together. Knows no kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace saccade {

using Task = void (*)(void* context, int thread, int num_threads);

int num_threads();
void set_num_threads(int count);  // at least 1, the caller included; not while a task runs

// Runs task(context, i, n) for every i of 0..n-1, each on a thread of its own, the caller's among them, and returns when all
// have. n is num_threads(), or 1 where another caller has the workers: a task must be right for any n.
void run(Task task, void* context);

// function(thread, num_threads), as above.
template <class Function>
inline void parallel(Function&& function) {
  run([](void* context, int thread, int count) { (*static_cast<Function*>(context))(thread, count); }, &function);
}

// Work handed out in pieces, so that a thread that was held up does less: next() is the next of `count` pieces, or -1.
class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}
  int64_t next() {
    const int64_t piece = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return piece < count_ ? piece : -1;
  }

 private:
  int64_t count_;
  int64_t next_ = 0;
};

// The same, but neighbouring pieces go to one thread as long as it has not fallen behind: memory is read fastest in order. A thread
// that has done its share takes the last pieces of others'.
class Shares {
 public:
  explicit Shares(int64_t count) : num_shares_(num_threads() < MOST ? num_threads() : MOST) {
    for (int i = 0; i < num_shares_; ++i)
      shares_[i].range = pack(count * i / num_shares_, count * (i + 1) / num_shares_);
  }
  int64_t next(int thread) {
    for (int i = 0; i < num_shares_; ++i) {
      Share& share = shares_[(thread + i) % num_shares_];
      uint64_t range = __atomic_load_n(&share.range, __ATOMIC_RELAXED);
      while (begin(range) < end(range)) {
        const bool is_own = i == 0 && thread < num_shares_;
        const uint64_t left = is_own ? pack(begin(range) + 1, end(range)) : pack(begin(range), end(range) - 1);
        if (__atomic_compare_exchange_n(&share.range, &range, left, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
          return is_own ? begin(range) : end(range) - 1;
      }
    }
    return -1;
  }

 private:
  static constexpr int MOST = 64;
  static uint64_t pack(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }
  static int64_t begin(uint64_t range) { return static_cast<int64_t>(range >> 32); }
  static int64_t end(uint64_t range) { return static_cast<int64_t>(range & 0xFFFFFFFF); }
  struct alignas(64) Share {
    uint64_t range;
  };
  int num_shares_;
  Share shares_[MOST];
};

// Memory of the calling thread that lives on between calls, aligned to 64 bytes; its contents do not. nullptr if there is none.
// A slot is one use of it: a later request for the same slot may move it.
enum Scratch {
  SCRATCH_INPUT,
  SCRATCH_INPUT_SCALES,
  SCRATCH_ROWS,
  SCRATCH_PANEL,
  SCRATCH_SUMS,
  SCRATCH_OTHER,
  SCRATCH_JOBS,
  SCRATCH_ATTENTION,
  NUM_SCRATCH
};
void* scratch(Scratch slot, size_t bytes);

}  // namespace saccade
