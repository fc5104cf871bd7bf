// Quantised panels written out in bfloat16.
//
// The earlier and the later weight of a column lie apart, so that a pair is put together without moving anything
// sideways: bfloat16 is the upper half of a float. A line is two weights of sixteen columns.

#pragma once

#include "linear_lanes.h"

namespace packlight::linear {

constexpr int kScalesAhead = 1024;  // elements: they come beside the codes, which are fetched block by block
constexpr uint32_t kUpper = 0xffff0000u, kHalfStep = 0x8000;  // of the last place that bfloat16 keeps

#if PACKLIGHT_LEVEL >= 2

inline __m512i floats_of_int8(const int8_t* codes) {
  const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return _mm512_castps_si512(_mm512_cvtepi32_ps(values));
}

inline __m512 floats_of_bf16(const uint16_t* from) {
  const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}

inline void unpack_int8_line(const int8_t* codes, uint16_t* out) {
  const __m512i early = floats_of_int8(codes), late = floats_of_int8(codes + kPanel);
  _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(early, 16), late));
}

struct Group {
  __m512 scale, least;
  explicit Group(const uint16_t* scales) : scale(floats_of_bf16(scales)), least(floats_of_bf16(scales + kPanel)) {}

  __m512i weights(__m512i codes) const {
    const __m512 values = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, least);
    return _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(kHalfStep));
  }

  void unpack_line(const uint8_t* codes, uint16_t* out) const {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i early = weights(_mm512_and_si512(both, _mm512_set1_epi32(15)));
    const __m512i late = weights(_mm512_srli_epi32(both, 4));
    const __m512i upper = _mm512_and_si512(late, _mm512_set1_epi32(static_cast<int>(kUpper)));
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(early, 16), upper));
  }
};

#else

inline void unpack_int8_line(const int8_t* codes, uint16_t* out) {
  uint32_t pairs[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    pairs[i] = bits_of(static_cast<float>(codes[i])) >> 16 | bits_of(static_cast<float>(codes[kPanel + i]));
  }
  std::memcpy(out, pairs, sizeof pairs);
}

struct Group {
  float scale[kPanel], least[kPanel];
  explicit Group(const uint16_t* scales) {
    for (int i = 0; i < kPanel; ++i) {
      scale[i] = to_float(scales[i]);
      least[i] = to_float(scales[kPanel + i]);
    }
  }

  void unpack_line(const uint8_t* codes, uint16_t* out) const {
    uint32_t pairs[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      const float early = static_cast<float>(codes[i] & 15) * scale[i] + least[i];
      const float late = static_cast<float>(codes[i] >> 4) * scale[i] + least[i];
      pairs[i] = (bits_of(early) + kHalfStep) >> 16 | ((bits_of(late) + kHalfStep) & kUpper);
    }
    std::memcpy(out, pairs, sizeof pairs);
  }
};

#endif

// `codes`: [num_lines][2][16]. Seven bits are exact in bfloat16; the scale comes at the end.
PACKLIGHT_ONCE inline void unpack_int8(const int8_t* codes, int64_t num_lines, uint16_t* out) {
  for (int64_t line = 0; line < num_lines; ++line, codes += kLine, out += kLine) {
    unpack_int8_line(codes, out);
  }
}

// One group: 16 lines of 16 bytes, the earlier weight of a column in the lower half of its byte. `scales`: bfloat16, a
// scale of each column and then a least value of each.
PACKLIGHT_ONCE inline void unpack_int4(const uint8_t* codes, const uint16_t* scales, uint16_t* out) {
  const Group group(scales);
  __builtin_prefetch(scales + kScalesAhead);
  for (int line = 0; line < kLinesPerTile; ++line, codes += kPanel, out += kLine) {
    group.unpack_line(codes, out);
  }
}

// The tiles of a block, one at a time: where it lies, or unpacked into a little room of its own, which stays in the
// first-level cache. For a few rows: memory, unpacking and multiplying then overlap. `kStepBytes` is what both panels'
// tiles of a k take in memory.
struct Bf16Tiles {
  static constexpr int64_t kStepBytes = 4 * kTileSize;
  const uint16_t* block;
  const uint16_t* operator()(int panel, int64_t k) const { return block + kBlock * k + panel * kTileSize; }
};

struct Int8Tiles {
  static constexpr int64_t kStepBytes = 2 * kTileSize;
  const int8_t* block;
  alignas(64) uint16_t room[2][kTileSize];
  explicit Int8Tiles(const int8_t* from) : block(from) {}
  const uint16_t* operator()(int panel, int64_t k) {
    unpack_int8(block + kBlock * k + panel * kTileSize, kLinesPerTile, room[panel]);
    return room[panel];
  }
};

struct Int4Tiles {
  static constexpr int64_t kStepBytes = kTileSize;
  const uint8_t* block;
  const uint16_t* scales;
  alignas(64) uint16_t room[2][kTileSize];
  Int4Tiles(const uint8_t* from, const uint16_t* groups) : block(from), scales(groups) {}
  const uint16_t* operator()(int panel, int64_t k) {
    const int64_t tile = 2 * (k / kTileDepth) + panel;
    unpack_int4(block + tile * kTileSize / 2, scales + tile * 2 * kPanel, room[panel]);
    return room[panel];
  }
};

}  // namespace packlight::linear
