// AMX's tiles: eight registers of 16 rows of 64 bytes. A thread begins with them, multiplies, and ends.
#pragma once

#include <stdint.h>

#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

namespace saccade::SACCADE_ISA {

#if defined(__AMX_TILE__)
inline void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" : "+m"(config));  // all of it is read: GCC 12's intrinsic says 8 bytes, and what is stored to the others may be dropped
  _tile_loadconfig(&config);
}
inline void end_tiles() { _tile_release(); }

// What was stored is in memory before tiles are loaded from it: GCC's intrinsic doesn't say that it reads any.
inline void before_loading_tiles() { asm volatile("" ::: "memory"); }
#else
inline void begin_tiles() {}
inline void end_tiles() {}
#endif

}  // namespace saccade::SACCADE_ISA
