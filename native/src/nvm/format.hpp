// What lies on an NVM device. docs/storage_format.md is the same in words; both change together.
//
//   0        superblock: whose the file is, and how it is divided
//   4 KiB    probe block: written and read back when a device is tried again
//   8 KiB    two heartbeats (heartbeat.hpp)
//   64 KiB   regions, one after the other
//
//   region:  header | records ... | free | hashes | offsets | trailer
//
// A region is written whole, once. Its header goes to the device before the rest, with a generation
// that no region had before: from then on nothing of the region's earlier life is taken for valid.
// The trailer says the same generation; the checksum of every record is seeded with it and with the
// record's place, so a record of another time or place never passes for this one's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "core/clock.hpp"
#include "core/hash.hpp"
#include "core/layout.hpp"
#include "core/moved_keys.hpp"
#include "feature_cache/types.hpp"

namespace fc::nvm {

inline constexpr std::uint32_t kFormatVersion = 3;
inline constexpr std::uint64_t kSuperblockMagic = 0x31304D564E434601ull;  // "\1FCNVM01"
inline constexpr std::uint64_t kHeaderMagic = 0x4745524745524346ull;
inline constexpr std::uint64_t kTrailerMagic = 0x4C4941525445524Full;
inline constexpr std::uint64_t kProbeOffset = 4096;

struct Superblock {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t region_bytes;
  std::uint64_t device_bytes;
  std::uint64_t set_id;  // of all devices that were made together
  std::uint32_t device;  // this one's number among them
  std::uint32_t devices;
  std::uint64_t checksum;  // of the bytes before

  std::uint64_t sum() const noexcept { return XXH3_64bits(this, offsetof(Superblock, checksum)); }
};
static_assert(sizeof(Superblock) == 48);

struct RegionHeader {
  std::uint64_t magic;
  std::uint64_t generation;
  std::uint64_t set_id;
  std::uint32_t region;
  std::uint16_t incarnation;  // of the namespace: all of a region's records have it
  std::uint16_t reserved;
  std::uint64_t namespace_seed;  // names the namespace
  Stamp stamp;                   // under which it was opened (core/moved_keys.hpp)
  std::uint32_t unused[3];
  std::uint64_t checksum;  // of the bytes before

  std::uint64_t sum() const noexcept { return XXH3_64bits(this, offsetof(RegionHeader, checksum)); }
};
static_assert(sizeof(RegionHeader) == 64);

// At the region's very end. Before it: `records` hashes of 8 bytes, `records` offsets of 4 bytes in
// units of kNvmRecordAlignment, rising, padded to 8 bytes.
struct RegionTrailer {
  std::uint64_t magic;
  std::uint64_t generation;
  std::uint32_t records;
  std::uint32_t used_bytes;  // header and records: where the last record ends
  std::uint64_t list_checksum;
  Tick last_expiry;   // of its records; ~0: one does not expire
  Tick first_expiry;  // of those that expire; kNever: none does
  std::uint64_t unused[2];
  std::uint64_t checksum;  // of the bytes before

  std::uint64_t sum() const noexcept {
    return XXH3_64bits(this, offsetof(RegionTrailer, checksum));
  }
};
static_assert(sizeof(RegionTrailer) == 64);

constexpr std::size_t list_bytes(std::size_t records) noexcept {
  return records * sizeof(std::uint64_t) + (records * sizeof(std::uint32_t) + 7) / 8 * 8;
}
static_assert(list_bytes(2) == 2 * layout::kNvmListedBytes);

// Where a region's list says that a record is.
struct ListedRecord {
  std::uint64_t hash;
  std::uint32_t offset;  // bytes, within the region
};

struct RecordHeader {
  static constexpr std::uint32_t kSizeBits = 22;
  static constexpr std::uint32_t kSizeMask = (1u << kSizeBits) - 1;
  static constexpr unsigned kDomainBits = 5;

  std::uint32_t checksum;         // of all that follows, seeded with generation and place
  std::uint32_t size_and_domain;  // value bytes; above them the domain's number in its namespace
  Tick expiry;                    // kNever: does not expire
  std::uint16_t key_bytes;
  std::uint16_t incarnation;

