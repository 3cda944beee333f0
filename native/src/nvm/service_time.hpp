// How busy a device is, so that a late read can be told from one that had to wait.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fc::nvm {

// How long the device needs for one read when it has many: the smallest mean interval between
// completions of late windows. What a read waits for those before it is this times their number;
// a device that has become slow must not raise it at once, or nothing would ever be late.
class ServiceTime {
 public:
  void completed(std::size_t reads, std::size_t in_flight_before, std::uint64_t now_ns) noexcept {
    if (in_flight_before >= kBusy && busy_since_ns_ != 0) {
      reads_ += reads;
    } else {
      busy_since_ns_ = now_ns;
      reads_ = 0;
    }
    if (reads_ < kReads) return;
    window(static_cast<std::uint64_t>((now_ns - busy_since_ns_) / reads_));
    busy_since_ns_ = now_ns;
    reads_ = 0;
  }
  std::uint64_t ns() const noexcept { return best_; }

 private:
  static constexpr std::size_t kBusy = 8;
  static constexpr std::uint64_t kReads = 256;
  static constexpr std::uint64_t kMostNs = 100'000;
  static constexpr std::size_t kWindows = 256;

  void window(std::uint64_t interval_ns) noexcept {
    least_ = std::min(least_, interval_ns);
    best_ = std::min({best_ == 0 ? kMostNs : best_, interval_ns, kMostNs});
    if (++windows_ < kWindows) return;
    best_ = std::min(least_, kMostNs);
    least_ = ~0ull;
    windows_ = 0;
  }

  std::uint64_t busy_since_ns_ = 0;
  std::uint64_t reads_ = 0;
  std::uint64_t best_ = 0;
  std::uint64_t least_ = ~0ull;
  std::size_t windows_ = 0;
};

}  // namespace fc::nvm
