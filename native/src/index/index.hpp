// The index of both tiers: cache-line buckets of eight 8-byte entries, two buckets a key.
//
// A key lives in its home bucket or in its home's partner. The partner of bucket b under tag t is
// (f(t) - b) mod n: an involution that needs no power of two and no key, so an entry can be moved
// knowing only the entry (partial-key cuckoo hashing, Fan et al., CoNEXT '14). Inserts prefer the
// home bucket; a full pair makes room by moving entries, at most two steps away.
//
// Threads. Readers load entries and take no lock. Writers of a key hold the locks of both its
// buckets (PairLock), so a key can never get into two slots. Moving an entry copies it before the
// old slot is cleared and bumps the tag's move version in between; a reader that found nothing
// looks again under that version (a miss is confirmed, a hit is not slowed), so a moved key is
// never hidden. Readers change only the frequency, by compare-and-swap, so that no reader brings a
// dead entry back.
//
// The slots live in memory that the owner hands in (it may outlive the process); locks and versions
// live in the process.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "core/check.hpp"
#include "core/hash.hpp"
#include "core/layout.hpp"
#include "core/sequence_point.hpp"
#include "core/spin.hpp"
#include "index/entry.hpp"
#include "index/move_journal.hpp"

namespace fc {

using Slot = std::atomic<std::uint64_t>;
static_assert(sizeof(Slot) == 8 && Slot::is_always_lock_free);

struct alignas(64) Bucket {
  Slot slots[layout::kSlotsPerBucket];
};
static_assert(sizeof(Bucket) == 64);

// Where a key may be: its two buckets and its tag.
struct Place {
  std::uint64_t home;
  std::uint64_t partner;
  std::uint16_t tag;
};

// Where the buckets are, for those who look at many keys: two words that they keep near.
struct IndexView {
  Bucket* buckets;
  std::uint64_t bucket_count;

  std::uint64_t home_of(std::uint64_t hash_low) const noexcept {
    return scale(hash_low, bucket_count);
  }
  std::uint64_t partner_of(std::uint64_t number, std::uint16_t tag) const noexcept {
    const std::uint64_t f = scale((std::uint64_t{tag} + 1) * 0x9E3779B97F4A7C15ull, bucket_count);
    return f >= number ? f - number : f + bucket_count - number;
  }
  void prefetch(std::uint64_t number) const noexcept { __builtin_prefetch(&buckets[number]); }
  Bucket& bucket(std::uint64_t number) const noexcept { return buckets[number]; }
};

class Index {
 public:
  // `moves`: where moves are announced to the next process.
  Index(Bucket* buckets, std::uint64_t bucket_count, std::span<MoveRow> moves = {});

  static std::uint16_t tag_of(std::uint64_t hash_low) noexcept {
    return static_cast<std::uint16_t>(hash_low);
  }
  IndexView view() const noexcept { return {buckets_, bucket_count_}; }
  std::uint64_t home_of(std::uint64_t hash_low) const noexcept { return view().home_of(hash_low); }
  std::uint64_t partner_of(std::uint64_t bucket, std::uint16_t tag) const noexcept {
    return view().partner_of(bucket, tag);
  }
  Place place_of(std::uint64_t hash_low) const noexcept {
    const std::uint64_t home = home_of(hash_low);
    const std::uint16_t tag = tag_of(hash_low);
    return {home, partner_of(home, tag), tag};
  }
  void prefetch(std::uint64_t bucket) const noexcept { __builtin_prefetch(&buckets_[bucket]); }
  Bucket& bucket(std::uint64_t number) noexcept { return buckets_[number]; }
  std::uint64_t bucket_count() const noexcept { return bucket_count_; }
  std::uint64_t slot_count() const noexcept { return bucket_count_ * layout::kSlotsPerBucket; }

