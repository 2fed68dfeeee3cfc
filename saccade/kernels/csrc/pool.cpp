#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace saccade {
namespace {

// A worker waits awake for the next task this long, then sleeps: waking costs more than the smallest kernels take, but other
// people's threads (torch's between our kernels) need the processor too.
constexpr std::chrono::microseconds AWAKE{100};
constexpr int TURNS_PER_LOOK = 64;  // at the clock
constexpr int TURNS_BEFORE_YIELD = 4096;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  ~Pool() = delete;  // lives until the process ends: workers may still wait then

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void resize(int count) {
    std::lock_guard<std::mutex> submitting(submit_);
    if (count == size()) return;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_ = true;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
    const uint32_t round = round_.load();
    for (int thread = 1; thread < count; ++thread)
      workers_.emplace_back([this, thread, round] { work(thread, round); });
  }

  void run(Task task, void* context) {
    std::unique_lock<std::mutex> submitting(submit_, std::try_to_lock);
    if (!submitting.owns_lock() || workers_.empty()) {
      task(context, 0, 1);
      return;
    }
    task_ = task;
    context_ = context;
    remaining_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1);  // publishes the three above
    if (num_asleep_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }  // a worker that was about to sleep has looked at the round, or sleeps
      wake_.notify_all();
    }
    task(context, 0, size());
    for (int turn = 0; remaining_.load(std::memory_order_acquire) > 0; ++turn) {
      if (turn < TURNS_BEFORE_YIELD)
        pause();
      else
        std::this_thread::yield();  // a worker may wait for the processor this thread is on
    }
  }

 private:
  void work(int thread, uint32_t seen) {
    for (;;) {
      await(seen);
      seen += 1;
      if (stopping_) return;
      task_(context_, thread, size());
      remaining_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Returns when the round is no longer `seen`.
  void await(uint32_t seen) {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int turn = 0; turn < TURNS_PER_LOOK; ++turn) {
        if (round_.load(std::memory_order_acquire) != seen) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() - start < AWAKE);
    std::unique_lock<std::mutex> lock(sleep_);
    num_asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return round_.load() != seen; });
    num_asleep_.fetch_sub(1);
  }

  std::mutex submit_;
  std::vector<std::thread> workers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> remaining_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

Pool* the_pool = new Pool;

// A forked child has none of its parent's threads: it starts with a pool of its own, of the caller alone.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });

struct Buffers {
  void* start[NUM_SCRATCH] = {};
  size_t size[NUM_SCRATCH] = {};
  ~Buffers() {
    for (void* buffer : start) free(buffer);
  }
};
thread_local Buffers buffers;

}  // namespace

int num_threads() { return the_pool->size(); }

void set_num_threads(int count) { the_pool->resize(count < 1 ? 1 : count); }

void run(Task task, void* context) { the_pool->run(task, context); }

void* scratch(Scratch slot, size_t bytes) {
  if (bytes > buffers.size[slot]) {
    free(buffers.start[slot]);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffers.start[slot] = aligned_alloc(64, rounded);
    buffers.size[slot] = buffers.start[slot] ? rounded : 0;
  }
  return buffers.start[slot];
}

}  // namespace saccade
