#include "index/index.hpp"

#include <algorithm>

#include "core/sequence_point.hpp"

namespace fc {
namespace {

Slot* empty_slot(Bucket& bucket) noexcept {
  for (Slot& slot : bucket.slots) {
    if (slot.load(std::memory_order_relaxed) == 0) return &slot;
  }
  return nullptr;
}

constexpr unsigned kMaxMoveDepth = 2;

}  // namespace

Index::Index(Bucket* buckets, std::uint64_t bucket_count, std::span<MoveRow> moves)
    : buckets_(buckets),
      bucket_count_(bucket_count),
      locks_(std::make_unique<SpinLock[]>(layout::kLockStripes)),
      move_versions_(std::make_unique<std::atomic<std::uint32_t>[]>(kMoveVersions)),
      journal_(moves) {
  FC_CHECK(bucket_count_ > 0);
}

Slot* Index::free_slot_locked(const Place& place) noexcept {
  if (Slot* slot = empty_slot(buckets_[place.home])) return slot;
  if (Slot* slot = empty_slot(buckets_[place.partner])) return slot;
  const std::uint64_t held[] = {place.home, place.partner};
  for (unsigned depth = 1; depth <= kMaxMoveDepth; ++depth) {
    if (Slot* slot = make_room_locked(place.home, held, 2, depth)) return slot;
    if (place.partner == place.home) continue;
    if (Slot* slot = make_room_locked(place.partner, held, 2, depth)) return slot;
  }
  return nullptr;
}

// Locks a further bucket while others are held. Only tries: two movers that want each other's
// bucket must not wait for one another.
bool Index::lock_extra(std::uint64_t number, const std::uint64_t* held, unsigned held_count,
                       bool* locked) noexcept {
  SpinLock* wanted = &lock_of(number);
  *locked = false;
  for (unsigned i = 0; i < held_count; ++i) {
    if (&lock_of(held[i]) == wanted) return true;
  }
  *locked = wanted->try_lock();
  return *locked;
}

// Frees a slot of the locked bucket `number` by moving one of its entries to its partner bucket,
// making room there first when `depth` allows. Returns the freed slot, empty.
Slot* Index::make_room_locked(std::uint64_t number, const std::uint64_t* held, unsigned held_count,
                              unsigned depth) noexcept {
  for (Slot& from : buckets_[number].slots) {
    const Entry entry(from.load(std::memory_order_relaxed));
    if (entry.empty()) return &from;
    const std::uint64_t target = partner_of(number, entry.tag());
    if (target == number) continue;
    bool revisits = false;
    for (unsigned i = 0; i < held_count; ++i) revisits |= held[i] == target;
    if (revisits) continue;
    bool locked = false;
    if (!lock_extra(target, held, held_count, &locked)) continue;
    Slot* to = empty_slot(buckets_[target]);
    if (to == nullptr && depth > 1) {
      std::uint64_t deeper[4] = {};
      for (unsigned i = 0; i < held_count; ++i) deeper[i] = held[i];
      deeper[held_count] = target;
      to = make_room_locked(target, deeper, held_count + 1, depth - 1);
    }
    if (to != nullptr) {
      // Copy, announce, clear: a reader finds the entry in one place or sees the announcement.
      MoveRow* announced = journal_.begin(entry.word(), number);
      to->store(from.load(std::memory_order_relaxed), std::memory_order_release);
      FC_SEQUENCE_POINT("index:moving");
      move_version(entry.tag()).fetch_add(1, std::memory_order_acq_rel);
      from.store(0, std::memory_order_release);
      MoveJournal::end(announced);
      moves_.fetch_add(1, std::memory_order_relaxed);
    }
    if (locked) lock_of(target).unlock();
    if (to != nullptr) return &from;
  }
  return nullptr;
}

void Index::finish_moves() noexcept {
  for (MoveRow& row : journal_.rows()) {
    const Entry entry(row.word.load(std::memory_order_acquire));
    const std::uint64_t from = row.from.load(std::memory_order_relaxed);
    if (entry.lines() != 0 && from < bucket_count_) {
      const auto moved = [&](const Slot& slot) {
        return Entry(slot.load(std::memory_order_relaxed)).same_record(entry);
      };
      const std::uint64_t target = partner_of(from, entry.tag());
      if (target != from && std::any_of(buckets_[target].slots,
                                        buckets_[target].slots + layout::kSlotsPerBucket, moved)) {
        for (Slot& slot : buckets_[from].slots) {
          if (moved(slot)) slot.store(0, std::memory_order_release);
        }
      }
    }
    row.word.store(0, std::memory_order_release);
  }
}

}  // namespace fc
