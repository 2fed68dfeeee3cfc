// What m2's search rounds and compares, candidate after candidate: weights and inputs in levels, and how far a row is from its exact self.
#include "ordered_products.h"
#include "ordered_sums.h"

namespace saccade::SACCADE_ISA {

using namespace ordered;

namespace {

// y = w c in 255 levels and back, the row's largest at the outermost.
void round_weight(const uint16_t* w, const uint16_t* c, int64_t count, uint16_t* y) {
  Floats largest_of = {};
  each_vector(count, [&](int64_t i, int64_t some) {
    const Floats v = rounded(load_some(values(w + i), some) * load_some(values(c + i), some));
    largest_of = larger(largest_of, (Floats)((Words)v & 0x7fffffffu));
    store_some(y + i, v, some);
  });
  const float share = wide(narrow(largest(largest_of) / 127.0f));
  const Floats step = splat(share < 0x1p-23f ? 0x1p-23f : share);
  each_vector(count, [&](int64_t i, int64_t some) {
    const Floats level = within(whole(rounded(load_some(values(y + i), some) / step)), -127.0f, 127.0f);
    store_some(y + i, rounded(level * step), some);
  });
}

// Squared distance of a row of silu(gate) * up to `exact`. squares: [columns] to work in.
float gate_up_distance(const SaccadeOrderedGateUp& op, int64_t row, float* squares) {
  const uint16_t *const gate = op.both + row * 2 * op.columns, *const up = gate + op.columns;
  const uint16_t* const exact = op.exact + row * op.columns;
  each_vector(op.columns, [&](int64_t i, int64_t some) {
    Floats g = load_some(values(gate + i), some), u = load_some(values(up + i), some);
    if (op.bias) {
      g = rounded(g + load_some(values(op.bias + i), some));
      u = rounded(u + load_some(values(op.bias + op.columns + i), some));
    }
    const Words bits = (Words)g >> 16;
    uint16_t found[LANES];
    for (int j = 0; j < LANES; ++j) found[j] = op.silu[bits[j]];
    const Floats off = rounded(load(values(found)) * u) - load_some(values(exact + i), some);
    store_first(squares + i, off * off, some);
  });
  return sum_row<16>(squares, op.columns);
}

// Patches of one segment, from `first` on, attend to all of it.
struct SegmentBlock {
  const SaccadeOrderedSegments& op;
  const uint16_t *q, *k;  // [rows, head_dim], rotated
  int64_t start, end, first, rows;
  using Value = ByPairs::Value;

  void run() const {
    const int64_t count = end - start, depth = op.head_dim, width = round_up(count, COLUMNS);
    const int64_t steps = ByPairs::steps(depth), stride = row_stride(steps);
    const int64_t weight_steps = ByPairs::steps(count), weight_stride = row_stride(weight_steps);
    const auto floats = [](Scratch slot, int64_t of) { return static_cast<float*>(scratch(slot, of * sizeof(float))); };
    const auto queries = static_cast<Value*>(scratch(SCRATCH_INPUT, rows * stride * sizeof(Value)));
    float* const logits = floats(SCRATCH_SUMS, rows * width);
    for (int64_t row = 0; row < rows; ++row) ByPairs::fill(q + (first + row) * depth, depth, queries + row * stride);
    const auto panel = static_cast<Value*>(
        scratch(SCRATCH_PANEL, (weight_steps > steps ? weight_steps : steps) * COLUMNS * sizeof(Value)));
    for (int64_t column = 0; column < count; column += COLUMNS) {
      fill_panel<ByPairs>(k + (start + column) * depth, 1, depth, depth, least(count - column, COLUMNS), panel);
      multiply<ByPairs>(queries, stride, rows, panel, steps, [&](int64_t row, const float* sums) {
        for (int64_t i = 0; i < COLUMNS; i += LANES)
          store(logits + row * width + column + i, rounded(rounded(load(sums + i)) / splat(op.root)));
      });
    }
    const auto weights = static_cast<Value*>(scratch(SCRATCH_ROWS, rows * weight_stride * sizeof(Value)));
    for (int64_t row = 0; row < rows; ++row) weigh(logits + row * width, count, weights + row * weight_stride);
    const auto out = reinterpret_cast<uint16_t*>(logits);  // whose place is free again
    for (int64_t column = 0; column < depth; column += COLUMNS) {
      const int64_t some = least(depth - column, COLUMNS);
      const uint16_t* const v = op.qkv + start * 3 * depth + 2 * depth + column;
      fill_panel<ByPairs>(v, 3 * depth, 1, count, some, panel);
      multiply<ByPairs>(weights, weight_stride, rows, panel, weight_steps, [&](int64_t row, const float* sums) {
        each_vector(some, [&](int64_t i, int64_t few) {
          store_some(out + row * depth + column + i, rounded(load(sums + i)), few);
        });
      });
    }
    if (op.y) memcpy(op.y + first * depth, out, rows * depth * sizeof *out);
    if (op.distances)
      for (int64_t row = 0; row < rows; ++row) op.distances[first + row] = distance(out + row * depth, first + row);
  }

