// The log's memory side: who has which region, records that are being appended, regions that wait
// to be written, emptied or used again. No I/O happens here, and nothing waits for any.
//
// Every namespace has regions of its own, at most its budget: it can fill, evict and flush nothing
// but these, so one namespace cannot take the SSD from another. A region takes records of one
// incarnation of its namespace only; a flush dooms it as a whole.
//
// Threads: any. Lock order: a namespace's mutex, then the pool's. A record's room is reserved under
// the namespace's lock and filled outside of it; the region is written when all of its writers are
// done.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/counter.hpp"
#include "core/epoch.hpp"
#include "feature_cache/recovery.hpp"
#include "index/index.hpp"
#include "index/lower_tier.hpp"
#include "nvm/admission.hpp"
#include "nvm/journal.hpp"
#include "nvm/regions.hpp"
#include "nvm/state.hpp"

namespace fc::nvm {

// Why an evicted item did not enter.
enum class Refusal : std::uint8_t {
  None,
  Frequency,
  RejectFirst,
  WriteRate,
  Buffers,  // all write buffers are on their way to the device
  Expiring,
  TooLarge,
  OutOfService,
  IndexFull,
};
inline constexpr std::size_t kRefusals = 9;
const char* refusal_name(Refusal refusal) noexcept;

inline constexpr std::uint32_t kNoRegion = ~0u;

// Write buffers of a tier: one open region a namespace, and the spare ones.
std::uint32_t buffers_of(const EngineConfig& config) noexcept;

// A namespace's part of the log.
struct LogNamespace {
  LogNamespace(const NamespaceConfig& config, std::uint32_t regions, std::uint64_t items);

  const std::string name;
  const std::uint64_t seed;
  const NvmShareConfig config;
  const std::uint32_t budget_regions;                 // 0: nothing of it comes here
  const std::uint64_t item_budget;                    // index slots
  std::atomic<std::uint16_t>* incarnation = nullptr;  // the DRAM tier's; set before use

  std::mutex mutex;
  std::uint32_t open = kNoRegion;      // guarded by mutex
  std::vector<std::uint64_t> hashes;   // of the open region's records; guarded by mutex
  std::vector<std::uint32_t> offsets;  // likewise, in units
  std::deque<std::uint32_t> sealed;    // oldest first; guarded by mutex
  Admission admission;                 // guarded by mutex

  std::atomic<std::uint32_t> used_regions{0};  // all that are not Free
  std::atomic<std::uint32_t> leaving{0};       // of them, those that only wait for their readers
  std::atomic<std::uint64_t> items{0};         // indexed

  Counter demoted;
  Counter demoted_bytes;  // keys and values
  Counter reinserted;
  Counter reinserted_bytes;
  Counter evicted;
  Counter expired;
  Counter hidden;
  Counter promoted;
  Counter dropped_by_tag;
  Counter hits;
  std::array<Counter, kRefusals> refused;
  Counter lost_damaged;
  Counter lost_device;
  Counter lost_out_of_service;
};

// A full region on its way to the device, with the list of its records.
struct WriteJob {
  std::uint32_t region = 0;
  std::vector<std::uint64_t> hashes;
  std::vector<std::uint32_t> offsets;
};

// What a rebuild believes and what not.
struct RebuildPlan {
  std::uint64_t set_id = 0;
  Tick now = 0;
  bool drop_expiring = false;  // the clock is in doubt
  std::span<const JournalEntry> journal;
  RecoveryProgress* progress = nullptr;
};

class RegionLog {
 public:
  RegionLog(const EngineConfig& config, const Geometry& geometry, Regions& regions, State& state,
            EpochManager& epochs, MovedKeys& moved);
  RegionLog(const RegionLog&) = delete;
  RegionLog& operator=(const RegionLog&) = delete;

  LogNamespace& ns(NamespaceIndex index) noexcept { return *namespaces_[index]; }
  const std::vector<std::unique_ptr<LogNamespace>>& namespaces() const noexcept {
    return namespaces_;
  }
  const MovedKeys& moved() const noexcept { return moved_; }

  // ---- what the process before left; before there are other threads, incarnations known ----
  struct Adopted {
    std::uint64_t items = 0;
    std::uint64_t dropped = 0;
  };
  // Makes rows, lists and index agree, however that process ended: what the index points at is what
  // there is. May be cut off and repeated.
  Adopted adopt(Index& index);
  // The same from the regions' own lists, where there is no index: what they name and `journal`
  // does not call invalid.
  Adopted rebuild(const RebuildPlan& plan, Index& index);
  // Every region free, once no entry points into any.
  void start_anew();

