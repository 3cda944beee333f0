// The leaves of a cluster as a root sees them: how busy each is, which fail, who serves a shard.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/counter.hpp"
#include "feature_cache/cluster.hpp"
#include "feature_cache/leaf_link.hpp"

namespace fc {

// One leaf, over all maps that name it. Thread-safe.
//
// A leaf whose calls fail is avoided for a while, which doubles with each failure; then one batch
// may try it again.
class Leaf {
 public:
  Leaf(std::string name, std::string address, std::shared_ptr<LeafLink> link)
      : name_(std::move(name)), address_(std::move(address)), link_(std::move(link)) {}

  const std::string& name() const noexcept { return name_; }
  const std::string& address() const noexcept { return address_; }
  LeafLink& link() noexcept { return *link_; }

  // Keys that it was asked for and has not answered.
  std::uint64_t outstanding() const noexcept {
    return outstanding_.load(std::memory_order_relaxed);
  }
  void asked(std::uint64_t keys) noexcept;
  void answered(std::uint64_t keys, std::uint64_t now_ns, bool failed) noexcept;
  // Whether a batch may choose it; true once when the time to avoid it is over.
  bool try_use(std::uint64_t now_ns) noexcept;
  bool avoided(std::uint64_t now_ns) const noexcept {
    return now_ns < avoid_until_ns_.load(std::memory_order_relaxed);
  }
  void visit(CounterVisitor& visitor, std::uint64_t now_ns) const;

 private:
  static constexpr std::uint64_t kFirstPauseNs = 50'000'000;
  static constexpr unsigned kPausesMost = 6;  // doublings

  const std::string name_;
  const std::string address_;
  const std::shared_ptr<LeafLink> link_;
  std::atomic<std::uint64_t> outstanding_{0};
  std::atomic<std::uint32_t> failures_{0};  // in a row
  std::atomic<std::uint64_t> avoid_until_ns_{0};
  Counter calls_;
  Counter keys_;
  Counter failed_;
};

// A map with its leaves. Immutable but for what the leaves count.
struct RoutedMap {
  ShardMap map;
  std::vector<std::shared_ptr<Leaf>> leaves;  // as map.leaves
};

class LeafSet {
 public:
  explicit LeafSet(std::shared_ptr<LeafConnector> connector);

  // Leaves that were there already keep their connection and what is known of them. An older map
  // than the one in use is ignored.
  void set(ShardMap map);
  // Never null; without shards until the first set().
  std::shared_ptr<const RoutedMap> map() const;
  void told(std::uint64_t version) noexcept;
  std::uint64_t newest() const noexcept { return newest_.load(std::memory_order_relaxed); }
  // Ends all calls.
  void close() { connector_->close(); }
  void visit(CounterVisitor& visitor) const;

 private:
  const std::shared_ptr<LeafConnector> connector_;
  std::atomic<std::uint64_t> newest_{0};
  mutable std::mutex mutex_;
  std::shared_ptr<const RoutedMap> map_;  // guarded by mutex_
};

// Which leaf a batch asks for a key: of the replicas that are online and were not tried, the one
// with the least outstanding work, this batch's own share included; one that fails is chosen only
// when there is no other. For one batch and one thread.
class ReplicaChooser {
 public:
  static constexpr std::uint32_t kNone = ~0u;

  ReplicaChooser(const RoutedMap& routed, std::uint64_t now_ns)
      : routed_(routed), now_ns_(now_ns), leaves_(routed.leaves.size()) {}

  // `tried`: leaves of this map. Counts the key to the leaf that it returns.
  std::uint32_t choose(std::uint32_t shard, std::span<const std::uint32_t> tried);

 private:
  enum class Use : std::uint8_t { Unknown, Yes, Avoid };
  struct Seen {
    std::uint64_t load = 0;
    Use use = Use::Unknown;
  };
  Seen& seen(std::uint32_t leaf);

  const RoutedMap& routed_;
  const std::uint64_t now_ns_;
  std::vector<Seen> leaves_;
};

// Permits of which a share comes with every first request, with some in hand. Thread-safe.
class ShareBudget {
 public:
  ShareBudget(double share, std::uint32_t in_hand)
      : share_(static_cast<std::int64_t>(share * kUnit)), most_(in_hand * kUnit), left_(most_) {}

  void earn() noexcept {
    if (left_.load(std::memory_order_relaxed) < most_) {
      left_.fetch_add(share_, std::memory_order_relaxed);
    }
  }
  bool take() noexcept {
    if (share_ == 0) return false;
    std::int64_t left = left_.load(std::memory_order_relaxed);
    while (left >= kUnit) {
      if (left_.compare_exchange_weak(left, left - kUnit, std::memory_order_relaxed)) return true;
    }
    return false;
  }

 private:
  static constexpr std::int64_t kUnit = 1'000'000;
  const std::int64_t share_;
  const std::int64_t most_;
  std::atomic<std::int64_t> left_;
};

}  // namespace fc
