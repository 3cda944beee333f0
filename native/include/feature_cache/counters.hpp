// How rooms show their counters: each visits its own, nobody keeps a registry.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>

namespace fc {

struct Label {
  std::string_view name;
  std::string_view value;
};
using Labels = std::span<const Label>;

class CounterVisitor {
 public:
  virtual ~CounterVisitor() = default;
  virtual void counter(std::string_view name, std::string_view help, Labels labels,
                       std::uint64_t value) = 0;
  virtual void gauge(std::string_view name, std::string_view help, Labels labels, double value) = 0;
  // `bounds` in seconds; `counts` has one more entry, the overflow; `sum` in seconds.
  virtual void histogram(std::string_view name, std::string_view help, Labels labels,
                         std::span<const double> bounds, std::span<const std::uint64_t> counts,
                         double sum) = 0;
};

}  // namespace fc
