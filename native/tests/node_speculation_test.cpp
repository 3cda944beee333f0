// Speculative lookups: which of the SSD and the store answers a cell, within which budget, and what
// enters the cache. The test is the fetch loop, and the device stalls until it is told.

#include "node_nvm_support.hpp"

namespace fc::testing {
namespace {

class NodeSpeculation : public NodeNvmTest {
 protected:
  // A get whose read is stalled, and the batch that its lateness caused.
  std::shared_ptr<FetchBatch> late_batch() {
    const auto batch = take();
    EXPECT_NE(batch, nullptr) << "nobody asked the store";
    EXPECT_TRUE(batch == nullptr || batch->priority() == FetchPriority::Speculative);
    return batch;
  }
  // Counted by the engine's thread, after the store may have heard of it.
  void expect_launched(double count) {
    EXPECT_TRUE(soon([&] { return speculative("launched") >= count; }));
    EXPECT_EQ(speculative("launched"), count);
  }
  // Lets the stalled read go on, and waits until the node has heard how it ended.
  void end_read(FaultDevice::RuleId stalled) {
    SequencePoints points;
    points.block("node:nvm_answered", 0);
    device_->remove(stalled);
    ASSERT_TRUE(soon([&] { return points.reached("node:nvm_answered") != 0; }));
  }
};

TEST_F(NodeSpeculation, StoreFirst) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto answer = ask("k");
  const auto batch = late_batch();
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:k"}));
  complete(*batch, {found("store's")});
  EXPECT_EQ(answer.get().only(), cell(CellStatus::Speculative, "store's"));
  device_->remove(stalled);
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "store's")) << "kept: its token was live";
  expect_launched(1);
  EXPECT_EQ(speculative("won_by_store"), 1);
  EXPECT_EQ(speculative("won_by_nvm"), 0);
  EXPECT_EQ(speculative("denied"), 0);
}

TEST_F(NodeSpeculation, StoreFirstWithNotFound) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto answer = ask("k");
  complete(*late_batch(), {{FetchedValue::Kind::NotFound, {}}});
  EXPECT_EQ(answer.get().only(), cell(CellStatus::NotFound));
  device_->remove(stalled);
  EXPECT_EQ(cached("k"), cell(CellStatus::NotFound));
}

TEST_F(NodeSpeculation, SsdFirst) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto answer = ask("k");
  const auto batch = late_batch();
  device_->remove(stalled);
  EXPECT_EQ(answer.get().only(), on_ssd("k"));
  complete(*batch, {found("newer")});
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
  EXPECT_EQ(speculative("won_by_nvm"), 1);
  EXPECT_EQ(speculative("won_by_store"), 0);
}

// A read starts while the thread of the device still looks at the time that it took before.
TEST_F(NodeSpeculation, AReadJustStartedIsNotLateBesideOneThatStalls) {
  NodeConfig config = nvm_config();
  config.engine.namespaces[0].speculative.after_us = 600'000'000;
  start_nvm(config);
  put_down("pin", {"stalled", "a", "b"});
  const auto stalled = device_->add(FaultRule::stall().reads().times(1));
  auto waits = ask("stalled");
  ASSERT_TRUE(device_->wait_hits(stalled, 1));
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(ask(i % 2 == 0 ? "a" : "b").get().only().status, CellStatus::HitNvm);
  }
  EXPECT_EQ(speculative("launched") + speculative("denied"), 0);
  device_->remove(stalled);
  EXPECT_EQ(waits.get().only(), on_ssd("stalled"));
}

TEST_F(NodeSpeculation, ReadsInTimeAskNobody) {
  put_down("pin", {"k"});
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(carries_value(ask("k").get().only().status));
  }
  EXPECT_LE(speculative("launched"), 5) << "the machine may be busy, but not that busy";
}

TEST_F(NodeSpeculation, FailingStoreLeavesTheAnswerToTheSsd) {
  put_down("pin", {"k"});
  for (const CellStatus failure :
       {CellStatus::Error, CellStatus::Throttled, CellStatus::TimedOut}) {
    const auto stalled = stall_reads();
    auto answer = ask("k");
    late_batch()->fail(failure);
    EXPECT_FALSE(ready(answer)) << "the SSD has not answered";
    device_->remove(stalled);
    EXPECT_EQ(answer.get().only(), on_ssd("k"));
  }
  const auto stalled = stall_reads();
  auto garbled = ask("k");
  complete(*late_batch(), {{FetchedValue::Kind::Garbled, {}}});
  EXPECT_FALSE(ready(garbled));
  device_->remove(stalled);
  EXPECT_EQ(garbled.get().only(), on_ssd("k"));
  expect_launched(4);
}

