// Which domain a value enters when neither the caller nor the store says: the first rule that
// holds, by key prefix or by how often the key was asked, else the namespace's default.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "eviction/sketch.hpp"
#include "feature_cache/types.hpp"

namespace fc {

class Router {
 public:
  struct Rule {
    std::string prefix;
    std::uint32_t asked_at_least = 0;
    DomainIndex domain = kNoDomain;
  };

  // `items`: keys that the sketch should tell apart; used when a rule counts.
  Router(std::vector<Rule> rules, DomainIndex fallback, std::uint64_t items)
      : rules_(std::move(rules)), fallback_(fallback) {
    for (const Rule& rule : rules_) counts_ |= rule.asked_at_least != 0;
    if (counts_) sketch_ = std::make_unique<FrequencySketch>(items);
  }

  // The domain for a value that arrives now; `times` it was asked, the miss that fetched it
  // included.
  DomainIndex route(std::string_view key, std::uint64_t hash, unsigned times) {
    if (rules_.empty()) return fallback_;
    unsigned asked = 0;
    if (counts_) {
      const std::lock_guard lock(mutex_);
      sketch_->add(hash, times);
      asked = sketch_->estimate(hash);
    }
    for (const Rule& rule : rules_) {
      if (key.starts_with(rule.prefix) && asked >= rule.asked_at_least) return rule.domain;
    }
    return fallback_;
  }
  // Hits that an item collected while it was cached; told when it is judged or leaves.
  void asked(std::uint64_t hash, unsigned times) {
    if (!counts_ || times == 0) return;
    const std::lock_guard lock(mutex_);
    sketch_->add(hash, times);
  }
  DomainIndex fallback() const noexcept { return fallback_; }
  bool counts() const noexcept { return counts_; }
  std::size_t memory_bytes() const noexcept { return counts_ ? sketch_->memory_bytes() : 0; }

 private:
  const std::vector<Rule> rules_;
  const DomainIndex fallback_;
  bool counts_ = false;
  std::mutex mutex_;
  std::unique_ptr<FrequencySketch> sketch_;  // guarded by mutex_
};

}  // namespace fc
