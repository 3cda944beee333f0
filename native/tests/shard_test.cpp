// Which shard a key is of: even, and the same for ever.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/hash.hpp"
#include "feature_cache/cluster.hpp"

namespace fc::testing {
namespace {

// Nodes and clients of one cluster agree on these, whatever their releases. Made with xxhash alone.
TEST(Shard, IsWrittenDownForEver) {
  std::string placed;
  for (int i = 0; i < 16; ++i) {
    placed += std::to_string(shard_of("pin", "key " + std::to_string(i), 1000)) + " ";
  }
  EXPECT_EQ(placed, "431 259 810 483 136 188 705 440 521 193 233 148 227 75 908 766 ");
}

TEST(Shard, IsThatOfTheUpperHalfOfTheHighHash) {
  const KeyHash hash = hash_key(namespace_seed("pin"), "key");
  EXPECT_EQ(shard_of("pin", "key", 7), ((hash.high >> 32) * 7) >> 32);
  EXPECT_EQ(shard_of(0, 7), 0U);
  EXPECT_EQ(shard_of(0xFFFFFFFF, 7), 0U);  // the lower half is the instance's
  EXPECT_EQ(shard_of(~0ull, 7), 6U);
  EXPECT_EQ(shard_of(~0ull, ~0u), ~0u - 1);
}

TEST(Shard, EveryShardGetsItsShare) {
  constexpr std::uint32_t kShards = 100;
  constexpr int kKeys = 200'000;
  std::vector<double> counts(kShards);
  for (int i = 0; i < kKeys; ++i) ++counts[shard_of("pin", std::to_string(i), kShards)];
  const double mean = static_cast<double>(kKeys) / kShards;
  for (const double count : counts) EXPECT_NEAR(count, mean, 5 * std::sqrt(mean));
}

}  // namespace
}  // namespace fc::testing
