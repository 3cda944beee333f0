// The index and the epochs by themselves.
#include "index/index.hpp"

#include <atomic>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "core/epoch.hpp"
#include "support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {
namespace {

static_assert(Entry::dram(0xABCD, 12345, 200, 5).tag() == 0xABCD);
static_assert(Entry::dram(0xABCD, 12345, 200, 5).location() == 12345);
static_assert(Entry::dram(0xABCD, 12345, 200, 5).frequency() == 5);
static_assert(Entry::dram(0xABCD, 12345, 200, 5).lines() == 4);
static_assert(Entry::dram(0, 1, 1 << 20, 0).lines() == 31);
static_assert(!Entry::dram(0xffff, Entry::kLocationMask, 1 << 20, 7).on_nvm());
static_assert(Entry::dram(1, 2, 3, 7).with_frequency(0).same_record(Entry::dram(1, 2, 3, 4)));
static_assert(!Entry::dram(1, 2, 3, 0).same_record(Entry::dram(1, 3, 3, 0)));

TEST(Index, PartnerIsAnInvolutionWithinRange) {
  std::mt19937_64 random(1);
  for (const std::uint64_t buckets : {1ull, 2ull, 3ull, 7ull, 64ull, 1'000ull, 65'537ull}) {
    std::vector<Bucket> memory(1);
    const Index index(memory.data(), buckets);
    for (int i = 0; i < 5'000; ++i) {
      const Place place = index.place_of(random());
      ASSERT_LT(place.home, buckets);
      ASSERT_LT(place.partner, buckets);
      ASSERT_EQ(index.partner_of(place.partner, place.tag), place.home);
    }
  }
}

TEST(Index, CandidatesAreTheSlotsOfTheTag) {
  Bucket bucket{};
  std::mt19937_64 random(2);
  for (int round = 0; round < 2'000; ++round) {
    std::uint32_t expected = 0;
    for (unsigned i = 0; i < layout::kSlotsPerBucket; ++i) {
      const std::uint16_t tag = static_cast<std::uint16_t>(random() % 3 == 0 ? 0x8001 : random());
      bucket.slots[i].store(Entry::dram(tag, random() % 1'000, 64, 0).word());
      if (tag == 0x8001) expected |= 1u << i;
    }
    std::uint32_t found = 0;
    for (std::uint32_t mask = Index::candidates(bucket, 0x8001); mask != 0; mask &= mask - 1) {
      found |= 1u << (&Index::first_of(bucket, mask) - &bucket.slots[0]);
    }
    ASSERT_EQ(found, expected);
  }
}

TEST(Index, TouchSaturatesAndNeverRevives) {
  Slot slot{Entry::dram(1, 2, 64, 0).word()};
  const Entry seen(slot.load());
  for (int i = 0; i < 20; ++i) Index::touch(slot, Entry(slot.load()));
  EXPECT_EQ(Entry(slot.load()).frequency(), Entry::kMaxFrequency);
  slot.store(0);
  Index::touch(slot, seen);
  EXPECT_EQ(slot.load(), 0U) << "a dead entry came back";
}

// A reader has looked into one bucket of a key; the key moves there from the other; then the reader
// looks into the other.
TEST(Index, AMoveBehindAReadersBackHidesNothing) {
  constexpr std::uint64_t kBuckets = 1'009;
  std::vector<Bucket> memory(kBuckets);
  Index index(memory.data(), kBuckets);
  std::mt19937_64 random(4);
  const Place key = index.place_of(random());
  Place other = index.place_of(random());
  while (other.home != key.partner || other.partner == other.home || other.partner == key.home) {
    other = index.place_of(random());
  }
  // The key lies in its partner bucket, which is full; so is the other's second bucket.
  for (Slot& slot : memory[other.home].slots) slot.store(Entry::dram(key.tag, 2, 64, 0).word());
  for (Slot& slot : memory[other.partner].slots) slot.store(Entry::dram(7, 3, 64, 0).word());
  memory[other.home].slots[0].store(Entry::dram(key.tag, 1, 64, 0).word());

  SequencePoints points;
  points.block("index:between_buckets");
  std::atomic<bool> found{false};
  std::thread reader([&] {
    found.store(index.find(key, [](Entry entry, Slot&) { return entry.location() == 1; }));
  });
  ASSERT_TRUE(points.wait_blocked("index:between_buckets"));
  {
    const PairLock lock(index, other);
    Slot* slot = index.free_slot_locked(other);
    ASSERT_EQ(slot, &memory[other.home].slots[0]) << "the key was not moved";
    ASSERT_EQ(Entry(memory[key.home].slots[0].load()).location(), 1U);
  }
  points.release("index:between_buckets");
  reader.join();
  EXPECT_TRUE(found.load());
}

class Filled : public ::testing::TestWithParam<std::uint64_t> {};

TEST_P(Filled, TakesWhatDomainsMayFillTogetherAndLosesNothing) {
  const std::uint64_t buckets = GetParam();
  std::vector<Bucket> memory(buckets);
  Index index(memory.data(), buckets);
  std::mt19937_64 random(seed_of(buckets));
  const auto wanted =
      static_cast<std::size_t>(static_cast<double>(index.slot_count()) * layout::kIndexLoadLimit);
  std::vector<std::uint64_t> hashes;
  std::size_t refused = 0;
  while (hashes.size() < wanted) {
    const std::uint64_t hash = random();
    const Place place = index.place_of(hash);
    const PairLock lock(index, place);
    Slot* slot = index.free_slot_locked(place);
    if (slot == nullptr) {
      ASSERT_LT(++refused, wanted / 500 + 3) << "full at " << hashes.size() << " of " << wanted;
      continue;
    }
    ASSERT_EQ(slot->load(), 0U);
    slot->store(Entry::dram(place.tag, hashes.size() + 1, 64, 0).word());
    hashes.push_back(hash);
  }
  EXPECT_GT(index.moves(), 0U);
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    const bool found = index.find(index.place_of(hashes[i]),
                                  [&](Entry entry, Slot&) { return entry.location() == i + 1; });
    ASSERT_TRUE(found) << "entry " << i << " of " << hashes.size();
  }
}

INSTANTIATE_TEST_SUITE_P(Buckets, Filled, ::testing::Values(37, 512, 4'099));

TEST(Index, PairLocksOfManyThreadsDoNotDeadlock) {
  std::vector<Bucket> memory(11);
  Index index(memory.data(), memory.size());
  std::vector<std::uint64_t> guarded(memory.size());  // each by its bucket's lock
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int i = 0; i < 20'000; ++i) {
        const Place place = index.place_of(random());
        const PairLock lock(index, place);
        ++guarded[place.home];
        if (place.partner != place.home) ++guarded[place.partner];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::uint64_t sum = 0;
  for (const std::uint64_t count : guarded) sum += count;
  EXPECT_GE(sum, 80'000U);
  EXPECT_LE(sum, 160'000U);
}

// ---- epochs
// ---------------------------------------------------------------------------------------

TEST(Epochs, WhatWasRetiredIsSafeOnlyWhenReadersOfItsTimeHaveLeft) {
  EpochManager epochs;
  const std::uint64_t before = epochs.retire();
  EXPECT_GT(epochs.safe_before(), before) << "nobody reads";
  std::optional<EpochGuard> early;
  early.emplace(epochs);
  const std::uint64_t during = epochs.retire();
  EXPECT_LE(epochs.safe_before(), during) << "the early reader may see it";
  std::optional<EpochGuard> late;
  late.emplace(epochs);
  EXPECT_LE(epochs.safe_before(), during);
  early.reset();
  EXPECT_GT(epochs.safe_before(), during) << "the late one entered after it was gone";
  const std::uint64_t last = epochs.retire();
  EXPECT_LE(epochs.safe_before(), last);
  late.reset();
  EXPECT_GT(epochs.safe_before(), last);
}

TEST(Epochs, MoreReadersThanSlotsWaitForOne) {
  EpochManager epochs;
  std::vector<std::unique_ptr<EpochGuard>> held;
  for (std::size_t i = 0; i < EpochManager::kSlots; ++i) {
    held.push_back(std::make_unique<EpochGuard>(epochs));
  }
  std::atomic<bool> entered{false};
  std::thread waiting([&] {
    const EpochGuard guard(epochs);
    entered.store(true);
  });
  for (int i = 0; i < 100; ++i) std::this_thread::yield();
  EXPECT_FALSE(entered.load());
  held.pop_back();
  waiting.join();
  EXPECT_TRUE(entered.load());
}

}  // namespace
}  // namespace fc::testing
