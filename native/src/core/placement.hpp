// Which instance of a node a key lives on.
//
// The hash space is cut into slots, and a table says whose each one is. The table for n + 1
// instances is made from the one for n: the new instance takes its share of slots, evenly from all
// that are there, and nothing else moves. So one more instance moves the fewest keys that it can,
// one less gives them back to where they were, and shares differ by one slot at most.
//
// Jump consistent hashing (Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm",
// 2014) moves as little without a table, but asks for a step an instance and key: that cost a
// lookup over four instances 5 %, where a load costs nothing that can be measured (docs/adr/0010).
//
// What a node has on disk and in shared memory hangs on this function: it never changes.
#pragma once

#include <array>
#include <cstdint>

#include "core/layout.hpp"

namespace fc {

inline constexpr std::uint32_t kPlacementSlotBits = 12;
inline constexpr std::uint32_t kPlacementSlots = 1u << kPlacementSlotBits;
static_assert(kPlacementSlots / layout::kMaxInstances >= 64);

// The instance of each slot.
using PlacementTable = std::array<std::uint8_t, kPlacementSlots>;

// `instances`: 1..layout::kMaxInstances. Lives as long as the process.
const PlacementTable& placement_table(std::uint32_t instances) noexcept;

// The slot of a key, by the high half of its published hash: the top of that half's lower 32 bits.
inline std::uint32_t placement_slot(std::uint64_t high) noexcept {
  return static_cast<std::uint32_t>(high) >> (32 - kPlacementSlotBits);
}

inline std::uint32_t instance_of(std::uint64_t high, std::uint32_t instances) noexcept {
  return placement_table(instances)[placement_slot(high)];
}

}  // namespace fc
