// Which copies no longer count, since their keys moved: a shard to another node and back, or a key
// to another instance of its node. Somebody else may have written to them meanwhile.
//
// Nothing is looked for when keys move. Instead every segment and region bears the stamp under
// which it was opened, a number that rises whenever keys move away; and it is known up to which
// stamp the copies of a shard are void. A record is hidden when its shard was dropped at the stamp
// of its segment or later, or when there has been a number of instances since that has its key on
// another one. What is hidden is as good as absent, and goes when its segment or region does.
//
// Nothing hidden may get into a younger segment or region, or it would count again. So whoever
// moves a record asks hides() after it has the room for the copy: the shards' stamps are set before
// the number rises, so room under the new number sees them. Else the copy is as old as the drop.
//
// A value that was fetched before a drop must not be installed after it: the tokens are void before
// the number rises. An install that found its own alive has its room under the old one.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "core/hash.hpp"
#include "core/sequence_point.hpp"

namespace fc {

using Stamp = std::uint32_t;
// Of what is damaged: older than all.
inline constexpr Stamp kUnknownStamp = 0;

// Over how many instances a node was split, and since when.
struct InstanceCounts {
  static constexpr std::size_t kMost = 8;
  struct Count {
    std::uint32_t instances;
    Stamp since;  // the last stamp before
  };

  std::uint32_t instance;  // whose this is
  std::uint32_t used;      // of `counts`, oldest first; 0: nothing is known
  std::array<Count, kMost> counts;
  std::uint64_t checksum;  // of the bytes before

  std::uint64_t sum() const noexcept {
    return XXH3_64bits(this, offsetof(InstanceCounts, checksum));
  }
  bool known() const noexcept { return checksum == sum() && used - 1 < kMost; }
};
static_assert(sizeof(InstanceCounts) == 80);

// Threads: any, once it is settled.
class MovedKeys {
 public:
  // `shard_count` 0: there are no shards.
  MovedKeys(std::uint32_t instance, std::uint32_t instances, std::uint32_t shard_count)
      : instance_(instance),
        instances_(instances),
        shard_count_(shard_count),
        since_(std::make_unique<std::atomic<Stamp>[]>(shard_count)) {}
  MovedKeys(const MovedKeys&) = delete;
  MovedKeys& operator=(const MovedKeys&) = delete;

  // ---- at the start, before there are other threads ----
  // A segment or region of an earlier process has this stamp.
  void found(Stamp stamp) noexcept {
    last_found_ = std::max(last_found_, stamp);
    if (stamp == kUnknownStamp) active_.store(true, std::memory_order_relaxed);
  }
  // The copies of a shard that an earlier process dropped.
  void found_dropped(std::uint32_t shard, Stamp since) noexcept {
    last_found_ = std::max(last_found_, since);
    since_[shard].store(since, std::memory_order_relaxed);
  }
  // Nobody knows what became of a shard meanwhile.
  void found_unknown(std::uint32_t shard) noexcept {
    since_[shard].store(kAllFound, std::memory_order_relaxed);
  }
  // After all that was found, and before anything is opened.
  void settle(const InstanceCounts& counts);
  // The last stamp of earlier processes; after settle().
  Stamp last_found() const noexcept { return last_found_; }
  const InstanceCounts& counts() const noexcept { return counts_; }

  // ---- any time ----
  std::uint32_t shard_count() const noexcept { return shard_count_; }
  // Of what is opened now.
  Stamp now() const noexcept { return now_.load(std::memory_order_acquire); }
  // Whether there is anything to be hidden.
  bool active() const noexcept { return active_.load(std::memory_order_relaxed); }
  // `high`: the high half of the key's hash.
  bool hides(Stamp stamp, std::uint64_t high) const noexcept {
    return stamp <= newest_.load(std::memory_order_relaxed) && hides_old(stamp, high);
  }
  // Whether a record must not be added to what was opened under `stamp`, but to something new.
  bool wants_new(Stamp stamp, std::uint64_t high) const noexcept {
    return active() && hides(stamp, high) && stamp != now();
  }

  // Hides what these shards have by now. `keep` writes down (shard, stamp) for the next process,
  // `void_tokens` voids the tokens of all that is being fetched.
  template <class Keep, class VoidTokens>
  void drop(std::span<const std::uint32_t> shards, Keep&& keep, VoidTokens&& void_tokens) {
    const std::lock_guard lock(mutex_);
    const Stamp last = now_.load(std::memory_order_relaxed);
    for (const std::uint32_t shard : shards) {
      keep(shard, last);
      since_[shard].store(last, std::memory_order_relaxed);
    }
    newest_.store(last, std::memory_order_relaxed);
    active_.store(true, std::memory_order_release);
    FC_SEQUENCE_POINT("drop:hidden");
    void_tokens();
    FC_SEQUENCE_POINT("drop:voided");
    now_.store(last + 1, std::memory_order_release);
  }
  Stamp dropped_at(std::uint32_t shard) const noexcept {
    return since_[shard].load(std::memory_order_relaxed);
  }

  std::uint64_t memory_bytes() const noexcept {
    return sizeof(*this) + std::uint64_t{shard_count_} * sizeof(Stamp);
  }

 private:
  static constexpr Stamp kAllFound = ~Stamp{0};  // until it is settled

  bool hides_old(Stamp stamp, std::uint64_t high) const noexcept;

  const std::uint32_t instance_;
  const std::uint32_t instances_;
  const std::uint32_t shard_count_;
  // Fixed once it is settled.
  Stamp last_found_ = 0;
  InstanceCounts counts_{};

  std::mutex mutex_;                                   // one drop at a time
  const std::unique_ptr<std::atomic<Stamp>[]> since_;  // by shard; 0: never dropped
  // Set in this order: since_, newest_, now_.
  std::atomic<Stamp> newest_{0};  // no copy of a later stamp is hidden
  std::atomic<Stamp> now_{1};
  std::atomic<bool> active_{false};
};

}  // namespace fc
