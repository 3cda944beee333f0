// What every policy promises, then what each is for; the ghost set and the sketch they rest on.
#include <algorithm>
#include <random>
#include <vector>

#include "core/hash.hpp"
#include "eviction/ghost.hpp"
#include "eviction/policy.hpp"
#include "eviction/sketch.hpp"
#include "memory/router.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

std::uint64_t hash_of(std::uint64_t number) {
  return hash_key(7, std::to_string(number)).low;
}

// ---- the contract of any policy
// -------------------------------------------------------------------

class PolicyContract : public ::testing::TestWithParam<PolicyKind> {
 protected:
  static constexpr std::uint64_t kItems = 1'000;
  std::unique_ptr<EvictionPolicy> policy_ = EvictionPolicy::make(GetParam(), kItems);

  // A fixed life of many items; all that the policy said.
  std::vector<unsigned> life(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<unsigned> said;
    for (int i = 0; i < 5'000; ++i) {
      const std::uint64_t hash = hash_of(random() % 3'000);
      const Queue queue = policy_->admit(hash);
      said.push_back(static_cast<unsigned>(queue));
      const unsigned frequency = random() % 2 == 0 ? 0 : static_cast<unsigned>(random() % 8);
      const Verdict verdict =
          policy_->judge({hash, frequency, random() % 2 == 0 ? queue : Queue::Main});
      said.push_back(verdict.keep ? 10 + verdict.frequency : 9);
    }
    return said;
  }
};

TEST_P(PolicyContract, VerdictsAreInRange) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 10'000; ++i) {
    const std::uint64_t hash = hash_of(random() % 2'000);
    policy_->prefetch(hash);
    ASSERT_LT(static_cast<std::size_t>(policy_->admit(hash)), kQueueCount);
    for (unsigned frequency = 0; frequency <= 7; ++frequency) {
      for (const Queue queue : {Queue::Small, Queue::Main}) {
        const Verdict verdict = policy_->judge({hash, frequency, queue});
        ASSERT_LE(verdict.frequency, 7U);
        ASSERT_LT(static_cast<std::size_t>(verdict.queue), kQueueCount);
        ASSERT_TRUE(!verdict.keep || verdict.queue == Queue::Main) << "nothing goes back to small";
      }
    }
  }
}

// Else a domain of hot items could not make room.
TEST_P(PolicyContract, AnItemThatIsHitNoMoreGoesWithinTenRounds) {
  for (std::uint64_t i = 0; i < 500; ++i) {
    const std::uint64_t hash = hash_of(i);
    Candidate candidate{hash, 7, policy_->admit(hash)};
    int rounds = 0;
    for (Verdict verdict = policy_->judge(candidate); verdict.keep;
         verdict = policy_->judge(candidate)) {
      candidate.queue = verdict.queue;
      candidate.frequency = verdict.frequency;
      ASSERT_LT(++rounds, 10);
    }
  }
}

TEST_P(PolicyContract, TakesFromMainWhenSmallIsEmptyAndFromSmallWhenItIsAll) {
  EXPECT_EQ(policy_->victim({0, 100, 100}), Queue::Main);
  if (policy_->admit(hash_of(1)) == Queue::Small) {
    EXPECT_EQ(policy_->victim({100, 0, 100}), Queue::Small);
  }
}

TEST_P(PolicyContract, ClearForgetsEverything) {
  const std::vector<unsigned> fresh = life(3);
  EXPECT_EQ(life(3) == fresh, GetParam() == PolicyKind::Fifo || GetParam() == PolicyKind::Lru)
      << "it remembers, or there is nothing to remember";
  policy_->clear();
  EXPECT_EQ(life(3), fresh);
}

TEST_P(PolicyContract, MemoryGrowsWithItemsAsPlanned) {
  const auto large = EvictionPolicy::make(GetParam(), 1'000'000);
  EXPECT_LE(large->memory_bytes(), GetParam() == PolicyKind::TinyLfu ? 8'001'000U : 2'000'000U);
}

INSTANTIATE_TEST_SUITE_P(All, PolicyContract,
                         ::testing::Values(PolicyKind::S3Fifo, PolicyKind::Lru, PolicyKind::Fifo,
                                           PolicyKind::TinyLfu),
                         [](const auto& tested) { return policy_name(tested.param); });

// ---- each by itself
// -------------------------------------------------------------------------------

TEST(Policies, FifoKeepsNothing) {
  const auto policy = EvictionPolicy::make(PolicyKind::Fifo, 100);
  EXPECT_FALSE(policy->judge({1, 7, Queue::Main}).keep);
}

TEST(Policies, LruKeepsWhatWasHitOnce) {
  const auto policy = EvictionPolicy::make(PolicyKind::Lru, 100);
  EXPECT_FALSE(policy->judge({1, 0, Queue::Main}).keep);
  const Verdict verdict = policy->judge({1, 1, Queue::Main});
  EXPECT_TRUE(verdict.keep);
  EXPECT_EQ(verdict.frequency, 0U) << "it must be hit again for another round";
}

