// Attention of one block of queries over its prompt, key block by key block (FlashAttention, arXiv 2205.14135).
//
// Knows one KV head: the queries that share it, and where its pages lie. Does not know threads or batches.
//
// A *row* is a (query, query head of the group): rows follow each other by query, then head. 16 rows are a strip, held
// in the lanes of vectors and the columns of tiles; two strips are a group, which skips the tokens none of its rows
// sees. Scores, weights and outputs are transposed, so nothing is ever summed across lanes, and keys are used as they
// lie. Key blocks begin at multiples of kKeyBlock of the prompt: a token's output depends on its prompt alone, to the
// last bit, and not on chunks, other prompts or threads.

#pragma once

#include <algorithm>
#include <cmath>

#include "prefill_attention_keys.h"
#include "prefill_attention_softmax.h"
#include "prefill_attention_tiles.h"

namespace packlight::prefill {

constexpr int kGroupRows = kGroupStrips * kStripRows;
constexpr ptrdiff_t kStripScores = kStripRows * kKeyBlock;
constexpr int kWeighed = kGroupRows / kLanes * kKeyBlock / kBetween;  // stretches in which a group weighs a block
constexpr int kBlockRows = 1024;  // rows that share the work of reading keys and arranging values

// Some next queries of one prompt that share a KV head. `Stored` is what memory holds: fp32 or bf16.
template <class Stored>
struct Queries {
  const Stored* q;  // of the first query and query head
  Stored* out;
  float* lse;
  ptrdiff_t q_token_stride, q_head_stride, out_token_stride, lse_token_stride;
  int64_t first_position, window;
  int num_queries, group, head_dim;
  float scale;

  int num_rows() const { return num_queries * group; }

  const Stored* q_row(int row) const { return q + row / group * q_token_stride + row % group * q_head_stride; }
  Stored* out_row(int row) const { return out + row / group * out_token_stride + row % group * ptrdiff_t(head_dim); }
  float& lse_of(int row) const { return lse[row / group * lse_token_stride + row % group]; }
};

// One thread's memory, for any block of queries of a shape.
template <class Math>
struct Workspace {
  using Element = typename Math::Element;
  int padded_dim;
  Element *q, *k, *v, *rows;
  float *scores, *out, *highest, *sum;
  int32_t* position;

  static size_t num_bytes(int max_rows, int head_dim) {
    Workspace unused(nullptr, max_rows, head_dim);
    return unused.end_;
  }

  Workspace(char* memory, int max_rows, int head_dim) : padded_dim(round_up(head_dim, kAlign)), memory_(memory) {
    const size_t num_rows = round_up(max_rows, kGroupRows), dim = padded_dim;
    take(q, num_rows * dim);
    take(k, kKeyBlock * dim);
    take(v, kKeyBlock * dim);
    take(rows, kAlign * dim);
    take(scores, kGroupRows * kKeyBlock);
    take(out, num_rows * dim);
    take(highest, num_rows);
    take(sum, num_rows);
    take(position, num_rows);
  }

 private:
  template <class T>
  void take(T*& part, size_t num) {
    part = reinterpret_cast<T*>(memory_ + end_);
    end_ += (num * sizeof(T) + 63) / 64 * 64;
  }

  char* memory_;
  size_t end_ = 0;
};

template <class Stored, class Math>
class QueryBlock {
  using Element = typename Math::Element;

 public:
  QueryBlock(const Queries<Stored>& queries, const Pages<Stored>& pages, const Workspace<Math>& space, bool tiles)
      : queries_(queries), pages_(pages), space_(space),
        keys_(pages_, space.padded_dim, space.k, space.v, space.rows), tiles_(tiles),
        num_groups_((queries.num_rows() + kGroupRows - 1) / kGroupRows) {}

  void attend() {
    const int64_t end = queries_.first_position + queries_.num_queries;
    const int64_t begin = first_seen(queries_.first_position) / kKeyBlock * kKeyBlock;
    Ahead<Stored>(pages_, begin, std::min(begin + kKeyBlock, end), 1)();
    prepare();
    for (int64_t token = begin, next; token < end; token = next) {
      next = std::min(token + kKeyBlock, end);
      keys_.load(token, int(next - token));
      Ahead<Stored> ahead(pages_, next, std::min(next + kKeyBlock, end), num_groups_ * kWeighed);
      for (int group = 0; group < num_groups_; ++group) attend_group(group, token, ahead);
    }
    finish();
  }

 private:
  int64_t first_seen(int64_t position) const {
    return queries_.window ? std::max<int64_t>(0, position - queries_.window + 1) : 0;
  }

  // The row that a lane stands for; lanes behind the last row repeat it, and are never written out.
  int row_at(int lane) const { return std::min(lane, queries_.num_rows() - 1); }

  int64_t position_of(int lane) const { return queries_.first_position + row_at(lane) / queries_.group; }

  void prepare() {
    const int num_lanes = num_groups_ * kGroupRows;
    for (int lane = 0; lane < num_lanes; ++lane) {
      space_.highest[lane] = kLowest, space_.sum[lane] = 0.0f;
      space_.position[lane] = int32_t(position_of(lane));
    }
    std::memset(space_.out, 0, size_t(num_lanes) * space_.padded_dim * sizeof(float));
    for (int lane = 0; lane < num_lanes; lane += kStripRows) load_queries(lane);
  }

  // A strip's queries, [dim / kPack][16 rows][kPack].
  void load_queries(int lane) {
    const int dim = space_.padded_dim;
    for (int i = 0; i < kStripRows; ++i) {
      pad_row(space_.rows + i * dim, queries_.q_row(row_at(lane + i)), queries_.head_dim, dim);
    }
    Element* to = space_.q + ptrdiff_t(lane) * dim;
    for (int at = 0; at < dim; at += kStripRows * Math::kPack) {
      transpose_words(space_.rows + at, dim / Math::kPack, to + at * kStripRows, kStripRows);
    }
  }