  // Logits become weights; they are rounded where the logits were.
  void weigh(float* x, int64_t count, Value* to) const {
    const auto narrowed = reinterpret_cast<uint16_t*>(x);
    rounded_softmax(x, x, count, narrowed);
    ByPairs::fill(narrowed, count, to);
  }

  float distance(uint16_t* y, int64_t row) const {
    each_vector(op.head_dim, [&](int64_t i, int64_t some) {
      const Floats exact = load_some(values(op.exact + row * op.head_dim + i), some);
      const Floats off = rounded(load_some(values(y + i), some) - exact);
      store_some(y + i, rounded(off * off), some);
    });
    return sum_row<16>(y, op.head_dim);
  }
};

// y = x cos + (x turned by half) sin
void rotate(const uint16_t* x, const float* cos, const float* sin, int64_t count, uint16_t* y) {
  const int64_t half = count / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = wide(x[i]), high = wide(x[half + i]);
    y[i] = narrow(low * cos[i] + -high * sin[i]);
    y[half + i] = narrow(high * cos[half + i] + low * sin[half + i]);
  }
}

}  // namespace

void ordered_panels(const SaccadeOrderedPanels& op) {
  const int64_t steps = ByPairs::steps(op.depth);
  Pieces pieces((op.columns + COLUMNS - 1) / COLUMNS);
  *op.bytes = (op.columns + COLUMNS - 1) / COLUMNS * COLUMNS * steps * sizeof(ByPairs::Value);
  if (!op.panels) return;
  parallel([&](int, int) {
    const auto row = static_cast<uint16_t*>(scratch(SCRATCH_ROWS, COLUMNS * op.depth * sizeof(uint16_t)));
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first = piece * COLUMNS, count = least(op.columns - first, COLUMNS);
      const uint16_t* from = op.weight + first * op.depth;
      if (op.scale) {
        for (int64_t j = 0; j < count; ++j) round_weight(from + j * op.depth, op.scale, op.depth, row + j * op.depth);
        from = row;
      }
      fill_panel<ByPairs>(from, 1, op.depth, op.depth, count, static_cast<ByPairs::Value*>(op.panels) + first * steps);
    }
  });
}

void ordered_levels(const SaccadeOrderedLevels& op) {
  const Floats step = splat(op.step), zero = splat(op.zero);
  each_row(op.rows, [&](int64_t row) {
    const int64_t at = row * op.columns;
    each_vector(op.columns, [&](int64_t i, int64_t some) {
      const Floats x = rounded(load_some(values(op.x + at + i), some) / load_some(values(op.scale + i), some));
      const Floats level = within(rounded(whole(rounded(x / step)) + zero), 0.0f, 255.0f);
      store_some(op.y + at + i, rounded(rounded(level - zero) * step), some);
    });
  });
}

void ordered_gate_up(const SaccadeOrderedGateUp& op) {
  each_row(op.rows, [&](int64_t row) {
    const auto squares = static_cast<float*>(scratch(SCRATCH_SUMS, op.columns * sizeof(float)));
    op.distances[row] = gate_up_distance(op, row, squares);
  });
}

void ordered_segments(const SaccadeOrderedSegments& op) {
  const int64_t rows = op.bounds[op.num_segments], depth = op.head_dim;
  const auto q = static_cast<uint16_t*>(scratch(SCRATCH_ATTENTION, 2 * rows * depth * sizeof(uint16_t)));
  uint16_t* const k = q + rows * depth;
  each_row(rows, [&](int64_t row) {
    const uint16_t* const of = op.qkv + row * 3 * depth;
    rotate(of, op.cos + row * depth, op.sin + row * depth, depth, q + row * depth);
    rotate(of + depth, op.cos + row * depth, op.sin + row * depth, depth, k + row * depth);
  });
  int64_t blocks = 0;
  for (int64_t i = 0; i < op.num_segments; ++i) blocks += (op.bounds[i + 1] - op.bounds[i] + BLOCK - 1) / BLOCK;
  Pieces pieces(blocks);
  parallel([&](int, int) {
    int64_t segment = 0, passed = 0;  // pieces of earlier segments
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const auto of_segment = [&] { return (op.bounds[segment + 1] - op.bounds[segment] + BLOCK - 1) / BLOCK; };
      while (piece >= passed + of_segment()) passed += of_segment(), ++segment;
      const int64_t start = op.bounds[segment], end = op.bounds[segment + 1], first = start + (piece - passed) * BLOCK;
      SegmentBlock{op, q, k, start, end, first, least(end - first, BLOCK)}.run();
    }
  });
}

}  // namespace saccade::SACCADE_ISA
