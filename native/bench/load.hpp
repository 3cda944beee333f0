// What benchmark programs ask for: keys, skews, batches, rates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

#include "core/clock.hpp"
#include "feature_cache/engine.hpp"

namespace fc::bench {

inline constexpr std::size_t kKeyBytes = 16;
inline constexpr std::size_t kBatch = 1000;

struct Key {
  char bytes[kKeyBytes];
  std::string_view view() const noexcept { return {bytes, sizeof(bytes)}; }
};

// Spread ids like real ones: neighbours in rank are not neighbours in memory.
inline Key key_of(std::uint64_t id) {
  Key key;
  const std::uint64_t mixed = id * 0x9E3779B97F4A7C15ull;
  std::memcpy(key.bytes, &mixed, 8);
  std::memcpy(key.bytes + 8, &id, 8);
  return key;
}

// Zipf by rejection inversion (Hoermann and Derflinger, 1996).
class Zipf {
 public:
  Zipf(std::uint64_t items, double exponent) : items_(items), s_(exponent) {
    low_ = integral(1.5) - 1.0;
    high_ = integral(static_cast<double>(items) + 0.5);
    cut_ = 2.0 - inverse(integral(2.5) - std::pow(2.0, -s_));
  }
  template <class Rng>
  std::uint64_t operator()(Rng& rng) {
    std::uniform_real_distribution<double> uniform(low_, high_);
    for (;;) {
      const double u = uniform(rng);
      const double x = inverse(u);
      const double k = std::floor(x + 0.5);
      if (k - x <= cut_ || u >= integral(k + 0.5) - std::pow(k, -s_)) {
        return std::min<std::uint64_t>(static_cast<std::uint64_t>(k), items_) - 1;
      }
    }
  }

 private:
  double integral(double x) const { return (std::pow(x, 1.0 - s_) - 1.0) / (1.0 - s_); }
  double inverse(double y) const { return std::pow(1.0 + y * (1.0 - s_), 1.0 / (1.0 - s_)); }
  std::uint64_t items_;
  double s_;
  double low_;
  double high_;
  double cut_;
};

struct Batch {
  explicit Batch(std::size_t size) : keys(size), statuses(size), lengths(size) {}

  GetColumn column() {
    values.clear();
    GetColumn column;
    column.ns = 0;
    column.keys = keys;
    column.statuses = statuses;
    column.lengths = lengths;
    column.values = &values;
    return column;
  }
  std::size_t count(CellStatus status) const {
    return static_cast<std::size_t>(std::count(statuses.begin(), statuses.end(), status));
  }

  std::vector<std::string_view> keys;
  std::vector<CellStatus> statuses;
  std::vector<std::uint32_t> lengths;
  Buffer values;
};

struct Rate {
  double per_second;
  double hit_share;
};

// Runs `batch(keys)` over a stream until the time is up.
template <class F>
Rate measure(const std::vector<Key>& stream, double seconds, F&& answer) {
  const std::uint64_t start = monotonic_ns();
  const auto limit = static_cast<std::uint64_t>(seconds * 1e9);
  std::uint64_t done = 0;
  std::uint64_t hits = 0;
  std::uint64_t elapsed = 0;
  std::size_t at = 0;
  while (elapsed < limit) {
    hits += answer(&stream[at]);
    done += kBatch;
    at = at + 2 * kBatch > stream.size() ? 0 : at + kBatch;
    elapsed = monotonic_ns() - start;
  }
  return {static_cast<double>(done) * 1e9 / static_cast<double>(elapsed),
          static_cast<double>(hits) / static_cast<double>(done)};
}

// The `q` quantile of `values`, which it sorts; 0 when there are none.
inline double quantile(std::vector<double>& values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto at = static_cast<std::size_t>(q * static_cast<double>(values.size()));
  return values[std::min(at, values.size() - 1)];
}

}  // namespace fc::bench