  void attend_group(int group, int64_t token, Ahead<Stored>& ahead) {
    const int lane = group * kGroupRows, dim = space_.padded_dim;
    const int64_t oldest = space_.position[lane], newest = space_.position[lane + kGroupRows - 1];
    const int64_t from = std::max<int64_t>(0, first_seen(oldest) - token) / kAlign * kAlign;
    const int64_t to = round_up(std::min<int64_t>(kKeyBlock, newest + 1 - token), kAlign);
    if (from >= to) return;
    const int first = int(from), last = int(to);
    multiply({space_.k + from * dim, dim, Math::kStep}, last - first, dim, space_.q + ptrdiff_t(lane) * dim,
             kStripRows * dim, false, space_.scores + first * kStripRows, kStripScores);
    for (int strip = 0; strip < kGroupStrips; ++strip) weigh_strip(lane, strip, first, last, token, ahead);
    Left<Element> values = left_values(space_.v, dim);
    values.at += first / Math::kStep * values.step_stride;
    multiply(values, dim, last - first, weights_of(0) + first * kStripRows, kStripWeights, true,
             space_.out + ptrdiff_t(lane) * dim, kStripRows * dim);
  }

  // A strip's weights take the place of its scores: what is smaller stays in a nearer cache.
  static constexpr ptrdiff_t kStripWeights = kStripScores * (sizeof(float) / sizeof(Element));
  Element* weights_of(int strip) const { return reinterpret_cast<Element*>(space_.scores) + strip * kStripWeights; }

  void weigh_strip(int group_lane, int strip, int first, int last, int64_t token, Ahead<Stored>& ahead) {
    const float factor = queries_.scale * 1.44269504088896f;  // powers of two are cheaper than those of e
    for (int lane = strip * kStripRows; lane < (strip + 1) * kStripRows; lane += kLanes) {
      const int at = group_lane + lane, part = lane % kStripRows;
      const Softmax rows{space_.scores + strip * kStripScores + part, space_.position + at, space_.highest + at,
                         space_.sum + at};
      hide_unseen(rows, first, last, token);
      const Lanes scale = weigh<Math>(rows, first, last, factor, weights_of(strip) + part, ahead);
      rescale(at, scale);
    }
  }

  // Only the steps in which some row of the strip does not see some token.
  void hide_unseen(const Softmax& rows, int first, int last, int64_t token) {
    const int64_t oldest = rows.position[0], newest = rows.position[kLanes - 1];
    for (int step = first; step < last; step += kAlign) {
      const bool all_seen = token + step + kAlign - 1 <= oldest && token + step >= first_seen(newest);
      if (!all_seen) hide(rows, step, step + kAlign, token, queries_.window);
    }
  }

  void rescale(int lane, Lanes scale) {
    bool changed = false;
    for (int i = 0; i < kLanes; ++i) changed |= scale[i] != 1.0f;
    if (!changed) return;
    float* out = space_.out + ptrdiff_t(lane / kStripRows) * kStripRows * space_.padded_dim + lane % kStripRows;
    for (int dim = 0; dim < space_.padded_dim; ++dim) {
      store(out + dim * kStripRows, load(out + dim * kStripRows) * scale);
    }
  }

  void multiply(Left<Element> a, int num_rows, int num_k, const Element* b, ptrdiff_t b_strip_size, bool add, float* c,
                ptrdiff_t c_strip_size) {
#if PACKLIGHT_LEVEL >= 4
    if constexpr (Math::kPack == 2) {
      if (tiles_) return multiply_tiles(a, num_rows, num_k, b, b_strip_size, add, c, c_strip_size);
    }
#endif
    multiply_lanes<Math>(a, num_rows, num_k, b, b_strip_size, add, c, c_strip_size);
  }

  void finish() {
    for (int lane = 0; lane < queries_.num_rows(); lane += kStripRows) finish_strip(lane);
  }

  void finish_strip(int lane) {
    const int num_lanes = std::min(kStripRows, queries_.num_rows() - lane), dim = space_.padded_dim;
    Stored* to[kStripRows];
    for (int i = 0; i < num_lanes; ++i) {
      to[i] = queries_.out_row(lane + i);
      queries_.lse_of(lane + i) = space_.highest[lane + i] * queries_.scale + std::log(space_.sum[lane + i]);
    }
    alignas(64) float lines[kStripRows][kStripRows];
    for (int at = 0; at < queries_.head_dim; at += kStripRows) {
      transpose_words(space_.out + ptrdiff_t(lane) * dim + at * kStripRows, kStripRows, lines, kStripRows);
      const int width = std::min(kStripRows, queries_.head_dim - at);
      for (int i = 0; i < num_lanes; ++i) write_line(to[i] + at, lines[i], 1.0f / space_.sum[lane + i], width);
    }
  }

  static void write_line(Stored* to, const float* line, float share, int width) {
    Stored rounded[kStripRows];
    Stored* whole = width == kStripRows ? to : rounded;
    for (int i = 0; i < kStripRows; i += kLanes) store_rounded(whole + i, load(line + i) * share);
    if (whole != to) copy_row(to, rounded, width);
  }

  const Queries<Stored> queries_;
  const Pages<Stored> pages_;
  const Workspace<Math> space_;
  KeyBlock<Stored, Element> keys_;
  const bool tiles_;
  const int num_groups_;
};

}  // namespace packlight::prefill
