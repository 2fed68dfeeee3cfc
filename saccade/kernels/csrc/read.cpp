#include "read.h"

#include "pool.h"

namespace saccade::SACCADE_ISA {

void read(const ReadCall& call) {
  constexpr int64_t PIECE = 1 << 15;  // words
  Pieces pieces((call.count + PIECE - 1) / PIECE);
  uint64_t all = 0;
  parallel([&](int, int) {
    uint64_t mine = 0;
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t end = (piece + 1) * PIECE < call.count ? (piece + 1) * PIECE : call.count;
      for (int64_t i = piece * PIECE; i < end; ++i) mine ^= call.start[i];
    }
    __atomic_fetch_xor(&all, mine, __ATOMIC_RELAXED);
  });
  *call.result = all;
}

}  // namespace saccade::SACCADE_ISA
