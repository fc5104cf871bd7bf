// A transformer layer but for its attention, in one parallel region per gap between two attentions. See
// packlight/native/layer.py.

#include "elementwise.h"
#include "linear.h"

using namespace packlight::linear;

namespace {

void normalise(Worker& worker, const PacklightStep& step, const float* weight) {
  worker.each(step.num_tokens, [&](int64_t row, int64_t) {
    const int64_t at = row * step.hidden_size;
    rms_norm(step.hidden + at, weight, step.hidden_size, step.epsilon, step.normed + at);
  });
}

// hidden += x W^T
void add_product(Worker& worker, const PacklightStep& step, const PacklightLinear& linear, const uint16_t* x) {
  multiply(worker, linear, x, step.num_tokens, step.room,
           [&](int64_t row, int64_t column, int width, const float* sums) {
             uint16_t* hidden = step.hidden + row * step.hidden_size + column;
             for (int i = 0; i < width; ++i) hidden[i] = to_bf16(to_float(hidden[i]) + sums[i]);
           });
}

// Columns come as 16 of the gate, 16 of what it gates, and so on.
void gate(Worker& worker, const PacklightStep& step, const PacklightLinear& linear) {
  const int64_t size = linear.num_columns / 2;
  multiply(worker, linear, step.normed, step.num_tokens, step.room,
           [&](int64_t row, int64_t column, int, const float* values) {
             uint16_t* gated = step.gated + row * size + column / 2;
             for (int i = 0; i < kPanel; ++i) gated[i] = to_bf16(silu(values[i]) * values[kPanel + i]);
           });
}

void project_qkv(Worker& worker, const PacklightStep& step, const PacklightLinear& linear) {
  multiply(worker, linear, step.normed, step.num_tokens, step.room,
           [&](int64_t row, int64_t column, int width, const float* values) {
             uint16_t* qkv = step.qkv + row * linear.num_columns + column;
             for (int i = 0; i < width; ++i) qkv[i] = to_bf16(values[i]);
           });
}

// One head of q or k: its norm where the family has one, then its turn.
void turn(const PacklightStep& step, int64_t token, const float* norm, uint16_t* head, uint16_t* out) {
  const int64_t half = step.head_dim / 2;
  if (norm) rms_norm(head, norm, step.head_dim, step.epsilon, head);
  rotate(head, step.cosines + token * half, step.sines + token * half, half, out);
}

void split_heads(Worker& worker, const PacklightStep& step, const PacklightLayer& layer) {
  const int64_t num_heads = step.num_heads, num_kv_heads = step.num_kv_heads, dim = step.head_dim;
  worker.each(step.num_tokens, [&](int64_t token, int64_t) {
    uint16_t* from = step.qkv + token * (num_heads + 2 * num_kv_heads) * dim;
    for (int64_t head = 0; head < num_heads; ++head, from += dim) {
      turn(step, token, layer.q_norm, from, step.q + (token * num_heads + head) * dim);
    }
    for (int64_t head = 0; head < num_kv_heads; ++head, from += dim) {
      turn(step, token, layer.k_norm, from, step.k + (token * num_kv_heads + head) * dim);
    }
    std::memcpy(step.v + token * num_kv_heads * dim, from, num_kv_heads * dim * sizeof *from);
  });
}

}  // namespace

void packlight_layers(const PacklightLayer* ended, const PacklightLayer* begun, const PacklightStep* step,
                      int num_threads) {
  together(num_threads, [&](Worker& worker) {
    if (ended) {
      add_product(worker, *step, ended->out, step->attended);
      normalise(worker, *step, ended->mlp_norm);
      gate(worker, *step, ended->gate_up);
      add_product(worker, *step, ended->down, step->gated);
    }
    if (begun) {
      normalise(worker, *step, begun->attention_norm);
      project_qkv(worker, *step, begun->qkv);
      split_heads(worker, *step, *begun);
    }
  });
}
