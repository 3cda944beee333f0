// The first pages of the arena: what it is, and the little state that adoption needs beyond index
// and segment table. docs/storage_format.md is the same in words; both change together.
//
//   [header][namespace rows][domain rows][move rows] kArenaHeadBytes
//   [segment table][buckets][hints][segments]
//
// The constant part is checksummed. What changes is either checked word by word (an incarnation
// carries its own check) or made up anew at adoption from index and segment table.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/hash.hpp"
#include "core/layout.hpp"
#include "core/moved_keys.hpp"
#include "index/move_journal.hpp"

namespace fc {

inline constexpr std::uint64_t kArenaMagic = 0x3130414E45524143ull;  // "CARENA01"
inline constexpr std::uint32_t kArenaVersion = 2;

// A namespace that has records here.
struct NamespaceRow {
  std::uint64_t seed;               // 0: the row is free
  std::atomic<std::uint64_t> word;  // incarnation, and a check over both

  static std::uint64_t word_of(std::uint64_t seed, std::uint16_t incarnation) noexcept {
    const std::array<std::uint64_t, 2> both{seed, incarnation};
    return (XXH3_64bits(both.data(), sizeof(both)) & ~std::uint64_t{0xffff}) | incarnation;
  }
  // 0: damaged.
  std::uint16_t incarnation() const noexcept {
    const std::uint64_t found = word.load(std::memory_order_acquire);
    const auto number = static_cast<std::uint16_t>(found);
    return found == word_of(seed, number) ? number : std::uint16_t{0};
  }
};
static_assert(sizeof(NamespaceRow) == 16);

// A domain that has segments here; its number is what their rows say.
struct DomainRow {
  std::uint64_t ns_seed;  // 0: the row is free
  std::uint64_t name_hash;
  std::uint64_t hint_offset;  // of its ghosts or sketch, from the hints' start
  std::uint64_t hint_bytes;   // 0: in process memory
  // As an orderly stop left them.
  std::uint64_t entries;
  std::uint64_t live_bytes;
  std::uint64_t payload_bytes;
  std::atomic<std::uint32_t> filled_once;
  std::uint32_t policy;  // whose hints they are
};
static_assert(sizeof(DomainRow) == 64);

struct ArenaHeader {
  static constexpr std::size_t kMoveRows = 256;

  // ---- constant ----
  std::uint64_t magic;  // written last: a file without it was never finished
  std::uint32_t version;
  std::uint32_t head_bytes;
  std::uint64_t memory_id;     // random
  std::uint64_t memory_bytes;  // as configured
  std::uint32_t segment_bytes;
  std::uint32_t segment_count;
  std::uint64_t bucket_count;
  std::uint64_t nvm_slots;
  std::uint64_t hint_bytes;
  std::uint64_t total_bytes;
  std::array<char, 32> boot_id;
  std::uint64_t tick_base_ms;  // CLOCK_BOOTTIME at tick 0
  std::uint64_t checksum;      // of the bytes before

  // ---- changing ----
  enum State : std::uint32_t { kServing = 0, kClean = 1 };
  std::atomic<std::uint32_t> state;
  std::uint32_t reserved;
  std::uint64_t clean_sum;  // of the rows below and the segment table, as an orderly stop left them

  std::uint64_t sum() const noexcept { return XXH3_64bits(this, offsetof(ArenaHeader, checksum)); }
};
static_assert(sizeof(ArenaHeader) == 136);

struct ArenaHead {
  ArenaHeader header;
  InstanceCounts counts;  // written by a start, before it serves
  std::array<std::byte, 4096 - sizeof(ArenaHeader) - sizeof(InstanceCounts)> unused;
  std::array<NamespaceRow, layout::kMaxNamespaces> namespaces;
  std::array<DomainRow, layout::kMaxDomains> domains;
  std::array<MoveRow, ArenaHeader::kMoveRows> moves;
};
static_assert(sizeof(ArenaHead) == 77824 && sizeof(ArenaHead) % 4096 == 0);

}  // namespace fc
