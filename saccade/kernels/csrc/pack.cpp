#include "pack.h"

#include <math.h>
#include <string.h>

namespace saccade::SACCADE_ISA {
namespace {

// Whether all of `count` products are `number` / `least` times whole numbers up to `most`, which are then in `multiples`.
bool are_multiples(const float* product, int64_t count, float least, float number, float most, int8_t* multiples) {
  for (int64_t i = 0; i < count; ++i) {
    const float multiple = product[i] / least * number, whole = nearbyintf(multiple);
    if (!(fabsf(multiple - whole) < 1e-4f && whole <= most)) return false;
    multiples[i] = static_cast<int8_t>(whole);
  }
  return true;
}

}  // namespace

void repack(const RepackCall& call) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  for (int64_t run = 0; run < call.runs; ++run) {
    Bytes both;
    memcpy(&both, call.words + run * 16, sizeof both);
    const Bytes even = both & 0x0f, odd = both >> 4;
    const Bytes first = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Bytes last = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const Bytes joined = (first | last << 4) ^ 0x88;  // minus 8, modulo 16, both halves
    memcpy(call.out + run * 16, &joined, sizeof joined);
  }
}

void split_scales(const SplitCall& call) {
  *call.is_split = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    const float* const product = call.product + row * call.groups;
    float least = INFINITY;
    for (int64_t i = 0; i < call.groups; ++i) least = product[i] < least ? product[i] : least;
    int32_t number = least > 0.0f ? 1 : call.most + 1;
    while (number <= call.most &&
           !are_multiples(product, call.groups, least, number, call.most, call.multiples + row * call.groups))
      ++number;
    if (number > call.most) return;
    call.scale[row] = least / static_cast<float>(number);
  }
  *call.is_split = 1;
}

}  // namespace saccade::SACCADE_ISA
