// The request log as it lies in its files; docs/request_log.md describes it.
//
//   file header | description | block | block | ... | last block
//
// A block holds keys as they were asked for, in order: runs (a column of a request each), one
// symbol a key (new, or the exponent of its place in the dictionary), the bits behind exponents,
// and the keys that are new. The dictionary grows from block to block until one that begins it
// anew. The last block has totals alone; a file without it was cut off, and is whole so far.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/hash.hpp"
#include "feature_cache/types.hpp"

namespace fc::request_log {

static_assert(std::endian::native == std::endian::little);

inline constexpr std::uint64_t kMagic = 0x31304C52434600FFull;  // "\xff\0FCRL01"
inline constexpr std::uint32_t kVersion = 1;
inline constexpr std::uint32_t kBlockMagic = 0x4B424C52;  // "RLBK"

inline constexpr std::uint32_t kBlockKeysMax = 64u << 10;
inline constexpr std::uint32_t kBlockKeyBytesMax = 4u << 20;   // of new keys, together
inline constexpr std::uint32_t kBlockRunsMax = kBlockKeysMax;  // each has a key at least
inline constexpr std::uint32_t kDescriptionBytesMax = 1u << 20;
inline constexpr std::uint32_t kDictionaryKeysMax = 64u << 20;
inline constexpr std::size_t kHashedKeyBytes = 16;

// Symbols: 0 is a new key, 1 + e a known one whose place is 2^e or more, less than 2^(e+1).
// Places count from 1.
inline constexpr std::uint8_t kNewKey = 0;
inline constexpr unsigned kExponents = 26;
static_assert(kDictionaryKeysMax <= 1u << kExponents);

struct FileHeader {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t description_bytes;
  std::uint64_t window_start_ms;  // since 1970
  std::uint64_t window_ms;
  std::uint64_t file_id;  // random; seeds the checksums
  std::uint64_t reserved[2];
  std::uint64_t checksum;  // of the bytes before and the description

  std::uint64_t sum(const void* description) const noexcept {
    const std::uint64_t own = XXH3_64bits(this, offsetof(FileHeader, checksum));
    return XXH3_64bits_withSeed(description, description_bytes, own);
  }
};
static_assert(sizeof(FileHeader) == 64);

// Parts of a block, each compressed by zstd, or as it is where that is no smaller.
enum Section : unsigned { kRuns, kSymbols, kBits, kLengths, kKeys, kSections };

struct SectionSize {
  std::uint32_t raw;
  std::uint32_t stored;  // equal to raw: not compressed
};

struct BlockHeader {
  enum Flags : std::uint32_t {
    kLast = 1,            // no keys: the totals of the file are in `total_*`
    kNewDictionary = 2,   // all that came before is forgotten
    kTransposedKeys = 4,  // all new keys have one length: first bytes first
  };
  std::uint32_t magic;
  std::uint32_t flags;
  std::uint32_t sequence;  // from 0, without gaps
  std::uint32_t keys;
  std::uint32_t new_keys;
  std::uint32_t requests;
  std::uint64_t total_requests;  // of the file up to here, this block included
  std::uint64_t total_keys;
  std::uint64_t total_dropped;  // keys that were sampled, and lost before they were written
  SectionSize sections[kSections];
  std::uint64_t checksum;  // of the bytes before and the sections

  std::uint64_t stored_bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const SectionSize& section : sections) sum += section.stored;
    return sum;
  }
  std::uint64_t sum(std::uint64_t file_id, const void* behind) const noexcept {
    const std::uint64_t own = XXH3_64bits_withSeed(this, offsetof(BlockHeader, checksum), file_id);
    return XXH3_64bits_withSeed(behind, stored_bytes(), own);
  }
};
static_assert(sizeof(BlockHeader) == 96);

// The most bytes that a section may have, before its checksum has been looked at.
constexpr std::uint32_t section_limit(unsigned section) noexcept {
  switch (section) {
    case kRuns:
      return kBlockRunsMax * 10;
    case kSymbols:
      return kBlockKeysMax;
    case kBits:
      return kBlockKeysMax * 4;
    case kLengths:
      return kBlockKeysMax * 2;
    default:
      return kBlockKeyBytesMax;
  }
}

// ---- numbers of variable length, in sections and in the description

template <class Bytes>
void put_number(Bytes& to, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) to.push_back(static_cast<std::uint8_t>(value | 0x80));
  to.push_back(static_cast<std::uint8_t>(value));
}

// Reads bytes that may be anything; after a fault all that is read is zero.
class Cursor {
 public:
  Cursor(const std::uint8_t* data, std::size_t size) noexcept : at_(data), left_(size) {}

  std::uint64_t number() noexcept {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (left_ == 0) break;
      --left_;
      const std::uint8_t byte = *at_++;
      value |= std::uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return value;
    }
    failed_ = true;
    left_ = 0;
    return 0;
  }
  std::string_view bytes(std::uint64_t size) noexcept {
    if (size > left_) {
      failed_ = true;
      left_ = 0;
      return {};
    }
    const std::string_view found(reinterpret_cast<const char*>(at_), size);
    at_ += size;
    left_ -= size;
    return found;
  }
  std::size_t left() const noexcept { return left_; }
  bool failed() const noexcept { return failed_; }

 private:
  const std::uint8_t* at_;
  std::size_t left_;
  bool failed_ = false;
};

}  // namespace fc::request_log
