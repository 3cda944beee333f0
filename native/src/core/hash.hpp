// The one published hash of the cache: XXH3-128 of the key, seeded by the namespace.
//
// Placement takes independent bits of it, so that no two decisions correlate:
//   high 64: shard (upper half), instance (lower half; core/placement.hpp)
//   low  64: bucket (from the top, by multiplication), write-version stripe, tag (bottom 16)
#pragma once

#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include <cstdint>
#include <string_view>

namespace fc {

struct KeyHash {
  std::uint64_t low;
  std::uint64_t high;
};

inline std::uint64_t namespace_seed(std::string_view name) noexcept {
  return XXH3_64bits(name.data(), name.size());
}

inline KeyHash hash_key(std::uint64_t seed, std::string_view key) noexcept {
  const XXH128_hash_t hash = XXH3_128bits_withSeed(key.data(), key.size(), seed);
  return {hash.low64, hash.high64};
}

// The virtual shard of a key, by the high half of its hash (feature_cache/cluster.hpp).
inline std::uint32_t shard_of(std::uint64_t high, std::uint32_t shard_count) noexcept {
  return static_cast<std::uint32_t>(((high >> 32) * shard_count) >> 32);
}

// Maps a uniform 64-bit value to [0, range) by its top bits (Lemire's multiply-shift).
inline std::uint64_t scale(std::uint64_t uniform, std::uint64_t range) noexcept {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(uniform) * range) >> 64);
}

}  // namespace fc
