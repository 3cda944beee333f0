// A record of the DRAM log: header, key, value, one after the other, aligned to four bytes.
//
// A record is immutable once an index entry points at it. The header's sizes are written under the
// domain's lock before the segment's end moves on, so a segment can be walked from its start even
// when a writer died half way.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

#include "core/clock.hpp"
#include "core/layout.hpp"
#include "feature_cache/types.hpp"

namespace fc {

struct RecordHeader {
  static constexpr std::uint32_t kSizeBits = 24;
  static constexpr std::uint32_t kSizeMask = (1u << kSizeBits) - 1;
  static constexpr std::uint32_t kNegative = 1u << 24;  // the store said: no value
  static constexpr std::uint32_t kLarge = 1u << 25;     // goes on in further segments

  std::uint32_t size_and_flags;
  Tick expiry;  // kNever: does not expire
  std::uint16_t key_bytes;
  std::uint16_t incarnation;  // names the namespace and its time since the last flush

  std::uint32_t value_bytes() const noexcept { return size_and_flags & kSizeMask; }
  bool negative() const noexcept { return (size_and_flags & kNegative) != 0; }
  bool large() const noexcept { return (size_and_flags & kLarge) != 0; }
  bool expired(Tick now) const noexcept { return expiry != kNever && expiry <= now; }

  const char* key_data() const noexcept { return reinterpret_cast<const char*>(this + 1); }
  std::string_view key() const noexcept { return {key_data(), key_bytes}; }
  const std::uint8_t* value_data() const noexcept {
    return reinterpret_cast<const std::uint8_t*>(this + 1) + key_bytes;
  }
  std::size_t payload_bytes() const noexcept { return std::size_t{key_bytes} + value_bytes(); }
  std::size_t record_bytes() const noexcept { return bytes_for(key_bytes, value_bytes()); }
  bool holds(std::string_view key, std::uint16_t of_incarnation) const noexcept {
    return incarnation == of_incarnation && key_bytes == key.size() &&
           std::memcmp(key_data(), key.data(), key.size()) == 0;
  }

  static constexpr std::size_t bytes_for(std::size_t key, std::size_t value) noexcept {
    constexpr std::size_t kMask = layout::kRecordAlignment - 1;
    return (layout::kRecordHeaderBytes + key + value + kMask) & ~kMask;
  }
};
static_assert(sizeof(RecordHeader) == layout::kRecordHeaderBytes);
static_assert(alignof(RecordHeader) == layout::kRecordAlignment);
static_assert(kMaxValueBytes <= RecordHeader::kSizeMask);

}  // namespace fc
