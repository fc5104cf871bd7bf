// The C interface of the compiled kernels: every function that Python calls, and what it takes.
//
// Plain C types only. Pointers are borrowed for the call; nothing is kept, allocated for the caller or thrown. Python's
// side of each struct stands in packlight/native/<name>.py. Threads are OpenMP's, `num_threads` of them in each call.

#pragma once

#include <cstddef>
#include <cstdint>

#define PACKLIGHT_EXPORT extern "C" __attribute__((visibility("default")))

// --- stream.cpp -----------------------------------------------------------------------------------------------------

// The sum of the 64-bit words of `num_bytes` (a multiple of 64) at `memory`.
PACKLIGHT_EXPORT uint64_t packlight_stream_read(const void* memory, size_t num_bytes, int num_threads);

// --- decode_attention.cpp -------------------------------------------------------------------------------------------

// One layer of a decode step: each row's new token is stored and attends to its row's tokens. See
// packlight/native/decode.py for what the fields are.
struct PacklightDecode {
  // the pool
  void* k_pages;
  void* v_pages;
  int32_t is_bf16, num_layers, num_kv_heads, page_size, head_dim;
  // the pool, where it is coded
  const void* records;
  int64_t record_bytes;
  const int32_t* states;
  int32_t bits, value_group;
  // the step
  int32_t num_rows, group;
  const int32_t* pages;
  int64_t pages_per_head;
  const int32_t* table_rows;
  const int32_t* places;
  const int32_t* lengths;
  const int32_t* new_index;
  // page-sparse rows
  void* bounds;
  const int32_t* ratings;
  const int32_t* num_dims;
  const int32_t* max_pages;
  const int32_t* num_dense_layers;
  // the layer
  int32_t layer, window;
  float scale;
  int32_t num_threads;
  const void* q;
  const void* k;
  const void* v;
  void* out;
  int64_t q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride;
};

PACKLIGHT_EXPORT void packlight_decode_attention(const PacklightDecode* arguments);

// --- linear.cpp -----------------------------------------------------------------------------------------------------

enum PacklightFormat : int32_t { PACKLIGHT_BF16 = 0, PACKLIGHT_INT8 = 1, PACKLIGHT_INT4 = 2 };

// A weight matrix `[num_columns, depth]`, padded to 32 rows; `depth` is a multiple of 32. In blocks of 32 rows, each
// `[depth / 32][2][tile]`, a tile being 16 rows and 32 deep:
// bf16: tiles `[16][16 rows][2]`, no scales. int8: tiles `[16][2][16 rows]`, `scales` float[num_columns].
// int4: tiles of bytes `[16][16 rows]`, the earlier weight in the lower half; `scales` bf16 `[2][16 rows]` for each tile,
// scale and least value.
struct PacklightLinear {
  const void* panels;
  const void* scales;
  const float* bias;  // [num_columns], or null
  int64_t num_columns, depth;
  int32_t format;
};

// out[num_rows, num_columns] = x[num_rows, depth] W^T + bias. `room`: bf16 [num_threads, 32, depth] to unpack into; null
// for bf16 weights.
PACKLIGHT_EXPORT void packlight_linear(const PacklightLinear* linear, const uint16_t* x, int64_t num_rows, float* out,
                                       uint16_t* room, int num_threads);

// out[num_rows, depth] = the rows of W with these numbers, without bias.
PACKLIGHT_EXPORT void packlight_rows(const PacklightLinear* linear, const int64_t* rows, int64_t num_rows, uint16_t* out,
                                     uint16_t* room, int num_threads);

// --- linear_layer.cpp -----------------------------------------------------------------------------------------------

// Norm weights are float; `q_norm` and `k_norm` [head_dim] may be null. Rows of `gate_up`: 16 of gate, 16 of up, ...
struct PacklightLayer {
  const float *attention_norm, *q_norm, *k_norm, *mlp_norm;
  PacklightLinear qkv, out, gate_up, down;
};