TEST_F(NodeSpeculation, FullStoreQueueLeavesTheAnswerToTheSsd) {
  NodeConfig config = nvm_config();
  config.stores[0].queue_keys = 1;
  start_nvm(config);
  put_down("pin", {"k"});
  auto in_the_way = ask("absent");
  const auto stalled = stall_reads();
  auto answer = ask("k");
  ASSERT_TRUE(soon([&] { return counter("feature_cache_fetch_throttled_total") == 1; }));
  EXPECT_FALSE(ready(answer));
  EXPECT_EQ(speculative("launched"), 0);
  device_->remove(stalled);
  EXPECT_EQ(answer.get().only(), on_ssd("k"));
  complete(*take(), {found("A")});
  in_the_way.get();
}

TEST_F(NodeSpeculation, FailingSsdLeavesTheAnswerToTheLookupUnderWay) {
  put_down("pin", {"k"});
  device_->add(FaultRule::fail(EIO).reads());
  const auto stalled = stall_reads();
  auto answer = ask("k");
  const auto batch = late_batch();
  end_read(stalled);
  EXPECT_EQ(take(50), nullptr) << "it must not be asked twice";
  EXPECT_FALSE(ready(answer));
  complete(*batch, {found("v")});
  EXPECT_EQ(answer.get().only(), cell(CellStatus::Fetched, "v")) << "nothing to speculate about";
  EXPECT_EQ(speculative("won_by_store") + speculative("won_by_nvm"), 0);
}

TEST_F(NodeSpeculation, FailingSsdTakesTheFailureOfTheLookupUnderWay) {
  put_down("pin", {"k"});
  device_->add(FaultRule::fail(EIO).reads());
  const auto stalled = stall_reads();
  auto answer = ask("k");
  const auto batch = late_batch();
  end_read(stalled);
  EXPECT_EQ(take(50), nullptr);
  batch->fail(CellStatus::Error);
  EXPECT_EQ(answer.get().only(), cell(CellStatus::Error));
}

TEST_F(NodeSpeculation, BothFailingMakesAnOrdinaryMiss) {
  put_down("pin", {"k"});
  device_->add(FaultRule::fail(EIO).reads());
  const auto stalled = stall_reads();
  auto answer = ask("k");
  late_batch()->fail(CellStatus::Error);
  device_->remove(stalled);
  const auto again = take();
  ASSERT_NE(again, nullptr);
  EXPECT_EQ(again->priority(), FetchPriority::Live);
  complete(*again, {found("v")});
  EXPECT_EQ(answer.get().only(), cell(CellStatus::Fetched, "v"));
}

// The lookup waits behind live misses; once its read has failed, the cell is a live miss itself.
TEST_F(NodeSpeculation, QueuedLookupGoesWithTheLiveOnesWhenItsReadFails) {
  put_down("pin", {"k"});
  device_->add(FaultRule::fail(EIO).reads());
  const auto stalled = stall_reads();
  auto answer = ask("k");
  ASSERT_TRUE(soon([&] { return speculative("launched") == 1; }));
  auto live = ask("absent");
  end_read(stalled);
  const auto batch = take();
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:absent", "pin:k"}));
  EXPECT_EQ(batch->priority(), FetchPriority::Live);
  complete(*batch, {found("A"), found("K")});
  EXPECT_EQ(answer.get().only(), cell(CellStatus::Fetched, "K"));
  EXPECT_EQ(live.get().only(), cell(CellStatus::Fetched, "A"));
  EXPECT_EQ(take(0), nullptr);
}

