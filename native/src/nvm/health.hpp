// Whether a device is in service.
//
// Errors and damaged records count against it, good requests for it, one error as much as
// kWorth good ones: a device that fails now and then stays, one that fails again and again leaves.
// It comes back when a probe finds it well; what it held by then is gone (writes went on without
// it).
#pragma once

#include <atomic>
#include <cstdint>

#include "core/counter.hpp"

namespace fc::nvm {

// Threads: any.
class DeviceHealth {
 public:
  explicit DeviceHealth(std::uint32_t errors_max) noexcept : limit_(errors_max * kWorth) {}

  bool in_service() const noexcept { return in_service_.load(std::memory_order_acquire); }
  void good() noexcept {
    if (score_.load(std::memory_order_relaxed) > 0) {
      score_.fetch_sub(1, std::memory_order_relaxed);
    }
  }
  // True when this error takes the device out of service.
  bool bad() noexcept {
    const std::int64_t before = score_.fetch_add(kWorth, std::memory_order_relaxed);
    if (before + kWorth < limit_) return false;
    if (!in_service_.exchange(false, std::memory_order_acq_rel)) return false;
    outages.add();
    return true;
  }
  void back() noexcept {
    score_.store(0, std::memory_order_relaxed);
    in_service_.store(true, std::memory_order_release);
  }

  Counter reads;
  Counter read_bytes;
  Counter writes;
  Counter written_bytes;
  Counter read_errors;
  Counter write_errors;
  Counter outages;
  Counter probes;

 private:
  static constexpr std::int64_t kWorth = 64;

  const std::int64_t limit_;
  std::atomic<std::int64_t> score_{0};
  std::atomic<bool> in_service_{true};
};

}  // namespace fc::nvm
