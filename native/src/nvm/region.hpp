// A region's row: what it is good for now.
//
// A region's life: Free → Open (its buffer fills) → Writing → Sealed → Emptying (its entries leave
// the index) → Free. While it has a buffer, its records are read from there. It is used again when
// no entry points into it, no reader's epoch is as old as that, and no read of it is under way
// (pins): so a read of the device always finds what its entry promised.
//
// Rows may lie in shared memory (state.hpp). What only this process knows (pins, writers, the
// buffer's address, the namespace's index) is made anew by whoever adopts them. What does not
// change any more once a region is on its device, and what is known of the device, has a sum each:
// adopted as they are, a wrong one would bring back at a reboot what was deleted.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/clock.hpp"
#include "core/hash.hpp"
#include "core/layout.hpp"
#include "core/moved_keys.hpp"
#include "feature_cache/types.hpp"

namespace fc::nvm {

enum class RegionState : std::uint8_t { Free, Open, Writing, Sealed, Emptying };
inline constexpr std::size_t kRegionStates = 5;
inline constexpr std::uint32_t kNoBuffer = ~0u;
inline constexpr std::uint32_t kUnknownRecords = ~0u;
inline constexpr Tick kForever = ~Tick{0};
inline constexpr std::uint64_t kUnknownGeneration = ~0ull;

struct alignas(64) Region {
  Region() noexcept { device_sum = sum_of_device(); }

  std::atomic<std::byte*> buffer{nullptr};
  std::atomic<std::uint64_t> generation{0};
  std::uint64_t namespace_seed = 0;       // what `ns` is called beyond this process
  std::atomic<std::uint32_t> pins{0};     // reads of the device under way
  std::atomic<std::uint32_t> writers{0};  // records reserved, not yet published or given up
  std::atomic<std::uint32_t> items{0};    // indexed ones
  std::uint32_t buffer_number = kNoBuffer;
  std::atomic<std::uint16_t> incarnation{0};
  std::atomic<NamespaceIndex> ns{kNoNamespace};
  std::atomic<RegionState> state{RegionState::Free};
  std::uint8_t on_device = 0;  // this generation was written whole
  std::uint32_t used = 0;      // guarded by its namespace's lock while Open, then constant
  Tick last_expiry = 0;        // likewise; ~0: holds an item that does not expire
  Tick first_expiry = kNever;  // likewise; of those that expire
  // Records that its list on the device names. Like the next one the region writer's own, and of
  // whoever is there before it.
  std::uint32_t listed = 0;
  // Whose header is on the device, while another one is being written this or that; 0: none. Read
  // by others, too.
  std::atomic<std::uint64_t> device_generation{0};
  // Under which it was opened, and above that a check over it. Read by others, too.
  std::atomic<std::uint64_t> stamp_word{0};
  std::uint64_t sealed_sum = 0;
  std::uint64_t device_sum = 0;

  Stamp stamp() const noexcept {
    return static_cast<Stamp>(stamp_word.load(std::memory_order_relaxed));
  }
  // When its generation is known.
  void set_stamp(Stamp stamp) noexcept {
    stamp_word.store(stamp_word_of(stamp), std::memory_order_relaxed);
  }
  bool stamp_is_whole() const noexcept {
    return stamp_word.load(std::memory_order_relaxed) == stamp_word_of(stamp());
  }
  // One more of its items expires then.
  void count_expiry(Tick expiry) noexcept {
    last_expiry = expiry == kNever ? kForever : std::max(last_expiry, expiry);
    if (expiry != kNever && (first_expiry == kNever || expiry < first_expiry)) {
      first_expiry = expiry;
    }
  }
  std::uint64_t stamp_word_of(Stamp stamp) const noexcept {
    const std::uint64_t fields[] = {generation.load(std::memory_order_relaxed), stamp};
    return XXH3_64bits(fields, sizeof(fields)) << 32 | stamp;
  }
  std::uint64_t sum_of_sealed() const noexcept {
    const std::uint64_t fields[] = {generation.load(std::memory_order_relaxed), namespace_seed,
                                    incarnation.load(std::memory_order_relaxed), used,
                                    std::uint64_t{last_expiry} << 32 | first_expiry};
    return XXH3_64bits(fields, sizeof(fields));
  }
  std::uint64_t sum_of_device() const noexcept {
    const std::uint64_t fields[] = {device_generation.load(std::memory_order_relaxed), listed};
    return XXH3_64bits(fields, sizeof(fields));
  }
  // Cut off between the two stores neither is known: what follows from that is safe.
  void set_listed(std::uint32_t records) noexcept {
    listed = records;
    device_sum = sum_of_device();
  }
  void set_device_generation(std::uint64_t of) noexcept {
    device_generation.store(of, std::memory_order_release);
    device_sum = sum_of_device();
  }
};
static_assert(sizeof(Region) == 128);
static_assert(sizeof(Region) <= layout::kRegionTableBytes);

}  // namespace fc::nvm
