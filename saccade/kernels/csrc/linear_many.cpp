// Linear layers of many rows: which product and which kind of weights each scheme takes.

#include "linear_many.h"

#include "linear.h"

namespace saccade::SACCADE_ISA {
namespace {

#if defined(__AMX_INT8__)
using WholeProduct = TileProduct<int8_t>;
using PairsProduct = TileProduct<BFloat16>;
constexpr int OFFSET = 0;
#else
using WholeProduct = VectorProduct<EachWord<WholeWords>>;
#if defined(__AVX512BF16__)
using PairsProduct = VectorProduct<EachWord<PairWords>>;
#endif
constexpr int OFFSET = WholeWords::OFFSET;
#endif

#if defined(SACCADE_PAIRS)
constexpr float QUIET_ZERO = 16;  // numbers about a zero point that is further away are loud together
#endif

// Product: of floats.
template <class T, class Product>
void multiply_floats(const LinearCall& call) {
  using V = typename Product::Value;
  switch (call.layer.scheme) {
    case SACCADE_DENSE: return multiply_many<T, Product, StagedRows<V, BFloat16>>(call);
    case SACCADE_W8A16: return multiply_many<T, Product, StagedRows<V, int8_t>>(call);
    case SACCADE_FP8: return multiply_many<T, Product, StagedRows<V, Float8>>(call);
    case SACCADE_W4A16:
    case SACCADE_W4A8_FLOAT: return multiply_many<T, Product, StagedFloatNibbles<V>>(call);
  }
}

template <class T>
void multiply_any(const LinearCall& call) {
  using V = WholeProduct::Value;
  switch (call.layer.scheme) {
    case SACCADE_W8A8:
    case SACCADE_W8A8_DYNAMIC:
#if defined(SACCADE_PAIRS)
      if (call.layer.scheme == SACCADE_W8A8_DYNAMIC || fabsf(call.layer.static_zero) <= QUIET_ZERO)
        return multiply_many<T, VectorProduct<EachTwoWords>, StagedRows<int8_t, int8_t, EachTwoWords::OFFSET>>(call);
#endif
      return multiply_many<T, WholeProduct, StagedRows<V, int8_t, OFFSET>>(call);
#if defined(SACCADE_PAIRS)
    case SACCADE_W4A8:
      return call.layer.group_size < 64 ? multiply_many<T, VectorProduct<EachRun<32>>, StagedRuns<32>>(call)
                                        : multiply_many<T, VectorProduct<EachRun<64>>, StagedRuns<64>>(call);
#else
    case SACCADE_W4A8: return multiply_many<T, WholeProduct, StagedWholeNibbles<V, OFFSET>>(call);
#endif
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return multiply_floats<T, PairsProduct>(call);
#endif
  multiply_floats<T, VectorProduct<EachWord<FloatWords>>>(call);
}

}  // namespace

void linear_of_many(const LinearCall& call) {
  switch (call.layer.dtype) {
    case SACCADE_FLOAT32: return multiply_any<float>(call);
    case SACCADE_BFLOAT16: return multiply_any<BFloat16>(call);
    case SACCADE_FLOAT16: return multiply_any<Float16>(call);
  }
}

}  // namespace saccade::SACCADE_ISA
