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

constexpr int kRun = kAlign / 2;

// ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────

// Values are the left operand of the second product, with rows over head_dim and k over tokens. In fp32 they can stay
// as they lie, [token][dim]; tiles and pairs want [32 tokens][dim][token of these].
inline Left<float> left_values(const float* values, int padded_dim) { return {values, 1, padded_dim}; }

// 32 tokens, as two runs of rows: pages may hold no more together.
inline void arrange_values(float* to, const float* earlier, const float* later, int padded_dim) {
  copy_row(to, earlier, kRun * padded_dim);
  copy_row(to + kRun * padded_dim, later, kRun * padded_dim);
}

#if PACKLIGHT_LEVEL >= 3
inline Left<Bf16> left_values(const Bf16* values, int padded_dim) { return {values, kAlign, kAlign * padded_dim}; }

// In each quarter of eight vectors, words[i] is 8 dims of a token. They become 8 tokens of a dim.
inline void turn_over(__m512i (&words)[8]) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi16(words[i], words[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi16(words[i], words[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm512_unpacklo_epi32(pairs[i + half], pairs[i + 2 + half]);
      fours[i + 2 * half + 1] = _mm512_unpackhi_epi32(pairs[i + half], pairs[i + 2 + half]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    words[2 * i] = _mm512_unpacklo_epi64(fours[i], fours[i + 4]);
    words[2 * i + 1] = _mm512_unpackhi_epi64(fours[i], fours[i + 4]);
  }
}

// 8 dims at a time. What a load puts into its quarter need not be shuffled there.
inline void arrange_values(Bf16* to, const Bf16* earlier, const Bf16* later, int padded_dim) {
  constexpr int kDims = 8;
  for (int dim = 0; dim < padded_dim; dim += kDims) {
    __m512i words[kDims];
    for (int i = 0; i < kDims; ++i) {
      const Bf16 *first = earlier + i * padded_dim + dim, *third = later + i * padded_dim + dim;
      const ptrdiff_t next = kDims * padded_dim;
      words[i] = _mm512_castsi128_si512(load<__m128i>(first));
      words[i] = _mm512_inserti32x4(words[i], load<__m128i>(first + next), 1);
      words[i] = _mm512_inserti32x4(words[i], load<__m128i>(third), 2);
      words[i] = _mm512_inserti32x4(words[i], load<__m128i>(third + next), 3);
    }
    turn_over(words);
    for (int i = 0; i < kDims; ++i) store(to + (dim + i) * kAlign, words[i]);
  }
}
#endif

}  // namespace packlight::prefill
