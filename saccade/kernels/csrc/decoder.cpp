// The decoder's layers, one op after the other: the ops Python would call one by one, so that results are equal to the bit.
#include "decoder.h"

#include <math.h>

#include "attention.h"
#include "small.h"

namespace saccade {
namespace {

struct Run {
  const SaccadeDecoder& decoder;
  const SaccadeStep& step;
  int64_t size;  // of a value
  char* residual;  // [T, H]
  char* branch;    // [T, H]: what enters a part of a layer, then what it adds
  char* wide;      // [T, ...]: what is held within a part

  void norm(const void* x, const void* residual_in, const void* gain, void* y) const {
    const int64_t width = decoder.hidden_size;
    SACCADE_CALL(rms_norm)
    ({x, residual_in, gain, y, residual, step.num_tokens, width, width, decoder.eps, decoder.dtype});
  }

  void linear(const SaccadeLinear* layer, const void* x, void* y) const {
    SACCADE_CALL(linear)({*layer, x, layer->in_features, y, step.num_tokens});
  }

  void keep(const void* x, void* cache) const {
    const int64_t stride = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim;
    SACCADE_CALL(store_rows)
    ({x, cache, step.slots, step.num_tokens, decoder.num_kv_heads, decoder.head_dim, stride, decoder.dtype,
      decoder.has_int8_cache});
  }

  void attend(const SaccadeDecoderLayer& layer) const {
    const int64_t heads = decoder.num_heads, kv_heads = decoder.num_kv_heads, head_dim = decoder.head_dim;
    const int64_t stride = (heads + 2 * kv_heads) * head_dim;
    char *q = wide, *k = q + heads * head_dim * size, *v = k + kv_heads * head_dim * size;
    char* attended = wide + step.num_tokens * stride * size;
    linear(layer.qkv, branch, q);
    SACCADE_CALL(rope)
    ({q, q, step.cos, step.sin, step.num_tokens, heads, head_dim, stride, stride, decoder.dtype});
    SACCADE_CALL(rope)
    ({k, k, step.cos, step.sin, step.num_tokens, kv_heads, head_dim, stride, stride, decoder.dtype});
    keep(k, layer.k_cache);
    keep(v, layer.v_cache);
    SaccadeAttention op = {};
    op.q = q;
    op.k = layer.k_cache;
    op.v = layer.v_cache;
    op.out = attended;
    op.query_lengths = step.query_lengths;
    op.context_lengths = step.context_lengths;
    op.block_tables = step.block_tables;
    op.table_width = step.table_width;
    op.block_size = decoder.block_size;
    op.num_sequences = step.num_sequences;
    op.q_stride = stride;
    op.k_stride = op.v_stride = kv_heads * (head_dim + (decoder.has_int8_cache ? 4 : 0));
    op.num_heads = heads;
    op.num_kv_heads = kv_heads;
    op.head_dim = head_dim;
    op.scale = static_cast<float>(1.0 / sqrt(static_cast<double>(head_dim)));
    op.causal = 1;
    op.dtype = decoder.dtype;
    op.is_int8 = decoder.has_int8_cache;
    SACCADE_CALL(attention)(op);
    linear(layer.output, attended, branch);
  }

  void gate(const SaccadeDecoderLayer& layer) const {
    const int64_t columns = decoder.intermediate_size;
    char* gated = wide + step.num_tokens * 2 * columns * size;
    linear(layer.gate_up, branch, wide);
    SACCADE_CALL(silu_mul)({wide, gated, step.num_tokens, columns, 2 * columns, decoder.dtype});
    linear(layer.down, gated, branch);
  }
};

}  // namespace

void decode(const SaccadeDecoder& decoder, const SaccadeStep& step) {
  const int64_t size = decoder.dtype == SACCADE_FLOAT32 ? 4 : 2;
  const int64_t rows_bytes = step.num_tokens * decoder.hidden_size * size;
  char* const residual = static_cast<char*>(step.workspace);
  const Run run{decoder, step, size, residual, residual + rows_bytes, residual + 2 * rows_bytes};
  const void* stream = nullptr;  // x itself, up to the first sum
  for (int64_t i = 0; i < decoder.num_layers; ++i) {
    const SaccadeDecoderLayer& layer = decoder.layers[i];
    run.norm(stream ? run.branch : step.x, stream, layer.input_gain, run.branch);
    run.attend(layer);
    run.norm(run.branch, stream ? stream : step.x, layer.post_gain, run.branch);
    stream = run.residual;
    run.gate(layer);
  }
  run.norm(run.branch, stream, decoder.gain, step.hidden);
}

}  // namespace saccade
