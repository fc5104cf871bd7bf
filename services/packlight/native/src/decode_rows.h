// Products of decode attention: queries with rows of K, weights with rows of V.
//
// Knows rows of numbers, padded to kStep, and nothing of pages, softmax or threads. A row is turned into fp32 once for
// several query heads, and multiplied in fp32 whatever its type: on the CPUs at hand that is no slower than the
// instructions for products of bf16 (which take two cycles where an fp32 product takes half of one), and exact.

#pragma once

#include <type_traits>

#include "lanes.h"

namespace packlight::decode {

constexpr int kStep = 32;  // a row's dims are padded to a multiple of this
constexpr int kVectorsPerStep = kStep / kLanes;

// How much is held in registers: heads that share a row, tokens whose sums are open, steps of output.
constexpr int kMaxHeads = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;
constexpr int kTileTokens = 4;
constexpr int kMaxSteps = kLanes == 16 ? 2 : 1;

// Calls do_heads(integral constant, first head) until `group` heads are done: kMaxHeads at a time, then the rest.
template <class DoHeads>
inline void for_heads(int group, const DoHeads& do_heads) {
  int g = 0;
  for (; g + kMaxHeads <= group; g += kMaxHeads) do_heads(std::integral_constant<int, kMaxHeads>{}, g);
  if constexpr (kMaxHeads > 3) {
    if (group - g == 3) do_heads(std::integral_constant<int, 3>{}, g);
    if (group - g == 2) do_heads(std::integral_constant<int, 2>{}, g);
  }
  if constexpr (kMaxHeads > 1) {
    if (group - g == 1) do_heads(std::integral_constant<int, 1>{}, g);
  }
}

// A step of a row as fp32. bf16 come out as even and odd lanes: `dim_at` says which dim stands where.
inline void load_step(const float* row, Lanes* values) {
  for (int i = 0; i < kVectorsPerStep; ++i) values[i] = load(row + i * kLanes);
}

inline void load_step(const Bf16* row, Lanes* values) {
  for (int i = 0; i < kVectorsPerStep; i += 2) load_even_odd(row + i * kLanes, values[i], values[i + 1]);
}

// Which dim of a step stands at place i once it is loaded.
template <class T>
inline int dim_at(int i) {
  if (sizeof(T) == sizeof(float)) return i;
  const int start = i / (2 * kLanes) * (2 * kLanes), place = i - start;
  return start + place % kLanes * 2 + place / kLanes;
}

// One head's query in the order in which rows of T are loaded; the dims that it is padded with are 0.
template <class T, class From>
inline void arrange_query(const From* q, int head_dim, int padded_dim, float* to) {
  for (int i = 0; i < padded_dim; ++i) {
    const int dim = i / kStep * kStep + dim_at<T>(i % kStep);
    to[i] = dim < head_dim ? to_float(q[dim]) : 0.0f;
  }
}

// q . row for kTileTokens rows and kHeads heads, their sums still spread over lanes.
template <class T, int kHeads>
struct Tile {
  Lanes sums[kHeads][kTileTokens] = {};

  // `row(i)` is where row i starts; queries lie `dim` apart.
  template <class Row>
  void add_step(const float* queries, const Row& row, int dim, int d) {
    for (int token = 0; token < kTileTokens; ++token) {
      Lanes values[kVectorsPerStep];
      load_step(row(token) + d, values);
      for (int i = 0; i < kVectorsPerStep; ++i) {
        for (int h = 0; h < kHeads; ++h) sums[h][token] += load(queries + h * dim + d + i * kLanes) * values[i];
      }
    }
  }
};

// scores[h * stride + t] = factor * q_h . row(t) for kLanes rows. `before_tile(t)` is called before rows t to
// t + kTileTokens - 1 are read.
template <class T, int kHeads, class Row, class BeforeTile>
inline void score_rows(const float* queries, const Row& row, int dim, float factor, float* scores, int stride,
                       const BeforeTile& before_tile) {
  constexpr int kTiles = kLanes / kTileTokens;
  Lanes by_tile[kHeads][kTiles];
  for (int tile = 0; tile < kTiles; ++tile) {
    const int first = tile * kTileTokens;
    before_tile(first);
    Tile<T, kHeads> products;
    for (int d = 0; d < dim; d += kStep) products.add_step(queries, [&](int t) { return row(first + t); }, dim, d);
    for (int h = 0; h < kHeads; ++h) by_tile[h][tile] = fold_quad(products.sums[h]);
  }
  for (int h = 0; h < kHeads; ++h) store(scores + h * stride, fold_blocks<kTiles>(by_tile[h]) * factor);
}

// weight * row added up for kHeads heads: kSteps steps of their outputs.
template <class T, int kHeads, int kSteps>
struct Sums {
  static constexpr int kVectors = kSteps * kVectorsPerStep;
  Lanes at[kHeads][kVectors];

  // Head h has the weight weights[h * stride].
  void add_row(const T* row, const float* weights, int stride) {
    Lanes values[kVectors];
    for (int s = 0; s < kSteps; ++s) load_step(row + s * kStep, values + s * kVectorsPerStep);
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kVectors; ++i) at[h][i] += values[i] * weights[h * stride];
    }
  }

  void read(const float* outs, int dim) {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kVectors; ++i) at[h][i] = load(outs + h * dim + i * kLanes);
    }
  }

  void write(float* outs, int dim) const {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kVectors; ++i) store(outs + h * dim + i * kLanes, at[h][i]);
    }
  }
};

}  // namespace packlight::decode
