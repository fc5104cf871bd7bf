// Reading memory as fast as it goes. See packlight/native/stream.py.

#include "packlight.h"

namespace {

constexpr size_t kLine = 64, kWords = 8, kPrefetchLines = 24;

uint64_t sum_lines(const uint64_t* words, size_t num_lines) {
  uint64_t sums[4][kWords] = {};  // four independent chains of sums hide the latency of each
  size_t line = 0;
  for (; line + 4 <= num_lines; line += 4) {
    for (size_t part = 0; part < 4; ++part) {
      const uint64_t* from = words + (line + part) * kWords;
      __builtin_prefetch(from + kPrefetchLines * kWords, 0, 0);
      for (size_t i = 0; i < kWords; ++i) sums[part][i] += from[i];
    }
  }
  for (; line < num_lines; ++line) {
    for (size_t i = 0; i < kWords; ++i) sums[0][i] += words[line * kWords + i];
  }
  uint64_t total = 0;
  for (auto& chain : sums) {
    for (uint64_t sum : chain) total += sum;
  }
  return total;
}

}  // namespace

uint64_t packlight_stream_read(const void* memory, size_t num_bytes, int num_threads) {
  const auto* words = static_cast<const uint64_t*>(memory);
  const size_t num_lines = num_bytes / kLine;
  uint64_t total = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(+ : total)
  for (int thread = 0; thread < num_threads; ++thread) {
    const size_t first = num_lines * thread / num_threads, last = num_lines * (thread + 1) / num_threads;
    total += sum_lines(words + first * kWords, last - first);
  }
  return total;
}
