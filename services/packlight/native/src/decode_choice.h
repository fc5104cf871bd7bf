// Which pages of a KV head a sparse step reads: rated by their summaries, then the best of them.
//
// Knows two ways to rate, Quest's (arXiv 2406.10774) and that of RocketKV's second stage (arXiv 2502.14051), and one
// rule of choosing. They are those of packlight/compress/readers and packlight/attention/choice.py, which say why.
//
// Legend: D head dim, E = 2 * D numbers of a summary (the smallest key elements, then the largest), P page size.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decode_split.h"

namespace packlight::decode {

enum PageRating : int32_t { kSumOfBounds = 1, kMassOfRepresentatives = 2 };

// What a reader wants: how pages are rated, over how many dims, and how many of them are read at most.
struct PageRule {
  int rating, num_dims, max_pages;
};

// Chooses for one KV head after the other. Its memory is used again.
template <class T>
class PageChooser {
 public:
  // `bounds` has a summary per page; `ids` are the pages of a head that stores `num_tokens`. Writes `rule.max_pages` of
  // them to `chosen`, in their order; there are more than that.
  void choose(const T* q, int64_t head_stride, int group, int head_dim, float scale, const PageRule& rule,
              const T* bounds, const int32_t* ids, int num_tokens, int page_size, int32_t* chosen) {
    num_pages_ = (num_tokens + page_size - 1) / page_size;
    width_ = round_up(num_pages_, kLanes);
    head_dim_ = head_dim;
    if (rule.rating == kSumOfBounds) {
      probe_bounds(q, head_stride, group);
      rate(bounds, ids);
    } else {
      probe_representatives(q, head_stride, group, scale, rule.num_dims);
      rate(bounds, ids);
      add_up_mass(num_tokens - (num_pages_ - 1) * page_size, page_size);
    }
    take_best(rule.max_pages, ids, chosen);
  }

 private:
  int size() const { return 2 * head_dim_; }

  // A probe has numbers on the side of a summary that is wanted and 0 on the other. sum_g sum_d max(q_gd * low_d,
  // q_gd * high_d) is one product, with what is negative of q on the side of `low`.
  void probe_bounds(const T* q, int64_t head_stride, int group) {
    probes_.assign(size(), 0.0f);
    num_probes_ = 1;
    for (int g = 0; g < group; ++g) {
      for (int d = 0; d < head_dim_; ++d) {
        const float x = to_float(q[g * head_stride + d]);
        probes_[x < 0.0f ? d : head_dim_ + d] += x;
      }
    }
  }

  // Each head's query in the `num_dims` dims where the group is largest; all heads take the side of the group's sum.
  void probe_representatives(const T* q, int64_t head_stride, int group, float scale, int num_dims) {
    find_largest_dims(q, head_stride, group, num_dims);
    probes_.assign(size_t(group) * size(), 0.0f);
    num_probes_ = group;
    for (int g = 0; g < group; ++g) {
      float all = 0.0f, kept = 0.0f;
      for (int d = 0; d < head_dim_; ++d) all += std::fabs(to_float(q[g * head_stride + d]));
      for (const int d : dims_) kept += std::fabs(to_float(q[g * head_stride + d]));
      constexpr float kTiny = 1.17549435e-38f;  // a query of zeros rates all pages alike
      const float factor = scale / std::sqrt(std::max(kept, kTiny) / std::max(all, kTiny));
      for (const int d : dims_) {
        probes_[g * size() + (sums_[d] > 0.0f ? head_dim_ : 0) + d] = to_float(q[g * head_stride + d]) * factor;
      }
    }
  }

  // Sets `sums_` over the group, and `dims_`; among equal ones the lower comes first.
  void find_largest_dims(const T* q, int64_t head_stride, int group, int num_dims) {
    sums_.assign(head_dim_, 0.0f);
    sizes_.assign(head_dim_, 0.0f);
    dims_.resize(head_dim_);
    for (int d = 0; d < head_dim_; ++d) {
      dims_[d] = d;
      for (int g = 0; g < group; ++g) {
        const float x = to_float(q[g * head_stride + d]);
        sums_[d] += x;
        sizes_[d] += std::fabs(x);
      }
    }
    if (num_dims >= head_dim_) return;
    std::stable_sort(dims_.begin(), dims_.end(), [this](int a, int b) { return sizes_[a] > sizes_[b]; });
    dims_.resize(num_dims);
  }

