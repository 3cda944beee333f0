// The log of what became invalid on NVM, as it lies in its file.
//
//   header | block | block | ...
//   block:  block header | entries
//
// A block is what one sync made durable, and the next is written after that: so only the last can
// be torn. Its checksum is seeded with the file's own id, so nothing of an earlier log passes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/check.hpp"
#include "core/hash.hpp"
#include "core/layout.hpp"

namespace fc::nvm {

static_assert(std::endian::native == std::endian::little);  // as all that lies on a device

inline constexpr std::uint64_t kJournalMagic = 0x31304A564E434601ull;  // "\1FCNVJ01"
inline constexpr std::uint32_t kJournalVersion = 1;

// One thing that became invalid.
struct JournalEntry {
  enum class Kind : std::uint8_t {
    Record = 1,  // the record at this place, if the region has this generation
    Region = 2,  // all of the region's, if it has this generation
    Flush = 3,   // all of this namespace's in regions of a lower generation
  };
  static constexpr unsigned kGenerationBits = 60;
  static constexpr std::uint64_t kGenerationMask = (std::uint64_t{1} << kGenerationBits) - 1;
  static constexpr std::size_t kOffsetUnit = layout::kNvmRecordAlignment;

  // `offset` is in bytes from the region's start.
  static JournalEntry record(std::uint32_t region, std::uint64_t generation,
                             std::uint32_t offset) noexcept {
    FC_DCHECK(offset % kOffsetUnit == 0);
    return {head_of(Kind::Record, generation), region | std::uint64_t{offset / kOffsetUnit} << 32};
  }
  static JournalEntry region_gone(std::uint32_t region, std::uint64_t generation) noexcept {
    return {head_of(Kind::Region, generation), region};
  }
  static JournalEntry flush(std::uint64_t namespace_seed, std::uint64_t below) noexcept {
    return {head_of(Kind::Flush, below), namespace_seed};
  }

  Kind kind() const noexcept { return static_cast<Kind>(head >> kGenerationBits); }
  std::uint64_t generation() const noexcept { return head & kGenerationMask; }
  std::uint32_t region() const noexcept { return static_cast<std::uint32_t>(what); }
  std::uint64_t offset() const noexcept { return (what >> 32) * kOffsetUnit; }
  std::uint64_t namespace_seed() const noexcept { return what; }
  bool known() const noexcept { return kind() >= Kind::Record && kind() <= Kind::Flush; }
  bool operator==(const JournalEntry&) const noexcept = default;

  std::uint64_t head;  // kind, generation
  std::uint64_t what;  // region and offset, or namespace

 private:
  static std::uint64_t head_of(Kind kind, std::uint64_t generation) noexcept {
    FC_DCHECK(generation <= kGenerationMask);
    return std::uint64_t{static_cast<std::uint8_t>(kind)} << kGenerationBits | generation;
  }
};
static_assert(sizeof(JournalEntry) == 16);

struct JournalHeader {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint64_t set_id;  // of the devices whose records it is about
  std::uint64_t log_id;  // of this file, random
  std::uint64_t unused[3];
  std::uint64_t checksum;  // of the bytes before

  std::uint64_t sum() const noexcept {
    return XXH3_64bits(this, offsetof(JournalHeader, checksum));
  }
  std::uint64_t seed() const noexcept { return XXH3_64bits_withSeed(&log_id, 8, set_id); }
};
static_assert(sizeof(JournalHeader) == 64);

struct JournalBlockHeader {
  static constexpr std::uint32_t kEntriesMax = 64 * 1024;

  std::uint32_t entries;  // at least one
  std::uint32_t reserved;
  std::uint64_t sequence;  // from 1, without gaps
  std::uint64_t checksum;  // of the bytes before and the entries behind

  std::uint64_t sum(std::uint64_t seed, const void* behind) const noexcept {
    const std::uint64_t own =
        XXH3_64bits_withSeed(this, offsetof(JournalBlockHeader, checksum), seed);
    return XXH3_64bits_withSeed(behind, std::size_t{entries} * sizeof(JournalEntry), own);
  }
  std::size_t bytes() const noexcept {
    return sizeof(JournalBlockHeader) + std::size_t{entries} * sizeof(JournalEntry);
  }
  // Whether it may be one at all, before its checksum is looked at.
  bool plausible() const noexcept { return entries - 1 < kEntriesMax && reserved == 0; }
};
static_assert(sizeof(JournalBlockHeader) == 24);

}  // namespace fc::nvm
