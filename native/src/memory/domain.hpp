// An eviction domain: a byte budget of segments in two queues, filled at their ends, emptied from
// their oldest segment by its policy.
//
// Segments are kept apart by time to live (classes half an octave wide) and sealed when they have
// been open for a quarter of it, so that a whole segment expires together and its bytes come back
// without any read: at the latest (1/4 + 3/2) TTL after an item was written. Where there are more
// classes than open segments, items of several share one: it is compacted when 15/8 of the shortest
// TTL in it have passed.
//
// Rules
//   - Open segments are never evicted. A sealed one is evicted only when its writers are done, and
//     they never need the domain's lock to get done.
//   - While a segment is emptied, kept items may take the domain one segment above its budget; the
//     arena's reserve covers that.
//   - A policy that keeps everything does not hold writers up for long: after kPatience segments
//     without gain the next one is dropped whole.
//
// A record whose key has moved since (core/moved_keys.hpp) is neither moved nor copied down; and no
// record is added to a segment in which it would be taken for such a one.
//
// With a tier below, an evicted record is copied there before its entry swings over, outside of the
// pair's lock: a writer of the key may come in between, then the copy is dead from the start.
//
// Lock order: domain, then the tier below or a bucket pair. No epoch is held while the domain's
// lock is wanted.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/counter.hpp"
#include "eviction/policy.hpp"
#include "feature_cache/config.hpp"
#include "index/lower_tier.hpp"
#include "memory/adoption.hpp"
#include "memory/arena.hpp"
#include "memory/router.hpp"

namespace fc {

// What all domains of a tier share.
struct TierParts {
  Arena& arena;
  Index& index;
  EpochManager& epochs;
  const MovedKeys& moved;
};

// The state of a namespace that lookups and evictors read.
struct NamespaceState {
  std::string name;
  std::uint64_t seed = 0;
  std::atomic<std::uint16_t> incarnation{1};
  std::unique_ptr<Router> router;
  Counter hits;
  Counter misses;
  Counter negative_hits;
  Counter stores;
  Counter rejected;
  Counter erased;
  Counter tokens_void;
};

// Room for one record, its header already written. `segment` counts a writer until `done`.
struct Reservation {
  RecordHeader* record = nullptr;  // null: no room
  std::uint64_t location = 0;
  std::uint32_t segment = 0;
};

struct RecordShape {
  std::uint64_t hash = 0;  // the low half
  std::uint64_t high = 0;
  std::uint16_t key_bytes = 0;
  std::uint32_t value_bytes = 0;
  bool negative = false;
  Tick expiry = kNever;
  std::uint16_t incarnation = 0;
};

class Domain {
 public:
  // `row`: of the arena's head, which says that the domain is there.
  Domain(const DomainConfig& config, DomainIndex index, NamespaceState& ns, TierParts parts,
         std::uint32_t segments, std::uint64_t entry_budget, std::uint16_t row);

  // The tier below, and what this domain is called there; before there are other threads.
  void attach(LowerTier& lower, NamespaceIndex ns, unsigned number) noexcept {
    lower_ = &lower;
    ns_index_ = ns;
    number_ = number;
  }
  const DomainConfig& config() const noexcept { return config_; }
  NamespaceState& ns() noexcept { return ns_; }
  Tick refresh_ticks() const noexcept { return refresh_ticks_; }

  // ---- the process before and the one after ----
  // What there is already; before there are other threads.
  void adopt(const AdoptedDomain& adopted);
  void fit_budget(Tick now) {
    resize(budget_segments(), entry_budget_.load(std::memory_order_relaxed), now);
  }
  // Moves items down, main queue and latest first, until `deadline_ns` or `bytes_most`; what the
  // tier below does not take stays. No writer may come meanwhile. Returns the bytes moved.
  std::uint64_t spill(Tick now, std::uint64_t deadline_ns, std::uint64_t bytes_most);
  // Leaves the counts behind; after all others have ended.
  void leave() noexcept;

  // ---- writers ----
  Reservation reserve(const RecordShape& shape, Tick now);
  void prefetch(std::uint64_t hash) const noexcept { policy_->prefetch(hash); }
  // The record is about to be indexed; under its pair's lock, so that nobody can forget() it first.
  void count_in(const RecordHeader& record) noexcept;
  // The record is indexed, or given up: it is dead then.
  void done(const Reservation& reservation, bool published) noexcept;
  // A published record of this domain is no longer indexed (superseded, deleted, displaced).
  void forget(std::uint32_t segment, const RecordHeader& record) noexcept;

  // ---- time and operators ----
  void maintain(Tick now);
  std::uint64_t flush(Tick now);
  std::uint64_t budget_bytes() const noexcept;
  std::uint32_t budget_segments() const noexcept {
    return budget_segments_.load(std::memory_order_relaxed);
  }
  // Evicts down to the new budget, a segment at a time, letting writers in between.
  void resize(std::uint32_t segments, std::uint64_t entry_budget, Tick now);
  void visit(CounterVisitor& visitor) const;
  std::uint64_t side_bytes() const noexcept { return sizeof(*this) + policy_->memory_bytes(); }
  std::uint64_t used_bytes() const noexcept;
  std::uint64_t entries() const noexcept { return entries_.load(std::memory_order_relaxed); }
  bool over_entry_share() const noexcept {
    return entries() > entry_budget_.load(std::memory_order_relaxed);
  }

