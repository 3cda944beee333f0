// The clock of an engine in ticks since shortly before its start.
#pragma once

#include "core/clock.hpp"

namespace fc {

// Threads: any.
class Ticks {
 public:
  explicit Ticks(const Clock& clock) noexcept : clock_(clock), started_ms_(clock.now_ms()) {}
  Tick now() const noexcept {
    return static_cast<Tick>((clock_.now_ms() - started_ms_ + kEpochMs) >> kTickShift);
  }

 private:
  static constexpr std::uint64_t kEpochMs = 1024;  // tick 0 is "never": start above it

  const Clock& clock_;
  const std::uint64_t started_ms_;
};

}  // namespace fc