  std::uint32_t value_bytes() const noexcept { return size_and_domain & kSizeMask; }
  unsigned domain() const noexcept {
    return (size_and_domain >> kSizeBits) & ((1u << kDomainBits) - 1);
  }
  bool expired(Tick now) const noexcept { return expiry != kNever && expiry <= now; }
  std::size_t bytes() const noexcept { return bytes_for(key_bytes, value_bytes()); }

  static constexpr std::size_t bytes_for(std::size_t key, std::size_t value) noexcept {
    constexpr std::size_t kMask = layout::kNvmRecordAlignment - 1;
    return (layout::kNvmRecordHeaderBytes + key + value + kMask) & ~kMask;
  }
};
static_assert(sizeof(RecordHeader) == layout::kNvmRecordHeaderBytes);
static_assert(layout::kMaxNvmRecordBytes <= RecordHeader::kSizeMask);
static_assert(layout::kMaxDomainsOfNamespace <= 1u << RecordHeader::kDomainBits);

// `location` is the record's own, in units over all regions.
inline std::uint32_t record_checksum(const std::byte* record, std::size_t payload_bytes,
                                     std::uint64_t generation, std::uint64_t location) noexcept {
  return static_cast<std::uint32_t>(
      XXH3_64bits_withSeed(record + sizeof(std::uint32_t),
                           layout::kNvmRecordHeaderBytes - sizeof(std::uint32_t) + payload_bytes,
                           generation * 0x9E3779B97F4A7C15ull ^ location));
}

// Reads a region's last bytes. False: damaged, or of another generation.
inline bool read_trailer(const std::byte* at, std::size_t region_bytes, std::uint64_t generation,
                         RegionTrailer& trailer) noexcept {
  std::memcpy(&trailer, at, sizeof(trailer));
  return trailer.magic == kTrailerMagic && trailer.checksum == trailer.sum() &&
         trailer.generation == generation && trailer.used_bytes >= sizeof(RegionHeader) &&
         trailer.used_bytes + list_bytes(trailer.records) <= region_bytes - sizeof(trailer);
}

// Reads the list before a good trailer, list_bytes() of its records long. False: damaged, or it
// names places where no records of this region can be.
inline bool read_list(const std::byte* at, const RegionTrailer& trailer,
                      std::vector<ListedRecord>& list) {
  if (XXH3_64bits_withSeed(at, list_bytes(trailer.records), trailer.generation) !=
      trailer.list_checksum) {
    return false;
  }
  list.resize(trailer.records);
  const std::byte* offsets = at + list.size() * sizeof(std::uint64_t);
  std::uint64_t least = sizeof(RegionHeader);
  for (std::size_t i = 0; i < list.size(); ++i) {
    std::uint32_t units = 0;
    std::memcpy(&list[i].hash, at + i * sizeof(std::uint64_t), sizeof(std::uint64_t));
    std::memcpy(&units, offsets + i * sizeof(units), sizeof(units));
    const std::uint64_t offset = std::uint64_t{units} * layout::kNvmRecordAlignment;
    const std::uint64_t next = offset + RecordHeader::bytes_for(1, 0);  // at the soonest
    if (offset < least || next > trailer.used_bytes) return false;
    list[i].offset = static_cast<std::uint32_t>(offset);
    least = next;
  }
  return true;
}

// A record whose sizes and checksum were found right.
struct RecordView {
  RecordHeader header;
  std::string_view key;
  const std::uint8_t* value = nullptr;
};

// Reads the record at `at`, of which `available` bytes are there. False: damaged, or another's.
inline bool read_record(const std::byte* at, std::size_t available, std::uint64_t generation,
                        std::uint64_t location, RecordView& view) noexcept {
  if (available < sizeof(RecordHeader)) return false;
  std::memcpy(&view.header, at, sizeof(RecordHeader));
  const std::size_t payload = std::size_t{view.header.key_bytes} + view.header.value_bytes();
  if (view.header.key_bytes == 0 || view.header.key_bytes > kMaxKeyBytes ||
      payload > available - sizeof(RecordHeader) ||
      view.header.checksum != record_checksum(at, payload, generation, location)) {
    return false;
  }
  view.key = {reinterpret_cast<const char*>(at) + sizeof(RecordHeader), view.header.key_bytes};
  view.value =
      reinterpret_cast<const std::uint8_t*>(at) + sizeof(RecordHeader) + view.header.key_bytes;
  return true;
}

}  // namespace fc::nvm
