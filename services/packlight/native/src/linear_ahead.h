// Weights on their way from memory while others are multiplied.
//
// Knows stretches of memory. Does not know what lies there.
//
// A core that reads one stretch after the other waits for memory: it has few requests of its own under way. Its second
// cache has many more, but follows a stretch only up to the next 4 KiB. Asked for sixteen stretches in turn it follows
// them all, and one thread reads half as much again.

#pragma once

#include <algorithm>
#include <cstdint>

namespace packlight::linear {

class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* memory, int64_t num_bytes) : at_(static_cast<const char*>(memory)), left_(num_bytes) { begin(); }

  // As many bytes more, in whole lines.
  void fetch(int64_t num_bytes) {
    for (; num_bytes > 0 && left_ > 0; num_bytes -= kLineBytes, left_ -= kLineBytes) {
      __builtin_prefetch(at_ + stretch_ * kStretch + line_, 0, 2);  // into the second-level cache
      if (++stretch_ < num_stretches_) continue;
      stretch_ = 0;
      line_ += kLineBytes;
      if (line_ == kStretch) at_ += num_stretches_ * kStretch, begin();
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64, kStretch = 4096, kMostStretches = 16;

  // What is left and shorter than a stretch comes last, line by line.
  void begin() {
    stretch_ = line_ = 0;
    num_stretches_ = std::clamp<int64_t>(left_ / kStretch, 1, kMostStretches);
  }

  const char* at_ = nullptr;
  int64_t left_ = 0, num_stretches_ = 1, stretch_ = 0, line_ = 0;
};

}  // namespace packlight::linear
