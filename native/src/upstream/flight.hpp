// One fetch of one key, and who waits for it.
//
// A flight carries the token that its first asker took. It outlives its waiters' deadlines: the
// answer still enters the cache. A get that comes later joins only while the token is still the one
// it would take itself; after a put, delete or flush it starts a flight of its own ("A get that
// starts after an acknowledged write never joins an older flight").
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/counter.hpp"
#include "core/hash.hpp"
#include "feature_cache/fetch.hpp"
#include "feature_cache/types.hpp"

namespace fc {

class PendingGet;

struct Waiter {
  std::shared_ptr<PendingGet> get;
  std::uint32_t column;
  std::uint32_t position;
};

struct Flight {
  NamespaceIndex ns = kNoNamespace;
  DomainIndex domain_hint = kNoDomain;  // the caller's
  std::uint8_t asked = 1;               // how often before it was pushed, as far as is known
  std::string key;
  std::uint64_t hash = 0;
  Token token;
  FetchPriority priority = FetchPriority::Live;  // it was started with; fixed
  // Of the store's queue, guarded by its mutex: somebody who must not wait as long may raise it.
  FetchPriority line = FetchPriority::Live;
  bool queued = false;
  bool ended = false;           // guarded by the shard's mutex
  std::vector<Waiter> waiters;  // guarded by the shard's mutex
};
using FlightRef = std::shared_ptr<Flight>;

class FlightTable {
 public:
  enum class Joined : std::uint8_t { Existing, Started };

  // Joins the flight of the key or starts one. `waiter` may be null (nobody waits: a refresh); then
  // an existing flight answers Existing and nothing is added.
  Joined join(NamespaceIndex ns, std::string_view key, std::uint64_t hash, Token token,
              FetchPriority priority, const Waiter* waiter, FlightRef& flight);
  // Joins the flight of the key if there is one under this token; else null.
  FlightRef join_existing(NamespaceIndex ns, std::string_view key, std::uint64_t hash, Token token,
                          const Waiter& waiter);
  // Hands out who waits by now; the flight goes on, and who comes later joins it still.
  void take_waiters(const FlightRef& flight, std::vector<Waiter>& waiters);
  // Ends a flight: takes it out of the table and hands out who waits. False when it had ended.
  bool end(const FlightRef& flight, std::vector<Waiter>& waiters);
  // How many flights have ended. A key that was absent when this was read, and whose flight starts
  // while it still reads the same, cannot have been installed by a flight in between.
  std::uint64_t ended() const noexcept { return ended_.load(std::memory_order_seq_cst); }
  std::size_t size() const noexcept;

  Counter started;
  Counter joined;

 private:
  static constexpr std::size_t kShards = 64;

  struct KeyOf {
    NamespaceIndex ns;
    std::string_view key;  // into the flight
    std::uint64_t hash;
    friend bool operator==(const KeyOf& a, const KeyOf& b) noexcept {
      return a.ns == b.ns && a.key == b.key;
    }
  };
  struct HashOf {
    std::size_t operator()(const KeyOf& key) const noexcept { return key.hash; }
  };
  struct Shard {
    mutable std::mutex mutex;
    std::unordered_map<KeyOf, FlightRef, HashOf> flights;  // guarded by mutex
  };
  Shard& shard_of(std::uint64_t hash) noexcept { return shards_[(hash >> 40) % kShards]; }

  std::array<Shard, kShards> shards_;
  std::atomic<std::uint64_t> ended_{0};
};

}  // namespace fc
