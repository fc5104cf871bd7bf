// Prefill attention over paged KV: stores a batch's keys and values, then attends. See packlight/native/prefill.py.
//
// Knows the batch: which (prompt, KV head, block of queries) there are, and that threads take them one after another.

#include <algorithm>

#include <omp.h>

#include "packlight.h"
#include "prefill_attention_block.h"

namespace packlight::prefill {
namespace {

using Args = PacklightPrefill;
using Chunk = PacklightPrefillChunk;

constexpr int kLeastRows = 128;  // fewer are not worth reading all keys for

// Blocks are divided evenly, and to whole queries.
int max_rows(int64_t group) { return int(kBlockRows + group); }

// ── storing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class Stored>
void store_token(const Args& args, const Chunk& chunk, int64_t index) {
  const int64_t head_page = args.page_size * args.head_dim, token = chunk.num_context + index;
  const int64_t block = chunk.blocks[token / args.page_size];
  const int64_t to = (block * args.num_layers + args.layer) * args.num_kv_heads * head_page +
                     token % args.page_size * args.head_dim;
  const auto* k = static_cast<const Stored*>(args.k) + (chunk.start + index) * args.k_token_stride;
  const auto* v = static_cast<const Stored*>(args.v) + (chunk.start + index) * args.v_token_stride;
  for (int64_t head = 0; head < args.num_kv_heads; ++head) {
    copy_row(static_cast<Stored*>(args.k_pool) + to + head * head_page, k + head * args.k_head_stride, args.head_dim);
    copy_row(static_cast<Stored*>(args.v_pool) + to + head * head_page, v + head * args.v_head_stride, args.head_dim);
  }
}

// To be called by all threads of a team.
template <class Stored>
void store_chunks(const Args& args) {
  for (int64_t i = 0; i < args.num_chunks; ++i) {
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < args.chunks[i].num_tokens; ++index) {
      store_token<Stored>(args, args.chunks[i], index);
    }
  }
#pragma omp barrier
}

// ── attending ───────────────────────────────────────────────────────────────────────────────────────────────────────

template <class Stored>
Queries<Stored> queries_of(const Args& args, const Chunk& chunk, int64_t kv_head, int64_t first, int64_t num_queries) {
  const int64_t group = args.num_heads / args.num_kv_heads, head = kv_head * group, token = chunk.start + first;
  Queries<Stored> queries{};
  queries.q = static_cast<const Stored*>(args.q) + token * args.q_token_stride + head * args.q_head_stride;
  queries.out = static_cast<Stored*>(args.out) + (token * args.num_heads + head) * args.head_dim;
  queries.lse = args.lse + token * args.num_heads + head, queries.lse_token_stride = args.num_heads;
  queries.q_token_stride = args.q_token_stride, queries.q_head_stride = args.q_head_stride;
  queries.out_token_stride = args.num_heads * args.head_dim;
  queries.first_position = chunk.num_context + first, queries.window = args.sliding_window;
  queries.num_queries = int(num_queries), queries.group = int(group), queries.head_dim = int(args.head_dim);
  queries.scale = args.scale;
  return queries;
}

template <class Stored>
Pages<Stored> pages_of(const Args& args, const Chunk& chunk, int64_t kv_head) {
  const int64_t head_page = args.page_size * args.head_dim, first = (args.layer * args.num_kv_heads + kv_head) * head_page;
  return {static_cast<const Stored*>(args.k_pool) + first, static_cast<const Stored*>(args.v_pool) + first,
          chunk.blocks, args.num_layers * args.num_kv_heads * head_page, args.page_size, int(args.head_dim)};
}

// How many blocks a chunk's queries are divided into: few, because each reads all keys, yet enough for all threads.
// Any division gives the same numbers.
int64_t num_blocks_of(const Args& args, const Chunk& chunk) {
  const int64_t rows = chunk.num_tokens * (args.num_heads / args.num_kv_heads);
  const int64_t at_least = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t wanted = 4 * args.num_threads / (args.num_kv_heads * args.num_chunks);
  const int64_t at_most = (rows + kLeastRows - 1) / kLeastRows;
  return std::min(std::max(at_least, std::min(wanted, at_most)), chunk.num_tokens);
}

template <class Stored, class Math>
void run(const Args& args) {
  const bool tiles = Math::kPack == 2 && PACKLIGHT_LEVEL >= 4 && tiles_are_allowed();
  const int rows = max_rows(args.num_heads / args.num_kv_heads);
  const size_t space_bytes = Workspace<Math>::num_bytes(rows, int(args.head_dim));
#pragma omp parallel num_threads(args.num_threads)
  {
    store_chunks<Stored>(args);
    const Tiles configured(tiles);
    const Workspace<Math> space(static_cast<char*>(args.scratch) + omp_get_thread_num() * space_bytes, rows,
                                int(args.head_dim));
    for (int64_t i = 0; i < args.num_chunks; ++i) {
      const Chunk& chunk = args.chunks[i];
      const int64_t num_blocks = num_blocks_of(args, chunk);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t unit = 0; unit < num_blocks * args.num_kv_heads; ++unit) {
        const int64_t block = num_blocks - 1 - unit / args.num_kv_heads;  // the longest first
        const int64_t head = unit % args.num_kv_heads, first = chunk.num_tokens * block / num_blocks;
        const int64_t last = chunk.num_tokens * (block + 1) / num_blocks;
        const auto queries = queries_of<Stored>(args, chunk, head, first, last - first);
        QueryBlock<Stored, Math>(queries, pages_of<Stored>(args, chunk, head), space, tiles).attend();
      }
    }
  }
}

#if PACKLIGHT_LEVEL >= 3
using MathOfBf16 = Bf16Pairs;
#else
using MathOfBf16 = Fp32;
#endif

}  // namespace
}  // namespace packlight::prefill

using namespace packlight;

size_t packlight_prefill_scratch_bytes(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int32_t num_threads) {
  const int rows = prefill::max_rows(num_heads / num_kv_heads);
  return num_threads * prefill::Workspace<prefill::Fp32>::num_bytes(rows, int(head_dim));
}

void packlight_prefill_attention(const PacklightPrefill* args) {
  if (args->is_bf16) {
    prefill::run<Bf16, prefill::MathOfBf16>(*args);
  } else {
    prefill::run<float, prefill::Fp32>(*args);
  }
}
