#include "feature_cache/cluster.hpp"

#include "core/hash.hpp"

namespace fc {

std::uint32_t shard_of(std::string_view ns, std::string_view key,
                       std::uint32_t shard_count) noexcept {
  return shard_of(hash_key(namespace_seed(ns), key).high, shard_count);
}

}  // namespace fc
