// bfloat16, how weights lie, and the sixteen running sums of one panel, in the widest vectors of the instruction set.
//
// A panel is sixteen columns of a product, that is sixteen rows of a weight matrix. A line is two consecutive weights
// of each of them, what one vector load brings; sixteen lines are a tile, 32 deep; a block is two panels, tile by tile
// in turn, so that it is one stream of memory: [depth / 32][2][16][16][2].

#pragma once

#include <cstdint>
#include <cstring>

#if PACKLIGHT_LEVEL >= 2
#include <immintrin.h>
#endif

// Compiled once per source, not into every place it is called from.
#define PACKLIGHT_ONCE __attribute__((noinline))

namespace packlight::linear {

constexpr int kPanel = 16, kBlock = 2 * kPanel, kLine = 2 * kPanel;
constexpr int kLinesPerTile = 16, kTileDepth = 2 * kLinesPerTile, kTileSize = kLinesPerTile * kLine;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

#if PACKLIGHT_LEVEL >= 3

struct Pairs {
  __m512bh both;
  static Pairs of_panel(const uint16_t* weights) { return {(__m512bh)_mm512_loadu_si512(weights)}; }
};

using PairOfRow = Pairs;

inline PairOfRow pair_of_row(const uint16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return {(__m512bh)_mm512_set1_epi32(pair)};
}

struct Sums {
  __m512 all = _mm512_setzero_ps();
  void add(const Pairs& weights, const PairOfRow& x) { all = _mm512_dpbf16_ps(all, weights.both, x.both); }
  void store(float* out) const { _mm512_storeu_ps(out, all); }
};

#else

#if PACKLIGHT_LEVEL >= 2
constexpr int kWidth = 16;
#elif PACKLIGHT_LEVEL >= 1
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kPanel / kWidth;

// One vector of the instruction set, in the compiler's own terms.
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

// The earlier and the later weight of each column, or of a row twice: bfloat16 is the upper half of a float.
struct Pairs {
  Floats early[kParts], late[kParts];
  static Pairs of_panel(const uint16_t* weights) {
    Pairs pairs;
    for (int part = 0; part < kParts; ++part) {
      Words words;
      std::memcpy(&words, weights + 2 * kWidth * part, sizeof words);
      pairs.early[part] = (Floats)(words << 16);
      pairs.late[part] = (Floats)(words & 0xffff0000u);
    }
    return pairs;
  }
};

struct PairOfRow {
  float early, late;
};

inline PairOfRow pair_of_row(const uint16_t* x) { return {to_float(x[0]), to_float(x[1])}; }

struct Sums {
  Floats parts[kParts] = {};
  void add(const Pairs& weights, const PairOfRow& x) {
    for (int part = 0; part < kParts; ++part) {
      parts[part] += weights.early[part] * x.early + weights.late[part] * x.late;
    }
  }
  void store(float* out) const { std::memcpy(out, parts, sizeof parts); }
};

#endif

}  // namespace packlight::linear