// The device goes out of service while a lookup is queued: who misses the key now joins that, and
// does not wait behind other live misses for having joined.
TEST_F(NodeSpeculation, QueuedLookupGoesWithTheLiveOnesWhenAMissJoinsIt) {
  NodeConfig config = nvm_config();
  config.engine.nvm.errors_max = 1;
  start_nvm(config);
  put_down("local", {"l"});
  put_down("pin", {"k"});
  const auto stalled = device_->add(FaultRule::stall().reads().times(1));
  auto late = ask("k");
  ASSERT_TRUE(soon([&] { return speculative("launched") == 1; }));
  device_->add(FaultRule::fail(EIO));
  ASSERT_TRUE(soon([&] {
    EXPECT_EQ(ask(Ask{.columns = {{"local", {"l"}}}}).get().only(), cell(CellStatus::Miss));
    return counter("feature_cache_nvm_device_in_service") == 0;
  }));
  auto missed = ask("k");
  const auto batch = take();
  ASSERT_NE(batch, nullptr);
  EXPECT_EQ(batch->priority(), FetchPriority::Live);
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:k"}));
  complete(*batch, {found("v")});
  EXPECT_EQ(missed.get().only(), cell(CellStatus::Fetched, "v"));
  EXPECT_EQ(late.get().only(), cell(CellStatus::Speculative, "v"));
  EXPECT_EQ(take(0), nullptr);
  device_->remove(stalled);
}

TEST_F(NodeSpeculation, RequestsOfOneKeyShareALookup) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto first = ask("k");
  const auto batch = late_batch();
  auto second = ask("k");
  auto twice = ask(Ask{.columns = {{"pin", {"k", "k"}}}});
  ASSERT_TRUE(soon([&] { return counter("feature_cache_flights_joined_total") >= 3; }));
  EXPECT_EQ(take(0), nullptr);
  complete(*batch, {found("v")});
  EXPECT_EQ(first.get().only(), cell(CellStatus::Speculative, "v"));
  EXPECT_EQ(second.get().only(), cell(CellStatus::Speculative, "v"));
  EXPECT_EQ(twice.get().columns[0], (std::vector<Cell>(2, cell(CellStatus::Speculative, "v"))));
  expect_launched(1);
  EXPECT_EQ(speculative("won_by_store"), 4);
  device_->remove(stalled);
}

TEST_F(NodeSpeculation, DeadlineWhileBothAreOut) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto answer = ask("k", 150);
  const auto batch = late_batch();
  EXPECT_EQ(answer.get().only(), cell(CellStatus::TimedOut));
  complete(*batch, {found("kept")});
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "kept")) << "a lookup outlives its waiter";
  device_->remove(stalled);
  EXPECT_EQ(speculative("won_by_store") + speculative("won_by_nvm"), 0);
}

TEST_F(NodeSpeculation, OnlyNamespacesThatSpeculateDoAndShowIt) {
  put_down("user", {"u"});
  const auto stalled = stall_reads();
  auto answer = ask(Ask{.columns = {{"user", {"u"}}}});
  ASSERT_TRUE(device_->wait_hits(stalled, 1));
  EXPECT_EQ(take(30), nullptr);
  device_->remove(stalled);
  EXPECT_EQ(answer.get().only(), on_ssd("u"));
  EXPECT_EQ(Counters::of(*node_).sum("feature_cache_speculative_launched_total{namespace=user}"),
            0);
}

// ---- the budget
// -----------------------------------------------------------------------------------

