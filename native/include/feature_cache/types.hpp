// Vocabulary of the data plane: what became of a key, and what a fetch may still install.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

namespace fc {

// What became of one key of a read. The values are those of the wire (proto CellStatus).
enum class CellStatus : std::uint8_t {
  Unspecified = 0,
  HitDram = 1,
  HitNvm = 2,
  Fetched = 3,
  Speculative = 4,
  NotFound = 5,
  Miss = 6,
  TimedOut = 7,
  Throttled = 8,
  WrongShard = 9,
  Error = 10,
};
inline constexpr std::size_t kCellStatusCount = 11;

constexpr bool carries_value(CellStatus status) noexcept {
  return status >= CellStatus::HitDram && status <= CellStatus::Speculative;
}

// What became of one key of a write. The values are those of the wire (proto WriteStatus).
enum class WriteStatus : std::uint8_t {
  Unspecified = 0,
  Stored = 1,
  Partial = 2,
  Rejected = 3,
  Error = 4,
};

// What became of a fetched value that wanted to enter the cache.
enum class InstallStatus : std::uint8_t {
  Installed,
  TokenVoid,  // a put, delete or flush of the key came in between: the late result loses
  Rejected,   // no room: larger than its domain, or no index slot
};

using NamespaceIndex = std::uint16_t;
inline constexpr NamespaceIndex kNoNamespace = std::numeric_limits<NamespaceIndex>::max();
using DomainIndex = std::uint16_t;  // numbered over all namespaces of an engine
inline constexpr DomainIndex kNoDomain = std::numeric_limits<DomainIndex>::max();

// Taken when a key is found absent, checked when the fetched answer comes back. A put, delete or
// flush of the key voids it ("Late results lose").
struct Token {
  std::uint32_t write_version = 0;
  std::uint16_t incarnation = 0;
  friend bool operator==(const Token&, const Token&) = default;
};

inline constexpr std::size_t kMaxKeyBytes = 1024;
inline constexpr std::size_t kMaxValueBytes = std::size_t{8} << 20;

}  // namespace fc
