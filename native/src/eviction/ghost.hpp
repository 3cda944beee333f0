// The ghost set of S3-FIFO: which keys were evicted not long ago.
//
// 16-bit fingerprints in cache-line buckets of 32; each bucket is a FIFO by shifting. Two bytes an
// item; a lookup errs for one key in about 2,000.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/hash.hpp"
#include "eviction/hints.hpp"

namespace fc {

class GhostSet {
 public:
  static constexpr std::size_t kEntries = 32;

  explicit GhostSet(std::uint64_t items, std::span<std::byte> memory = {})
      : buckets_(items / kEntries + 1, memory) {}
  static std::size_t bytes_for(std::uint64_t items) noexcept {
    return (items / kEntries + 1) * sizeof(Bucket);
  }

  void insert(std::uint64_t hash) noexcept {
    Bucket& in = buckets_[bucket_of(hash)];
    std::memmove(&in.prints[1], &in.prints[0], sizeof(in.prints) - sizeof(in.prints[0]));
    in.prints[0] = print_of(hash);
  }
  // Whether the key is remembered; it is forgotten by this.
  bool take(std::uint64_t hash) noexcept {
    Bucket& in = buckets_[bucket_of(hash)];
    const std::uint16_t print = print_of(hash);
    for (std::uint16_t& seen : in.prints) {
      if (seen == print) {
        seen = 0;
        return true;
      }
    }
    return false;
  }
  void prefetch(std::uint64_t hash) const noexcept {
    __builtin_prefetch(&buckets_[bucket_of(hash)], 1);
  }
  void clear() noexcept { buckets_.clear(); }
  std::size_t memory_bytes() const noexcept { return buckets_.bytes(); }

 private:
  struct alignas(64) Bucket {
    std::uint16_t prints[kEntries] = {};
  };
  static_assert(sizeof(Bucket) == 64);

  static std::uint64_t mix(std::uint64_t hash) noexcept { return hash * 0xD6E8FEB86659FD93ull; }
  std::uint64_t bucket_of(std::uint64_t hash) const noexcept {
    return scale(mix(hash), buckets_.size());
  }
  static std::uint16_t print_of(std::uint64_t hash) noexcept {
    const auto print = static_cast<std::uint16_t>(mix(hash) >> 16);
    return print != 0 ? print : 1;  // 0 is an empty place
  }

  HintArray<Bucket> buckets_;
};

}  // namespace fc
