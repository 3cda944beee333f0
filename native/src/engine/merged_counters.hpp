// The counters of several instances as those of one node: what has one name and one set of labels
// adds up.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/counters.hpp"

namespace fc {

// Whether a gauge is one number of all instances (a size of segments, a flag), of which the largest
// is shown, and not a share of the node's.
bool gauge_is_common(std::string_view name) noexcept;

// Visits instances one after the other, then hands on what they add up to, in the order in which it
// was first seen. One thread.
class MergedCounters final : public CounterVisitor {
 public:
  void counter(std::string_view name, std::string_view help, Labels labels,
               std::uint64_t value) override;
  void gauge(std::string_view name, std::string_view help, Labels labels, double value) override;
  void histogram(std::string_view name, std::string_view help, Labels labels,
                 std::span<const double> bounds, std::span<const std::uint64_t> counts,
                 double sum) override;

  void visit(CounterVisitor& visitor) const;

 private:
  enum class Kind : std::uint8_t { Counter, Gauge, Histogram };
  struct Row {
    Kind kind;
    std::string name;
    std::string help;
    std::vector<std::pair<std::string, std::string>> labels;
    std::uint64_t count = 0;
    double value = 0;  // of a histogram: its sum
    std::vector<double> bounds;
    std::vector<std::uint64_t> counts;
  };

  // The row of that name and those labels; `fresh`: it is new.
  Row& row(Kind kind, std::string_view name, std::string_view help, Labels labels, bool& fresh);

  std::vector<Row> rows_;
  std::map<std::string, std::size_t> places_;
};

}  // namespace fc
