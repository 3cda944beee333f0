// A node: engine, single-flight table and store queues of one process, behind the request path.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/buffer.hpp"
#include "feature_cache/cluster.hpp"
#include "feature_cache/config.hpp"
#include "feature_cache/counters.hpp"
#include "feature_cache/fetch.hpp"
#include "feature_cache/recovery.hpp"
#include "feature_cache/types.hpp"

namespace fc {

// How a call ended; the numbers are gRPC's status codes.
struct CallStatus {
  enum Code : int {
    Ok = 0,
    InvalidArgument = 3,
    NotFound = 5,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Unavailable = 14,
  };
  int code = Ok;
  std::string message;
  bool ok() const noexcept { return code == Ok; }
};

// The bytes of a request and whatever keeps them alive.
struct RequestBytes {
  std::span<const std::uint8_t> bytes;
  std::shared_ptr<const void> owner;
};

// A reply is a row of buffers to be sent one after the other.
using ReplyDone = std::function<void(CallStatus, std::vector<Buffer>)>;

// A key that a warm-up wants in the cache.
struct WarmKey {
  NamespaceIndex ns = kNoNamespace;
  DomainIndex domain = kNoDomain;  // that its value enters; kNoDomain: as of any fetched value
  std::string_view key;
  std::uint8_t asked = 1;  // how often, as far as is known; see PutItem
};
// What became of each key, in their order: HitDram, HitNvm or NotFound where the cache knew
// already (as far as the index tells), Fetched or NotFound where the store said so, Miss without a
// store, WrongShard, or how the fetch failed.
using WarmDone = std::function<void(std::span<const CellStatus>)>;

// What another node wants to copy.
struct CopyWanted {
  struct Domain {
    std::string ns;
    std::string name;
  };
  std::vector<Domain> domains;        // in a batch an item's domain is its place here
  std::uint32_t shard_count = 0;      // of a cluster, with
  std::vector<std::uint32_t> shards;  // those whose items are wanted; empty: all
  std::uint64_t map_version = 0;      // of a leaf: it must go by this shard map, or a newer one
};
// What a node has of one eviction domain.
struct ItemTotals {
  std::string ns;
  std::string domain;
  std::uint64_t items = 0;
  std::uint64_t bytes = 0;
  std::uint64_t ttl_ms = 0;            // as configured; 0: no expiry
  std::uint64_t mean_ttl_left_ms = 0;  // of some of its items; 0: they do not expire
};

struct ScanBatch;
struct ScanFilter;
class Engine;
class LeafConnector;
class NvmDevice;

class Node {
 public:
  virtual ~Node() = default;

  // Serves an encoded BatchGetRequest. `done` is called once: before this returns when nothing has
  // to be read from NVM or fetched, else from a thread of the node, at the deadline at the latest.
  // `timeout_ms` 0: no deadline, the namespaces' fetch timeouts bound the wait, stores or none.
  virtual void batch_get(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) = 0;
  // The same for an encoded BatchPutRequest or BatchDeleteRequest. Only a root waits: for its
  // leaves.
  virtual void batch_put(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) = 0;
  virtual void batch_delete(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) = 0;

  // Fetches those of `keys` that are absent, after everything else that waits for a store; they are
  // not counted as asked. `done` is called once, as batch_get()'s; `timeout_ms` must not be 0.
  // `owner` keeps the keys alive.
  virtual void warm(std::vector<WarmKey> keys, std::shared_ptr<const void> owner,
                    std::uint64_t timeout_ms, WarmDone done) = 0;
  // Says of each key whether the cache knows its value now, or that there is none: 1, else 0.
  virtual void held(std::span<const WarmKey> keys, std::span<std::uint8_t> held) = 0;

  // Of items for another node: what a scan for `wanted` is to look for, once; and then their next
  // part, as Engine::scan(). A leaf gives shards that it may be read of, and no others.
  virtual CallStatus begin_copy(const CopyWanted& wanted, ScanFilter& filter) = 0;
  virtual CallStatus copy_items(const CopyWanted& wanted, const ScanFilter& filter,
                                std::uint64_t& cursor, std::size_t bytes, ScanBatch& batch) = 0;
  // By namespace and domain, as configured. Looks at some thousand items.
  virtual std::vector<ItemTotals> item_totals() = 0;

  // Misses for `store`, waiting for them; null when there are none within `wait_ms`, when the
  // store's concurrency is used up, or after stop().
  virtual std::shared_ptr<FetchBatch> take_fetch(std::string_view store, std::uint64_t wait_ms) = 0;
  virtual bool has_store(std::string_view store) const noexcept = 0;

  // ---- of a root
  // Routes by `map` from now on, unless it is older than the one there is. Throws
  // std::invalid_argument for a map that contradicts itself.
  virtual void set_shard_map(ShardMap map) = 0;
  // The newest map version that a leaf told of: what is newer than the node's own is worth asking
  // for.
  virtual std::uint64_t newest_map_version() const noexcept = 0;

  // ---- of a leaf
  // Answers for these shards from now on; keys of all others are WRONG_SHARD. Returns when no write
  // is under way any more that began before.
  virtual void set_owned(OwnedShards owned) = 0;
  // The keys of `shards` that were put or deleted in the last `age_ms`, for a replica that was
  // away.
  virtual RecentWrites recent_writes(std::uint32_t shard_count,
                                     std::span<const std::uint32_t> shards,
                                     std::uint64_t age_ms) const = 0;

  virtual Engine& engine() noexcept = 0;
  virtual const NodeConfig& config() const noexcept = 0;
  virtual void visit(CounterVisitor& visitor) const = 0;
  // Answers what waits with TIMED_OUT and wakes every take_fetch. Idempotent.
  virtual void stop() = 0;
  // stop(), then the engine's shutdown(); no request may come any more. Idempotent: says again what
  // it said first.
  virtual bool shutdown() = 0;
};

// `devices` and `progress` as in make_engine(); a root needs `leaves`.
std::unique_ptr<Node> make_node(const NodeConfig& config,
                                std::vector<std::shared_ptr<NvmDevice>> devices = {},
                                RecoveryProgress* progress = nullptr,
                                std::shared_ptr<LeafConnector> leaves = nullptr);

}  // namespace fc