  // scores_[i * width_ + page] of every probe i.
  void rate(const T* bounds, const int32_t* ids) {
    scores_.resize(size_t(num_probes_) * width_);
    if (size() % kStep) {
      rate_slowly(bounds, ids);
      return;
    }
    arranged_.resize(probes_.size());
    for (int i = 0; i < num_probes_; ++i) {
      arrange_query<T>(&probes_[i * size()], size(), size(), &arranged_[i * size()]);
    }
    constexpr int kAhead = 2 * kLanes;
    for (int page = 0; page < width_; page += kLanes) {
      const auto row = [&](int i) { return bounds + int64_t{ids[std::min(page + i, num_pages_ - 1)]} * size(); };
      // Inlined by force, and without `prefetch`: GCC takes a function that does nothing but prefetch for one that does
      // nothing, and drops its calls.
      const auto look = [&](int first) __attribute__((always_inline)) {
        for (int i = first; i < first + kTileTokens; ++i) {
          for (int dim = 0; dim < size(); dim += 64 / int(sizeof(T))) __builtin_prefetch(row(i + kAhead) + dim);
        }
      };
      for_heads(num_probes_, [&](auto heads, int g) {
        float* scores = &scores_[g * width_ + page];
        score_rows<T, heads.value>(&arranged_[g * size()], row, size(), 1.0f, scores, width_, look);
      });
    }
  }

  void rate_slowly(const T* bounds, const int32_t* ids) {
    for (int i = 0; i < num_probes_; ++i) {
      for (int page = 0; page < num_pages_; ++page) {
        const T* row = bounds + int64_t{ids[page]} * size();
        float total = 0.0f;
        for (int e = 0; e < size(); ++e) total += probes_[i * size() + e] * to_float(row[e]);
        scores_[i * width_ + page] = total;
      }
    }
  }

  // Scores become each page's share of a softmax over tokens, in which all tokens of a page score alike, added up over
  // the heads. All pages are full but the last, which has `num_last` tokens.
  void add_up_mass(int num_last, int page_size) {
    for (int i = 0; i < num_probes_; ++i) {
      float* scores = &scores_[i * width_];
      std::fill(scores + num_pages_, scores + width_, -INFINITY);
      const float maximum = *std::max_element(scores, scores + num_pages_);
      Lanes total{};
      for (int page = 0; page < width_; page += kLanes) {
        const Lanes mass = exp2((load(scores + page) - maximum) * kLog2E);
        store(scores + page, mass);
        total += mass;
      }
      const float last_share = float(num_last) / float(page_size);
      const float all = sum(total) - scores[num_pages_ - 1] * (1.0f - last_share);
      scores[num_pages_ - 1] *= last_share;
      for (int page = 0; page < num_pages_; ++page) scores_[page] = (i ? scores_[page] : 0.0f) + scores[page] / all;
    }
  }

  // The first page, the last, and the best of the others; ties go to the earlier one.
  void take_best(int max_pages, const int32_t* ids, int32_t* chosen) {
    keys_.resize(num_pages_);
    for (int page = 0; page < num_pages_; ++page) keys_[page] = key(scores_[page]);
    keys_[0] = keys_[num_pages_ - 1] = UINT32_MAX;
    const uint32_t least = key_of_rank(max_pages);
    int num_equal = max_pages - count_above(least);
    for (int page = 0; page < num_pages_; ++page) {
      if (keys_[page] > least || (keys_[page] == least && num_equal-- > 0)) *chosen++ = ids[page];
    }
  }

  // Orders as `score` does; -0 is 0. A finite score's is less than UINT32_MAX.
  static uint32_t key(float score) {
    score += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits ^ (bits >> 31 ? UINT32_MAX : 0x80000000u);
  }

  // The `rank`-th largest key, found bit by bit: counting is a vector operation, sorting is not.
  uint32_t key_of_rank(int rank) const {
    uint32_t found = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      if (count_above((found | bit) - 1) >= rank) found |= bit;
    }
    return found;
  }

  int count_above(uint32_t key) const {
    int count = 0;
    for (const uint32_t other : keys_) count += other > key;
    return count;
  }

  int num_pages_ = 0, width_ = 0, head_dim_ = 0, num_probes_ = 0;
  std::vector<float> probes_, arranged_, sums_, sizes_, scores_;
  std::vector<int> dims_;
  std::vector<uint32_t> keys_;
};

}  // namespace packlight::decode
