// Which keys a warm-up asks for, and in which order: the keys of any number of request logs, each
// once, the most valuable first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "feature_cache/node.hpp"
#include "feature_cache/request_log.hpp"

namespace fc {

// Threads: one at a time.
class WarmPlan {
 public:
  struct Domain {
    std::string name;
    std::uint64_t ttl_ms = 0;  // 0: no expiry
  };
  struct Namespace {
    std::string name;
    std::vector<Domain> domains;
    std::uint32_t default_domain = 0;  // where values go that nobody hints
    DomainIndex first_domain = 0;      // the engine's number of domains[0]
    bool fetchable = true;             // it has a store
  };
  // What became of the keys of one log: all of them are counted once.
  struct Added {
    std::uint64_t keys = 0;
    std::uint64_t new_keys = 0;  // distinct ones that the plan did not have
    std::uint64_t unknown_namespace = 0;
    std::uint64_t not_fetchable = 0;
    std::uint64_t hashed = 0;
    std::uint64_t not_owned = 0;
    std::uint64_t over_limit = 0;  // of keys beyond `max_keys`
  };

  // `namespaces` in the engine's order. At most `max_keys` distinct keys are kept.
  WarmPlan(std::vector<Namespace> namespaces, std::uint64_t max_keys);
  ~WarmPlan();
  WarmPlan(const WarmPlan&) = delete;
  WarmPlan& operator=(const WarmPlan&) = delete;

  // Keys of these shards alone enter from now on. Throws std::invalid_argument for one beyond
  // `shard_count`.
  void own(std::uint32_t shard_count, std::span<const std::uint32_t> shards);
  // Adds the keys of a file; what they count is multiplied by `weight`. What stood before a fault
  // stays in the plan.
  [[nodiscard]] LogFault add(std::span<const std::uint8_t> file, double weight, Added& added);
  // Takes keys out that will not be asked for: those of a domain, or those that `held` says are
  // there; returns how many. Their weight stays part of total_weight().
  std::uint64_t drop_domain(NamespaceIndex ns, std::uint32_t domain);
  using Held = std::function<void(std::span<const WarmKey>, std::span<std::uint8_t>)>;
  std::uint64_t drop_held(const Held& held);
  // By weight, then by TTL, the largest first; domains with a TTL below `realtime_ttl_ms` come
  // last, so that they are fresh. take() goes through the keys in this order, from the first.
  void order(std::uint64_t realtime_ttl_ms);
  // The next keys, at most so many. The views live as long as the plan.
  std::vector<WarmKey> take(std::size_t most);
  // Puts a key that was taken at the end again; false when that was done twice already.
  bool again(const WarmKey& key);

  std::uint64_t keys() const noexcept;       // distinct ones that are, or were, to be asked for
  std::uint64_t keys_left() const noexcept;  // that take() has not given yet
  double total_weight() const noexcept;      // of all that was added
  // The share of total_weight() that `held` says is there: of all keys, or of `sample` of them that
  // are chosen evenly by weight.
  double held_share(const Held& held, std::size_t sample) const;

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace fc
