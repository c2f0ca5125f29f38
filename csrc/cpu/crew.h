// Threads that work through a sequence of steps together.
//
// A parallel region of OpenMP for each step costs more than a small step does: the threads are woken for it, and all of them must
// come to its end, also one that does not run because another process has its core. In a crew, every thread runs the whole
// program. A step consists of items, which the threads take one by one; it ends when its items are done, whoever did them. So a
// thread that comes late finds steps that are over, and the others wait for it only while it has an item in its hands.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace alignpro {

class Crew {
 public:
  // Calls program(crew) on `threads` threads at most. All must call the same steps in the same order, with equal items. What
  // work throws is thrown again at the end; the rest of the program runs before, on whatever values there are.
  template <typename Program>
  static void run(int64_t threads, const Program& program) {
    Shared shared(threads);
    if (threads <= 1) {
      Crew crew(shared);
      program(crew);
    } else {
      at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const at::AutoDispatchBelowAutograd no_autograd;  // of this thread
        Crew crew(shared);
        program(crew);
      });
    }
    if (shared.error) std::rethrow_exception(shared.error);
  }

  // A step: work(begin, end) for ranges that make up [0, count). All that it wrote is visible to every thread afterwards.
  template <typename Work>
  void ranges(int64_t count, const Work& work) {
    if (count == 0) return;
    if (alone_) return work(int64_t{0}, count);
    const uint32_t step = step_++;
    uint64_t next = shared_.next.load(std::memory_order_acquire);
    while (step_of(next) == step) {
      const int64_t begin = static_cast<uint32_t>(next), left = count - begin;
      if (left == 0) return wait(step);
      // Large ranges, whose items are neighbours in memory, and small ones in the end, so that all threads end at the same time.
      const int64_t size = std::max<int64_t>(1, left / (2 * shared_.threads));
      if (!shared_.next.compare_exchange_weak(next, next + size, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      attempt([&] { work(begin, begin + size); });
      if (shared_.done.fetch_add(size, std::memory_order_acq_rel) + size == count) return finish(step);
      next = shared_.next.load(std::memory_order_acquire);
    }
  }

  // A step: work(i) for 0 <= i < count.
  template <typename Work>
  void each(int64_t count, const Work& work) {
    ranges(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i);
    });
  }

 private:
  struct Shared {
    explicit Shared(int64_t threads) : threads(threads) {}
    const int64_t threads;
    alignas(64) std::atomic<uint64_t> next{0};  // the present step in the upper half, its next item in the lower one
    alignas(64) std::atomic<int64_t> done{0};   // items of the present step
    alignas(64) std::atomic<uint32_t> finished{0};  // steps
    std::atomic<bool> failed{false};
    std::exception_ptr error;
  };

  explicit Crew(Shared& shared) : shared_(shared), alone_(shared.threads <= 1) {}

  static uint32_t step_of(uint64_t next) { return static_cast<uint32_t>(next >> 32); }

  template <typename Work>
  void attempt(const Work& work) {
    try {
      work();
    } catch (...) {
      if (!shared_.failed.exchange(true)) shared_.error = std::current_exception();
    }
  }

  void finish(uint32_t step) {
    shared_.done.store(0, std::memory_order_relaxed);
    shared_.next.store(static_cast<uint64_t>(step + 1) << 32, std::memory_order_release);
    shared_.finished.store(step + 1, std::memory_order_release);
    shared_.finished.notify_all();
  }

  // Items take some ten microseconds. Who waits for longer waits for a thread that has lost its core, and gives up its own.
  void wait(uint32_t step) const {
    constexpr int spins = 1000;
    for (int i = 0; i < spins; ++i) {
      if (step_of(shared_.next.load(std::memory_order_acquire)) != step) return;
      pause();
    }
    shared_.finished.wait(step, std::memory_order_acquire);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Shared& shared_;
  bool alone_;
  uint32_t step_ = 0;
};

}  // namespace alignpro
