// The DRAM tier: namespaces, their domains, and the ways of a batch through index and log.
//
// Reads take no lock (see get.cpp). A write reserves room in its domain, fills the record, then
// publishes it under the locks of the key's two buckets. Under the same locks every put and erase
// raises the write version of the key's stripe; a fetched value is installed only when the version
// and the namespace's incarnation are still those of its token. So a result that is older than an
// acknowledged write never enters ("Late results lose"). Two keys may share a stripe: then a
// fetched value is served but not kept, and counted.
//
// No two namespaces have one incarnation, so a record's incarnation also says whose it is: the
// index is shared, and one key of two namespaces may meet in it.
//
// Flush starts a new incarnation first (every older record is invisible from then on), then takes
// the segments back. A put that raced with it checks the incarnation again under the pair's locks.
//
// With a tier below, one index serves both. A key has one entry, wherever its record lies. An entry
// of the tier below cannot be compared with a key in memory; so a write takes the place of, or
// drops, every entry below that may be its key's, before it is acknowledged: an older value never
// comes back. The new entry overwrites the old one by one store: a key that is present never reads
// as a miss in between.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "core/ticks.hpp"
#include "feature_cache/engine.hpp"
#include "index/lower_tier.hpp"
#include "memory/domain.hpp"
#include "memory/shard_file.hpp"

namespace fc {

class DramTier {
 public:
  // `tick`: what time it is for what the tier below holds already. Throws std::invalid_argument for
  // a config that does not fit, std::bad_alloc for no memory, std::system_error for a directory of
  // shared memory that cannot be used.
  DramTier(const EngineConfig& config, const Clock& clock, StartReport& report,
           std::optional<Tick> tick = {}, RecoveryProgress* progress = nullptr,
           MemoryClaim claim = MemoryClaim::Whole);
  ~DramTier();

  NamespaceIndex find_namespace(std::string_view name) const noexcept;
  DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept;

  // The tier below; before there are other threads.
  void attach(LowerTier& lower);
  Index& index() noexcept { return index_; }
  EpochManager& epochs() noexcept { return epochs_; }
  const Ticks& ticks() const noexcept { return ticks_; }
  MovedKeys& moved() noexcept { return moved_; }
  // After all tiers have said what they found, and before anything is written or served. `below`:
  // what the tier below knows of the time before, where memory is new.
  void settle_moves(const InstanceCounts& below, StartReport& report);
  const Geometry& geometry() const noexcept { return geometry_; }
  const ArenaMemory& memory() const noexcept { return memory_; }
  // The tier below may set it to what it holds, before there are other threads; then
  // keep_incarnations().
  std::atomic<std::uint16_t>& incarnation(NamespaceIndex ns) noexcept {
    return namespaces_[ns]->incarnation;
  }
  void keep_incarnations() noexcept;
  // Evicts what the budgets of an adopted memory hold no more; the tier below may be attached.
  void fit_budgets();
  // Leaves all in order for the next process; after all other threads have ended.
  void leave() noexcept;
  // Moves what DRAM holds down, the latest first, until `deadline_ns` and at most so many bytes of
  // each namespace; nobody may write meanwhile.
  void spill(std::uint64_t deadline_ns, std::span<const std::uint64_t> bytes_most);

