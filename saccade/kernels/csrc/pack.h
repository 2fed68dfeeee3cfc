// Bringing weights of files into the form of linear layers (schemes/packing.py).
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace saccade {

struct RepackCall {
  const uint8_t* words;  // compressed-tensors: 4-bit values plus 8, two in a byte, the first in the lower half
  uint8_t* out;
  int64_t runs;  // of 32 columns, 16 bytes
};

// Scales of groups as a row's scale times whole numbers, as schemes/affine.py's split_group_scales finds them.
struct SplitCall {
  const float* product;  // [rows, groups]
  float* scale;          // [rows]
  int8_t* multiples;     // [rows, groups]
  int64_t rows, groups;
  int32_t most;       // the largest multiple
  int32_t* is_split;  // whether all rows are whole multiples of something
};

SACCADE_KERNEL(repack, const RepackCall&)
SACCADE_KERNEL(split_scales, const SplitCall&)

}  // namespace saccade