  // Bytes of a record beyond which it takes segments of its own.
  std::size_t large_bytes() const noexcept { return parts_.arena.segment_bytes(); }

  Counter hits;

 private:
  enum class Purpose : std::uint8_t { Judge, Drop, Compact, Spill };
  struct Open {
    std::uint32_t segment;
    std::uint8_t ttl_class;
  };

  static constexpr std::size_t kMaxOpen = 8;
  static constexpr unsigned kPatience = 16;
  static constexpr unsigned kSettleTries = 1000;
  static constexpr unsigned kGarbageScan = 64;
  static constexpr std::uint32_t kGarbageShare = 5;  // live bytes below a fifth: compact first

  QueueSizes sizes_locked() const noexcept;
  std::uint32_t count(Queue queue) const noexcept {
    return segments_in_[static_cast<std::size_t>(queue)];
  }
  Reservation append_locked(Queue queue, const RecordShape& shape, Tick now, bool evicting);
  Reservation append_large_locked(Queue queue, const RecordShape& shape, std::size_t bytes,
                                  Tick now);
  Reservation write_header_locked(std::uint32_t segment, std::uint32_t offset,
                                  const RecordShape& shape, std::size_t bytes, Tick now);
  Open* open_for_locked(Queue queue, const RecordShape& shape, Tick now, bool evicting);
  // Whether a record may go into this open segment.
  bool takes(std::uint32_t segment, const RecordShape& shape, std::size_t bytes) const noexcept;
  bool make_room_locked(std::uint32_t segments, Tick now);
  void settle_first_fill_locked();
  void set_filled_once(bool filled) noexcept {
    row_.filled_once.store(filled ? 1 : 0, std::memory_order_relaxed);
  }
  // Makes sure that no entry points into a segment that was emptied.
  void ensure_no_entry_locked(std::uint32_t segment);
  void relabel_locked(std::uint32_t segment, Queue queue);
  std::uint32_t start_segment_locked(Queue queue, std::uint8_t ttl_class, Tick now);
  void seal_locked(Queue queue, std::size_t open_place);
  bool seal_any_locked();
  bool pop_victim_locked(Queue queue, std::uint32_t* segment);
  bool pop_garbage_locked(std::uint32_t* segment);
  bool evict_one_locked(Tick now, Purpose purpose);
  void empty_locked(std::uint32_t segment, Tick now, Purpose purpose);
  void judge_record_locked(std::uint32_t segment, std::uint32_t offset, const KeyHash& hash,
                           Tick now, Purpose purpose);
  void move_record_locked(std::uint64_t location, RecordHeader& record, const KeyHash& hash,
                          Queue queue, unsigned frequency, Tick now);
  void demote_record_locked(std::uint64_t location, const RecordHeader& record, const KeyHash& hash,
                            unsigned frequency);
  Slot* find_location(const Place& place, std::uint64_t location) noexcept;
  // Of a record: whether its key has moved since. For a mover that has the room for the copy.
  bool is_hidden(std::uint32_t segment, const KeyHash& hash) const noexcept {
    return parts_.moved.hides(parts_.arena.stamp_of(segment), hash.high);
  }
  void release_locked(std::uint32_t segment);
  void release_dead_locked();
  void drop_entry(Slot& slot, std::uint32_t segment, const RecordHeader& record,
                  std::uint64_t replacement = 0) noexcept;

  const DomainConfig config_;
  const DomainIndex index_;
  const std::uint16_t row_number_;
  DomainRow& row_;
  NamespaceState& ns_;
  const TierParts parts_;
  const Tick refresh_ticks_;
  const std::unique_ptr<EvictionPolicy> policy_;
  LowerTier* lower_ = nullptr;  // null: what is evicted is gone
  NamespaceIndex ns_index_ = kNoNamespace;
  unsigned number_ = 0;

  mutable std::mutex mutex_;
  std::array<std::deque<std::uint32_t>, kQueueCount> queues_;  // sealed; guarded by mutex_
  std::array<std::vector<Open>, kQueueCount> open_;            // guarded by mutex_
  std::array<std::uint32_t, kQueueCount> segments_in_{};       // guarded by mutex_
  std::uint64_t next_sequence_ = 1;                            // guarded by mutex_
  std::uint32_t used_segments_ = 0;                            // guarded by mutex_
  bool emptying_ = false;                                      // guarded by mutex_
  bool large_kept_ = false;                                    // guarded by mutex_
  std::uint64_t spill_until_ns_ = 0;                           // 0: none; guarded by mutex_
  bool left_behind_ = false;                                   // by a spill; guarded by mutex_
  std::vector<std::span<const std::uint8_t>> pieces_;          // guarded by mutex_

  // Relaxed: budgets are compared loosely, counts are shown.
  std::atomic<std::uint32_t> budget_segments_;
  std::atomic<std::uint64_t> entry_budget_;
  std::atomic<std::uint64_t> entries_{0};
  std::atomic<std::uint32_t> dead_segments_{0};  // sealed ones without a live byte
  std::atomic<std::uint32_t> used_shown_{0};
  Counter live_bytes_;     // headers included
  Counter payload_bytes_;  // keys and values alone
  Counter evictions_;
  Counter expirations_;
  Counter hidden_;
  Counter kept_;
  Counter dropped_kept_;
  Counter segments_emptied_;
  Counter swept_;
};

}  // namespace fc
