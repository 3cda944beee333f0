// What the native tests share: configs in few words, one key at a time over the batch calls, and
// counters as a map.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/engine.hpp"

namespace fc::testing {

inline constexpr std::uint64_t kKiB = 1024;
inline constexpr std::uint64_t kMiB = 1024 * kKiB;

// The seed of a random test: its own, or FC_TEST_SEED to repeat a failure. Printed when it fails.
inline std::uint64_t seed_of(std::uint64_t fallback) {
  const char* given = std::getenv("FC_TEST_SEED");
  const std::uint64_t seed = given == nullptr ? fallback : std::strtoull(given, nullptr, 0);
  std::cout << "FC_TEST_SEED=" << seed << std::endl;
  return seed;
}

// Repetitions of a loop, fewer where the thread sanitizer makes each cost ten times as much.
constexpr std::size_t scaled(std::size_t repetitions) {
#if defined(FC_TSAN)
  return repetitions / 5;
#else
  return repetitions;
#endif
}

inline DomainConfig domain(std::string name, std::uint64_t budget_bytes,
                           PolicyKind policy = PolicyKind::S3Fifo, std::uint64_t ttl_ms = 0,
                           double ttl_jitter = 0.0) {
  DomainConfig config;
  config.name = std::move(name);
  config.budget_bytes = budget_bytes;
  config.policy = policy;
  config.ttl_ms = ttl_ms;
  config.ttl_jitter = ttl_jitter;
  return config;
}

inline NamespaceConfig name_space(std::string name, std::vector<DomainConfig> domains) {
  NamespaceConfig config;
  config.name = std::move(name);
  config.default_domain = domains.front().name;
  config.domains = std::move(domains);
  return config;
}

// An engine of small segments, so that little data makes it seal, evict and compact.
inline EngineConfig engine_config(std::uint64_t memory_bytes,
                                  std::vector<NamespaceConfig> namespaces) {
  EngineConfig config;
  config.memory_bytes = memory_bytes;
  config.segment_bytes = 16 * kKiB;
  config.expected_item_bytes = 64;
  config.huge_pages = false;
  config.namespaces = std::move(namespaces);
  return config;
}

// What became of one key.
struct Got {
  CellStatus status = CellStatus::Unspecified;
  std::string value;
  std::optional<Token> token;  // when absent
  bool refresh = false;
  std::optional<Token> refresh_token;
};

inline std::vector<Got> get_all(Engine& engine, NamespaceIndex ns,
                                const std::vector<std::string_view>& keys,
                                std::uint64_t max_value_bytes = ~0ull, bool quiet = false) {
  std::vector<CellStatus> statuses(keys.size());
  std::vector<std::uint32_t> lengths(keys.size(), 0xEEEEEEEE);
  Buffer values;
  std::vector<Absent> absent;
  std::vector<Absent> refresh;
  GetColumn column;
  column.ns = ns;
  column.keys = keys;
  column.statuses = statuses;
  column.lengths = lengths;
  column.values = &values;
  column.max_value_bytes = max_value_bytes;
  column.quiet = quiet;
  column.absent = &absent;
  column.refresh = &refresh;
  engine.get(column);
  std::vector<Got> got(keys.size());
  std::size_t at = 0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    got[i].status = statuses[i];
    if (carries_value(statuses[i])) {
      EXPECT_LE(at + lengths[i], values.size());
      got[i].value.assign(reinterpret_cast<const char*>(values.data()) + at, lengths[i]);
      at += lengths[i];
    } else {
      EXPECT_EQ(lengths[i], 0U) << "a cell without a value has a length";
    }
  }
  EXPECT_EQ(at, values.size()) << "the lengths do not add up to the values";
  std::uint32_t last = 0;
  for (const Absent& cell : absent) {
    EXPECT_EQ(got[cell.position].status, CellStatus::Miss);
    EXPECT_GE(cell.position, last) << "absent keys come in key order";
    last = cell.position;
    got[cell.position].token = cell.token;
  }
  for (const Absent& cell : refresh) {
    EXPECT_TRUE(carries_value(got[cell.position].status));
    got[cell.position].refresh = true;
    got[cell.position].refresh_token = cell.token;
  }
  for (const Got& cell : got) {
    EXPECT_EQ(cell.status == CellStatus::Miss, cell.token.has_value());
  }
  return got;
}

