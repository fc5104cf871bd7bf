// The threads of one parallel region, going through its stages together.
//
// Work of a stage is dealt out run by run, so a thread that the system put aside delays the others by one run. The
// barrier between stages spins a moment, because the next stage is microseconds away, and then offers its core to
// whoever wants it: OpenMP's own would put the thread to sleep (OMP_WAIT_POLICY=PASSIVE), tens of microseconds each.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include <omp.h>

namespace packlight::linear {

constexpr int kMaxStages = 16, kRunsPerThread = 6, kSpins = 400;

inline void pause_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Team {
  std::atomic<int64_t> dealt[kMaxStages] = {};
  std::atomic<int> arrived{0}, round{0};
};

// One thread's view of the team.
class Worker {
 public:
  explicit Worker(Team& team) : team_(team), size_(omp_get_num_threads()) {}

  int thread() const { return omp_get_thread_num(); }

  // `work(i, next)` for every i below `count`; returns when all of them are done. Dealt in runs. `next` is what this
  // thread works on after i, or -1.
  template <class Work>
  void each(int64_t count, Work&& work) {
    const int64_t grain = std::max<int64_t>(1, count / (kRunsPerThread * size_));
    std::atomic<int64_t>& dealt = team_.dealt[stage_++];
    for (int64_t first = dealt.fetch_add(grain, std::memory_order_relaxed), next; first < count; first = next) {
      const int64_t last = std::min(first + grain, count);
      for (int64_t i = first; i + 1 < last; ++i) work(i, i + 1);
      next = dealt.fetch_add(grain, std::memory_order_relaxed);
      work(last - 1, next < count ? next : -1);
    }
    wait();
  }

 private:
  void wait() {
    const int round = team_.round.load(std::memory_order_acquire);
    if (team_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      team_.arrived.store(0, std::memory_order_relaxed);
      team_.round.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; team_.round.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        pause_a_little();
      } else {
        std::this_thread::yield();
      }
    }
  }

  Team& team_;
  const int size_;
  int stage_ = 0;
};

// Runs `stages(worker)` on `num_threads` threads.
template <class Stages>
void together(int num_threads, Stages&& stages) {
  Team team;
#pragma omp parallel num_threads(num_threads)
  {
    Worker worker(team);
    stages(worker);
  }
}

}  // namespace packlight::linear
