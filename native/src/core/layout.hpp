// The numbers that shape the engine's memory. docs/storage_format.md speaks of those that last.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fc::layout {

inline constexpr std::uint32_t kMinSegmentBytes = 16u << 10;
inline constexpr std::uint32_t kMaxSegmentBytes = 1u << 20;
inline constexpr std::uint32_t kSegmentsPerDomainWanted = 128;  // FIFO order stays fine-grained
inline constexpr std::uint32_t kMinDomainSegments = 4;
inline constexpr std::uint64_t kMaxSegments = std::uint64_t{1} << 24;

inline constexpr std::size_t kRecordHeaderBytes = 12;
inline constexpr std::size_t kRecordAlignment = 4;
inline constexpr std::size_t kSlotBytes = 8;
inline constexpr std::size_t kSlotsPerBucket = 8;
inline constexpr double kIndexLoad = 0.91;       // what the expected items fill
inline constexpr double kIndexLoadLimit = 0.94;  // what domains may fill together
inline constexpr double kGhostBytesPerItem = 2.0;
inline constexpr double kSketchBytesPerItem = 8.0;
inline constexpr double kSegmentTableBytes = 80.0;        // its row, domain, stamp, places in lists
inline constexpr std::uint64_t kFixedBytes = 720u << 10;  // locks, write versions, epochs, the head
inline constexpr std::uint64_t kBytesPerDomain = 2u << 10;  // its state, and its namespace's

inline constexpr std::uint32_t kWriteVersionStripes = 1u << 16;
inline constexpr std::uint32_t kLockStripes = 1u << 16;

// The NVM tier.
inline constexpr std::uint32_t kMinRegionBytes = 64u << 10;
inline constexpr std::uint32_t kMaxRegionBytes = 16u << 20;
inline constexpr std::uint32_t kRegionsPerNamespaceWanted = 64;
inline constexpr std::uint32_t kMinNamespaceRegions = 4;    // open, being written, sealed, clean
inline constexpr std::uint64_t kNvmDataOffset = 64u << 10;  // of a device: superblock, probe block
inline constexpr std::uint64_t kMaxNvmBytes = std::uint64_t{1} << 40;  // an entry's location
inline constexpr std::size_t kNvmRecordAlignment = 8;
inline constexpr std::size_t kNvmRecordHeaderBytes = 16;
inline constexpr std::size_t kNvmListedBytes = 12;  // of a record in its region's footer
inline constexpr std::size_t kMaxNvmRecordBytes = std::size_t{2} << 20;
inline constexpr std::size_t kRegionTableBytes = 128;       // a region's row
inline constexpr std::uint64_t kNvmItemsPerSketchItem = 4;  // admission by frequency
inline constexpr std::uint64_t kNvmItemsPerGhost = 2;       // admission by reject-first
inline constexpr std::size_t kMaxNvmDevices = 16;

inline constexpr std::uint32_t kMaxInstances = 64;
inline constexpr std::uint32_t kMaxShards = 1u << 20;
inline constexpr double kShardBytes = 12.0;  // since when its copies count, and whether it is held
inline constexpr std::size_t kMaxNamespaces = 256;
inline constexpr std::size_t kMaxDomains = 1024;
inline constexpr std::size_t kMaxDomainsOfNamespace = 32;
inline constexpr std::uint32_t kMaxAsked = 15;
inline constexpr std::uint64_t kMaxTtlMs = std::uint64_t{366} * 24 * 3600 * 1000;

}  // namespace fc::layout
