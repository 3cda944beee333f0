// The 8-byte index entry: all that a probe knows before it touches a record.
//
//   63..48 tag        16 bits of the key's hash; a hint, never proof
//   47..45 frequency   0..7, raised by readers by compare-and-swap
//   44     tier        0 DRAM, 1 NVM
//   43..39 size class  never 0 in a live entry
//                      DRAM: cache lines of the record, 31 for "31 or more"
//                      NVM: half octaves, 64, 96, 128, 192, ... 2 MiB: what to read at most
//   38..0  location    DRAM: 4-byte units from the arena's start
//                      NVM: two more bits of the hash, then 37 bits of 8-byte units over all
//                      regions
//
// A zero word is an empty slot: a live entry has a size class of at least 1.
//
// An NVM entry's key cannot be compared without a read, so it carries two bits more of the hash: a
// write that drops every entry that may be its key's then takes another key's along at most once in
// 16,000 times (16 slots a pair / 2^18).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fc {

class Entry {
 public:
  static constexpr unsigned kTagShift = 48;
  static constexpr unsigned kFrequencyShift = 45;
  static constexpr unsigned kTierShift = 44;
  static constexpr unsigned kSizeShift = 39;
  static constexpr std::uint64_t kLocationMask = (std::uint64_t{1} << kSizeShift) - 1;
  static constexpr std::uint64_t kFrequencyMask = std::uint64_t{7} << kFrequencyShift;
  static constexpr unsigned kMaxFrequency = 7;
  static constexpr std::size_t kCacheLine = 64;
  static constexpr unsigned kNvmTagShift = 37;
  static constexpr std::uint64_t kNvmLocationMask = (std::uint64_t{1} << kNvmTagShift) - 1;
  static constexpr std::uint64_t kNvmBit = std::uint64_t{1} << kTierShift;
  // All but size, location and frequency: equal for entries that may be of one key.
  static constexpr std::uint64_t kNvmIdentityMask =
      (std::uint64_t{0xffff} << kTagShift) | kNvmBit | (std::uint64_t{3} << kNvmTagShift);

  constexpr Entry() noexcept = default;
  constexpr explicit Entry(std::uint64_t word) noexcept : word_(word) {}
  static constexpr Entry dram(std::uint16_t tag, std::uint64_t location, std::size_t bytes,
                              unsigned frequency) noexcept {
    const std::uint64_t lines =
        std::clamp<std::uint64_t>((bytes + kCacheLine - 1) / kCacheLine, 1, 31);
    return Entry((std::uint64_t{tag} << kTagShift) | (std::uint64_t{frequency} << kFrequencyShift) |
                 (lines << kSizeShift) | location);
  }

  // `hash` is the low half of the key's; `location` counts 8-byte units.
  static constexpr Entry nvm(std::uint64_t hash, std::uint64_t location, std::size_t bytes,
                             unsigned frequency) noexcept {
    return Entry(nvm_identity(hash) | (std::uint64_t{frequency} << kFrequencyShift) |
                 (std::uint64_t{size_class(bytes)} << kSizeShift) | location);
  }
  // What every NVM entry of a key has, and few of other keys.
  static constexpr std::uint64_t nvm_identity(std::uint64_t hash) noexcept {
    return (hash << kTagShift) | kNvmBit | (((hash >> 32) & 3) << kNvmTagShift);
  }
  constexpr bool may_be_nvm_of(std::uint64_t hash) const noexcept {
    return (word_ & kNvmIdentityMask) == nvm_identity(hash);
  }
  // The smallest half octave that holds `bytes`: 1 for up to 64, 31 for up to 2 MiB.
  static constexpr unsigned size_class(std::size_t bytes) noexcept {
    unsigned size = 1;
    while (class_bytes(size) < bytes) ++size;
    return size;
  }
  static constexpr std::size_t class_bytes(unsigned size) noexcept {
    const std::size_t octave = std::size_t{64} << ((size - 1) / 2);
    return (size & 1) != 0 ? octave : octave + octave / 2;
  }

  constexpr std::uint64_t word() const noexcept { return word_; }
  constexpr bool empty() const noexcept { return word_ == 0; }
  constexpr std::uint16_t tag() const noexcept {
    return static_cast<std::uint16_t>(word_ >> kTagShift);
  }
  constexpr unsigned frequency() const noexcept {
    return static_cast<unsigned>((word_ >> kFrequencyShift) & 7);
  }
  constexpr bool on_nvm() const noexcept { return ((word_ >> kTierShift) & 1) != 0; }
  constexpr unsigned lines() const noexcept {
    return static_cast<unsigned>((word_ >> kSizeShift) & 31);
  }
  constexpr std::uint64_t location() const noexcept { return word_ & kLocationMask; }
  constexpr std::uint64_t nvm_location() const noexcept { return word_ & kNvmLocationMask; }
  // Bytes of the record at most.
  constexpr std::size_t nvm_bytes() const noexcept { return class_bytes(lines()); }
  constexpr Entry with_frequency(unsigned frequency) const noexcept {
    return Entry((word_ & ~kFrequencyMask) | (std::uint64_t{frequency} << kFrequencyShift));
  }
  // The same record, whatever readers made of the frequency meanwhile.
  constexpr bool same_record(Entry other) const noexcept {
    return ((word_ ^ other.word_) & ~kFrequencyMask) == 0;
  }

 private:
  std::uint64_t word_ = 0;
};
static_assert(sizeof(Entry) == 8);
static_assert(Entry::dram(0xffff, Entry::kLocationMask, 1, 3).location() == Entry::kLocationMask);
static_assert(!Entry::dram(0, 0, 0, 0).empty());
static_assert(Entry::size_class(64) == 1 && Entry::size_class(65) == 2 &&
              Entry::size_class(97) == 3 && Entry::class_bytes(31) == std::size_t{2} << 20);
static_assert(Entry::nvm(~0ull, Entry::kNvmLocationMask, 300, 7).nvm_location() ==
              Entry::kNvmLocationMask);
static_assert(Entry::nvm(0xabcd, 5, 300, 0).tag() == 0xabcd);

}  // namespace fc
