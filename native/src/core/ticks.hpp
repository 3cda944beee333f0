// The clock of an engine in ticks.
#pragma once

#include "core/clock.hpp"

namespace fc {

// Threads: any.
class Ticks {
 public:
  // Tick 0 is "never": a new cache starts a little above it.
  static constexpr Tick kFirst = 1024 >> kTickShift;
  // From here on 32 bits might not last: 3.2 years since the cache was new. It starts anew then.
  static constexpr Tick kLast = 0xC0000000;

  explicit Ticks(const Clock& clock) noexcept : Ticks(clock, base_ms(clock.now_ms(), kFirst)) {}
  // `base_ms`: when tick 0 was, on the clock; may have been before that began.
  Ticks(const Clock& clock, std::uint64_t base_ms) noexcept : clock_(clock), base_ms_(base_ms) {}

  static std::uint64_t base_ms(std::uint64_t now_ms, Tick tick) noexcept {
    return now_ms - (std::uint64_t{tick} << kTickShift);
  }
  static std::uint64_t at(std::uint64_t now_ms, std::uint64_t base_ms) noexcept {
    return (now_ms - base_ms) >> kTickShift;
  }
  std::uint64_t clock_ms() const noexcept { return clock_.now_ms(); }
  Tick now() const noexcept { return static_cast<Tick>(at(clock_.now_ms(), base_ms_)); }

 private:
  const Clock& clock_;
  const std::uint64_t base_ms_;
};

}  // namespace fc
