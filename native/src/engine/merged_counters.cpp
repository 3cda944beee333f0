#include "engine/merged_counters.hpp"

#include <algorithm>
#include <array>

namespace fc {

bool gauge_is_common(std::string_view name) noexcept {
  constexpr std::array<std::string_view, 7> kCommon{
      "feature_cache_domain_ttl_seconds", "feature_cache_nvm_device_in_service",
      "feature_cache_nvm_device_info",    "feature_cache_nvm_durability_info",
      "feature_cache_nvm_journal_failed", "feature_cache_nvm_region_bytes",
      "feature_cache_segment_bytes",
  };
  return std::find(kCommon.begin(), kCommon.end(), name) != kCommon.end();
}

MergedCounters::Row& MergedCounters::row(Kind kind, std::string_view name, std::string_view help,
                                         Labels labels, bool& fresh) {
  std::string key(name);
  for (const Label& label : labels) {
    key.append(1, '\0').append(label.name).append(1, '\0').append(label.value);
  }
  const auto [place, added] = places_.emplace(std::move(key), rows_.size());
  fresh = added;
  if (!added) return rows_[place->second];
  Row& made = rows_.emplace_back();
  made.kind = kind;
  made.name = name;
  made.help = help;
  for (const Label& label : labels) made.labels.emplace_back(label.name, label.value);
  return made;
}

void MergedCounters::counter(std::string_view name, std::string_view help, Labels labels,
                             std::uint64_t value) {
  bool fresh = false;
  row(Kind::Counter, name, help, labels, fresh).count += value;
}

void MergedCounters::gauge(std::string_view name, std::string_view help, Labels labels,
                           double value) {
  bool fresh = false;
  Row& of = row(Kind::Gauge, name, help, labels, fresh);
  if (fresh) {
    of.value = value;
  } else if (gauge_is_common(name)) {
    of.value = std::max(of.value, value);
  } else {
    of.value += value;
  }
}

void MergedCounters::histogram(std::string_view name, std::string_view help, Labels labels,
                               std::span<const double> bounds,
                               std::span<const std::uint64_t> counts, double sum) {
  bool fresh = false;
  Row& of = row(Kind::Histogram, name, help, labels, fresh);
  if (fresh) {
    of.bounds.assign(bounds.begin(), bounds.end());
    of.counts.resize(counts.size());
  }
  const std::size_t common = std::min(of.counts.size(), counts.size());
  for (std::size_t i = 0; i < common; ++i) of.counts[i] += counts[i];
  of.value += sum;
}

void MergedCounters::visit(CounterVisitor& visitor) const {
  std::vector<Label> labels;
  for (const Row& row : rows_) {
    labels.clear();
    for (const auto& [name, value] : row.labels) labels.push_back({name, value});
    switch (row.kind) {
      case Kind::Counter:
        visitor.counter(row.name, row.help, labels, row.count);
        break;
      case Kind::Gauge:
        visitor.gauge(row.name, row.help, labels, row.value);
        break;
      case Kind::Histogram:
        visitor.histogram(row.name, row.help, labels, row.bounds, row.counts, row.value);
        break;
    }
  }
}

}  // namespace fc
