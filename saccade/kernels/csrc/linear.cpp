// Linear layers: which way each scheme and number of rows takes.
//
// Weights are read as they lie, row after row, in memory or in a mapped file: nothing is packed or held twice.
// Letters: M rows of x, N rows of the weight (outputs), K columns.

#include "linear.h"

#include "linear_rows.h"
#include "linear_tiles.h"

namespace saccade::SACCADE_ISA {
namespace {

template <class T>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<BFloat16> = true;

#if defined(__AVX512BF16__)
using DenseFew = DensePairs;
#else
using DenseFew = Wide<BFloat16>;
#endif

#if defined(__AMX_INT8__)
constexpr int64_t TILES_PAY = 5;        // rows of x from which on tiles are faster
constexpr int64_t TILES_PAY_DENSE = 9;  // as fast either way from 5 on; up to here a row has the bits it has alone (alike_rows)

// Whether the layer was computed: sums of bfloat16 products are for x of bfloat16 only.
template <class T>
bool linear_by_tiles(const LinearCall& call) {
  if (call.rows < (call.layer.scheme == SACCADE_DENSE ? TILES_PAY_DENSE : TILES_PAY)) return false;
  switch (call.layer.scheme) {
    case SACCADE_W8A8:
    case SACCADE_W8A8_DYNAMIC: return multiply_by_tiles<T, BytesTile>(call), true;
    case SACCADE_W4A8: return multiply_by_tiles<T, NibblesTile>(call), true;
  }
  if constexpr (IS_BFLOAT16<T>) {
    switch (call.layer.scheme) {
      case SACCADE_DENSE: return multiply_by_tiles<T, DenseTile>(call), true;
      case SACCADE_W8A16: return multiply_by_tiles<T, BytesPairsTile>(call), true;
      case SACCADE_W4A16: return multiply_by_tiles<T, NibblePairsTile>(call), true;
    }
  }
  return false;
}
#else
template <class T>
bool linear_by_tiles(const LinearCall&) {
  return false;
}
#endif

template <class T>
void linear_of(const LinearCall& call) {
  if (linear_by_tiles<T>(call)) return;
  const bool is_fine = call.layer.group_size < PACKED_COLUMNS;
  switch (call.layer.scheme) {
    case SACCADE_DENSE: return multiply_by_rows<T, DenseFew>(call);
    case SACCADE_W8A16: return multiply_by_rows<T, Wide<int8_t>>(call);
    case SACCADE_W4A16:
      if constexpr (IS_BFLOAT16<T>) return is_fine ? multiply_by_rows<T, FixedNibbles<true>>(call) : multiply_by_rows<T, FixedNibbles<false>>(call);
      return multiply_by_rows<T, WideNibbles>(call);
    case SACCADE_W8A8:
    case SACCADE_W8A8_DYNAMIC: return multiply_by_rows<T, Bytes>(call);
    case SACCADE_W4A8:
      return is_fine ? multiply_by_rows<T, Nibbles<true>>(call) : multiply_by_rows<T, Nibbles<false>>(call);
  }
}

}  // namespace

void linear(const LinearCall& call) {
  if (call.rows == 0) return;
  switch (call.layer.dtype) {
    case SACCADE_FLOAT32: return linear_of<float>(call);
    case SACCADE_BFLOAT16: return linear_of<BFloat16>(call);
    case SACCADE_FLOAT16: return linear_of<Float16>(call);
  }
}

}  // namespace saccade::SACCADE_ISA
