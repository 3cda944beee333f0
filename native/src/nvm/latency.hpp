// What a read of a device usually takes, so that a late one can be told.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

namespace fc::nvm {

// Quantiles of recent latencies: log-linear buckets, eight an octave (an error of at most an
// eighth), halved after every kWindow records so that the past fades. One thread.
class RecentLatencies {
 public:
  void record(std::uint64_t ns) noexcept {
    ++counts_[bucket_of(ns)];
    if (++total_ < kWindow) return;
    total_ = 0;
    for (std::uint32_t& count : counts_) {
      count /= 2;
      total_ += count;
    }
  }
  // The upper end of the bucket in which the quantile lies; `fallback` before there is enough.
  std::uint64_t quantile(double q, std::uint64_t fallback) const noexcept {
    if (total_ < kEnough) return fallback;
    const double wanted = q * total_;
    double seen = 0;
    for (std::size_t i = 0; i < kBuckets; ++i) {
      seen += counts_[i];
      if (seen >= wanted) return upper_end(i);
    }
    return upper_end(kBuckets - 1);
  }

 private:
  static constexpr unsigned kShift = 12;  // 4 µs and less are one
  static constexpr unsigned kSteps = 8;
  static constexpr std::size_t kBuckets = 22 * kSteps;  // up to 16 s
  static constexpr std::uint32_t kWindow = 16384;
  static constexpr std::uint32_t kEnough = 512;

  static std::size_t bucket_of(std::uint64_t ns) noexcept {
    const std::uint64_t units = std::max<std::uint64_t>(ns >> (kShift - 3), kSteps);
    const auto octave = static_cast<unsigned>(std::bit_width(units)) - 4;
    const std::size_t step = (units >> octave) & (kSteps - 1);
    return std::min<std::size_t>(octave * kSteps + step, kBuckets - 1);
  }
  static std::uint64_t upper_end(std::size_t bucket) noexcept {
    const std::uint64_t octave = bucket / kSteps;
    return (kSteps + bucket % kSteps + 1) << (octave + kShift - 3);
  }

  std::array<std::uint32_t, kBuckets> counts_{};
  std::uint32_t total_ = 0;
};

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
