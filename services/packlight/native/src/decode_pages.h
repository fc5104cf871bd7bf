// Where the rows of a chunk come from: the pages of one KV head, read where they lie or copied into blocks.
//
// Legend: P page size, D head dim.

#pragma once

#include "decode_split.h"

namespace packlight::decode {

// Pages of P x D numbers of T, K and V apart; `ids` lists those of one KV head.
template <class T>
struct PagesOf {
  const T* k;
  const T* v;
  const int32_t* ids;
  int page_size, head_dim;

  int64_t row(int token) const {
    return (int64_t{ids[token / page_size]} * page_size + token % page_size) * head_dim;
  }
};

// Blocks lie whole in pages, and rows need no padding.
template <class T>
class PagesInPlace {
 public:
  explicit PagesInPlace(const PagesOf<T>& pages) : pages_(pages) {}

  static bool can_read(int page_size, int head_dim) { return page_size % kBlockTokens == 0 && head_dim % kStep == 0; }

  void read(int at, Chunk<T>& chunk) const {
    for (int block = 0; block * kBlockTokens < chunk.last; ++block) {
      const int64_t row = pages_.row(at + block * kBlockTokens);
      chunk.k[block] = pages_.k + row;
      chunk.v[block] = pages_.v + row;
    }
  }

  void look(int at, int num_tokens, Ahead& ahead) const {
    ahead.num_bytes = kBlockTokens * pages_.head_dim * int(sizeof(T));
    ahead.num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
    for (int block = 0; block < ahead.num_blocks; ++block) {
      const int64_t row = pages_.row(at + block * kBlockTokens);
      ahead.k[block] = reinterpret_cast<const char*>(pages_.k + row);
      ahead.v[block] = reinterpret_cast<const char*>(pages_.v + row);
    }
  }

 private:
  const PagesOf<T> pages_;
};

// Any page size and head dim, at the price of a copy into the cache.
template <class T>
class PagesCopied {
 public:
  explicit PagesCopied(const PagesOf<T>& pages) : pages_(pages), dim_(round_up(pages.head_dim, kStep)) {
    std::fill(k_, k_ + kChunkTokens * dim_, T{});
    std::fill(v_, v_ + kChunkTokens * dim_, T{});
  }

  void read(int at, Chunk<T>& chunk) {
    for (int block = 0; block < kChunkBlocks; ++block) {
      chunk.k[block] = k_ + block * kBlockTokens * dim_;
      chunk.v[block] = v_ + block * kBlockTokens * dim_;
    }
    for (int t = chunk.first; t < chunk.last; ++t) {
      const int64_t row = pages_.row(at + t);
      std::copy_n(pages_.k + row, pages_.head_dim, k_ + t * dim_);
      std::copy_n(pages_.v + row, pages_.head_dim, v_ + t * dim_);
    }
  }

  void look(int, int, Ahead&) const {}

 private:
  const PagesOf<T> pages_;
  const int dim_;
  alignas(64) T k_[kChunkTokens * kMaxDim];
  alignas(64) T v_[kChunkTokens * kMaxDim];
};

}  // namespace packlight::decode
