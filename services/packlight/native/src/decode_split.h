// Attention of the query heads of one KV head over an unbroken run of its tokens, a chunk at a time: online softmax
// (arXiv 1805.02867) in fp32.
//
// Knows rows of K and V in blocks of kBlockTokens. Does not know where they come from: that is a `Source` (pages.h).

#pragma once

#include <algorithm>
#include <cmath>

#include "decode_rows.h"

namespace packlight::decode {

constexpr int kBlockTokens = 16;  // rows that lie one after the other
constexpr int kChunkBlocks = 4;
constexpr int kChunkTokens = kBlockTokens * kChunkBlocks;  // tokens whose scores are held at once
constexpr int kMaxGroup = 32, kMaxDim = 256;
constexpr float kLog2E = 1.44269504088896341f;

inline int round_up(int count, int step) { return (count + step - 1) / step * step; }

// The blocks of a chunk, and which of its tokens are seen: `first` to `last` - 1.
template <class T>
struct Chunk {
  const T* k[kChunkBlocks];
  const T* v[kChunkBlocks];
  int first, last;
};

// What the next chunk will need: `num_bytes` of K and as many of V per block. 0 where there is nothing to be told.
struct Ahead {
  const char* k[kChunkBlocks];
  const char* v[kChunkBlocks];
  int num_blocks, num_bytes;
};

inline void prefetch(const char* from, int num_bytes) {
  for (int i = 0; i < num_bytes; i += 64) __builtin_prefetch(from + i);
}

// Of one head: sum_t 2^(score_t - maximum), over the tokens so far. Its output is weighted alike.
struct Softmax {
  float maximum, total;
};

// T is what rows are made of.
template <class T>
class SplitAttention {
 public:
  // `q` holds `group` heads of `head_dim` numbers, `head_stride` apart. `states` are as many; so are the outputs, each
  // of padded floats in the order of `dim_at`.
  template <class From>
  SplitAttention(const From* q, int64_t head_stride, int group, int head_dim, float scale, Softmax* states, float* outs)
      : group_(group), dim_(round_up(head_dim, kStep)), factor_(scale * kLog2E), states_(states), outs_(outs) {
    for (int g = 0; g < group; ++g) {
      arrange_query<T>(q + g * head_stride, head_dim, dim_, queries_ + g * dim_);
      states[g] = {-INFINITY, 0.0f};
    }
    std::fill(outs, outs + group * dim_, 0.0f);
  }

  template <class Source>
  void run(Source& source, int start, int end) {
    Chunk<T> chunk;
    for (int at = start / kChunkTokens * kChunkTokens; at < end; at += kChunkTokens) {
      chunk.first = std::max(start - at, 0);
      chunk.last = std::min(end - at, kChunkTokens);
      source.read(at, chunk);
      Ahead ahead{};
      const int num_ahead = std::min(end - at - kChunkTokens, kChunkTokens);
      if (num_ahead > 0) source.look(at + kChunkTokens, num_ahead, ahead);
      add(chunk, ahead);
    }
  }

 private:
  void add(const Chunk<T>& chunk, const Ahead& ahead) {
    for (int block = chunk.first / kBlockTokens; block * kBlockTokens < chunk.last; ++block) {
      for_heads(group_, [&](auto heads, int g) { this->template score<heads.value>(chunk, ahead, block, g); });
    }
    for (int g = 0; g < group_; ++g) weigh(chunk, g);
    for_heads(group_, [&](auto heads, int g) { this->template add_dims<heads.value>(chunk, ahead, g); });
  }

  // What comes next is fetched a few rows at a time, as fast as rows are worked on: a CPU has room for few lines under
  // way, and waits when it is asked for more.
  template <int kHeads>
  void score(const Chunk<T>& chunk, const Ahead& ahead, int block, int g) {
    const int row_bytes = g == 0 && block < ahead.num_blocks ? ahead.num_bytes / kBlockTokens : 0;
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      float* scores = scores_ + g * kChunkTokens + block * kBlockTokens + t;
      const auto look = [&](int row) { prefetch(ahead.k[block] + (t + row) * row_bytes, kTileTokens * row_bytes); };
      const auto row = [&](int i) { return chunk.k[block] + (t + i) * dim_; };
      score_rows<T, kHeads>(queries_ + g * dim_, row, dim_, factor_, scores, kChunkTokens, look);
    }
  }

  // Scores of head g become weights; what was added up before shrinks to the new maximum.
  void weigh(const Chunk<T>& chunk, int g) {
    float* scores = scores_ + g * kChunkTokens;
    const int end = round_up(chunk.last, kBlockTokens);
    std::fill(scores, scores + chunk.first, -INFINITY);
    std::fill(scores + chunk.last, scores + end, -INFINITY);
    Lanes most = load(scores);
    for (int t = kLanes; t < end; t += kLanes) most = larger(load(scores + t), most);
    Softmax& state = states_[g];
    const float maximum = largest(most);
    if (maximum > state.maximum) {
      const float shrink = std::exp2(state.maximum - maximum);
      state = {maximum, state.total * shrink};
      for (int d = 0; d < dim_; ++d) outs_[g * dim_ + d] *= shrink;
    }
    Lanes total{};
    for (int t = 0; t < end; t += kLanes) {
      const Lanes weights = exp2(load(scores + t) - state.maximum);
      store(scores + t, weights);
      total += weights;
    }
    state.total += sum(total);
  }

  template <int kHeads>
  void add_dims(const Chunk<T>& chunk, const Ahead& ahead, int g) {
    int d = 0;
    for (; d + kMaxSteps * kStep <= dim_; d += kMaxSteps * kStep) add_values<kHeads, kMaxSteps>(chunk, ahead, g, d);
    if (kMaxSteps > 1 && d < dim_) add_values<kHeads, 1>(chunk, ahead, g, d);
  }

  // To `kSteps` steps of the outputs of `kHeads` heads, from dim d and head g on.
  template <int kHeads, int kSteps>
  void add_values(const Chunk<T>& chunk, const Ahead& ahead, int g, int d) {
    const bool is_first = g == 0 && d == 0;
    const int num_ahead = is_first ? ahead.num_blocks * kBlockTokens : 0, row_bytes = ahead.num_bytes / kBlockTokens;
    float* outs = outs_ + g * dim_ + d;
    Sums<T, kHeads, kSteps> sums;
    sums.read(outs, dim_);
    for (int t = chunk.first; t < chunk.last; ++t) {
      const int block = t / kBlockTokens, token = t % kBlockTokens;
      if (t < num_ahead) prefetch(ahead.v[block] + token * row_bytes, row_bytes);
      sums.add_row(chunk.v[block] + token * dim_ + d, scores_ + g * kChunkTokens + t, kChunkTokens);
    }
    sums.write(outs, dim_);
  }

  const int group_, dim_;
  const float factor_;
  Softmax* const states_;
  float* const outs_;
  alignas(64) float queries_[kMaxGroup * kMaxDim];
  alignas(64) float scores_[kMaxGroup * kChunkTokens];  // then weights
};

}  // namespace packlight::decode
