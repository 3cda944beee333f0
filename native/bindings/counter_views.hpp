// What a CounterVisitor is shown, kept: as Python sees counters, gauges and histograms.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/counters.hpp"

namespace fc::bindings {

struct SampleView {
  std::string name;
  std::string help;
  std::string kind;
  std::map<std::string, std::string> labels;
  double value = 0;
};

struct HistogramView {
  std::string name;
  std::string help;
  std::map<std::string, std::string> labels;
  std::vector<double> bounds;
  std::vector<std::uint64_t> counts;
  double sum = 0;
};

class Collector final : public CounterVisitor {
 public:
  void counter(std::string_view name, std::string_view help, Labels labels,
               std::uint64_t value) override {
    samples.push_back({std::string(name), std::string(help), "counter", to_map(labels),
                       static_cast<double>(value)});
  }
  void gauge(std::string_view name, std::string_view help, Labels labels, double value) override {
    samples.push_back({std::string(name), std::string(help), "gauge", to_map(labels), value});
  }
  void histogram(std::string_view name, std::string_view help, Labels labels,
                 std::span<const double> bounds, std::span<const std::uint64_t> counts,
                 double sum) override {
    histograms.push_back({std::string(name),
                          std::string(help),
                          to_map(labels),
                          {bounds.begin(), bounds.end()},
                          {counts.begin(), counts.end()},
                          sum});
  }

  std::vector<SampleView> samples;
  std::vector<HistogramView> histograms;

 private:
  static std::map<std::string, std::string> to_map(Labels labels) {
    std::map<std::string, std::string> map;
    for (const Label& label : labels) map.emplace(label.name, label.value);
    return map;
  }
};

}  // namespace fc::bindings
