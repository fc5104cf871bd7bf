// Pages that lie in memory as records of integers: decoded to fp32 a block at a time, in the cache, as they are read.
//
// Knows the records of packlight/compress/codecs/kivi.py, which says what they are and where they come from:
//   K codes [P, D], V codes [P, D] (packed bits), K scale [D], K low [D], V scale [P, G], V low [P, G]
// where x = low + code * scale, both in fp16. Codes of 4 bits lie in 8 equal runs, of which each byte holds two.
//
// Legend: P page size, D head dim, G groups of channels of V.

#pragma once

#include "decode_split.h"

#if PACKLIGHT_LEVEL >= 1
#include <immintrin.h>
#endif

namespace packlight::decode {

// fp16, finite, as its bits. Behind the shift the exponent is 112 too small, whether it was normal or not.
inline float half_to_float(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t bits = (half & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  return half & 0x8000u ? -value : value;
}

// kLanes neighbours as wider integers. The compiler's own conversion of vectors goes number by number here.
#if PACKLIGHT_LEVEL >= 2
inline IntLanes load_bytes(const uint8_t* from) {
  return (IntLanes)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline BitLanes load_pairs(const uint8_t* from) {
  return (BitLanes)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Lanes to_floats(IntLanes x) { return _mm512_cvtepi32_ps((__m512i)x); }
#elif PACKLIGHT_LEVEL == 1
inline IntLanes load_bytes(const uint8_t* from) {
  return (IntLanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
inline BitLanes load_pairs(const uint8_t* from) {
  return (BitLanes)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Lanes to_floats(IntLanes x) { return _mm256_cvtepi32_ps((__m256i)x); }
#else
inline IntLanes load_bytes(const uint8_t* from) {
  return IntLanes{from[0], from[1], from[2], from[3]};
}
inline BitLanes load_pairs(const uint8_t* from) {
  uint16_t pairs[kLanes];
  std::memcpy(pairs, from, sizeof pairs);
  return BitLanes{pairs[0], pairs[1], pairs[2], pairs[3]};
}
inline Lanes to_floats(IntLanes x) { return __builtin_convertvector(x, Lanes); }
#endif

inline Lanes load_halves(const uint8_t* from) {
  const BitLanes halves = load_pairs(from);
  const Lanes sized = (Lanes)((halves & 0x7fffu) << 13) * 0x1p112f;
  return (Lanes)((BitLanes)sized | (halves & 0x8000u) << 16);
}

// Codes of kLanes neighbours of a run: in bytes of which each holds others besides, above or below.
inline Lanes load_codes(const uint8_t* from, int shift, int mask) {
  return to_floats(load_bytes(from) >> shift & mask);
}

// The pages of one KV head in a coded pool. `states` says of each page whether it is coded (negative), or else at which
// place of the open store, which holds pages of T, it lies.
template <class T>
struct CodedPagesOf {
  const uint8_t* records;
  int64_t record_bytes;
  const int32_t* states;
  const T* k_open;
  const T* v_open;
  int bits, value_group;
  const int32_t* ids;
  int page_size, head_dim;
};

template <class T>
class CodedPages {
 public:
  explicit CodedPages(const CodedPagesOf<T>& pages)
      : p_(pages), codes_bytes_(p_.page_size * p_.head_dim / 8 * p_.bits), share_(bytes_per_block()) {}

  void read(int at, Chunk<float>& chunk) {
    for (int block = 0; block * kBlockTokens < chunk.last; ++block) {
      const int token = at + block * kBlockTokens, first = token % p_.page_size;
      const int32_t page = p_.ids[token / p_.page_size], state = p_.states[page];
      float* k = k_ + block * kBlockTokens * p_.head_dim;
      float* v = v_ + block * kBlockTokens * p_.head_dim;
      chunk.k[block] = k;
      chunk.v[block] = v;
      if (state >= 0) {
        const int64_t row = int64_t{state} * p_.page_size + first;
        copy_open(p_.k_open + row * p_.head_dim, k);
        copy_open(p_.v_open + row * p_.head_dim, v);
      } else {
        const uint8_t* record = p_.records + page * p_.record_bytes;
        decode_keys(record, first, k);
        decode_values(record, first, v);
      }
    }
  }

  // A page's blocks share its record; which of them asks for which part of it does not matter.
  void look(int at, int num_tokens, Ahead& ahead) const {
    ahead.num_bytes = share_ / 2;
    ahead.num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
    for (int block = 0; block < ahead.num_blocks; ++block) {
      const int token = at + block * kBlockTokens;
      const uint8_t* record = p_.records + p_.ids[token / p_.page_size] * p_.record_bytes;
      ahead.k[block] = reinterpret_cast<const char*>(record) + token % p_.page_size / kBlockTokens * share_;
      ahead.v[block] = ahead.k[block] + ahead.num_bytes;
    }
  }

 private:
  int bytes_per_block() const {
    return round_up(int(p_.record_bytes * kBlockTokens / p_.page_size), 2 * kBlockTokens);
  }

  void copy_open(const T* from, float* to) const {
    for (int i = 0; i < kBlockTokens * p_.head_dim; ++i) to[i] = to_float(from[i]);
  }

  // Where the codes of a token start, and by how much they are shifted.
  const uint8_t* codes(const uint8_t* field, int token, int& shift) const {
    if (p_.bits == 8) {
      shift = 0;
      return field + token * p_.head_dim;
    }
    const int run_tokens = p_.page_size / 8, run = token / run_tokens;
    shift = run % 2 * 4;
    return field + (run / 2 * run_tokens + token % run_tokens) * p_.head_dim;
  }

  // Each channel has a range of its own.
  void decode_keys(const uint8_t* record, int first, float* to) const {
    const uint8_t* scales = record + 2 * codes_bytes_;
    const uint8_t* lows = scales + 2 * p_.head_dim;
    const int head_dim = p_.head_dim, mask = (1 << p_.bits) - 1;
    alignas(64) float scale[kMaxDim], low[kMaxDim];
    for (int d = 0; d < head_dim; d += kLanes) {
      store(scale + d, load_halves(scales + 2 * d));
      store(low + d, load_halves(lows + 2 * d));
    }
    for (int t = 0; t < kBlockTokens; ++t, to += head_dim) {
      int shift;
      const uint8_t* from = codes(record, first + t, shift);
      for (int d = 0; d < head_dim; d += kLanes) {
        store(to + d, load(low + d) + load_codes(from + d, shift, mask) * load(scale + d));
      }
    }
  }

  // Each token has a range for every `value_group` channels.
  void decode_values(const uint8_t* record, int first, float* to) const {
    const int num_groups = p_.head_dim / p_.value_group, mask = (1 << p_.bits) - 1;
    const uint8_t* scales = record + 2 * codes_bytes_ + 4 * p_.head_dim;
    const uint8_t* lows = scales + 2 * p_.page_size * num_groups;
    for (int t = 0; t < kBlockTokens; ++t) {
      int shift;
      const uint8_t* from = codes(record + codes_bytes_, first + t, shift);
      for (int group = 0; group < num_groups; ++group) {
        const int range = 2 * ((first + t) * num_groups + group), start = group * p_.value_group;
        const Lanes scale = all_lanes(half_to_float(scales + range)), low = all_lanes(half_to_float(lows + range));
        for (int d = start; d < start + p_.value_group; d += kLanes) {
          store(to + t * p_.head_dim + d, low + load_codes(from + d, shift, mask) * scale);
        }
      }
    }
  }

  const CodedPagesOf<T> p_;
  const int codes_bytes_, share_;
  alignas(64) float k_[kChunkTokens * kMaxDim];
  alignas(64) float v_[kChunkTokens * kMaxDim];
};

}  // namespace packlight::decode