  // The slots of a bucket that may carry the tag, as a mask for first_of(); the caller looks at
  // each slot again, by an atomic load.
  static std::uint32_t candidates(const Bucket& bucket, std::uint16_t tag) noexcept {
#if defined(__SSE2__) && !defined(FC_TSAN)
    // One compare of 16-bit lanes; the tag is the top lane of each word. The vector loads are not
    // atomic as a whole, but each aligned word is: what they say is only where to look.
    const auto* words = reinterpret_cast<const __m128i*>(bucket.slots);
    const __m128i wanted = _mm_set1_epi16(static_cast<short>(tag));
    const __m128i low = _mm_packs_epi16(_mm_cmpeq_epi16(_mm_load_si128(words), wanted),
                                        _mm_cmpeq_epi16(_mm_load_si128(words + 1), wanted));
    const __m128i high = _mm_packs_epi16(_mm_cmpeq_epi16(_mm_load_si128(words + 2), wanted),
                                         _mm_cmpeq_epi16(_mm_load_si128(words + 3), wanted));
    const auto lanes = static_cast<std::uint32_t>(_mm_movemask_epi8(low)) |
                       static_cast<std::uint32_t>(_mm_movemask_epi8(high)) << 16;
    return lanes & 0x88888888u;
#else
    std::uint32_t mask = 0;
    for (unsigned i = 0; i < layout::kSlotsPerBucket; ++i) {
      const std::uint64_t word = bucket.slots[i].load(std::memory_order_relaxed);
      mask |= static_cast<std::uint32_t>((word >> Entry::kTagShift) == tag) << (4 * i + 3);
    }
    return mask;
#endif
  }
  static Slot& first_of(Bucket& bucket, std::uint32_t mask) noexcept {
    return bucket.slots[static_cast<unsigned>(__builtin_ctz(mask)) / 4];
  }

  // Calls match(Entry, Slot&) for every entry of the key's tag until it returns true. Under no
  // lock; a false answer is certain: no entry that matched was present all the time.
  template <class Match>
  bool find(const Place& place, Match&& match) noexcept {
    for (;;) {
      const std::uint32_t version = move_version(place.tag).load(std::memory_order_acquire);
      if (find_in(place.home, place.tag, match)) return true;
      FC_SEQUENCE_POINT("index:between_buckets");
      if (place.partner != place.home && find_in(place.partner, place.tag, match)) return true;
      std::atomic_thread_fence(std::memory_order_acquire);
      if (move_version(place.tag).load(std::memory_order_relaxed) == version) return false;
    }
  }
  template <class Match>
  bool find_in(std::uint64_t number, std::uint16_t tag, Match& match) noexcept {
    Bucket& in = buckets_[number];
    for (std::uint32_t mask = candidates(in, tag); mask != 0; mask &= mask - 1) {
      Slot& slot = first_of(in, mask);
      const Entry entry(slot.load(std::memory_order_acquire));
      if (!entry.empty() && entry.tag() == tag && match(entry, slot)) return true;
    }
    return false;
  }

  // Raises the frequency of a hit. May fail under contention: it is only a hint.
  static void touch(Slot& slot, Entry seen) noexcept {
    if (seen.frequency() >= Entry::kMaxFrequency) return;
    std::uint64_t expected = seen.word();
    slot.compare_exchange_strong(expected, seen.with_frequency(seen.frequency() + 1).word(),
                                 std::memory_order_relaxed);
  }

  // ---- for the holder of the key's PairLock ----

  // A free slot of the pair, made by moving others when both buckets are full; null when even that
  // does not help.
  Slot* free_slot_locked(const Place& place) noexcept;
  // Any entry of the pair that `worse(Entry)` accepts, for the caller to drop.
  template <class Worse>
  Slot* victim_locked(const Place& place, Worse&& worse) noexcept {
    for (const std::uint64_t number : {place.home, place.partner}) {
      for (Slot& slot : buckets_[number].slots) {
        const Entry entry(slot.load(std::memory_order_relaxed));
        if (!entry.empty() && worse(entry)) return &slot;
      }
    }
    return nullptr;
  }

