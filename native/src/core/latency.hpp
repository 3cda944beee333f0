// What an answer usually takes, so that a late one can be told.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

namespace fc {

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

}  // namespace fc
