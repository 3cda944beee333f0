// The node: decode → engine → single flight → store queues → encode.
//
// A BatchGet that is answered from DRAM ends in the caller's thread. Cells on NVM are read by the
// engine (nvm_reads.hpp hears of them); absent keys join flights (node_fetches.cpp).
//
// When a flight has ended since the lookup, the flights that were started look into the engine once
// more before they are queued (the one that ended may have been theirs): concurrent misses of a key
// cost one fetch.
#pragma once

#include <atomic>
#include <mutex>
#include <unordered_map>

#include "core/clock.hpp"
#include "feature_cache/engine.hpp"
#include "feature_cache/node.hpp"
#include "request_log/recorder.hpp"
#include "upstream/deadlines.hpp"
#include "upstream/flight.hpp"
#include "upstream/leaf_shards.hpp"
#include "upstream/leaf_upstream.hpp"
#include "upstream/pending_get.hpp"
#include "upstream/speculation.hpp"
#include "upstream/store_queue.hpp"

namespace fc {

class CacheNode final : public Node {
 public:
  explicit CacheNode(const NodeConfig& config, std::vector<std::shared_ptr<NvmDevice>> devices = {},
                     RecoveryProgress* progress = nullptr,
                     std::shared_ptr<LeafConnector> leaves = nullptr);
  ~CacheNode() override;

  void batch_get(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) override;
  void batch_put(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) override;
  void batch_delete(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) override;
  void warm(std::vector<WarmKey> keys, std::shared_ptr<const void> owner, std::uint64_t timeout_ms,
            WarmDone done) override;
  void held(std::span<const WarmKey> keys, std::span<std::uint8_t> held) override;
  CallStatus begin_copy(const CopyWanted& wanted, ScanFilter& filter) override;
  CallStatus copy_items(const CopyWanted& wanted, const ScanFilter& filter, std::uint64_t& cursor,
                        std::size_t bytes, ScanBatch& batch) override;
  std::vector<ItemTotals> item_totals() override;
  std::shared_ptr<FetchBatch> take_fetch(std::string_view store, std::uint64_t wait_ms) override;
  bool has_store(std::string_view store) const noexcept override {
    return by_name_.contains(std::string(store));
  }
  void set_shard_map(ShardMap map) override;
  std::uint64_t newest_map_version() const noexcept override;
  void set_owned(OwnedShards owned) override;
  RecentWrites recent_writes(std::uint32_t shard_count, std::span<const std::uint32_t> shards,
                             std::uint64_t age_ms) const override;
  Engine& engine() noexcept override { return *engine_; }
  const NodeConfig& config() const noexcept override { return config_; }
  void visit(CounterVisitor& visitor) const override;
  void stop() override;
  bool shutdown() override;

 private:
  class NvmReads;
  class OwnedWrite;

  struct NamespaceLink {
    std::string name;
    std::uint64_t seed = 0;
    StoreQueue* store = nullptr;
    bool negative_cached = false;
    std::uint64_t fetch_timeout_ms = 0;
    std::unique_ptr<Speculation> speculation;  // null: none
    std::array<Counter, kCellStatusCount> cells;
    std::array<Counter, kCellStatusCount> warmed;  // keys of warm-ups
  };

  // node_writes.cpp
  template <class Request>
  CallStatus decode_write(const RequestBytes& bytes, Request& request,
                          std::vector<NamespaceIndex>& namespaces,
                          std::vector<DomainIndex>& domains);
  template <class Request>
  void write_to_leaves(RequestBytes bytes, std::shared_ptr<const Request> request,
                       std::vector<NamespaceIndex> namespaces, std::uint64_t timeout_ms,
                       ReplyDone done);
  std::uint64_t deadline_ns(std::uint64_t started_ns, std::uint64_t wait_ms) const noexcept;