TEST_F(NodeSpeculation, BudgetIsAShareOfTheKeysAskedInASecond) {
  NodeConfig config = nvm_config();
  config.engine.namespaces[0].speculative.budget = 0.1;
  start_nvm(config);
  std::vector<std::string> keys;
  for (int i = 0; i < 40; ++i) keys.push_back("k" + std::to_string(i));
  put_down("pin", keys);
  // What put_down asked is forgotten after a second, and idle time saves nothing up.
  std::this_thread::sleep_for(milliseconds(1'300));
  const auto stalled = stall_reads();
  auto one = ask("k0");
  ASSERT_TRUE(soon([&] { return speculative("denied") == 1; }));
  EXPECT_EQ(speculative("launched"), 0) << "one key is not ten";
  auto all = ask(Ask{.columns = {{"pin", keys}}});
  ASSERT_TRUE(soon([&] { return speculative("denied") + speculative("launched") == 41; }));
  EXPECT_LE(speculative("launched"), 4);
  EXPECT_GE(speculative("launched"), 1);
  const auto batch = late_batch();
  EXPECT_EQ(static_cast<double>(batch->key_count()), speculative("launched"));
  complete(*batch, std::vector<Given>(batch->key_count(), found("store's")));
  device_->remove(stalled);
  const Answer got = all.get();
  std::size_t of_store = 0;
  for (const Cell& one_of_all : got.columns[0]) {
    EXPECT_TRUE(carries_value(one_of_all.status));
    of_store += one_of_all.status == CellStatus::Speculative ? 1 : 0;
  }
  EXPECT_EQ(of_store, batch->key_count()) << "the others waited for the SSD";
  EXPECT_TRUE(carries_value(one.get().only().status));
}

// ---- late results lose
// ----------------------------------------------------------------------------

TEST_F(NodeSpeculation, PutDuringALookupWins) {
  put_down("pin", {"k"});
  stall_reads();
  auto before = ask("k");
  const auto batch = late_batch();
  put("k", "newer");
  EXPECT_EQ(ask("k").get().only(), cell(CellStatus::HitDram, "newer"));
  complete(*batch, {found("older")});
  EXPECT_EQ(before.get().only(), cell(CellStatus::Speculative, "older")) << "asked before the put";
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
  EXPECT_EQ(counter("feature_cache_install_void_total"), 1);
}

TEST_F(NodeSpeculation, DeleteDuringALookupWins) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto before = ask("k");
  const auto older = late_batch();
  erase("k");
  auto after = ask("k");
  const auto newer = take();
  ASSERT_NE(newer, nullptr) << "a get after the delete joined the lookup of before";
  EXPECT_EQ(newer->priority(), FetchPriority::Live);
  complete(*older, {found("stale")});
  EXPECT_EQ(before.get().only(), cell(CellStatus::Speculative, "stale"));
  EXPECT_FALSE(ready(after));
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  complete(*newer, {found("fresh")});
  EXPECT_EQ(after.get().only(), cell(CellStatus::Fetched, "fresh"));
  device_->remove(stalled);
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "fresh"));
}

TEST_F(NodeSpeculation, FlushDuringALookupWins) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto before = ask("k");
  const auto batch = late_batch();
  node_->engine().flush(node_->engine().find_namespace("pin"));
  complete(*batch, {found("stale")});
  EXPECT_EQ(before.get().only(), cell(CellStatus::Speculative, "stale"));
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  device_->remove(stalled);
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
}

TEST_F(NodeSpeculation, LateNotFoundLosesToAPut) {
  put_down("pin", {"k"});
  stall_reads();
  auto before = ask("k");
  const auto batch = late_batch();
  put("k", "newer");
  complete(*batch, {{FetchedValue::Kind::NotFound, {}}});
  EXPECT_EQ(before.get().only(), cell(CellStatus::NotFound));
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
}

// Written between a get's lookup and its read's lateness: the store is not asked under a dead
// token.
TEST_F(NodeSpeculation, DeadTokenAsksNobody) {
  NodeConfig config = nvm_config();
  config.engine.namespaces[0].speculative.after_us = 300'000;
  start_nvm(config);
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto answer = ask("k");
  ASSERT_TRUE(device_->wait_hits(stalled, 1));
  put("k", "newer");
  EXPECT_EQ(take(600), nullptr);
  EXPECT_EQ(speculative("launched"), 0);
  device_->remove(stalled);
  EXPECT_TRUE(carries_value(answer.get().only().status)) << "of before the put, or the put's";
  EXPECT_EQ(cached("k"), cell(CellStatus::HitDram, "newer"));
}

// The value came into DRAM between a get's lookup and its read's lateness: it is found there.
TEST_F(NodeSpeculation, SecondLookBeforeALookupStarts) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto first = ask("k");
  const auto batch = late_batch();
  std::optional<SequencePoints> points{std::in_place};
  points->block("node:looked_up");
  std::future<Answer> second;
  std::thread asker([&] { second = ask("k"); });
  ASSERT_TRUE(points->wait_blocked("node:looked_up"));
  complete(*batch, {found("store's")});
  EXPECT_EQ(first.get().only(), cell(CellStatus::Speculative, "store's"));
  points->release("node:looked_up");
  asker.join();
  EXPECT_EQ(second.get().only(), cell(CellStatus::HitDram, "store's"));
  EXPECT_EQ(take(0), nullptr);
  EXPECT_EQ(counter("feature_cache_fetch_keys_total"), 1);
  expect_launched(1);
  device_->remove(stalled);
}