// One flat batch. All bf16 and row by row; `normed`, `qkv` and `gated` are scratch.
struct PacklightStep {
  int64_t num_tokens, hidden_size, num_heads, num_kv_heads, head_dim;
  float epsilon;
  uint16_t *hidden, *normed, *qkv, *gated, *room;
  const uint16_t* attended;        // [num_tokens, num_heads, head_dim]
  uint16_t *q, *k, *v;             // [num_tokens, heads, head_dim], after rotary embedding
  const float *cosines, *sines;    // [num_tokens, head_dim / 2]
};

// From the attention of one layer to that of the next: the rest of `ended` (null before the first), then norm, q, k and v
// of `begun` (null after the last).
PACKLIGHT_EXPORT void packlight_layers(const PacklightLayer* ended, const PacklightLayer* begun,
                                       const PacklightStep* step, int num_threads);

// --- prefill_attention.cpp ------------------------------------------------------------------------------------------

// Some next tokens of one prompt: rows `start` to `start + num_tokens` of the batch, behind `num_context` stored ones.
// `blocks` are the ids of the pool's blocks that hold both.
struct PacklightPrefillChunk {
  int64_t start, num_tokens, num_context;
  const int64_t* blocks;
};

// Elements are fp32 (`is_bf16` 0) or bf16 (1), the same everywhere. Tensors of the batch are [token, head, head_dim]
// with strides in elements, those of the pool [block, layer, KV head, page_size, head_dim] without gaps.
struct PacklightPrefill {
  const void *q, *k, *v;
  void* out;   // [num_tokens, num_heads, head_dim], no gaps
  float* lse;  // [num_tokens, num_heads]: natural log of the sum of exp(scale * q.k) over all that a token sees
  void *k_pool, *v_pool;
  void* scratch;  // packlight_prefill_scratch_bytes(...), aligned to 64 bytes
  const struct PacklightPrefillChunk* chunks;
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t num_chunks, num_tokens, sliding_window;  // sliding_window 0: none
  int64_t num_layers, layer, num_heads, num_kv_heads, head_dim, page_size;
  float scale;
  int32_t is_bf16, num_threads;
};

PACKLIGHT_EXPORT size_t packlight_prefill_scratch_bytes(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                                        int32_t num_threads);

// Stores the chunks' k and v in the pool, then attends: softmax(scale * q k^T) v over all that a token sees.
PACKLIGHT_EXPORT void packlight_prefill_attention(const struct PacklightPrefill* args);

// --- window_attention.cpp -------------------------------------------------------------------------------------------

// The last `num_rows` tokens of a prompt of `num_keys`, whose keys are in the pool's blocks, in one layer. Elements are
// fp32 (`is_bf16` 0) or bf16 (1); `q` is [row, head, head_dim] with strides in elements, the pool as above.
struct PacklightWindow {
  const void *q, *k_pool;
  const int64_t* blocks;
  float* mass;     // [num_kv_heads, num_keys]: attention weights, summed over the rows and heads that share the key
  float* lse;      // [num_heads, num_rows]: natural log of the sum of exp(scale * q.k); read if it is known
  float* scratch;  // packlight_window_scratch_bytes(...), anything in it
  int64_t q_token_stride, q_head_stride;
  int64_t num_rows, num_keys, num_layers, layer, num_heads, num_kv_heads, head_dim, page_size;
  float scale;
  int32_t is_bf16, lse_is_known, num_threads;
};

PACKLIGHT_EXPORT size_t packlight_window_scratch_bytes(int64_t num_rows, int64_t num_keys, int64_t head_dim,
                                                       int32_t lse_is_known, int32_t num_threads);
PACKLIGHT_EXPORT void packlight_window_attention(const PacklightWindow* args);

// --- pack.cpp -------------------------------------------------------------------------------------------------------

// Some tokens of one prompt in one layer. Pools are as above, a row of `row_bytes` for each token; `pages` is
// [pages of all heads, 2, page_size] rows: of each page K, then V, the pages of head 0 first, zeros behind a head's last
// token. `indices[head]` has `num_tokens[head]` ascending numbers of tokens, no two the same.
struct PacklightPack {
  const void *k_pool, *v_pool;
  const int64_t* blocks;
  const int64_t* const* indices;
  const int64_t* num_tokens;
  void* pages;
  int64_t num_layers, layer, num_kv_heads, page_size, row_bytes;
  int32_t num_threads;
};

PACKLIGHT_EXPORT void packlight_pack(const PacklightPack* args);
