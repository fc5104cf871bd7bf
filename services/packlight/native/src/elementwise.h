// What a layer does to one token besides multiplying: norm, rotary embedding, gate. In float32, rounded once.

#pragma once

#include <cmath>

#include "linear_lanes.h"

namespace packlight::linear {

// e^x to 2e-7 relative, for x of any size: 2^n e^r with |r| <= ln 2 / 2, and the Taylor series of e^r to the 7th power.
inline float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

// RMSNorm (arXiv 1910.07467). `in` may be `out`.
inline void rms_norm(const uint16_t* in, const float* weight, int64_t count, float epsilon, uint16_t* out) {
  constexpr int64_t kChains = 16;  // sums side by side: the compiler may not reorder a single one
  float sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t j = 0; j < kChains; ++j) sums[j] += to_float(in[i + j]) * to_float(in[i + j]);
  }
  float total = 0;
  for (; i < count; ++i) total += to_float(in[i]) * to_float(in[i]);
  for (float sum : sums) total += sum;
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(count) + epsilon);
  for (i = 0; i < count; ++i) out[i] = to_bf16(to_float(in[i]) * scale * weight[i]);
}

// Rotary embedding (arXiv 2104.09864) of one head: element i turns with element i + half, as in Hugging Face models.
inline void rotate(const uint16_t* in, const float* cosines, const float* sines, int64_t half, uint16_t* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float x = to_float(in[i]), y = to_float(in[half + i]);
    out[i] = to_bf16(x * cosines[i] - y * sines[i]);
    out[half + i] = to_bf16(y * cosines[i] + x * sines[i]);
  }
}

}  // namespace packlight::linear