// ---- all at once
// ----------------------------------------------------------------------------------

// As GetsAfterAnAcknowledgedWriteNeverSeeAnOlderValue, with values that go down to a device of any
// mood and come back, and lookups that race them.
TEST_F(NodeSpeculation, NoAcknowledgedWriteIsForgottenWhoeverAnswers) {
  constexpr std::size_t kKeys = 60;
  NodeConfig config = nvm_config();
  config.engine.namespaces[0].speculative.after_us = 200;
  config.engine.namespaces[0].nvm.promotion = PromotionKind::SecondHit;
  config.engine.nvm.errors_max = 1'000'000;
  config.stores[0].max_batch_keys = 7;
  start_nvm(config);
  device_->add(FaultRule::delay_quantiles({{0.0, 1}, {0.7, 100'000}, {1.0, 3'000'000}}).reads());
  device_->add(FaultRule::fail(EIO).reads().rate(0.02));
  std::array<std::atomic<std::uint64_t>, kKeys> store{};
  std::array<std::atomic<std::uint64_t>, kKeys> acknowledged{};
  std::array<std::atomic<std::uint64_t>, kCellStatusCount> seen{};
  std::atomic<bool> done{false};
  const std::uint64_t seed = seed_of(51);
  std::vector<std::thread> loops;
  for (int loop = 0; loop < 2; ++loop) {
    loops.emplace_back([&] {
      while (!done.load()) {
        const auto batch = take(20);
        if (batch == nullptr) continue;
        std::vector<Given> given;
        for (const FetchBatch::Group& group : batch->groups()) {
          for (const std::string_view key : group.keys) {
            given.push_back(found(std::to_string(store[std::stoul(std::string(key))].load())));
          }
        }
        std::this_thread::yield();
        complete(*batch, given);
      }
    });
  }
  std::thread writer([&] {
    std::mt19937_64 random(seed);
    for (std::size_t round = 0; round < scaled(10'000); ++round) {
      const std::size_t number = random() % kKeys;
      const std::uint64_t version = store[number].load() + 1;
      store[number].store(version);
      if (random() % 3 != 0) {
        put(std::to_string(number), std::to_string(version));
      } else {
        erase(std::to_string(number));
      }
      acknowledged[number].store(version);
      fill("pin", 5);  // the keys go down, and their regions are emptied in turn
      if (round % 16 == 0) std::this_thread::sleep_for(milliseconds(1));
    }
    done.store(true);
  });
  std::vector<std::thread> readers;
  for (std::uint64_t reader = 0; reader < 3; ++reader) {
    readers.emplace_back([&, reader] {
      std::mt19937_64 random(seed + 1 + reader);
      while (!done.load()) {
        std::vector<std::string> keys;
        std::vector<std::uint64_t> least;
        for (int i = 0; i < 5; ++i) {
          const std::size_t number = random() % kKeys;
          keys.push_back(std::to_string(number));
          least.push_back(acknowledged[number].load());
        }
        const Answer got = ask(Ask{.columns = {{"pin", keys}}}).get();
        for (std::size_t i = 0; i < keys.size(); ++i) {
          const Cell& one = got.columns.at(0).at(i);
          seen[static_cast<std::size_t>(one.status)].fetch_add(1);
          if (!carries_value(one.status)) {
            ASSERT_TRUE(done.load())
                << "only the end leaves a cell without a value: " << static_cast<int>(one.status);
            continue;
          }
          ASSERT_GE(std::stoull(one.value), least[i]) << "key " << keys[i];
        }
      }
    });
  }
  writer.join();
  for (std::thread& loop : loops) loop.join();
  node_->stop();
  for (std::thread& reader : readers) reader.join();
  for (const CellStatus status :
       {CellStatus::HitDram, CellStatus::HitNvm, CellStatus::Fetched, CellStatus::Speculative}) {
    EXPECT_GT(seen[static_cast<std::size_t>(status)].load(), 20U) << static_cast<int>(status);
  }
}

}  // namespace
}  // namespace fc::testing
