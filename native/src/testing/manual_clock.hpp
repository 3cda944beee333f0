// A clock that stands still until the test moves it.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/clock.hpp"

namespace fc::testing {

// Threads: any.
class ManualClock final : public Clock {
 public:
  static constexpr std::uint64_t kTickMs = std::uint64_t{1} << kTickShift;

  explicit ManualClock(std::uint64_t start_ms = 1'000'000) : now_ms_(start_ms) {}
  std::uint64_t now_ms() const noexcept override { return now_ms_.load(std::memory_order_relaxed); }
  void advance(std::uint64_t ms) noexcept { now_ms_.fetch_add(ms, std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> now_ms_;
};

}  // namespace fc::testing
