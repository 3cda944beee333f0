// How a domain makes room: which segment goes, and what becomes of each of its records.
#include <algorithm>
#include <array>
#include <thread>

#include "core/check.hpp"
#include "core/sequence_point.hpp"
#include "memory/domain.hpp"

namespace fc {

bool Domain::pop_victim_locked(Queue queue, std::uint32_t* segment) {
  auto& sealed = queues_[static_cast<std::size_t>(queue)];
  if (sealed.empty()) return false;
  *segment = sealed.front();
  sealed.pop_front();
  return true;
}

// Overwrites leave garbage anywhere in the log. A segment that is mostly garbage among the next in
// line is compacted before anything that lives is evicted.
bool Domain::pop_garbage_locked(std::uint32_t* segment) {
  for (auto& sealed : queues_) {
    const std::size_t end = std::min<std::size_t>(sealed.size(), kGarbageScan);
    for (std::size_t i = 0; i < end; ++i) {
      const SegmentMeta& row = parts_.arena.meta(sealed[i]);
      if (row.large != 0) continue;
      if (row.live_bytes.load(std::memory_order_relaxed) * kGarbageShare <
          row.used.load(std::memory_order_relaxed)) {
        *segment = sealed[i];
        sealed.erase(sealed.begin() + static_cast<std::ptrdiff_t>(i));
        return true;
      }
    }
  }
  return false;
}

bool Domain::evict_one_locked(Tick now, Purpose purpose) {
  std::uint32_t segment = 0;
  if (purpose == Purpose::Judge && pop_garbage_locked(&segment)) {
    empty_locked(segment, now, Purpose::Compact);
    return true;
  }
  const Queue first = policy_->victim(sizes_locked());
  const Queue second = first == Queue::Small ? Queue::Main : Queue::Small;
  if (!pop_victim_locked(first, &segment) && !pop_victim_locked(second, &segment)) {
    if (!seal_any_locked()) return false;
    if (!pop_victim_locked(first, &segment) && !pop_victim_locked(second, &segment)) return false;
  }
  empty_locked(segment, now, purpose);
  return true;
}

// Takes every live record out of a sealed segment, by moving or dropping it, and gives it back.
void Domain::empty_locked(std::uint32_t segment, Tick now, Purpose purpose) {
  FC_DCHECK(!emptying_);
  emptying_ = true;
  SegmentMeta& row = parts_.arena.meta(segment);
  // Who reserved here is about to publish and does not need our lock for it.
  while (row.writers.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  segments_emptied_.add();
  constexpr std::uint32_t kAhead = 16;
  struct Seen {
    std::uint32_t offset;
    KeyHash hash;
  };
  std::array<Seen, kAhead> ahead{};
  std::uint32_t scanned = 0;  // records whose bucket was prefetched
  std::uint32_t judged = 0;
  std::uint32_t offset = 0;
  std::uint32_t end = row.used.load(std::memory_order_relaxed);
  while (judged < scanned || offset < end) {
    if (offset < end && scanned - judged < kAhead) {
      const RecordHeader& record = *parts_.arena.record(parts_.arena.location(segment, offset));
      if (row.large == 0 && (record.large() || record.key_bytes > kMaxKeyBytes ||
                             offset + record.record_bytes() > end)) [[unlikely]] {
        end = offset;  // damaged: nothing says where the next record would be
        continue;
      }
      const KeyHash hash = hash_key(ns_.seed, record.key());
      parts_.index.prefetch(parts_.index.home_of(hash.low));
      policy_->prefetch(hash.low);
      ahead[scanned++ % kAhead] = {offset, hash};
      offset = row.large != 0 ? end : offset + static_cast<std::uint32_t>(record.record_bytes());
      continue;
    }
    const Seen& seen = ahead[judged++ % kAhead];
    judge_record_locked(segment, seen.offset, seen.hash, now, purpose);
  }
  FC_SEQUENCE_POINT("domain:emptied");
  emptying_ = false;
  if (large_kept_) {
    large_kept_ = false;  // it is back in line with its segments
    return;
  }
  if (left_behind_) return;
  if (parts_.arena.memory().kind() != ArenaMemory::Kind::New) ensure_no_entry_locked(segment);
  release_locked(segment);
}

// An adopted segment may hold what an earlier process damaged. Its live bytes say whether all that
// is indexed was found: then nothing is left of them. (Whoever takes an entry out counts after it,
// so there may be a moment to wait.)
void Domain::ensure_no_entry_locked(std::uint32_t segment) {
  const SegmentMeta& row = parts_.arena.meta(segment);
  for (unsigned tries = 0; tries < kSettleTries; ++tries) {
    if (row.live_bytes.load(std::memory_order_acquire) == 0) return;
    std::this_thread::yield();
  }
  swept_.add();
  parts_.index.clear_all(
      [&](Entry entry) {
        return !entry.empty() && !entry.on_nvm() &&
               parts_.arena.segment_of(entry.location()) == segment;
      },
      [&](Entry) { entries_.fetch_sub(1, std::memory_order_relaxed); });
}

Slot* Domain::find_location(const Place& place, std::uint64_t location) noexcept {
  for (const std::uint64_t number : {place.home, place.partner}) {
    Bucket& bucket = parts_.index.bucket(number);
    for (std::uint32_t mask = Index::candidates(bucket, place.tag); mask != 0; mask &= mask - 1) {
      Slot& slot = Index::first_of(bucket, mask);
      const Entry entry(slot.load(std::memory_order_relaxed));
      if (!entry.empty() && !entry.on_nvm() && entry.location() == location) return &slot;
    }
  }
  return nullptr;
}

void Domain::drop_entry(Slot& slot, std::uint32_t segment, const RecordHeader& record,
                        std::uint64_t replacement) noexcept {
  slot.store(replacement, std::memory_order_release);
  SegmentMeta& row = parts_.arena.meta(segment);
  const std::size_t bytes = record.record_bytes();
  entries_.fetch_sub(1, std::memory_order_relaxed);
  live_bytes_.sub(bytes);
  payload_bytes_.sub(record.payload_bytes());
  row.live_bytes.fetch_sub(static_cast<std::uint32_t>(bytes), std::memory_order_relaxed);
}

void Domain::judge_record_locked(std::uint32_t segment, std::uint32_t offset, const KeyHash& hash,
                                 Tick now, Purpose purpose) {
  SegmentMeta& row = parts_.arena.meta(segment);
  const std::uint64_t location = parts_.arena.location(segment, offset);
  RecordHeader& record = *parts_.arena.record(location);
  const Place place = parts_.index.place_of(hash.low);
  Verdict verdict{};
  unsigned frequency = 0;
  {
    const PairLock pair(parts_.index, place);
    Slot* slot = find_location(place, location);
    if (slot == nullptr) return;  // superseded or deleted
    const Entry entry(slot->load(std::memory_order_relaxed));
    if (is_hidden(segment, hash)) {
      hidden_.add();
      drop_entry(*slot, segment, record);
      return;
    }
    ns_.router->asked(hash.low, entry.frequency());
    if (record.expired(now) ||
        record.incarnation != ns_.incarnation.load(std::memory_order_relaxed)) {
      expirations_.add();
      drop_entry(*slot, segment, record);
      return;
    }
    const auto from = static_cast<Queue>(row.queue);
    if (purpose == Purpose::Judge) {
      verdict = policy_->judge({hash.low, entry.frequency(), from});
    } else {
      verdict = {purpose == Purpose::Compact, from, entry.frequency()};
    }
    if (!verdict.keep && (lower_ == nullptr || record.negative())) {
      evictions_.add();
      drop_entry(*slot, segment, record);
      return;
    }
    // Asked or not, what is spilled is worth the write.
    frequency = purpose == Purpose::Spill ? Entry::kMaxFrequency : entry.frequency();
    if (verdict.keep && row.large != 0) {
      // A record with segments of its own moves by changing its place in line.
      slot->store(entry.with_frequency(verdict.frequency).word(), std::memory_order_release);
    }
  }
  if (!verdict.keep) {
    if (purpose != Purpose::Spill) evictions_.add();
    demote_record_locked(location, record, hash, frequency);
    return;
  }
  kept_.add();
  if (row.large != 0) {
    relabel_locked(segment, verdict.queue);
    row.sequence = next_sequence_++;
    queues_[row.queue].push_back(segment);
    large_kept_ = true;
    return;
  }
  move_record_locked(location, record, hash, verdict.queue, verdict.frequency, now);
}

// Copies a live record to the tier below and swings its entry over, or drops it where it is not
// taken; unless a writer was faster.
void Domain::demote_record_locked(std::uint64_t location, const RecordHeader& record,
                                  const KeyHash& hash, unsigned frequency) {
  const std::uint32_t first = parts_.arena.segment_of(location);
  DemotedRecord item;
  item.ns = ns_index_;
  item.incarnation = record.incarnation;
  item.domain = number_;
  item.hash = hash.low;
  item.high = hash.high;
  item.key = record.key();
  item.value_bytes = record.value_bytes();
  item.expiry = record.expiry;
  item.frequency = frequency;
  pieces_.clear();
  if (!record.large()) {
    pieces_.emplace_back(record.value_data(), record.value_bytes());
  } else {
    std::size_t offset = sizeof(RecordHeader) + record.key_bytes;
    std::size_t left = record.value_bytes();
    for (std::uint32_t segment = first; left != 0; segment = parts_.arena.meta(segment).next) {
      const std::size_t here = std::min(left, parts_.arena.segment_bytes() - offset);
      pieces_.emplace_back(
          reinterpret_cast<const std::uint8_t*>(parts_.arena.data(segment)) + offset, here);
      left -= here;
      offset = 0;
    }
  }
  item.value = pieces_;
  FC_SEQUENCE_POINT("domain:judged");
  Demotion demotion = lower_->demote(item);
  if (spill_until_ns_ != 0) {
    // Nobody waits for this one: there is time until the device has taken more.
    while (!demotion.taken() && demotion.busy && monotonic_ns() < spill_until_ns_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      demotion = lower_->demote(item);
    }
    if (!demotion.taken()) {
      left_behind_ = true;
      return;
    }
  }
  FC_SEQUENCE_POINT("domain:demoting");
  const Place place = parts_.index.place_of(hash.low);
  const PairLock pair(parts_.index, place);
  Slot* slot = find_location(place, location);
  const bool moved = slot != nullptr && demotion.taken() && !is_hidden(first, hash);
  if (slot != nullptr) drop_entry(*slot, first, record, moved ? demotion.entry.word() : 0);
  if (demotion.taken()) lower_->published(demotion, moved);
}

std::uint64_t Domain::spill(Tick now, std::uint64_t deadline_ns, std::uint64_t bytes_most) {
  const std::lock_guard lock(mutex_);
  if (lower_ == nullptr) return 0;
  while (seal_any_locked()) {
  }
  const std::uint64_t before = live_bytes_.get();
  spill_until_ns_ = deadline_ns;
  for (const Queue queue : {Queue::Main, Queue::Small}) {
    auto& sealed = queues_[static_cast<std::size_t>(queue)];
    std::vector<std::uint32_t> left;
    while (!sealed.empty() && before - live_bytes_.get() < bytes_most &&
           monotonic_ns() < deadline_ns) {
      const std::uint32_t segment = sealed.back();
      sealed.pop_back();
      left_behind_ = false;
      empty_locked(segment, now, Purpose::Spill);
      if (left_behind_) left.push_back(segment);
    }
    sealed.insert(sealed.end(), left.rbegin(), left.rend());
  }
  spill_until_ns_ = 0;
  left_behind_ = false;
  return before - std::min(before, live_bytes_.get());
}

// Copies a live record to the end of a queue and swings its entry over, unless a writer was faster.
// The pair's lock is not held while room is made: that may wait for readers.
void Domain::move_record_locked(std::uint64_t location, RecordHeader& record, const KeyHash& hash,
                                Queue queue, unsigned frequency, Tick now) {
  RecordShape shape;
  shape.hash = hash.low;
  shape.high = hash.high;
  shape.key_bytes = record.key_bytes;
  shape.value_bytes = record.value_bytes();
  shape.negative = record.negative();
  shape.expiry = record.expiry;
  shape.incarnation = record.incarnation;
  FC_SEQUENCE_POINT("domain:moving");
  const Reservation copy = append_locked(queue, shape, now, true);
  const Place place = parts_.index.place_of(hash.low);
  const std::uint32_t segment = parts_.arena.segment_of(location);
  if (copy.record == nullptr) {
    const PairLock pair(parts_.index, place);
    if (Slot* slot = find_location(place, location)) {
      evictions_.add();
      drop_entry(*slot, segment, record);
    }
    return;
  }
  std::memcpy(copy.record + 1, &record + 1, record.payload_bytes());
  FC_SEQUENCE_POINT("domain:copied");
  bool moved = false;
  {
    const PairLock pair(parts_.index, place);
    Slot* slot = find_location(place, location);
    if (slot != nullptr && is_hidden(segment, hash)) {
      hidden_.add();
      drop_entry(*slot, segment, record);
    } else if (slot != nullptr) {
      const Entry to = Entry::dram(place.tag, copy.location, record.record_bytes(), frequency);
      count_in(*copy.record);
      drop_entry(*slot, segment, record, to.word());  // one store: the key is never away
      moved = true;
    }
  }
  done(copy, moved);
}

}  // namespace fc
