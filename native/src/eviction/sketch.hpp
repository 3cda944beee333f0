// A count-min sketch of 4-bit counters that ages by halving (TinyLFU, Einziger et al., TOS '17).
//
// One cache line a key: the four counters of a key lie in one 64-byte block, so that counting costs
// one memory access. Counts saturate at 15; all are halved after as many additions as ten times
// the expected items. Not thread-safe but harmless to race: a lost count is an estimate.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/hash.hpp"
#include "eviction/hints.hpp"

namespace fc {

class FrequencySketch {
 public:
  static constexpr unsigned kMaxCount = 15;

  explicit FrequencySketch(std::uint64_t items, std::span<std::byte> memory = {})
      : blocks_(items * 8 / sizeof(Block) + 1, memory),
        additions_limit_(std::max<std::uint64_t>(items, 64) * 10) {}

  static std::size_t bytes_for(std::uint64_t items) noexcept {
    return (items * 8 / sizeof(Block) + 1) * sizeof(Block);
  }

  void add(std::uint64_t hash, unsigned by = 1) noexcept {
    const std::uint64_t mixed = mix(hash);
    Block& block = blocks_[scale(mixed, blocks_.size())];
    for (unsigned row = 0; row < kRows; ++row) {
      std::uint64_t& word = word_of(block, mixed, row);
      const unsigned shift = shift_of(mixed, row);
      const auto count = static_cast<unsigned>((word >> shift) & kMaxCount);
      const unsigned raised = std::min(count + by, kMaxCount);
      word += std::uint64_t{raised - count} << shift;
    }
    additions_ += by;
    if (additions_ >= additions_limit_) age();
  }
  unsigned estimate(std::uint64_t hash) const noexcept {
    const std::uint64_t mixed = mix(hash);
    const Block& block = blocks_[scale(mixed, blocks_.size())];
    unsigned least = kMaxCount;
    for (unsigned row = 0; row < kRows; ++row) {
      const std::uint64_t word = block.words[word_index(mixed, row)];
      least = std::min(least, static_cast<unsigned>((word >> shift_of(mixed, row)) & kMaxCount));
    }
    return least;
  }
  void prefetch(std::uint64_t hash) const noexcept {
    __builtin_prefetch(&blocks_[scale(mix(hash), blocks_.size())], 1);
  }
  void clear() noexcept {
    blocks_.clear();
    additions_ = 0;
  }
  std::size_t memory_bytes() const noexcept { return blocks_.bytes(); }

 private:
  static constexpr unsigned kRows = 4;
  struct alignas(64) Block {
    std::uint64_t words[8] = {};
  };

  static std::uint64_t mix(std::uint64_t hash) noexcept {
    hash = (hash ^ (hash >> 32)) * 0xD6E8FEB86659FD93ull;
    return hash ^ (hash >> 29);
  }
  // Row r owns words 2r and 2r+1 of the block: 32 counters, chosen by five bits of the hash.
  static unsigned word_index(std::uint64_t mixed, unsigned row) noexcept {
    return 2 * row + static_cast<unsigned>((mixed >> (5 * row)) & 1);
  }
  static unsigned shift_of(std::uint64_t mixed, unsigned row) noexcept {
    return static_cast<unsigned>((mixed >> (5 * row + 1)) & 15) * 4;
  }
  static std::uint64_t& word_of(Block& block, std::uint64_t mixed, unsigned row) noexcept {
    return block.words[word_index(mixed, row)];
  }
  void age() noexcept {
    for (Block& block : blocks_.all()) {
      for (std::uint64_t& word : block.words) word = (word >> 1) & 0x7777777777777777ull;
    }
    additions_ /= 2;
  }

  HintArray<Block> blocks_;
  std::uint64_t additions_ = 0;
  std::uint64_t additions_limit_;
};

}  // namespace fc