  void record(const PendingGet& get, const std::vector<DomainIndex>& hints);
  CallStatus resolve(const wire::KeyColumn& column, NamespaceIndex& ns, DomainIndex& domain) const;
  void look_up(PendingGet& get, std::vector<std::vector<Absent>>& absent,
               std::vector<std::vector<Absent>>& refresh, std::vector<NvmCell>& on_nvm);
  CallStatus enter_pending(const std::shared_ptr<PendingGet>& get);
  void leave_pending(const PendingGet& get);
  // Answers what this leaf does not own, and looks the rest of a column up.
  void look_up_owned(GetColumn& lookup, const LeafShards::View& owned, std::uint64_t seed);
  void ask_leaves(const std::shared_ptr<PendingGet>& get, const std::vector<DomainIndex>& hints,
                  const std::vector<std::vector<Absent>>& absent, std::uint64_t ended_before,
                  std::uint64_t deadline);
  void install_from_leaves(const PendingGet& get, std::span<const LeafUpstream::Install> values);
  // node_warm.cpp
  void look_up_quietly(GetColumn& lookup, std::vector<NvmCell>& on_nvm);

  // node_copy.cpp
  CallStatus may_copy(const CopyWanted& wanted) const;

  // Asks the stores for what is absent, which each cell will hear of. `ended_before`: of flights_,
  // from before the cells were looked up.
  void ask_stores(const std::shared_ptr<PendingGet>& get, const std::vector<DomainIndex>& hints,
                  const std::vector<std::vector<Absent>>& absent, std::uint64_t ended_before,
                  FetchPriority priority = FetchPriority::Live);
  void drop_already_cached(NamespaceIndex ns, std::vector<FlightRef>& flights);
  void refresh_ahead(NamespaceIndex ns, const std::vector<std::string_view>& keys,
                     const std::vector<Absent>& hot);
  void deliver(std::vector<FlightRef>& flights, FetchAnswer* answer, CellStatus status);
  void install(const std::vector<FlightRef>& flights, std::size_t begin, std::size_t end,
               const FetchAnswer& answer, const Buffer& bytes);
  void end_flight(const FlightRef& flight, CellStatus status, const SharedValue& value);
  void count(const PendingGet& get);
  bool take_refresh_budget();

  const NodeConfig config_;
  const wire::Limits limits_;
  const BootClock clock_;
  FlightTable flights_;
  std::vector<std::shared_ptr<StoreQueue>> stores_;         // fixed after construction
  std::unordered_map<std::string, StoreQueue*> by_name_;    // fixed after construction
  std::vector<std::unique_ptr<NamespaceLink>> namespaces_;  // fixed after construction

  std::atomic<bool> stopped_{false};
  std::once_flag shut_down_;
  bool shut_down_whole_ = false;  // after shut_down_
  std::atomic<std::uint32_t> pending_{0};
  std::mutex pending_mutex_;
  std::unordered_map<PendingGet*, std::weak_ptr<PendingGet>> pending_gets_;  // by pending_mutex_

  std::mutex refresh_mutex_;
  double refresh_tokens_ = 0;            // guarded by refresh_mutex_
  std::uint64_t refresh_filled_ns_ = 0;  // guarded by refresh_mutex_

  Counter requests_get_;
  Counter requests_put_;
  Counter requests_delete_;
  Counter refused_;
  Counter refreshes_;
  Counter refreshes_denied_;
  Counter install_void_;
  Counter install_rejected_;
  LatencyHistogram get_seconds_;
  LatencyHistogram engine_seconds_;
  LatencyHistogram nvm_seconds_;
  LatencyHistogram fetch_seconds_;
  LatencyHistogram put_seconds_;

  const std::unique_ptr<LeafShards> leaf_;           // null: not a leaf
  std::unique_ptr<request_log::Recorder> recorder_;  // null: nothing is recorded; fixed
  // Last, so that they go first: their threads use the rest.
  const std::unique_ptr<Engine> engine_;
  std::unique_ptr<Deadlines> deadlines_;
  std::unique_ptr<LeafUpstream> leaves_;  // null: not a root
};

}  // namespace fc
