// From rows as they lie in memory to the forms that products take: padding, transposing, pairing, and back again.
//
// Knows strides and element types. Does not know what the numbers mean. A *word* is 32 bits: an fp32, or two bf16.

#pragma once

#include <type_traits>

#include "prefill_attention_products.h"

namespace packlight::prefill {

constexpr int round_up(int64_t n, int unit) { return int((n + unit - 1) / unit * unit); }

// ── transposing ─────────────────────────────────────────────────────────────────────────────────────────────────────

// One exchange between two vectors: lanes with the bit `distance` of `a` change places with those without it of `b`.
template <int distance>
constexpr int keep_low(int i) {
  return i & distance ? kLanes + i - distance : i;
}
template <int distance>
constexpr int keep_high(int i) {
  return i & distance ? kLanes + i : i + distance;
}

template <int distance>
inline void exchange(Lanes (&rows)[kLanes]) {
  if constexpr (distance < kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (i & distance) continue;
      const Lanes low = rows[i], high = rows[i + distance];
      rows[i] = pick<keep_low<distance>>(low, high);
      rows[i + distance] = pick<keep_high<distance>>(low, high);
    }
    exchange<2 * distance>(rows);
  }
}

// to[column][row] = from[row][column] for 16 x 16 words; strides are in words.
inline void transpose_words(const void* from, ptrdiff_t from_stride, void* to, ptrdiff_t to_stride) {
  const auto* source = static_cast<const float*>(from);
  auto* target = static_cast<float*>(to);
  for (int row = 0; row < kStripRows; row += kLanes) {
    for (int column = 0; column < kStripRows; column += kLanes) {
      Lanes lines[kLanes];
      for (int i = 0; i < kLanes; ++i) lines[i] = load(source + (row + i) * from_stride + column);
      exchange<1>(lines);
      for (int i = 0; i < kLanes; ++i) store(target + (column + i) * to_stride + row, lines[i]);
    }
  }
}

// ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────

// A call of memcpy for each short row would cost as much as the copy.
inline void copy_bytes(char* to, const char* from, size_t num) {
  constexpr size_t kPiece = sizeof(Lanes);
  size_t at = 0;
  for (; at + kPiece <= num; at += kPiece) store(to + at, load(from + at));
  if (at < num) std::memcpy(to + at, from + at, num - at);
}

template <class To, class From>
inline void copy_row(To* to, const From* from, int64_t num) {
  if constexpr (std::is_same_v<To, From>) {
    copy_bytes(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), num * sizeof(To));
  } else {
    for (int64_t i = 0; i < num; ++i) to[i] = from_float<To>(to_float(from[i]));
  }
}

inline void store_rounded(float* to, Lanes x) { store(to, x); }

// To the nearest, ties to even; NaN stays NaN.
inline void store_rounded(Bf16* to, Lanes x) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  const BitLanes bits = (BitLanes)x, nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  store(to, __builtin_convertvector((x == x ? nearest : bits | 0x400000u) >> 16, Halves));
}

// A row of `num` elements and zeros up to `padded` ones.
template <class To, class From>
inline void pad_row(To* to, const From* from, int num, int padded) {
  copy_row(to, from, num);
  if (num < padded) std::memset(static_cast<void*>(to + num), 0, (padded - num) * sizeof(To));
}

// ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────

// Values are the left operand of the second product, with rows over head_dim and k over tokens. In fp32 they can stay
// as they lie, [token][dim]; tiles and pairs want [32 tokens][dim][token of these].
inline Left<float> left_values(const float* values, int padded_dim) { return {values, 1, padded_dim}; }

inline void arrange_values(float* to, const float* rows, int padded_dim) {
  std::memcpy(to, rows, size_t{kAlign} * padded_dim * sizeof *to);
}

#if PACKLIGHT_LEVEL >= 3
inline Left<Bf16> left_values(const Bf16* values, int padded_dim) { return {values, kAlign, kAlign * padded_dim}; }

// Each pair of tokens becomes a row of words, and 16 of these rows are turned over.
inline void arrange_values(Bf16* to, const Bf16* rows, int padded_dim) {
  alignas(64) uint32_t pairs[kAlign / 2][kStripRows];
  for (int dim = 0; dim < padded_dim; dim += kStripRows) {
    for (int pair = 0; pair < kAlign / 2; ++pair) {
      const Bf16* even = rows + 2 * pair * padded_dim + dim;
      const __m512i low = _mm512_cvtepu16_epi32(load<__m256i>(even));
      const __m512i high = _mm512_cvtepu16_epi32(load<__m256i>(even + padded_dim));
      store(pairs[pair], _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    transpose_words(pairs, kStripRows, to + dim * kAlign, kAlign / 2);
  }
}
#endif

}  // namespace packlight::prefill
