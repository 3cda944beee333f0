// Time as the cache counts it.
#pragma once

#include <cstdint>

namespace fc {

// Milliseconds that go on counting while the machine sleeps (CLOCK_BOOTTIME), so that a TTL means
// what it says after a suspend.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual std::uint64_t now_ms() const noexcept = 0;
};

class BootClock final : public Clock {
 public:
  std::uint64_t now_ms() const noexcept override;
};

// Nanoseconds for measuring durations (CLOCK_MONOTONIC).
std::uint64_t monotonic_ns() noexcept;

// Expiry is kept in ticks of 32 ms in 32 bits: 4.3 years from the engine's start.
using Tick = std::uint32_t;
inline constexpr unsigned kTickShift = 5;
inline constexpr Tick kNever = 0;

}  // namespace fc