  // ---- appending ----
  // Copies a record into its namespace's open region. `reinsertion`: not judged, not counted as
  // demoted.
  Demotion append(const DemotedRecord& record, bool reinsertion, Tick now, std::uint64_t now_ns);
  void published(const Demotion& demotion, bool indexed) noexcept;
  void forget(Entry entry) noexcept;
  // ---- the journal of what the devices hold but must not be found again; null: none is kept ----
  void keep_journal(Journal* journal) noexcept { journal_ = journal; }
  bool keeps_journal() const noexcept { return journal_ != nullptr; }
  // An entry was taken out of the index, its record stays on the device.
  void invalidated(Entry entry) noexcept;
  // All of a region's records are, or are about to be, somewhere else or nowhere.
  void region_gone(std::uint32_t region) noexcept;
  bool still_matters(const JournalEntry& entry) const noexcept;
  // Seals every open region, so that all are written.
  void seal_all();
  // No region is full and not on the device yet.
  bool all_written();
  // The namespace has a new incarnation: dooms every region that it had before.
  void flush(NamespaceIndex index);

  // ---- for the region writer ----
  // The next thing to do, in order of urgency; waits up to `wait_ms` when there is none.
  struct Work {
    std::optional<WriteJob> write;
    std::optional<std::uint32_t> empty;  // a sealed region to be emptied
    bool keep_hits = false;              // ... whose hit items are kept
  };
  Work next_work(Tick now, std::uint64_t wait_ms);
  void wake() noexcept;
  // A region that was written: its records are read from the device from now on.
  void written(std::uint32_t region);
  // A region that could not be written, or was emptied: no entry points into it any more.
  void retire(std::uint32_t region);
  // Regions of a device that went out of service; the caller takes their entries out of the index.
  std::vector<std::uint32_t> doom_device(std::size_t device);
  // Every spare buffer is on its way to the device: what leaves DRAM now may find none.
  bool pressed() const noexcept {
    return writing_.load(std::memory_order_relaxed) >= spare_buffers_;
  }
  // Gives back the regions and buffers that nobody can be reading any more.
  void collect();
  // Nothing is open, waits to be written, or waits for readers.
  bool settled();

  std::uint64_t memory_bytes() const noexcept;
  std::array<std::uint32_t, kRegionStates> count_states(std::size_t device) const noexcept;
  bool uses_incarnation(std::uint16_t incarnation) const noexcept;

 private:
  struct Waiting {
    std::uint32_t region;  // kNoRegion: a buffer alone
    std::uint32_t buffer;
    std::uint64_t epoch;
    bool held = false;  // by reads, though no epoch sees it any more: that may last
  };

  Refusal judge_locked(LogNamespace& ns, const DemotedRecord& record, std::size_t bytes,
                       bool reinsertion, std::uint64_t now_ns);
  Refusal open_locked(LogNamespace& ns, NamespaceIndex index, std::uint16_t incarnation,
                      bool reinsertion);
  void seal_locked(LogNamespace& ns);
  bool has_room_locked(const LogNamespace& ns, std::size_t bytes) const noexcept;
  std::uint32_t budget_now(const LogNamespace& ns) const noexcept;
  bool wants_room(const LogNamespace& ns) const noexcept;
  std::optional<std::uint32_t> take_region_locked();
  void collect_locked();
  void release_buffer_locked(std::uint32_t region);

  // region_adopt.cpp
  enum class Use : std::uint8_t { None, Flushed, Buffer, Device };
  std::vector<Use> classify();
  Use use_of(const Region& row, std::vector<bool>& buffers) const noexcept;
  bool points_well(Entry entry, const std::vector<Use>& uses) const noexcept;
  struct Buffered;
  bool is_in_buffer(Index& index, Entry entry, std::uint64_t bucket, Buffered& record) const;
  WriteJob job_of(std::uint32_t region, std::vector<Buffered>& records);
  void queue_up(const std::vector<Use>& uses, std::vector<WriteJob>& jobs);
  // region_rebuild.cpp
  class Rebuild;

  Regions& regions_;
  Journal* journal_ = nullptr;  // fixed before there are other threads
  State& state_;
  EpochManager& epochs_;
  MovedKeys& moved_;
  const std::size_t spare_buffers_;
  std::atomic<std::size_t> writing_{0};  // regions that are full and not on the device yet
  std::vector<std::unique_ptr<LogNamespace>> namespaces_;  // fixed after construction

  Tick looked_for_expired_ = 0;  // the region writer's own
  mutable std::mutex pool_mutex_;
  std::condition_variable work_;
  bool woken_ = false;                           // guarded by pool_mutex_
  std::vector<std::deque<std::uint32_t>> free_;  // by device; guarded by pool_mutex_
  std::size_t next_device_ = 0;                  // guarded by pool_mutex_
  std::uint64_t next_generation_;                // guarded by pool_mutex_
  std::vector<std::uint32_t> free_buffers_;      // guarded by pool_mutex_
  std::deque<WriteJob> to_write_;                // guarded by pool_mutex_
  std::deque<std::uint32_t> doomed_;             // sealed ones that were flushed; by pool_mutex_
  std::vector<Waiting> limbo_;                   // guarded by pool_mutex_
  WriteBudget write_budget_;                     // guarded by pool_mutex_
};

}  // namespace fc::nvm
