// A prompt's keys and values, block by block, from their pages into the forms that products take.
//
// Knows the pages of one KV head. Does not know queries, or when there is time to fetch. Pages of whole runs that need
// no padding are read straight out of the pool, all others row by row; what comes out is the same.

#pragma once

#include <algorithm>

#include "prefill_attention_layout.h"

namespace packlight::prefill {

constexpr int kKeyBlock = 256;

// The pages of one KV head of one layer: `block_stride` elements from one block's to the next.
template <class Stored>
struct Pages {
  const Stored *k, *v;
  const int64_t* blocks;
  ptrdiff_t block_stride;
  int64_t page_size;
  int head_dim;

  ptrdiff_t place(int64_t token) const {
    return blocks[token / page_size] * block_stride + token % page_size * head_dim;
  }
};

// Brings the keys and values of some tokens into the L2 cache, a few lines with each call. Pages lie anywhere, so the
// processor does not find the next one by itself; many lines at once would hold up what else is loaded. It keeps state,
// because GCC takes a function that does nothing but prefetch for one that does nothing, and drops its calls.
template <class Stored>
class Ahead {
 public:
  // Tokens `token` to `end`, spread over `num_calls` calls.
  Ahead(const Pages<Stored>& pages, int64_t token, int64_t end, int64_t num_calls)
      : pages_(pages), token_(token), end_(end) {
    const int64_t num_lines = std::max<int64_t>(0, end - token) * pages.head_dim * int64_t(sizeof(Stored)) / kLine;
    lines_per_call_ = (num_lines + num_calls - 1) / num_calls;
  }

  void operator()() {
    for (int64_t i = 0; i < lines_per_call_; ++i) fetch_line();
  }

 private:
  static constexpr int64_t kLine = 64;

  void fetch_line() {
    if (left_ <= 0 && !begin_page()) return;
    __builtin_prefetch(k_, 0, 2);
    __builtin_prefetch(v_, 0, 2);
    k_ += kLine, v_ += kLine, left_ -= kLine;
  }

  bool begin_page() {
    if (token_ >= end_) return false;
    const int64_t num = std::min(end_ - token_, pages_.page_size - token_ % pages_.page_size);
    const ptrdiff_t at = pages_.place(token_);
    k_ = reinterpret_cast<const char*>(pages_.k + at), v_ = reinterpret_cast<const char*>(pages_.v + at);
    left_ = num * pages_.head_dim * int64_t(sizeof(Stored));
    token_ += num;
    return true;
  }

  const Pages<Stored>& pages_;
  int64_t token_, end_, lines_per_call_, left_ = 0;
  const char *k_ = nullptr, *v_ = nullptr;
};

// Up to kKeyBlock keys, copied as they are, and values, arranged as left operands, in memory that others own.
template <class Stored, class Element>
class KeyBlock {
 public:
  // `k` and `v`: [kKeyBlock, padded_dim]; `rows`: [kAlign, padded_dim].
  KeyBlock(const Pages<Stored>& pages, int padded_dim, Element* k, Element* v, Element* rows)
      : pages_(pages), dim_(padded_dim), k_(k), v_(v), rows_(rows),
        whole_runs_(std::is_same_v<Stored, Element> && pages.head_dim == dim_ && pages.page_size % kRun == 0) {}

  // `num` tokens from `token` on. Up to the next multiple of kAlign zeros follow: whatever lies there in the pool must
  // not matter.
  void load(int64_t token, int num) {
    for (int first = 0; first < num; first += kAlign) {
      Element *keys = k_ + ptrdiff_t(first) * dim_, *values = v_ + ptrdiff_t(first) * dim_;
      if (whole_runs_ && num - first >= kAlign) {
        const ptrdiff_t earlier = pages_.place(token + first), later = pages_.place(token + first + kRun);
        copy_row(keys, pages_.k + earlier, kRun * dim_);
        copy_row(keys + kRun * dim_, pages_.k + later, kRun * dim_);
        arrange_values(values, as_elements(pages_.v + earlier), as_elements(pages_.v + later), dim_);
      } else {
        copy_rows(keys, pages_.k, token + first, num - first);
        copy_rows(rows_, pages_.v, token + first, num - first);
        arrange_values(values, rows_, rows_ + kRun * dim_, dim_);
      }
    }
  }

 private:
  // Only called where they are.
  static const Element* as_elements(const Stored* from) { return reinterpret_cast<const Element*>(from); }

  void copy_rows(Element* to, const Stored* from, int64_t token, int num) const {
    int64_t page = token / pages_.page_size, slot = token % pages_.page_size;
    for (int i = 0; i < kAlign; ++i, to += dim_) {
      const bool is_token = i < num;
      const ptrdiff_t at = is_token ? pages_.blocks[page] * pages_.block_stride + slot * pages_.head_dim : 0;
      pad_row(to, from + at, is_token ? pages_.head_dim : 0, dim_);
      if (++slot == pages_.page_size) slot = 0, ++page;
    }
  }

  const Pages<Stored>& pages_;
  const int dim_;
  Element *const k_, *const v_, *const rows_;
  const bool whole_runs_;
};

}  // namespace packlight::prefill