inline Got get(Engine& engine, NamespaceIndex ns, std::string_view key) {
  return get_all(engine, ns, {key}).front();
}

inline WriteStatus put(Engine& engine, NamespaceIndex ns, const PutItem& item) {
  WriteStatus status = WriteStatus::Unspecified;
  engine.put(ns, {&item, 1}, {&status, 1});
  return status;
}

inline WriteStatus put(Engine& engine, NamespaceIndex ns, std::string_view key,
                       std::string_view value, DomainIndex to = kNoDomain,
                       std::uint64_t ttl_ms = 0) {
  PutItem item;
  item.key = key;
  item.value = value;
  item.domain = to;
  item.ttl_ms = ttl_ms;
  return put(engine, ns, item);
}

inline WriteStatus erase(Engine& engine, NamespaceIndex ns, std::string_view key) {
  WriteStatus status = WriteStatus::Unspecified;
  engine.erase(ns, {&key, 1}, {&status, 1});
  return status;
}

inline InstallStatus install(Engine& engine, NamespaceIndex ns, const PutItem& item, Token token) {
  InstallStatus status = InstallStatus::Rejected;
  engine.install(ns, {&item, 1}, {&token, 1}, {&status, 1});
  return status;
}

inline InstallStatus install(Engine& engine, NamespaceIndex ns, std::string_view key,
                             std::string_view value, Token token) {
  PutItem item;
  item.key = key;
  item.value = value;
  return install(engine, ns, item, token);
}

// All counters and gauges, by "name" or "name{label=value,...}".
class Counters final : public CounterVisitor {
 public:
  template <class Source>
  static Counters of(const Source& source) {
    Counters counters;
    source.visit(counters);
    return counters;
  }

  void counter(std::string_view name, std::string_view, Labels labels,
               std::uint64_t value) override {
    add(name, labels, static_cast<double>(value));
  }
  void gauge(std::string_view name, std::string_view, Labels labels, double value) override {
    add(name, labels, value);
  }
  void histogram(std::string_view name, std::string_view, Labels labels, std::span<const double>,
                 std::span<const std::uint64_t> counts, double) override {
    std::uint64_t sum = 0;
    for (const std::uint64_t count : counts) sum += count;
    add(name, labels, static_cast<double>(sum));
  }

  double at(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) {
      ADD_FAILURE() << "no counter " << name;
      return -1;
    }
    return found->second;
  }
  double domain(const std::string& what, const std::string& ns, const std::string& name) const {
    return at("feature_cache_domain_" + what + "{namespace=" + ns + ",domain=" + name + "}");
  }
  // The sum over all label values.
  double sum(std::string_view name) const {
    double total = 0;
    for (const auto& [key, value] : values_) {
      if (key == name || (key.starts_with(name) && key[name.size()] == '{')) total += value;
    }
    return total;
  }

 private:
  void add(std::string_view name, Labels labels, double value) {
    std::string key(name);
    for (std::size_t i = 0; i < labels.size(); ++i) {
      key += i == 0 ? '{' : ',';
      key.append(labels[i].name).append("=").append(labels[i].value);
    }
    if (!labels.empty()) key += '}';
    EXPECT_TRUE(values_.emplace(key, value).second) << key << " is shown twice";
  }
  std::map<std::string, double> values_;
};

// A value of `bytes` that tells key, version and every place in it apart.
inline std::string patterned(std::string_view key, std::uint64_t version, std::size_t bytes) {
  std::string value(bytes, '\0');
  std::uint64_t state = version * 0x9E3779B97F4A7C15ull + 1;
  for (const char c : key) {
    state = (state ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  }
  for (std::size_t i = 0; i < bytes; ++i) {
    if (i % 8 == 0) state = state * 6364136223846793005ull + 1442695040888963407ull;
    value[i] = static_cast<char>(state >> (8 * (i % 8)));
  }
  return value;
}

}  // namespace fc::testing
