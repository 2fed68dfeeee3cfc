// Products, sums and softmax of whole tensors.
#include "ordered_products.h"
#include "ordered_sums.h"

namespace saccade::SACCADE_ISA {

using namespace ordered;

namespace {

// b's columns from one panel to another as panels.
const ByPairs::Value* panels_of(const SaccadeOrderedProduct& op, int64_t first, int64_t count) {
  const int64_t steps = ByPairs::steps(op.depth);
  if (op.panels) return static_cast<const ByPairs::Value*>(op.panels) + first * COLUMNS * steps;
  const auto panels = static_cast<ByPairs::Value*>(
      scratch(SCRATCH_PANEL, count * COLUMNS * steps * sizeof(ByPairs::Value)));
  Pieces pieces(count);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t column = (first + piece) * COLUMNS;
      fill_panel<ByPairs>(op.b + column * op.b_column_stride, op.b_row_stride, op.b_column_stride, op.depth,
                          least(op.columns - column, COLUMNS), panels + piece * COLUMNS * steps);
    }
  });
  return panels;
}

}  // namespace

void ordered_product(const SaccadeOrderedProduct& op) {
  using Value = ByPairs::Value;
  const int64_t steps = ByPairs::steps(op.depth), stride = row_stride(steps);
  const auto a = static_cast<Value*>(scratch(SCRATCH_INPUT, op.rows * stride * sizeof(Value)));
  each_row(op.rows, [&](int64_t row) { ByPairs::fill(op.a + row * op.a_stride, op.depth, a + row * stride); });
  const int64_t all = (op.columns + COLUMNS - 1) / COLUMNS, blocks = (op.rows + BLOCK - 1) / BLOCK;
  for (int64_t start = 0; start < all; start += PANELS) {
    const int64_t some = least(all - start, PANELS);
    const Value* const panels = panels_of(op, start, some);
    Pieces pieces(blocks * some);
    parallel([&](int, int) {
      for (int64_t piece; (piece = pieces.next()) >= 0;) {
        const int64_t first = (start + piece % some) * COLUMNS, top = piece / some * BLOCK;
        const int64_t count = least(op.columns - first, COLUMNS);
        const Value* const panel = panels + piece % some * COLUMNS * steps;
        multiply<ByPairs>(a + top * stride, stride, least(op.rows - top, BLOCK), panel, steps,
                          [&](int64_t row, float* sums) {
                            if (op.bias)
                              for (int64_t i = 0; i < count; ++i) sums[i] += wide(op.bias[first + i]);
                            each_vector(count, [&](int64_t i, int64_t some) {
                              store_some(op.y + (top + row) * op.columns + first + i, rounded(load(sums + i)), some);
                            });
                          });
      }
    });
  }
}

void ordered_causal(const SaccadeOrderedCausal& op) {
  each_row(op.rows, [&](int64_t row) {
    const int64_t seen = least(op.first + row % op.tokens + 1, op.columns);
    const auto exps = static_cast<float*>(scratch(SCRATCH_SUMS, op.columns * sizeof(float)));
    uint16_t* const y = op.y + row * op.columns;
    rounded_softmax(op.logits + row * op.columns, exps, seen, y);
    memset(y + seen, 0, (op.columns - seen) * sizeof *y);
  });
}

template <int64_t VECTOR, class T>
void sum_rows(const SaccadeOrderedRows& op) {
  const auto x = static_cast<const T*>(op.x);
  each_row(op.rows, [&](int64_t row) { op.y[row] = sum_row<VECTOR>(x + row * op.columns, op.columns); });
}

void ordered_sum(const SaccadeOrderedRows& op) {
  if (op.is_bf16) return op.lanes == 16 ? sum_rows<16, uint16_t>(op) : sum_rows<8, uint16_t>(op);
  op.lanes == 16 ? sum_rows<16, float>(op) : sum_rows<8, float>(op);
}

void ordered_softmax(const SaccadeOrderedRows& op) {
  each_row(op.rows, [&](int64_t row) {
    const int64_t at = row * op.columns;
    softmax_row(static_cast<const float*>(op.x) + at, op.y + at, op.columns, op.lanes);
  });
}

}  // namespace saccade::SACCADE_ISA
