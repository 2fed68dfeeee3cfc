// The C interface: what ctypes calls. Each entry point hands its arguments to the kernel of the instruction set in use.

#include <stdint.h>

#include "attention.h"
#include "decoder.h"
#include "dispatch.h"
#include "linear.h"
#include "ordered.h"
#include "pack.h"
#include "pool.h"
#include "read.h"
#include "small.h"

#define ENTRY extern "C" __attribute__((visibility("default")))

// Goes up with every change of an entry point or a structure: Python refuses a library of another number.
ENTRY int32_t saccade_interface() { return 7; }

// --- the machine ---

ENTRY const char* saccade_isa_name(int32_t isa) { return saccade::isa_name(isa); }  // null beyond the last
ENTRY int32_t saccade_isa_is_supported(int32_t isa) { return saccade::isa_is_supported(isa); }
ENTRY int32_t saccade_isa() { return saccade::active_isa; }
ENTRY void saccade_set_isa(int32_t isa) { saccade::active_isa = isa; }
ENTRY int32_t saccade_num_threads() { return saccade::num_threads(); }
ENTRY void saccade_set_num_threads(int32_t count) { saccade::set_num_threads(count); }

// `count` words of 8 bytes, all threads together; returns them combined.
ENTRY uint64_t saccade_read(const uint64_t* start, int64_t count) {
  uint64_t result;
  SACCADE_CALL(read)({start, count, &result});
  return result;
}

// --- linear layers ---

// `runs` of 32 columns of 4 bits from compressed-tensors' layout to ours, on the calling thread.
ENTRY void saccade_repack(const uint8_t* words, uint8_t* out, int64_t runs) { SACCADE_CALL(repack)({words, out, runs}); }

ENTRY void saccade_linear(const SaccadeLinear* layer, const void* x, int64_t x_stride, void* y, int64_t rows) {
  SACCADE_CALL(linear)({*layer, x, x_stride, y, rows});
}

// Returns whether the scales of groups could be split; product is [rows, groups].
ENTRY int32_t saccade_split_scales(const float* product, float* scale, int8_t* multiples, int64_t rows, int64_t groups,
                                   int32_t most) {
  int32_t is_split;
  SACCADE_CALL(split_scales)({product, scale, multiples, rows, groups, most, &is_split});
  return is_split;
}

// --- attention, and the ops between products ---

ENTRY void saccade_attention(const SaccadeAttention* op) { SACCADE_CALL(attention)(*op); }
ENTRY void saccade_rms_norm(const SaccadeNorm* op) { SACCADE_CALL(rms_norm)(*op); }
ENTRY void saccade_silu_mul(const SaccadeSiluMul* op) { SACCADE_CALL(silu_mul)(*op); }
ENTRY void saccade_rope(const SaccadeRope* op) { SACCADE_CALL(rope)(*op); }
ENTRY void saccade_store(const SaccadeStore* op) { SACCADE_CALL(store_rows)(*op); }

// --- the decoder ---

ENTRY void saccade_decode(const SaccadeDecoder* decoder, const SaccadeStep* step) { saccade::decode(*decoder, *step); }

// --- arithmetic in a fixed order ---

ENTRY void saccade_ordered_product(const SaccadeOrderedProduct* op) { SACCADE_CALL(ordered_product)(*op); }
ENTRY void saccade_ordered_panels(const SaccadeOrderedPanels* op) { SACCADE_CALL(ordered_panels)(*op); }
ENTRY void saccade_ordered_levels(const SaccadeOrderedLevels* op) { SACCADE_CALL(ordered_levels)(*op); }
ENTRY void saccade_ordered_gate_up(const SaccadeOrderedGateUp* op) { SACCADE_CALL(ordered_gate_up)(*op); }
ENTRY void saccade_ordered_segments(const SaccadeOrderedSegments* op) { SACCADE_CALL(ordered_segments)(*op); }
ENTRY void saccade_ordered_causal(const SaccadeOrderedCausal* op) { SACCADE_CALL(ordered_causal)(*op); }
ENTRY void saccade_ordered_attention(const SaccadeOrderedAttention* op) { SACCADE_CALL(ordered_attention)(*op); }
ENTRY void saccade_ordered_sum(const SaccadeOrderedRows* op) { SACCADE_CALL(ordered_sum)(*op); }
ENTRY void saccade_ordered_softmax(const SaccadeOrderedRows* op) { SACCADE_CALL(ordered_softmax)(*op); }
