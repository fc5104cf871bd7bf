// Products of small matrices, the inner loops of prefill attention: fp32 by multiply-add, bf16 in pairs, bf16 in tiles.
//
// Knows registers and strides. Does not know queries, keys or pages.
//
// Every product is C += A B, where C and B have 16 columns, a *strip*, or two strips side by side:
//     A  element (row, k) at `at[row * row_stride + k / kStep * step_stride + k % kStep]`
//     B  [strip][k / kPack][16 columns][kPack]: kPack neighbours in k lie together, as bf16 instructions take them
//     C  [strip][row][16 columns] fp32
// Each element of C is summed over ascending k, whatever its place: results do not depend on what is computed beside.

#pragma once

#include <cstddef>

#include "lanes.h"

#if PACKLIGHT_LEVEL >= 2
#include <immintrin.h>
#endif

namespace packlight::prefill {

constexpr int kStripRows = 16;  // columns of a strip; they are rows of the attention matrix, which is held transposed
constexpr int kGroupStrips = 2;
constexpr int kAlign = 32;  // the rows of A, and its k, come in multiples of this many

template <class Element>
struct Left {
  const Element* at;
  ptrdiff_t row_stride, step_stride;
};

struct Fp32 {
  using Element = float;
  static constexpr int kPack = 1, kStep = 1;

  static Lanes broadcast(const float* left) { return all_lanes(*left); }
  static Lanes multiply_add(Lanes left, Lanes right, Lanes sums) { return left * right + sums; }
};

#if PACKLIGHT_LEVEL >= 3
struct Bf16Pairs {
  using Element = Bf16;
  static constexpr int kPack = 2, kStep = 32;

  static Lanes broadcast(const Bf16* left) { return (Lanes)_mm512_set1_epi32(load_word(left)); }

  static Lanes multiply_add(Lanes left, Lanes right, Lanes sums) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
  }

 private:
  static int load_word(const Bf16* from) {
    int word;
    std::memcpy(&word, from, sizeof word);
    return word;
  }
};
#endif

// Rows of A that are worked on at once: as many sums as there are registers for.
#if PACKLIGHT_LEVEL >= 2
constexpr int kRowsAtOnce = 8;
#elif PACKLIGHT_LEVEL == 1 || defined(__aarch64__)
constexpr int kRowsAtOnce = 2;
#else
constexpr int kRowsAtOnce = 1;
#endif
constexpr int kGroupLanes = kGroupStrips * kStripRows / kLanes;  // vectors of a row of C

// The place of vector `part` of a row of two strips, of which each takes `strip_size` elements.
inline ptrdiff_t place_of(int part, ptrdiff_t strip_size) {
  constexpr int kParts = kStripRows / kLanes;
  return part / kParts * strip_size + part % kParts * kLanes;
}

template <class Math>
inline void multiply_rows(Left<typename Math::Element> a, int num_k, const typename Math::Element* b,
                          ptrdiff_t b_strip_size, bool add, float* c, ptrdiff_t c_strip_size) {
  Lanes sums[kRowsAtOnce][kGroupLanes];
  for (int row = 0; row < kRowsAtOnce; ++row) {
    for (int part = 0; part < kGroupLanes; ++part) {
      sums[row][part] = add ? load(c + row * kStripRows + place_of(part, c_strip_size)) : Lanes{};
    }
  }
  for (int step = 0; step < num_k; step += Math::kStep, a.at += a.step_stride) {
    for (int k = 0; k < Math::kStep; k += Math::kPack, b += kStripRows * Math::kPack) {
      Lanes right[kGroupLanes];
      for (int part = 0; part < kGroupLanes; ++part) {
        right[part] = load(b + place_of(part, b_strip_size / Math::kPack) * Math::kPack);
      }
      for (int row = 0; row < kRowsAtOnce; ++row) {
        const Lanes left = Math::broadcast(a.at + row * a.row_stride + k);
        for (int part = 0; part < kGroupLanes; ++part) {
          sums[row][part] = Math::multiply_add(left, right[part], sums[row][part]);
        }
      }
    }
  }
  for (int row = 0; row < kRowsAtOnce; ++row) {
    for (int part = 0; part < kGroupLanes; ++part) {
      store(c + row * kStripRows + place_of(part, c_strip_size), sums[row][part]);
    }
  }
}

// C = A B, or C += A B, for two strips; strip sizes are in elements of B and C.
template <class Math>
inline void multiply_lanes(Left<typename Math::Element> a, int num_rows, int num_k, const typename Math::Element* b,
                           ptrdiff_t b_strip_size, bool add, float* c, ptrdiff_t c_strip_size) {
  for (int row = 0; row < num_rows; row += kRowsAtOnce) {
    const Left<typename Math::Element> rows{a.at + row * a.row_stride, a.row_stride, a.step_stride};
    multiply_rows<Math>(rows, num_k, b, b_strip_size, add, c + row * kStripRows, c_strip_size);
  }
}

}  // namespace packlight::prefill