TEST(Policies, S3FifoPromotesWhatWasHitTwiceAndWhatReturns) {
  const auto policy = EvictionPolicy::make(PolicyKind::S3Fifo, 1'000);
  EXPECT_EQ(policy->admit(hash_of(1)), Queue::Small);
  EXPECT_TRUE(policy->judge({hash_of(1), 2, Queue::Small}).keep);
  EXPECT_EQ(policy->admit(hash_of(2)), Queue::Small);
  EXPECT_FALSE(policy->judge({hash_of(2), 1, Queue::Small}).keep);
  EXPECT_EQ(policy->admit(hash_of(2)), Queue::Main) << "its ghost is remembered";
  EXPECT_EQ(policy->admit(hash_of(2)), Queue::Small) << "once";
  EXPECT_EQ(policy->victim({5, 95, 100}), Queue::Small) << "a twentieth";
  EXPECT_EQ(policy->victim({4, 96, 100}), Queue::Main);
}

TEST(Policies, TinyLfuKeepsTheFrequentOutOfTheWindowOnly) {
  const auto policy = EvictionPolicy::make(PolicyKind::TinyLfu, 1'000);
  // Main lets go items that are known four times each.
  for (std::uint64_t round = 0; round < 4; ++round) {
    for (std::uint64_t i = 0; i < 500; ++i) policy->admit(hash_of(i));
  }
  for (int round = 0; round < 8; ++round) {
    for (std::uint64_t i = 0; i < 500; ++i) policy->judge({hash_of(i), 0, Queue::Main});
  }
  policy->admit(hash_of(9'000));
  EXPECT_FALSE(policy->judge({hash_of(9'000), 0, Queue::Small}).keep) << "seen once";
  policy->admit(hash_of(9'001));
  EXPECT_TRUE(policy->judge({hash_of(9'001), 7, Queue::Small}).keep) << "seen eight times";
}

// ---- ghosts and sketch
// ----------------------------------------------------------------------------

TEST(GhostSet, RemembersWhatWasEvictedLastAndForgetsOnTake) {
  GhostSet ghosts(3'200);
  for (std::uint64_t i = 0; i < 2'400; ++i) ghosts.insert(hash_of(i));
  std::size_t known = 0;
  for (std::uint64_t i = 0; i < 2'400; ++i) known += ghosts.take(hash_of(i));
  EXPECT_GT(known, 2'300U);
  std::size_t again = 0;
  for (std::uint64_t i = 0; i < 2'400; ++i) again += ghosts.take(hash_of(i));
  EXPECT_LT(again, 10U);
}

TEST(GhostSet, ErrsForOneKeyInTwoThousand) {
  GhostSet ghosts(32'000);
  for (std::uint64_t i = 0; i < 64'000; ++i) ghosts.insert(hash_of(i));
  std::size_t wrong = 0;
  for (std::uint64_t i = 0; i < 400'000; ++i) wrong += ghosts.take(hash_of(1'000'000 + i));
  EXPECT_LT(wrong, 400'000U / 1'600);
  EXPECT_GT(wrong, 0U) << "or the test asks nothing";
  ghosts.clear();
  for (std::uint64_t i = 0; i < 64'000; ++i) ASSERT_FALSE(ghosts.take(hash_of(i)));
}

TEST(FrequencySketch, NeverCountsTooLittleBeforeItAges) {
  FrequencySketch sketch(10'000);
  for (std::uint64_t i = 0; i < 3'000; ++i) {
    for (std::uint64_t times = 0; times < i % 6; ++times) sketch.add(hash_of(i));
  }
  std::size_t too_much = 0;
  for (std::uint64_t i = 0; i < 3'000; ++i) {
    ASSERT_GE(sketch.estimate(hash_of(i)), i % 6);
    too_much += sketch.estimate(hash_of(i)) > i % 6;
  }
  EXPECT_LT(too_much, 150U);
}

TEST(FrequencySketch, SaturatesAndAgesByHalf) {
  FrequencySketch sketch(100);
  for (int i = 0; i < 40; ++i) sketch.add(hash_of(1));
  EXPECT_EQ(sketch.estimate(hash_of(1)), FrequencySketch::kMaxCount);
  sketch.add(hash_of(2), 7);
  EXPECT_EQ(sketch.estimate(hash_of(2)), 7U);
  for (std::uint64_t i = 0; i < 960; ++i) sketch.add(hash_of(1'000 + i));
  EXPECT_LE(sketch.estimate(hash_of(1)), 12U) << "a thousand additions: all were halved";
  EXPECT_GE(sketch.estimate(hash_of(1)), 7U);
  sketch.clear();
  EXPECT_EQ(sketch.estimate(hash_of(1)), 0U);
}

// ---- the router
// -----------------------------------------------------------------------------------

TEST(Router, AllConditionsOfARuleMustHold) {
  Router router({{"hot:", 3, 1}, {"hot:", 0, 2}, {"", 5, 3}}, 9, 1'000);
  const auto route = [&](std::string_view key) {
    return router.route(key, hash_key(1, key).low, 1);
  };
  EXPECT_EQ(route("hot:a"), 2);
  EXPECT_EQ(route("hot:a"), 2);
  EXPECT_EQ(route("hot:a"), 1) << "its third ask";
  EXPECT_EQ(router.route("hot:b", hash_key(1, "hot:b").low, 3), 1) << "a warm-up says so";
  EXPECT_EQ(route("cold"), 9);
  router.asked(hash_key(1, "cold").low, 3);
  EXPECT_EQ(route("cold"), 3) << "one, three hits, one more";
}

}  // namespace
}  // namespace fc::testing
