// Relaxed counters and latency histograms: cheap to bump, read by a visitor.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

#include "feature_cache/counters.hpp"

namespace fc {

class Counter {
 public:
  void add(std::uint64_t by = 1) noexcept { value_.fetch_add(by, std::memory_order_relaxed); }
  void sub(std::uint64_t by = 1) noexcept { value_.fetch_sub(by, std::memory_order_relaxed); }
  std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

// Latencies from 8 µs to about 17 s in powers of two.
class LatencyHistogram {
 public:
  static constexpr std::size_t kBounds = 22;

  void record_ns(std::uint64_t ns) noexcept {
    const std::uint64_t units = (ns + kUnitNs - 1) / kUnitNs;
    const auto bucket = static_cast<std::size_t>(units <= 1 ? 0 : std::bit_width(units - 1));
    counts_[bucket < kBounds ? bucket : kBounds].add();
    sum_ns_.add(ns);
  }
  void visit(CounterVisitor& visitor, std::string_view name, std::string_view help,
             Labels labels) const {
    std::array<double, kBounds> bounds{};
    std::array<std::uint64_t, kBounds + 1> counts{};
    for (std::size_t i = 0; i < kBounds; ++i) {
      bounds[i] = static_cast<double>(kUnitNs << i) * 1e-9;
    }
    for (std::size_t i = 0; i <= kBounds; ++i) counts[i] = counts_[i].get();
    visitor.histogram(name, help, labels, bounds, counts,
                      static_cast<double>(sum_ns_.get()) * 1e-9);
  }

 private:
  static constexpr std::uint64_t kUnitNs = 8192;
  std::array<Counter, kBounds + 1> counts_;
  Counter sum_ns_;
};

}  // namespace fc