  // `rejected`: entries of the tier below that were read already and are not the key's, or cannot
  // be read. Returns how many cells were answered from the tier below.
  std::uint64_t get(GetColumn& column, std::span<const std::uint64_t> rejected = {});
  // Counts cells whose answer came later than their lookup.
  void count_later(NamespaceIndex ns, std::uint64_t hits, std::uint64_t misses) noexcept;
  void put(NamespaceIndex ns, std::span<const PutItem> items, std::span<WriteStatus> statuses);
  void erase(NamespaceIndex ns, std::span<const std::string_view> keys,
             std::span<WriteStatus> statuses);
  void install(NamespaceIndex ns, std::span<const PutItem> items, std::span<const Token> tokens,
               std::span<InstallStatus> statuses);
  bool token_alive(NamespaceIndex ns, std::string_view key, Token token) const noexcept;
  // scan.cpp
  std::shared_ptr<const TokenSnapshot> tokens() const;
  // From bucket `bucket` on; returns the next one, bucket_count() at the end. See Engine::scan().
  std::uint64_t scan(std::uint64_t bucket, const ScanFilter& filter, std::size_t bytes,
                     ScanBatch& batch);
  // A record that was read from below comes up: installed in place of `entry`, when that is still
  // the key's. False: it is not, or there is no room.
  struct Promotion {
    std::uint64_t hash = 0;
    std::uint64_t entry = 0;
    std::uint64_t generation = 0;  // of what lay at the entry's place when it was read
    std::string_view key;
    std::string_view value;
    unsigned domain = 0;  // its number within the namespace
    Tick expiry = kNever;
    std::uint16_t incarnation = 0;
  };
  bool promote(NamespaceIndex ns, const Promotion& item);
  // Whether the key of what was read from below has moved since.
  bool is_hidden_below(NamespaceIndex ns, std::string_view key, std::uint64_t entry) const noexcept;
  // Takes an entry of the tier below out of the index, when it is there still.
  void drop_below(std::uint64_t hash, std::uint64_t entry);
  std::uint64_t flush(NamespaceIndex ns);
  void drop_shards(std::span<const std::uint32_t> shards);
  void hold_shards(std::span<const std::uint32_t> shards);
  const KeptShards& kept_shards() const noexcept { return kept_shards_; }
  std::uint64_t resize(DomainIndex domain, std::uint64_t budget_bytes);
  // The most segments that the domain may be given while the others keep theirs.
  std::uint64_t segments_most(DomainIndex domain);
  std::uint32_t segment_bytes() const noexcept { return geometry_.segment_bytes; }
  void maintain();
  void visit(CounterVisitor& visitor) const;

 private:
  struct Namespace : NamespaceState {
    NamespaceIndex index = kNoNamespace;
    NamespaceRow* row = nullptr;
    DomainIndex first_domain = 0;
    DomainIndex domain_count = 0;
    std::uint64_t negative_ttl_ms = 0;
  };
  friend class TierSet;
  class Tokens;
  struct GetTally;
  struct GetBatch;
  class OneTier;
  class ManyTiers;
  class VersionRaiser;
  enum class Outcome : std::uint8_t { Stored, Rejected, TokenVoid };

  Tick now() const noexcept { return ticks_.now(); }
  std::atomic<std::uint32_t>& write_version(std::uint64_t hash) const noexcept {
    return write_versions_[(hash >> 16) & (layout::kWriteVersionStripes - 1)];
  }
  Tick expiry_of(const Domain& domain, const PutItem& item, const Namespace& ns,
                 const KeyHash& hash, Tick tick) const noexcept;
  // batch_writes.cpp
  template <class Choose, class Body>
  static void for_each_prefetched(NamespaceIndex ns, std::uint64_t seed,
                                  std::span<const PutItem> items, Choose&& choose, Body&& body);
  WriteStatus put_one(NamespaceIndex ns, const PutItem& item, const KeyHash& hash, Tick tick);
  InstallStatus install_one(NamespaceIndex ns, const PutItem& item, const Token& token,
                            const KeyHash& hash, Tick tick);
  WriteStatus erase_one(NamespaceIndex ns, std::string_view key, const KeyHash& hash);
  Outcome write(Namespace& ns, const PutItem& item, const KeyHash& hash, const Token* token,
                Tick tick);
  Outcome publish(Namespace& ns, Domain& domain, const PutItem& item, const Place& place,
                  std::uint64_t hash, const Reservation& reservation, std::uint16_t incarnation,
                  const Token* token);
  void remove(Namespace& ns, std::string_view key, const KeyHash& hash);
  void fill(const Reservation& reservation, std::string_view key, std::string_view value) noexcept;
  void supersede_locked(Slot& slot, Entry entry, std::uint64_t replacement,
                        bool by_tag = false) noexcept;
  // An entry below that may be the key's, other than in `except`; for the holder of its PairLock.
  Slot* find_below_locked(const Place& place, std::uint64_t hash, const Slot* except) noexcept;
  void drop_all_below_locked(const Place& place, std::uint64_t hash, const Slot* except) noexcept;
  // The slot of the key, whatever its expiry; for the holder of its PairLock inside an epoch.
  Slot* find_key_locked(const Namespace& ns, const Place& place, std::string_view key) noexcept;
  std::uint16_t new_incarnation() noexcept;
  void keep_incarnation(Namespace& ns, std::uint16_t incarnation) noexcept;
  void make_namespaces(const EngineConfig& config);
  std::vector<AdoptedDomain> adopt(const EngineConfig& config, StartReport& report,
                                   RecoveryProgress* progress);
  std::vector<AdoptedDomain> lay_out_domains(const EngineConfig& config,
                                             std::span<const DomainIdentity> identities);
  std::vector<std::uint32_t> budgets_of(const EngineConfig& config) const;
  std::uint64_t side_bytes() const noexcept;
  std::uint64_t segments_most_locked(DomainIndex domain) const noexcept;
  void visit_instance(CounterVisitor& visitor) const;
  // shards.cpp
  void settle_shards(StartReport& report);
  void keep_shards() noexcept;
  void drop_shards_locked(std::span<const std::uint32_t> shards, bool held);

