// What a leaf answers for, and what was written to it of late.
//
// Reads and writes go by an immutable view, and writes hold on to theirs until they are done: set()
// returns only when no write is under way that found a shard still owned, so what is dropped
// afterwards stays dropped. No lock is held meanwhile: writes that never cease must not keep a new
// view from coming.
//
// The log of recent writes is for a replica that was away: it asks its peers which keys it may have
// missed, and drops those. Bounded in bytes: who was away for longer than the log reaches back has
// to drop its shards.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/clock.hpp"
#include "core/counter.hpp"
#include "core/hash.hpp"
#include "feature_cache/cluster.hpp"
#include "feature_cache/config.hpp"
#include "feature_cache/types.hpp"

namespace fc {

class RecentWriteLog {
 public:
  explicit RecentWriteLog(std::uint64_t bytes_most)
      : bytes_most_(bytes_most), since_ms_(boot_now_ms()) {}

  void add(NamespaceIndex ns, std::string_view key, std::uint64_t high);
  // What was added in the last `age_ms`; `columns` is by namespace. False: it does not reach back
  // that far.
  bool since(std::uint64_t age_ms, std::uint32_t shard_count, const std::vector<bool>& shards,
             std::vector<RecentWrites::Column>& columns) const;
  std::size_t size() const;
  static std::uint64_t boot_now_ms();

 private:
  struct Entry {
    std::uint64_t at_ms;
    std::uint64_t high;  // of the key's hash
    NamespaceIndex ns;
    std::string key;
  };
  static std::uint64_t bytes_of(const Entry& entry) noexcept {
    return sizeof(Entry) + entry.key.capacity();
  }

  const std::uint64_t bytes_most_;
  mutable std::mutex mutex_;
  std::deque<Entry> entries_;  // guarded by mutex_, as what follows
  std::uint64_t bytes_ = 0;
  std::uint64_t since_ms_;  // all that came later is here
};

class LeafShards {
 public:
  // Immutable.
  struct View {
    static constexpr std::uint64_t kNotOwned = ~std::uint64_t{0};
    std::uint64_t version = 0;
    std::vector<std::uint64_t> written_since;   // by shard; kNotOwned where it is not this leaf's
    std::vector<std::uint64_t> owned_since_ms;  // by shard: from then on without a break
    std::vector<std::uint8_t> readable;         // by shard
    std::uint32_t owned = 0;

    std::uint32_t shard_count() const noexcept {
      return static_cast<std::uint32_t>(written_since.size());
    }
    // Whether the leaf was told of all writes of `shard` in the last `age_ms`.
    bool owned_for(std::uint32_t shard, std::uint64_t age_ms) const noexcept {
      return shard < written_since.size() && written_since[shard] != kNotOwned &&
             owned_since_ms[shard] + age_ms <= RecentWriteLog::boot_now_ms();
    }
    // Before the first set() nothing is owned.
    bool owns(std::uint64_t high) const noexcept {
      return !written_since.empty() && written_since[shard_of(high, shard_count())] != kNotOwned;
    }
    bool reads(std::uint64_t high) const noexcept {
      return !readable.empty() && readable[shard_of(high, shard_count())] != 0;
    }
    // Whether a write by map `version` (0: by none) reaches all replicas.
    bool takes_write(std::uint64_t high, std::uint64_t by_version) const noexcept {
      return owns(high) &&
             (by_version == 0 || by_version >= written_since[shard_of(high, shard_count())]);
    }
  };

  explicit LeafShards(const LeafConfig& config) : log(config.write_log_bytes) {}

  std::shared_ptr<const View> view() const {
    const std::lock_guard lock(mutex_);
    return view_;
  }
  // Throws std::invalid_argument for shards that contradict themselves.
  void set(const OwnedShards& owned);
  // Of the newest view by which, or by a newer one, all writes go: those by older ones have ended,
  // and are in the log.
  std::uint64_t settled_version() const noexcept {
    return settled_version_.load(std::memory_order_acquire);
  }
  void visit(CounterVisitor& visitor) const;

  RecentWriteLog log;
  Counter wrong_shard;     // cells of reads
  Counter writes_refused;  // keys

 private:
  std::mutex set_mutex_;  // one set() at a time
  std::atomic<std::uint64_t> settled_version_{0};
  mutable std::mutex mutex_;
  std::shared_ptr<const View> view_ = std::make_shared<View>();  // guarded by mutex_
};

}  // namespace fc
