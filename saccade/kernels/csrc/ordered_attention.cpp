// Causal attention as torch's flash attention adds it.
#include "ordered_products.h"
#include "ordered_sums.h"

namespace saccade::SACCADE_ISA {

using namespace ordered;

namespace {

constexpr int64_t KEYS = 512;  // taken at once

inline int64_t queries_at_once(int64_t tokens) { return tokens >= 768 ? 256 : tokens >= 192 ? 64 : 32; }

// `rows` queries of one head, from `first` on: softmax over blocks of KEYS, the sums of earlier blocks scaled to the larger maximum.
struct QueryBlock {
  const SaccadeOrderedAttention& op;
  int64_t head, first, rows;
  float *queries = {}, *scores = {}, *outputs = {}, *panel = {};
  float tops[256] = {}, sums[256] = {};

  const uint16_t* at(const uint16_t* of, int64_t token) const { return of + (head * op.tokens + token) * op.head_dim; }

  void run() {
    const int64_t depth = op.head_dim;
    queries = static_cast<float*>(scratch(SCRATCH_INPUT, rows * depth * sizeof(float)));
    scores = static_cast<float*>(scratch(SCRATCH_SUMS, rows * KEYS * sizeof(float)));
    outputs = static_cast<float*>(scratch(SCRATCH_ROWS, rows * op.head_dim * sizeof(float)));
    panel = static_cast<float*>(scratch(SCRATCH_PANEL, (depth > KEYS ? depth : KEYS) * COLUMNS * sizeof(float)));
    for (int64_t row = 0; row < rows; ++row) {
      tops[row] = -INFINITY;
      sums[row] = 0.0f;
      InTurn::fill(at(op.q, first + row), depth, queries + row * depth);
    }
    for (int64_t key = 0; key < first + rows; key += KEYS) {
      const int64_t count = op.tokens - key < KEYS ? op.tokens - key : KEYS;
      score(key, count, depth);
      for (int64_t row = 0; row < rows; ++row) weigh(row, key, count);
      gather(key, count);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float part = 1.0f / sums[row];
      uint16_t* const y = op.y + (head * op.tokens + first + row) * op.head_dim;
      for (int64_t i = 0; i < op.head_dim; ++i) y[i] = narrow(outputs[row * op.head_dim + i] * part);
    }
  }

  void score(int64_t key, int64_t count, int64_t depth) {
    const float scale = static_cast<float>(1.0 / sqrt(static_cast<double>(op.head_dim)));
    for (int64_t column = 0; column < count; column += COLUMNS) {
      const int64_t some = count - column < COLUMNS ? count - column : COLUMNS;
      fill_panel<InTurn>(at(op.k, key + column), 1, op.head_dim, depth, some, panel);
      multiply<InTurn>(queries, depth, rows, panel, depth, [&](int64_t row, const float* of) {
        for (int64_t i = 0; i < some; ++i)
          scores[row * KEYS + column + i] = key + column + i > first + row ? -INFINITY : of[i] * scale;
      });
    }
  }

  // A row's scores become weights, rounded to bfloat16; their sum is of what they were before.
  void weigh(int64_t row, int64_t key, int64_t count) {
    float* const x = scores + row * KEYS;
    float top = tops[row];
    for (int64_t i = 0; i < count; ++i) top = x[i] > top ? x[i] : top;
    const int64_t vectors = count / op.lanes * op.lanes;
    float parts[16] = {};
    for (int64_t i = 0; i < vectors; i += op.lanes)
      for (int64_t j = 0; j < op.lanes; ++j) {
        const float weight = rough_exp(x[i + j] - top);
        parts[j] += weight;
        x[i + j] = wide(narrow(weight));
      }
    float sum = folded(parts, op.lanes);
    for (int64_t i = vectors; i < count; ++i) {
      const float weight = expf(x[i] - top);
      sum += weight;
      x[i] = wide(narrow(weight));
    }
    const float shrink = expf(tops[row] - top);
    sums[row] = sum + shrink * sums[row];
    tops[row] = top;
    if (key > 0)
      for (int64_t i = 0; i < op.head_dim; ++i) outputs[row * op.head_dim + i] *= shrink;
  }

  void gather(int64_t key, int64_t count) {
    for (int64_t column = 0; column < op.head_dim; column += COLUMNS) {
      const int64_t some = op.head_dim - column < COLUMNS ? op.head_dim - column : COLUMNS;
      fill_panel<InTurn>(at(op.v, key) + column, op.head_dim, 1, count, some, panel);
      multiply<InTurn>(scores, KEYS, rows, panel, count, [&](int64_t row, const float* of) {
        float* const y = outputs + row * op.head_dim + column;
        for (int64_t i = 0; i < some; ++i) y[i] = key > 0 ? y[i] + of[i] : of[i];
      });
    }
  }
};

}  // namespace

void ordered_attention(const SaccadeOrderedAttention& op) {
  const int64_t most = queries_at_once(op.tokens), blocks = (op.tokens + most - 1) / most;
  Pieces pieces(op.heads * blocks);
  parallel([&](int, int) {
    for (int64_t piece; (piece = pieces.next()) >= 0;) {
      const int64_t first = piece % blocks * most;
      QueryBlock block = {op, piece / blocks, first, op.tokens - first < most ? op.tokens - first : most};
      block.run();
    }
  });
}

}  // namespace saccade::SACCADE_ISA
