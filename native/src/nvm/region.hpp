// A region's row: what it is good for now.
//
// A region's life: Free → Open (its buffer fills) → Writing → Sealed → Emptying (its entries leave
// the index) → Free. While it has a buffer, its records are read from there. It is used again when
// no entry points into it, no reader's epoch is as old as that, and no read of it is under way
// (pins): so a read of the device always finds what its entry promised.
//
// Rows may lie in shared memory (state.hpp). What only this process knows (pins, writers, the
// buffer's address, the namespace's index) is made anew by whoever adopts them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/clock.hpp"
#include "core/layout.hpp"
#include "feature_cache/types.hpp"

namespace fc::nvm {

enum class RegionState : std::uint8_t { Free, Open, Writing, Sealed, Emptying };
inline constexpr std::size_t kRegionStates = 5;
inline constexpr std::uint32_t kNoBuffer = ~0u;

struct alignas(64) Region {
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
  std::uint32_t listed = 0;    // records that its list on the device names
  // Whose header is on the device, while another one is being written this or that; 0: none.
  std::atomic<std::uint64_t> device_generation{0};
};
static_assert(sizeof(Region) == 128);
static_assert(sizeof(Region) <= layout::kRegionTableBytes);

}  // namespace fc::nvm
