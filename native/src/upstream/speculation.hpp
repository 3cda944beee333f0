// Which late reads of a namespace may ask the store, and how that went.
//
// The budget is a share of the keys asked, and it holds over every second: whenever a lookup is
// launched, those launched in the second before it, itself included, are at most that share of the
// keys asked in the same second. Nothing is saved up: after an idle hour there is as little to
// spend as the last second's keys give. Below 1 / budget keys in a second there is none at all.
//
// Time is cut into slots of a tenth of a second. Launches are counted over the running slot and ten
// more, so over more than a second; keys over the running slot and nine more, so over less.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string_view>

#include "core/counter.hpp"

namespace fc {

class SpeculationBudget {
 public:
  static constexpr std::uint64_t kSlotNs = 100'000'000;
  static constexpr std::uint64_t kSlotsPerSecond = 10;

  explicit SpeculationBudget(double share) : share_(share) {}

  // Keys of a request, at `now_ns` of CLOCK_MONOTONIC. Any thread, without a lock.
  void asked(std::uint64_t now_ns, std::size_t keys) noexcept {
    const std::uint64_t slot = now_ns / kSlotNs;
    std::atomic<std::uint64_t>& place = asked_[slot % kSlots];
    std::uint64_t seen = place.load(std::memory_order_relaxed);
    std::uint64_t counted = 0;
    do {
      // Who was held up for longer than the ring is round finds a later slot there.
      if (slot_of(seen) > slot) return;
      counted = slot_of(seen) == slot ? seen + keys : pack(slot, keys);
    } while (!place.compare_exchange_weak(seen, counted, std::memory_order_relaxed));
  }
  // Takes up to `wanted` launches; returns how many there were. Any thread.
  std::size_t take(std::uint64_t now_ns, std::size_t wanted) noexcept;

 private:
  static constexpr std::size_t kSlots = 16;  // a power of two above kSlotsPerSecond + 1
  static constexpr unsigned kCountBits = 28;
  static_assert(kSlots > kSlotsPerSecond + 1);

  // A slot's number and its count in one word: nobody adds to a count that was begun anew.
  static constexpr std::uint64_t pack(std::uint64_t slot, std::uint64_t count) noexcept {
    return slot << kCountBits | count;
  }
  static constexpr std::uint64_t slot_of(std::uint64_t word) noexcept { return word >> kCountBits; }
  static constexpr std::uint64_t count_of(std::uint64_t word) noexcept {
    return word & ((std::uint64_t{1} << kCountBits) - 1);
  }
  // Counts of the running slot and of `before` slots before it.
  template <class Ring>
  static std::uint64_t sum(const Ring& ring, std::uint64_t slot, std::uint64_t before) noexcept;

  const double share_;
  std::array<std::atomic<std::uint64_t>, kSlots> asked_{};
  std::mutex mutex_;
  std::array<std::uint64_t, kSlots> launched_{};  // guarded by mutex_
  std::uint64_t newest_slot_ = 0;                 // guarded by mutex_
};

// Speculative lookups of one namespace.
struct Speculation {
  explicit Speculation(double share) : budget(share) {}
  void visit(CounterVisitor& visitor, std::string_view ns) const;

  SpeculationBudget budget;
  Counter launched;      // flights
  Counter won_by_store;  // cells that waited for both
  Counter won_by_nvm;
  Counter denied;  // cells
};

}  // namespace fc
