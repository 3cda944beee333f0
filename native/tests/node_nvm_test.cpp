// A node whose cells lie on NVM: reads, deadlines, the store and the SSD against each other.

#include "node_nvm_support.hpp"

namespace fc::testing {
namespace {

// ---- reading
// --------------------------------------------------------------------------------------

TEST_F(NodeNvmTest, CellsOfAllSourcesComeInKeyOrder) {
  put_down("pin", {"p1", "p2"});
  put_down("local", {"l1"});
  put_in("pin", "hot", "dram's");
  auto answer =
      ask(Ask{.columns = {{"pin", {"p2", "absent", "hot", "p1"}}, {"local", {"l1", "x"}}}});
  const auto batch = take();
  EXPECT_EQ(keys_of(*batch), (std::vector<std::string>{"pin:absent"}));
  EXPECT_EQ(batch->priority(), FetchPriority::Live);
  complete(*batch, {found("store's")});
  const Answer got = answer.get();
  EXPECT_EQ(got.columns[0], (std::vector<Cell>{on_ssd("p2"), cell(CellStatus::Fetched, "store's"),
                                               cell(CellStatus::HitDram, "dram's"), on_ssd("p1")}));
  EXPECT_EQ(got.columns[1], (std::vector<Cell>{on_ssd("l1"), cell(CellStatus::Miss)}));
  EXPECT_EQ(counter("feature_cache_pending_batches"), 0);
}

TEST_F(NodeNvmTest, KeyAskedTwiceIsAnsweredTwice) {
  put_down("pin", {"k", "l"});
  const Answer got = ask(Ask{.columns = {{"pin", {"k", "l", "k"}}, {"pin", {"k"}}}}).get();
  EXPECT_EQ(got.columns[0], (std::vector<Cell>{on_ssd("k"), on_ssd("l"), on_ssd("k")}));
  EXPECT_EQ(got.columns[1], (std::vector<Cell>{on_ssd("k")}));
}

TEST_F(NodeNvmTest, WithoutAStoreReadsAreWaitedForAndFailuresAreMisses) {
  put_down("local", {"k"});
  EXPECT_EQ(ask(Ask{.columns = {{"local", {"k"}}}}).get().only(), on_ssd("k"));
  device_->add(FaultRule::fail(EIO).reads());
  EXPECT_EQ(ask(Ask{.columns = {{"local", {"k"}}}}).get().only(), cell(CellStatus::Miss));
  EXPECT_EQ(take(0), nullptr);
  const Counters counters = Counters::of(*node_);
  EXPECT_GE(counters.at("feature_cache_stage_seconds{stage=batch_get_with_nvm}"), 2);
  EXPECT_EQ(counters.at("feature_cache_stage_seconds{stage=batch_get_with_fetch}"), 0);
}

TEST_F(NodeNvmTest, CacheOnlyReadsNvmButAsksNoStore) {
  put_down("pin", {"k"});
  const auto stalled = stall_reads();
  auto slow = ask(Ask{.columns = {{"pin", {"k"}}}, .cache_only = true});
  ASSERT_TRUE(device_->wait_hits(stalled, 1));
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_EQ(speculative("launched"), 0);
  EXPECT_FALSE(ready(slow));
  device_->remove(stalled);
  EXPECT_EQ(slow.get().only(), on_ssd("k"));
  device_->add(FaultRule::fail(EIO).reads());
  EXPECT_EQ(cached("k"), cell(CellStatus::Miss));
  EXPECT_EQ(take(0), nullptr);
}

TEST_F(NodeNvmTest, FailedReadsAreFetchedTogetherOnceAndKept) {
  put_down("pin", {"a", "b"});
  put_down("user", {"u"});
  const auto failing = device_->add(FaultRule::fail(EIO).reads());
  const auto stalled = stall_reads();
  const Ask both{.columns = {{"user", {"u", "absent"}}, {"pin", {"a", "b"}}}};
  auto first = ask(both);
  auto second = ask(both);
  complete(*take(), {found("nowhere")});
  device_->remove(stalled);
  std::map<std::string, int> asked;
  while (!ready(first) || !ready(second)) {
    const auto batch = take(50);
    if (batch == nullptr) continue;
    std::vector<Given> given;
    for (const std::string& key : keys_of(*batch)) {
      ++asked[key];
      given.push_back(found("store's " + key));
    }
    complete(*batch, given);
  }
  EXPECT_EQ(asked, (std::map<std::string, int>{{"pin:a", 1}, {"pin:b", 1}, {"user:u", 1}}));
  for (std::future<Answer>* answer : {&first, &second}) {
    const Answer got = answer->get();
    EXPECT_EQ(got.columns[0][0].value, "store's user:u");
    EXPECT_EQ(got.columns[0][1].value, "nowhere");
    EXPECT_EQ(got.columns[1][0].value, "store's pin:a");
    EXPECT_EQ(got.columns[1][1].value, "store's pin:b");
  }
  device_->remove(failing);
  EXPECT_EQ(cached("a"), cell(CellStatus::HitDram, "store's pin:a"));
}

TEST_F(NodeNvmTest, HugeValuesOfManyCellsStayWithinTheReplysLimit) {
  NodeConfig config = nvm_config();
  config.engine.memory_bytes = 64 * kMiB;
  config.engine.segment_bytes = 0;
  config.engine.nvm.region_bytes = 4 * kMiB;
  config.engine.nvm.devices[0].bytes = 40 * kMiB;
  config.engine.namespaces[0].domains[0].budget_bytes = 8 * kMiB;
  config.engine.namespaces[0].nvm.budget_bytes = 32 * kMiB;
  config.engine.namespaces[0].speculative.enabled = false;
  config.engine.namespaces[1].nvm.budget_bytes = 0;
  config.engine.namespaces[2].nvm.budget_bytes = 0;
  config.max_reply_bytes = 3 * kMiB;
  start_nvm(config);
  std::vector<std::string> keys;
  for (int i = 0; i < 4; ++i) {
    keys.push_back("huge" + std::to_string(i));
    put_in("pin", keys.back(), patterned(keys.back(), 1, kMiB - 100));
  }
  const auto all_on_ssd = [&] {
    fill("pin", 1'000);
    const std::uint64_t before = device_reads();
    return cached(keys[3]).status == CellStatus::HitNvm && device_reads() > before;
  };
  ASSERT_TRUE(soon(all_on_ssd));
  const Answer got = ask(Ask{.columns = {{"pin", keys}}}).get();
  std::size_t values = 0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const Cell& one = got.columns[0][i];
    if (one.status == CellStatus::Throttled) continue;
    ++values;
    EXPECT_EQ(one.status, CellStatus::HitNvm);
    EXPECT_TRUE(one.value == patterned(keys[i], 1, kMiB - 100));
  }
  EXPECT_EQ(values, 3U) << "a fourth has no room";
  for (const std::string& key : keys) {
    EXPECT_TRUE(cached(key).value == patterned(key, 1, kMiB - 100));
  }
}

// ---- deadlines, limits, the end
// -------------------------------------------------------------------

TEST_F(NodeNvmTest, AtTheDeadlineAStalledReadIsTimedOutAndItsLateAnswerHarmless) {
  put_down("user", {"k"});
  put_in("user", "hot", "v");
  const auto stalled = stall_reads();
  const Answer got = ask(Ask{.columns = {{"user", {"k", "hot"}}}, .timeout_ms = 120}).get();
  EXPECT_EQ(got.columns[0],
            (std::vector<Cell>{cell(CellStatus::TimedOut), cell(CellStatus::HitDram, "v")}));
  EXPECT_GE(got.took, milliseconds(100));
  EXPECT_LT(got.took, milliseconds(2'000));
  EXPECT_EQ(counter("feature_cache_pending_batches"), 0);
  device_->remove(stalled);
  EXPECT_EQ(ask(Ask{.columns = {{"user", {"k"}}}}).get().only(), on_ssd("k"));
}

TEST_F(NodeNvmTest, WithoutADeadlineTheNamespacesTimeoutBoundsAReadStoreOrNone) {
  NodeConfig config = nvm_config();
  config.engine.namespaces[2].fetch_timeout_ms = 100;
  start_nvm(config);
  put_down("local", {"k"});
  stall_reads();
  const Answer got = ask(Ask{.columns = {{"local", {"k"}}}, .timeout_ms = 0}).get();
  EXPECT_EQ(got.only(), cell(CellStatus::TimedOut));
  EXPECT_LT(got.took, milliseconds(2'000));
}

TEST_F(NodeNvmTest, ReadsOfRequestsThatEndedAreNotStarted) {
  NodeConfig config = nvm_config();
  config.engine.nvm.queue_depth = 1;
  start_nvm(config);
  put_down("local", {"a", "b"});
  const auto stalled = stall_reads();
  auto first = ask(Ask{.columns = {{"local", {"a"}}}});
  ASSERT_TRUE(device_->wait_hits(stalled, 1));
  const Answer second = ask(Ask{.columns = {{"local", {"b"}}}, .timeout_ms = 50}).get();
  EXPECT_EQ(second.only(), cell(CellStatus::TimedOut));
  const std::uint64_t before = device_reads();
  device_->remove(stalled);
  EXPECT_EQ(first.get().only(), on_ssd("a"));
  EXPECT_EQ(cached("a", "local"), on_ssd("a"));
  EXPECT_EQ(device_reads(), before + 1) << "nobody wanted b any more";
}

TEST_F(NodeNvmTest, MoreReadsThanMayWaitAreThrottled) {
  NodeConfig config = nvm_config();
  config.engine.nvm.queue_depth = 1;
  config.engine.nvm.queued_reads = 1;
  start_nvm(config);
  put_down("local", {"a"});
  put_down("user", {"b"});
  put_down("pin", {"c"});
  const auto stalled = stall_reads();
  auto under_way = ask(Ask{.columns = {{"local", {"a"}}}});
  ASSERT_TRUE(device_->wait_hits(stalled, 1));
  auto waiting = ask(Ask{.columns = {{"user", {"b"}}}});
  EXPECT_EQ(ask("c").get().only(), cell(CellStatus::Throttled)) << "and not fetched instead";
  EXPECT_EQ(take(0), nullptr);
  device_->remove(stalled);
  EXPECT_EQ(under_way.get().only(), on_ssd("a"));
  EXPECT_EQ(waiting.get().only(), on_ssd("b"));
}

TEST_F(NodeNvmTest, BatchesBeyondThePendingLimitGiveTheirCellsBack) {
  NodeConfig config = nvm_config();
  config.max_pending_batches = 1;
  start_nvm(config);
  put_down("local", {"k"});
  const auto stalled = stall_reads();
  auto first = ask(Ask{.columns = {{"local", {"k"}}}});
  for (int i = 0; i < 100; ++i) {
    const Answer refused = ask(Ask{.columns = {{"local", {"k"}}}}).get();
    EXPECT_EQ(refused.call.code, CallStatus::ResourceExhausted);
    EXPECT_NE(refused.call.message.find("limits.max_pending_batches"), std::string::npos);
  }
  device_->remove(stalled);
  EXPECT_EQ(first.get().only(), on_ssd("k"));
  // A region that somebody still held could not be used again: the share would run dry.
  for (int round = 0; round < 8; ++round) put_down("local", {"k" + std::to_string(round)});
}

TEST_F(NodeNvmTest, StopAnswersRequestsWhoseReadsAreOut) {
  put_down("pin", {"k"});
  put_down("local", {"l"});
  const auto stalled = stall_reads();
  auto asked = ask("k");
  const auto batch = take();
  ASSERT_NE(batch, nullptr);
  auto local = ask(Ask{.columns = {{"local", {"l"}}}});
  ASSERT_TRUE(device_->wait_hits(stalled, 2));
  node_->stop();
  EXPECT_EQ(asked.get().only(), cell(CellStatus::TimedOut));
  EXPECT_EQ(local.get().only(), cell(CellStatus::TimedOut));
  EXPECT_EQ(ask("k").get().call.code, CallStatus::Unavailable);
  device_->remove(stalled);
  complete(*batch, {found("too late")});
}

TEST_F(NodeNvmTest, NodeEndsWhileReadsAreOut) {
  put_down("pin", {"k"});
  const auto slow = device_->add(FaultRule::delay(100'000'000).reads());
  auto asked = ask("k");
  ASSERT_TRUE(device_->wait_hits(slow, 1));
  node_.reset();
  EXPECT_EQ(asked.get().only(), cell(CellStatus::TimedOut));
}

}  // namespace
}  // namespace fc::testing
