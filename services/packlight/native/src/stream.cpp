// Reading memory as fast as it goes. See packlight/native/stream.py.

#include "packlight.h"

namespace {

constexpr size_t kLine = 64, kWords = 8, kPrefetchLines = 16;
constexpr size_t kRuns = 4;  // read side by side: a core has not enough requests of its own under way to read one alone

uint64_t sum_lines(const uint64_t* words, size_t num_lines) {
  const size_t run = num_lines / kRuns;
  uint64_t sums[kRuns][kWords] = {};
  for (size_t line = 0; line < run; ++line) {
    for (size_t part = 0; part < kRuns; ++part) {
      const uint64_t* from = words + (part * run + line) * kWords;
      __builtin_prefetch(from + kPrefetchLines * kWords, 0, 0);
      for (size_t i = 0; i < kWords; ++i) sums[part][i] += from[i];
    }
  }
  uint64_t total = 0;
  for (auto& chain : sums) {
    for (uint64_t sum : chain) total += sum;
  }
  for (size_t i = kRuns * run * kWords; i < num_lines * kWords; ++i) total += words[i];
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
