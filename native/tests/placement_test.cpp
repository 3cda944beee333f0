// Which instance a key lives on: even, moving the minimum, and the same for ever.
#include "core/placement.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/hash.hpp"

namespace fc::testing {
namespace {

constexpr std::size_t kKeys = 200'000;

std::vector<KeyHash> hashes() {
  std::vector<KeyHash> all;
  const std::uint64_t seed = namespace_seed("pin");
  for (std::size_t i = 0; i < kKeys; ++i) all.push_back(hash_key(seed, "key " + std::to_string(i)));
  return all;
}

TEST(Placement, IsWrittenDownForEver) {
  // Nodes find their keys by these; a change would hide all of them.
  std::string placed;
  for (std::uint64_t i = 0; i < 24; ++i) {
    placed += static_cast<char>('0' + instance_of(i * 0x0123456789ABCDEFull, 6));
  }
  EXPECT_EQ(placed, "525253345010102525334451");
  EXPECT_EQ(XXH3_64bits(placement_table(64).data(), kPlacementSlots), 0xFFA9B50FDA1DC575ull);
}

TEST(Placement, LooksAtTheLowerHalfOfTheHighHashOnly) {
  for (std::uint64_t i = 1; i < 1000; ++i) {
    const std::uint64_t low = i * 0x9E3779B9u & 0xFFFFFFFFu;
    EXPECT_EQ(instance_of(low | i << 32, 7), instance_of(low, 7));
  }
}

TEST(Placement, EveryInstanceGetsItsShare) {
  const std::vector<KeyHash> all = hashes();
  for (const std::uint32_t instances : {1u, 2u, 3u, 4u, 5u, 6u, 8u, 13u, 32u, 64u}) {
    std::vector<double> counts(instances);
    for (const KeyHash& hash : all) {
      const std::uint32_t instance = instance_of(hash.high, instances);
      ASSERT_LT(instance, instances);
      ++counts[instance];
    }
    const double mean = static_cast<double>(kKeys) / instances;
    for (const double count : counts) {
      EXPECT_NEAR(count, mean, 5 * std::sqrt(mean)) << "of " << instances;
    }
  }
}

TEST(Placement, SharesDifferByOneSlotAtMost) {
  for (std::uint32_t instances = 1; instances <= 64; ++instances) {
    std::vector<std::uint32_t> counts(instances);
    for (const std::uint8_t owner : placement_table(instances)) ++counts.at(owner);
    const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
    EXPECT_LE(*most - *least, 1U) << "of " << instances;
  }
}

TEST(Placement, OneMoreInstanceTakesItsShareAndMovesNothingElse) {
  const std::vector<KeyHash> all = hashes();
  for (std::uint32_t instances = 1; instances < 64; ++instances) {
    double moved = 0;
    for (const KeyHash& hash : all) {
      const std::uint32_t before = instance_of(hash.high, instances);
      const std::uint32_t after = instance_of(hash.high, instances + 1);
      if (before == after) continue;
      ASSERT_EQ(after, instances) << "moved between instances that were there before";
      ++moved;
    }
    const double share = static_cast<double>(kKeys) / (instances + 1);
    EXPECT_NEAR(moved, share, 5 * std::sqrt(share)) << "of " << instances;
  }
}

TEST(Placement, TakesNoneOfTheBitsOfBucketTagAndShard) {
  const std::vector<KeyHash> all = hashes();
  constexpr std::uint32_t kInstances = 4;
  constexpr std::size_t kParts = 8;
  const auto part_of = [](const KeyHash& hash, int of) {
    switch (of) {
      case 0:
        return hash.low >> 61;
      case 1:
        return hash.low & 7;
      default:
        return hash.high >> 61;
    }
  };
  for (int of = 0; of < 3; ++of) {
    std::vector<double> counts(kInstances * kParts);
    for (const KeyHash& hash : all) {
      ++counts[instance_of(hash.high, kInstances) * kParts + part_of(hash, of)];
    }
    const double mean = static_cast<double>(kKeys) / static_cast<double>(counts.size());
    for (const double count : counts) EXPECT_NEAR(count, mean, 5 * std::sqrt(mean));
  }
}

}  // namespace
}  // namespace fc::testing
