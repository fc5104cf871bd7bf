// Online softmax (arXiv 1805.02867) over transposed scores: tokens go down, rows of attention lie side by side in lanes.
//
// Knows scores, weights and running sums. Does not know where scores come from. Each lane is a row of its own: what
// happens in it does not depend on its neighbours.

#pragma once

#include "prefill_attention_products.h"

namespace packlight::prefill {

// What a hidden score becomes, and where a running maximum starts: far enough apart, and from every real score, for
// weights of hidden tokens to be exactly 0 even where a row has seen nothing else. Finite: no infinity minus infinity.
constexpr float kHidden = -1e30f, kLowest = -1e20f;

constexpr int kBetween = 8;  // tokens that are weighed at a stretch, before something else gets its turn

// Up to `kLanes` rows of a strip: pointers into arrays whose rows are strips.
struct Softmax {
  float* scores;           // [tokens][strip]
  const int32_t* position; // of each row's own token
  float *highest, *sum;    // running, per row
};

// 2^x for x <= 0 to about 1e-7, or to 3e-6 where a bf16 takes the result. Huge negative numbers give 0, NaN stays.
// The lower end of each unit interval comes out exactly, so 2^0 is 1: a maximum that stays rescales nothing.
template <class Element>
inline Lanes weight(Lanes x) {
#if PACKLIGHT_LEVEL >= 2
  constexpr int kDownwards = 0x09;  // round down, quietly
  const Lanes part = (Lanes)_mm512_reduce_ps((__m512)x, kDownwards);
  Lanes power;
  if constexpr (sizeof(Element) == sizeof(float)) {
    power = part * 0.000216129285f + 0.00124678429f;
    power = power * part + 0.00967545191f;
    power = power * part + 0.0554852805f;
    power = power * part + 0.240229306f;
    power = power * part + 0.693147044f;
  } else {
    power = part * 0.0134267009f + 0.0522424475f;
    power = power * part + 0.241280217f;
    power = power * part + 0.693044843f;
  }
  return (Lanes)_mm512_scalef_ps((__m512)(power * part + 1.0f), (__m512)x);
#else
  return exp2(x);
#endif
}

// Weights of the tokens t and t + 1, stored as the second product's right operand takes them.
inline void store_weights(float* to, Lanes even, Lanes odd) {
  store(to, even);
  store(to + kStripRows, odd);
}

#if PACKLIGHT_LEVEL >= 3
inline void store_weights(Bf16* to, Lanes even, Lanes odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i interleave = (__m512i)(BitLanes{0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006,
                                               0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d,
                                               0x1e000e, 0x1f000f});
  store(to, _mm512_permutexvar_epi16(interleave, halves));
}
#endif

// Hides the scores of tokens `first` .. `last` that a row may not see; `first_token` is where scores[0] stands.
inline void hide(const Softmax& rows, int first, int last, int64_t first_token, int64_t window) {
  const IntLanes position = load<IntLanes>(rows.position) - int32_t(first_token);
  const int32_t reach = window > 0 && window < INT32_MAX ? int32_t(window) : INT32_MAX;
  for (int token = first; token < last; ++token) {
    float* at = rows.scores + token * kStripRows;
    const IntLanes age = position - token;
    store(at, (age >= 0) & (age < reach) ? load(at) : all_lanes(kHidden));
  }
}

inline Lanes highest_score(const Softmax& rows, int first, int last) {
  Lanes best[4];  // chains of their own hide the latency of each
  for (auto& lanes : best) lanes = load(rows.highest);
  for (int token = first; token < last; token += 4) {
    for (int i = 0; i < 4; ++i) best[i] = larger(best[i], load(rows.scores + (token + i) * kStripRows));
  }
  return larger(larger(best[0], best[1]), larger(best[2], best[3]));
}

// Turns scores into weights, 2^(factor * (score - highest)), and brings the running state up to date. Returns by what
// the rows' older sums, and their outputs, are to be multiplied. `weights` may lie where the scores do. `meanwhile` is
// called every kBetween tokens: this is all arithmetic, and leaves the ways to memory idle.
template <class Math, class Meanwhile>
inline Lanes weigh(const Softmax& rows, int first, int last, float factor, typename Math::Element* weights,
                   Meanwhile& meanwhile) {
  using Element = typename Math::Element;
  const Lanes highest = highest_score(rows, first, last), shift = highest * factor;
  // Not by `shift`, which is rounded: where the highest score stays, nothing may be rescaled.
  const Lanes scale = weight<float>((load(rows.highest) - highest) * factor);
  Lanes even_sum{}, odd_sum{};
  for (int token = first; token < last; token += 2) {
    const float* at = rows.scores + token * kStripRows;
    const Lanes even = weight<Element>(load(at) * factor - shift);
    const Lanes odd = weight<Element>(load(at + kStripRows) * factor - shift);
    even_sum += even;
    odd_sum += odd;
    store_weights(weights + token * kStripRows, even, odd);
    if (token % kBetween == 0) meanwhile();
  }
  store(rows.highest, highest);
  store(rows.sum, load(rows.sum) * scale + (even_sum + odd_sum));
  return scale;
}

}  // namespace packlight::prefill
