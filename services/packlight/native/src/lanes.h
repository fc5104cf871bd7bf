// Vectors of fp32 for every instruction set, out of the compiler's own vector types: one kernel source for all of them.
//
// Knows widths, shuffles, bf16 and 2^x. Does not know what is computed with them, and needs no intrinsics.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace packlight {

#if PACKLIGHT_LEVEL >= 2
constexpr int kLanes = 16;
#elif PACKLIGHT_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // NEON, SSE2
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitLanes __attribute__((vector_size(4 * kLanes)));

struct Bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even; NaN stays NaN.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Bf16 from_float<Bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return Bf16{uint16_t((bits >> 16) | 0x40u)};
  return Bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class Vector = Lanes>
inline Vector load(const void* from) {
  Vector lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <class Vector>
inline void store(void* to, Vector lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

inline Lanes all_lanes(float x) { return Lanes{} + x; }

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// 2 * kLanes bf16 as those with an even index and those with an odd one: two operations, and no lane is crossed.
inline void load_even_odd(const Bf16* from, Lanes& even, Lanes& odd) {
  const BitLanes pairs = load<BitLanes>(from);
  even = (Lanes)(pairs << 16);
  odd = (Lanes)(pairs & 0xffff0000u);
}

// ── shuffles ────────────────────────────────────────────────────────────────────────────────────────────────────────

// Lane i is lane source(i) of `a` and `b` laid one after the other.
template <int (*source)(int), int... i>
inline Lanes pick(Lanes a, Lanes b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(i)...);
#else
  return __builtin_shuffle(a, b, IntLanes{source(i)...});
#endif
}

template <int (*source)(int)>
inline Lanes pick(Lanes a, Lanes b) {
  return pick<source>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Within each block of four lanes: a0 b0 a1 b1 and a2 b2 a3 b3.
constexpr int low_ones(int i) { return i % 2 * kLanes + i / 4 * 4 + i % 4 / 2; }
constexpr int high_ones(int i) { return low_ones(i) + 2; }
// Likewise: a0 a1 b0 b1 and a2 a3 b2 b3.
constexpr int low_pairs(int i) { return i % 4 / 2 * kLanes + i / 4 * 4 + i % 2; }
constexpr int high_pairs(int i) { return low_pairs(i) + 2; }
// The even and the odd blocks of four lanes of `a`, then those of `b`.
constexpr int even_blocks(int i) { return i / (kLanes / 2) * kLanes + i % (kLanes / 2) / 4 * 8 + i % 4; }
constexpr int odd_blocks(int i) { return even_blocks(i) + 4; }

// Sums of the lanes of four vectors, block by block: lane i of a block of four is what block adds to the sum of x[i].
inline Lanes fold_quad(const Lanes* x) {
  const Lanes a = pick<low_ones>(x[0], x[1]) + pick<high_ones>(x[0], x[1]);
  const Lanes b = pick<low_ones>(x[2], x[3]) + pick<high_ones>(x[2], x[3]);
  return pick<low_pairs>(a, b) + pick<high_pairs>(a, b);
}

// The blocks of each of `count` = kLanes / 4 such vectors added up: their sums, one vector's after the other's.
template <int count>
inline Lanes fold_blocks(const Lanes* x) {
  if constexpr (count == 1) {
    return x[0];
  } else {
    const Lanes a = fold_blocks<count / 2>(x), b = fold_blocks<count / 2>(x + count / 2);
    return pick<even_blocks>(a, b) + pick<odd_blocks>(a, b);
  }
}

inline float sum(Lanes x) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

inline float largest(Lanes x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// ── 2^x ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

// 2^x for x <= 127, to 2e-7; 0 below -126, and NaN for NaN. The whole part of x becomes the exponent, a minimax
// polynomial of degree 6 (2e-9 before rounding) takes the rest, -0.5 to 0.5.
inline Lanes exp2(Lanes x) {
  const Lanes least = all_lanes(-126.0f);
  const Lanes bounded = x < least ? least : x;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits behind the point
  const Lanes shifted = bounded + kRounder;
  const Lanes part = bounded - (shifted - kRounder);
  Lanes power = part * 0.00015353360504377633f + 0.0013398875016719103f;
  power = power * part + 0.00961843691766262f;
  power = power * part + 0.055503323674201965f;
  power = power * part + 0.24022647738456726f;
  power = power * part + 0.6931471824645996f;
  power = power * part + 1.0f;
  const BitLanes exponent = ((BitLanes)shifted - 0x4b400000u + 127u) << 23;
  const Lanes result = power * (Lanes)exponent;
  return x < least ? Lanes{} : result;
}

}  // namespace packlight