  // The slot of the record at this place on NVM.
  Slot* find_nvm_locked(const Place& place, std::uint64_t nvm_location) noexcept {
    for (const std::uint64_t number : {place.home, place.partner}) {
      Bucket& in = buckets_[number];
      for (std::uint32_t mask = candidates(in, place.tag); mask != 0; mask &= mask - 1) {
        Slot& slot = first_of(in, mask);
        const Entry entry(slot.load(std::memory_order_relaxed));
        if (entry.on_nvm() && entry.nvm_location() == nvm_location) return &slot;
      }
    }
    return nullptr;
  }

  // ---- for nobody's lock ----

  // Calls gone(Entry) for every entry that goes(Entry) accepts, and clears it. Walks the whole
  // index until a walk finds none; an entry that is moved behind the walk's back in every walk
  // stays.
  template <class Goes, class Gone>
  void clear_all(Goes&& goes, Gone&& gone) {
    constexpr unsigned kWalks = 4;
    for (unsigned walk = 0; walk < kWalks; ++walk) {
      bool found = false;
      for (std::uint64_t number = 0; number < bucket_count_; ++number) {
        for (Slot& slot : buckets_[number].slots) {
          if (!goes(Entry(slot.load(std::memory_order_relaxed)))) continue;
          const std::lock_guard lock(lock_of(number));
          const Entry entry(slot.load(std::memory_order_relaxed));
          if (!goes(entry)) continue;
          slot.store(0, std::memory_order_release);
          gone(entry);
          found = true;
        }
      }
      if (!found) return;
    }
  }

  // Ends the moves that another process had begun: no entry is in two places then. Before there
  // are other threads; may be cut off and called again.
  void finish_moves() noexcept;

  // Bytes beside the buckets.
  static constexpr std::uint64_t side_bytes() noexcept {
    return layout::kLockStripes * sizeof(SpinLock) + kMoveVersions * sizeof(std::uint32_t);
  }
  std::uint64_t moves() const noexcept { return moves_.load(std::memory_order_relaxed); }

 private:
  friend class PairLock;

  SpinLock& lock_of(std::uint64_t number) noexcept {
    return locks_[number & (layout::kLockStripes - 1)];
  }
  std::atomic<std::uint32_t>& move_version(std::uint16_t tag) noexcept {
    return move_versions_[tag & (kMoveVersions - 1)];
  }
  Slot* make_room_locked(std::uint64_t number, const std::uint64_t* held, unsigned held_count,
                         unsigned depth) noexcept;
  bool lock_extra(std::uint64_t number, const std::uint64_t* held, unsigned held_count,
                  bool* locked) noexcept;

  static constexpr std::uint32_t kMoveVersions = 4096;

  Bucket* const buckets_;
  const std::uint64_t bucket_count_;
  const std::unique_ptr<SpinLock[]> locks_;
  const std::unique_ptr<std::atomic<std::uint32_t>[]> move_versions_;
  MoveJournal journal_;
  std::atomic<std::uint64_t> moves_{0};
};

// Holds the locks of both buckets of a key. Stripes are taken in ascending order: no deadlock.
class PairLock {
 public:
  PairLock(Index& index, const Place& place) noexcept
      : first_(&index.lock_of(place.home)), second_(&index.lock_of(place.partner)) {
    if (first_ == second_) {
      second_ = nullptr;
    } else if (second_ < first_) {
      std::swap(first_, second_);
    }
    first_->lock();
    if (second_ != nullptr) second_->lock();
  }
  ~PairLock() {
    if (second_ != nullptr) second_->unlock();
    first_->unlock();
  }
  PairLock(const PairLock&) = delete;
  PairLock& operator=(const PairLock&) = delete;

 private:
  SpinLock* first_;
  SpinLock* second_;
};

}  // namespace fc
