// A one-byte spin lock for critical sections of some tens of nanoseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace fc {

inline void cpu_relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class SpinLock {
 public:
  void lock() noexcept {
    for (unsigned spins = 0; !try_lock(); ++spins) {
      // The holder may have lost its processor: give it ours instead of burning it.
      if (spins < kSpinsBeforeYield) {
        cpu_relax();
      } else {
        std::this_thread::yield();
      }
    }
  }
  bool try_lock() noexcept {
    return flag_.load(std::memory_order_relaxed) == 0 &&
           flag_.exchange(1, std::memory_order_acquire) == 0;
  }
  void unlock() noexcept { flag_.store(0, std::memory_order_release); }

 private:
  static constexpr unsigned kSpinsBeforeYield = 64;
  std::atomic<std::uint8_t> flag_{0};
};
static_assert(sizeof(SpinLock) == 1);

}  // namespace fc
