// Reading memory and nothing else: the rate that kernels bound by their weights are held against.
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace saccade {

struct ReadCall {
  const uint64_t* start;
  int64_t count;
  uint64_t* result;  // all words combined, so that no read can be left out
};

SACCADE_KERNEL(read, const ReadCall&)

}  // namespace saccade
