// Epochs: when may memory that readers may still be looking at be used again?
//
// A reader enters (publishes the global epoch in a slot), reads, leaves. What is taken out of the
// index is stamped with the epoch and reused only when every reader has entered later. An epoch
// never spans I/O, a callback or encoding; a thread never waits for readers while it is one.
//
// Slots belong to the process, never to shared memory: the dead hold none.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <memory>

#include "core/layout.hpp"
#include "core/spin.hpp"

namespace fc {

class EpochManager {
 public:
  static constexpr std::size_t kSlots = 512;  // readers at one time; more wait for a slot
  static constexpr std::uint64_t kIdle = std::numeric_limits<std::uint64_t>::max();

  EpochManager() : slots_(std::make_unique<ReaderSlot[]>(kSlots)) {}

  static constexpr std::uint64_t memory_bytes() noexcept { return kSlots * sizeof(ReaderSlot); }

  // The epoch to stamp on what was just made unreachable.
  std::uint64_t retire() noexcept { return global_.fetch_add(1, std::memory_order_seq_cst); }
  // Everything stamped below this is out of every reader's sight.
  std::uint64_t safe_before() const noexcept {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    std::uint64_t least = global_.load(std::memory_order_seq_cst);
    for (std::size_t i = 0; i < kSlots; ++i) {
      const std::uint64_t seen = slots_[i].epoch.load(std::memory_order_seq_cst);
      if (seen < least) least = seen;
    }
    return least;
  }

 private:
  friend class EpochGuard;
  friend class EpochGuards;
  struct alignas(64) ReaderSlot {
    std::atomic<std::uint64_t> epoch{kIdle};
  };

  std::atomic<std::uint64_t>* enter() noexcept {
    thread_local std::size_t hint = next_hint_.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t tries = 0;; ++tries) {
      std::atomic<std::uint64_t>& slot = slots_[hint % kSlots].epoch;
      std::uint64_t idle = kIdle;
      // Sequentially consistent: the slot is visible before any index entry is read.
      if (slot.load(std::memory_order_relaxed) == kIdle &&
          slot.compare_exchange_strong(idle, global_.load(std::memory_order_seq_cst),
                                       std::memory_order_seq_cst)) {
        return &slot;
      }
      ++hint;
      if (tries >= kSlots) std::this_thread::yield();
    }
  }

  static inline std::atomic<std::size_t> next_hint_{0};
  std::atomic<std::uint64_t> global_{1};
  const std::unique_ptr<ReaderSlot[]> slots_;
};

class EpochGuard {
 public:
  explicit EpochGuard(EpochManager& epochs) noexcept : slot_(epochs.enter()) {}
  ~EpochGuard() { slot_->store(EpochManager::kIdle, std::memory_order_release); }
  EpochGuard(const EpochGuard&) = delete;
  EpochGuard& operator=(const EpochGuard&) = delete;

 private:
  std::atomic<std::uint64_t>* slot_;
};

// Holds the epochs of several managers, each from when it is first wanted.
class EpochGuards {
 public:
  EpochGuards() noexcept = default;  // slots_ stays as it is: held_ says which of them count
  ~EpochGuards() {
    for (; held_ != 0; held_ &= held_ - 1) {
      slots_[std::countr_zero(held_)]->store(EpochManager::kIdle, std::memory_order_release);
    }
  }
  EpochGuards(const EpochGuards&) = delete;
  EpochGuards& operator=(const EpochGuards&) = delete;

  bool holds(std::uint32_t number) const noexcept { return (held_ >> number & 1) != 0; }
  // `number`: below kMost, of a manager that is not held yet.
  void enter(std::uint32_t number, EpochManager& epochs) noexcept {
    slots_[number] = epochs.enter();
    held_ |= std::uint64_t{1} << number;
  }

 private:
  static constexpr std::uint32_t kMost = layout::kMaxInstances;
  static_assert(kMost <= 64);

  std::uint64_t held_ = 0;
  std::array<std::atomic<std::uint64_t>*, kMost> slots_;
};

}  // namespace fc
