// The 8-byte index entry: all that a probe knows before it touches a record.
//
//   63..48 tag        16 bits of the key's hash; a hint, never proof
//   47..45 frequency   0..7, raised by readers by compare-and-swap
//   44     tier        0 DRAM, 1 NVM
//   43..39 size class  cache lines of the record, 31 for "31 or more"; never 0 in a live entry
//   38..0  location    DRAM: 4-byte units from the arena's start
//
// A zero word is an empty slot: a live entry has a size class of at least 1.
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

  constexpr Entry() noexcept = default;
  constexpr explicit Entry(std::uint64_t word) noexcept : word_(word) {}
  static constexpr Entry dram(std::uint16_t tag, std::uint64_t location, std::size_t bytes,
                              unsigned frequency) noexcept {
    const std::uint64_t lines =
        std::clamp<std::uint64_t>((bytes + kCacheLine - 1) / kCacheLine, 1, 31);
    return Entry((std::uint64_t{tag} << kTagShift) | (std::uint64_t{frequency} << kFrequencyShift) |
                 (lines << kSizeShift) | location);
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

}  // namespace fc