  // get.cpp
  template <bool kHides, class Tiers>
  static void get_all(Tiers tiers, GetBatch& batch);
  template <bool kHides, class Tiers>
  static void get_group(Tiers tiers, typename Tiers::Chunk& chunk, GetBatch& batch,
                        std::size_t begin, std::size_t end);
  template <bool kHides>
  void find_again(GetBatch& batch, GetTally& tally, std::size_t position, const KeyHash& hash);
  template <bool kHides>
  bool serve(GetColumn& column, GetBatch& batch, GetTally& tally, std::size_t position,
             const RecordHeader& record, Entry entry, Slot& slot, const KeyHash& hash);
  bool serve_below(GetBatch& batch, GetTally& tally, std::size_t position, Entry entry, Slot& slot,
                   std::uint64_t hash, Token token);
  bool append_value(GetColumn& column, GetBatch& batch, std::size_t position, CellStatus status,
                    std::uint32_t bytes, std::uint8_t** to);
  void count(const GetTally& tally) noexcept;
  void copy_value(const RecordHeader& record, std::uint64_t location, std::uint8_t* to) noexcept;

  const ArenaMemory memory_;
  const Geometry geometry_;
  const Ticks ticks_;
  const std::uint64_t max_value_bytes_;
  const std::uint64_t memory_bytes_;
  const std::uint16_t instance_;
  Arena arena_;
  Index index_;
  EpochManager epochs_;
  MovedKeys moved_;
  LowerTier* lower_ = nullptr;  // fixed before there are other threads; null: none
  const std::unique_ptr<std::atomic<std::uint32_t>[]> write_versions_;
  std::vector<std::unique_ptr<Namespace>> namespaces_;  // fixed after construction
  std::vector<std::unique_ptr<Domain>> domains_;        // fixed after construction
  std::unordered_map<std::string_view, NamespaceIndex> by_name_;
  std::mutex resize_mutex_;             // one resize or flush at a time
  std::uint16_t last_incarnation_ = 0;  // guarded by resize_mutex_
  const std::string shard_path_;        // empty: nothing outlives the process
  KeptShards kept_shards_;              // fixed once the moves are settled
  std::mutex shards_mutex_;             // one change of shards at a time
  std::unique_ptr<ShardFile> shards_;   // null: no leaf
  std::atomic<bool> holds_{false};      // the shards that it holds are known
  Counter no_slot_;
  Counter displaced_;
  Counter below_dropped_;
};

}  // namespace fc
