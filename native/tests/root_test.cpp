// A root over its leaves: reads.

#include "cluster_support.hpp"

namespace fc::testing {
namespace {

class RootTest : public ClusterTest {};

TEST_F(RootTest, GathersABatchFromAllLeavesInKeyOrder) {
  start(4, 1);
  const std::vector<std::string> keys = many_keys(500);
  EXPECT_EQ(put(*root_, keys, "v:").columns.at(0),
            std::vector<WriteStatus>(keys.size(), WriteStatus::Stored));
  std::vector<std::string> asked = keys;
  asked.insert(asked.begin() + 100, "absent");
  const std::vector<Cell> cells = get(asked);
  ASSERT_EQ(cells.size(), asked.size());
  for (std::size_t i = 0; i < asked.size(); ++i) {
    if (asked[i] == "absent") {
      EXPECT_EQ(cells[i], cell(CellStatus::Miss));
    } else {
      EXPECT_EQ(cells[i], cell(CellStatus::HitDram, "v:" + asked[i]));
    }
  }
  for (std::uint32_t l = 0; l < 4; ++l) EXPECT_EQ(manners(l).gets, 1) << "one sub-request a leaf";
}

TEST_F(RootTest, SeveralColumnsIdsAndEmptyValuesKeepTheirPlaces) {
  start(3, 1);
  ASSERT_EQ(put(*root_, {"12345678", "12345679", "x"}, "").columns.at(0).size(), 3U);
  const Answer answer = ask(*root_, {.columns = {{"user", {"u"}},
                                                 {"pin", {"12345679", "nope", "12345678"}},
                                                 {"pin", {"x"}},
                                                 {"pin", {"12345678", "12345679"}}}});
  ASSERT_EQ(answer.columns.size(), 4U);
  EXPECT_EQ(answer.request_id, 7U);
  EXPECT_EQ(answer.columns[0][0], cell(CellStatus::Miss));
  EXPECT_EQ(answer.columns[1],
            (std::vector<Cell>{cell(CellStatus::HitDram, "12345679"), cell(CellStatus::Miss),
                               cell(CellStatus::HitDram, "12345678")}));
  EXPECT_EQ(answer.columns[2][0], cell(CellStatus::HitDram, "x"));
  EXPECT_EQ(answer.columns[3][1], cell(CellStatus::HitDram, "12345679"));
}

TEST_F(RootTest, ALeafThatIsGoneIsAskedOnceAndItsReplicasAnswer) {
  RootConfig root;
  root.hedge = false;
  start(3, 2, root);
  const std::vector<std::string> keys = many_keys(300);
  put(*root_, keys, "v:");
  manners(1).dead = true;
  for (int i = 0; i < 20; ++i) EXPECT_EQ(count(get(keys), CellStatus::HitDram), keys.size());
  EXPECT_LE(manners(1).gets, 8) << "avoided after its first failure, tried again now and then";
  EXPECT_GE(counter("feature_cache_root_retries_total"), 1);
  manners(1).dead = false;
  const int before = manners(1).gets;
  for (int i = 0; i < 400 && manners(1).gets < before + 20; ++i) {
    get(keys);
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_GE(manners(1).gets, before + 20) << "it is asked again once it answers";
}

TEST_F(RootTest, WithoutReplicasTheCellsOfALostLeafTimeOutAndTheRestIsAnswered) {
  start(2, 1);
  const std::vector<std::string> keys = many_keys(100);
  put(*root_, keys, "v:");
  manners(0).dead = true;
  const std::vector<Cell> cells = get(keys);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(cells[i].status,
              shard(keys[i]) % 2 == 0 ? CellStatus::TimedOut : CellStatus::HitDram);
  }
}

TEST_F(RootTest, ASilentLeafIsHedgedAndThenAvoided) {
  RootConfig root;
  root.hedge_after_us = 5000;
  root.hedge_budget = 1.0;
  start(2, 2, root);
  const std::vector<std::string> keys = many_keys(100);
  put(*root_, keys, "v:");
  manners(0).silent = true;
  const Answer answer = ask(*root_, {.columns = {{"pin", keys}}, .timeout_ms = 1000});
  EXPECT_EQ(count(answer.columns[0], CellStatus::HitDram), keys.size());
  EXPECT_LT(answer.took.count(), 900);
  EXPECT_GE(counter("feature_cache_root_hedges_total"), 1);
  EXPECT_GE(counter("feature_cache_root_hedged_cells_won_total"), 1);
}

TEST_F(RootTest, ASilentLeafWithoutHedgesCostsOneTimeoutOfItsOwn) {
  RootConfig root;
  root.hedge = false;
  root.leaf_timeout_ms = 30;
  start(2, 2, root);
  const std::vector<std::string> keys = many_keys(100);
  put(*root_, keys, "v:");
  manners(0).silent = true;
  const Answer answer = ask(*root_, {.columns = {{"pin", keys}}, .timeout_ms = 2000});
  EXPECT_EQ(count(answer.columns[0], CellStatus::HitDram), keys.size());
  EXPECT_GE(answer.took.count(), 25);
  EXPECT_LT(answer.took.count(), 1500);
}

TEST_F(RootTest, TheCallersDeadlineBoundsABatch) {
  RootConfig root;
  root.hedge = false;
  start(2, 1, root);
  const std::vector<std::string> keys = many_keys(100);
  put(*root_, keys, "v:");
  manners(0).silent = true;
  const Answer answer = ask(*root_, {.columns = {{"pin", keys}}, .timeout_ms = 400});
  ASSERT_TRUE(answer.call.ok());
  EXPECT_LE(answer.took.count(), 400 + 200);
  EXPECT_GT(count(answer.columns[0], CellStatus::TimedOut), 0U);
  EXPECT_GT(count(answer.columns[0], CellStatus::HitDram), 0U);
}

TEST_F(RootTest, HedgesStayWithinTheirBudget) {
  RootConfig root;
  root.hedge_after_us = 1000;
  root.hedge_budget = 0.02;
  start(2, 2, root);
  const std::vector<std::string> keys = many_keys(20);
  put(*root_, keys, "v:");
  manners(0).delay_ms = 8;
  manners(1).delay_ms = 8;
  for (int i = 0; i < 100; ++i) get(keys);
  const double calls = counter("feature_cache_root_calls_total");
  const double hedges = counter("feature_cache_root_hedges_total");
  EXPECT_LE(hedges, 5 + 0.02 * calls + 1);
  EXPECT_GE(counter("feature_cache_root_denied_total"), 50);
}

TEST_F(RootTest, AGarbledReplyCountsAsNone) {
  start(2, 2);
  const std::vector<std::string> keys = many_keys(50);
  put(*root_, keys, "v:");
  manners(0).garbled = true;
  EXPECT_EQ(count(get(keys), CellStatus::HitDram), keys.size());
}

TEST_F(RootTest, AWrongShardIsAskedElsewhereAndTheNewerMapIsHeardOf) {
  start(3, 2);
  const std::vector<std::string> keys = many_keys(200);
  put(*root_, keys, "v:");
  // Leaf 0 knows version 5, in which nothing is its own any more.
  leaves_[0]->set_owned({5, kShards, {}, {}, {}});
  EXPECT_EQ(count(get(keys), CellStatus::HitDram), keys.size());
  EXPECT_EQ(root_->newest_map_version(), 5U);
  EXPECT_GT(counter("feature_cache_root_wrong_shard_cells_total"), 0);
}

TEST_F(RootTest, AWrongShardWithoutAnyOtherReplicaSaysSo) {
  start(2, 1);
  const std::vector<std::string> keys = many_keys(50);
  put(*root_, keys, "v:");
  leaves_[0]->set_owned({5, kShards, {}, {}, {}});
  const std::vector<Cell> cells = get(keys);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(cells[i].status,
              shard(keys[i]) % 2 == 0 ? CellStatus::WrongShard : CellStatus::HitDram);
  }
}

// The map changes while a batch is out: its keys go again by the newer one.
TEST_F(RootTest, KeysThatMovedMeanwhileGoAgainByTheNewerMap) {
  start(2, 1);
  const std::vector<std::string> keys = many_keys(100);
  put(*root_, keys, "v:");
  // All moves to leaf 1, which has the values; the root hears of it after it has asked leaf 0.
  replicas_of_ = [](std::uint32_t) { return std::vector<std::uint32_t>{1}; };
  own(0, 2);
  own(1, 2);
  put(*leaves_[1], keys, "v:");
  manners(0).delay_ms = 100;
  auto answer = ask_async(*root_, {.columns = {{"pin", keys}}});
  root_->set_shard_map(map_of(2));
  EXPECT_EQ(count(answer.get().columns[0], CellStatus::HitDram), keys.size());
}

TEST_F(RootTest, ShardsWithoutALeafAskTheStoreWithinItsBudget) {
  RootConfig root;
  root.store_budget = 0.5;
  start(2, 1, root, 0, true);
  const std::vector<std::string> keys = many_keys(100);
  put(*root_, keys, "v:");
  manners(0).dead = true;
  auto answer = ask_async(*root_, {.columns = {{"pin", keys}}});
  const auto batch = root_->take_fetch("store", 5000);
  ASSERT_NE(batch, nullptr);
  EXPECT_LE(batch->key_count(), 50U);
  FetchAnswer values;
  for (std::size_t i = 0; i < batch->key_count(); ++i) {
    values.values.push_back({FetchedValue::Kind::Found, values.bytes.size(), 1, {}, 0});
    values.bytes.append("s", 1);
  }
  const std::size_t fetched = batch->key_count();
  batch->complete(std::move(values));
  const std::vector<Cell> cells = answer.get().columns.at(0);
  EXPECT_EQ(count(cells, CellStatus::Fetched), fetched);
  EXPECT_EQ(count(cells, CellStatus::Fetched) + count(cells, CellStatus::HitDram) +
                count(cells, CellStatus::TimedOut),
            keys.size());
}

// What only the leaves can know to be wrong is no reason to avoid them.
TEST_F(RootTest, ARequestThatLeavesRefuseIsAnErrorAndNoFailureOfTheirs) {
  start(2, 2);
  put(*root_, {"a"}, "v:");
  client::GetRequest request;
  const std::vector<std::string> keys{"a"};
  request.columns.push_back(column_of("pin", keys, "no-such-domain"));
  const auto answer = std::make_shared<std::promise<Answer>>();
  root_->batch_get(encoded(request), 1000,
                   [answer](CallStatus call, const std::vector<Buffer>& pieces) {
                     answer->set_value(parsed(std::move(call), pieces));
                   });
  EXPECT_EQ(answer->get_future().get().only(), cell(CellStatus::Error));
  EXPECT_EQ(counter("feature_cache_leaf_failures_total"), 0);
  EXPECT_EQ(get({"a"})[0], cell(CellStatus::HitDram, "v:a"));
}

TEST_F(RootTest, CacheOnlyAsksTheLeavesForWhatTheyHave) {
  start(2, 1);
  put(*root_, {"a"}, "v:");
  const Answer answer = ask(*root_, {.columns = {{"pin", {"a", "b"}}}, .cache_only = true});
  EXPECT_EQ(answer.columns[0],
            (std::vector<Cell>{cell(CellStatus::HitDram, "v:a"), cell(CellStatus::Miss)}));
}

TEST_F(RootTest, BeforeItsFirstMapNothingIsAnsweredAndNothingFails) {
  start(1, 1);
  NodeConfig config;
  config.engine = leaf_engine();
  config.engine.memory_bytes = 0;
  config.root.enabled = true;
  const auto connector = std::make_shared<TestConnector>();
  const std::unique_ptr<Node> young = make_node(config, {}, nullptr, connector);
  const Answer answer = ask(*young, {.columns = {{"pin", {"a", "b"}}}});
  ASSERT_TRUE(answer.call.ok());
  EXPECT_EQ(count(answer.columns[0], CellStatus::TimedOut), 2U);
  EXPECT_EQ(put(*young, {"a"}, "v").columns.at(0).at(0), WriteStatus::Error);
}

TEST_F(RootTest, MapsThatContradictThemselvesOrAreOlderChangeNothing) {
  start(2, 1);
  put(*root_, {"a"}, "v:");
  ShardMap bad = map_of(9);
  bad.replicas[0].leaf = 77;
  EXPECT_THROW(root_->set_shard_map(bad), std::invalid_argument);
  bad = map_of(9);
  bad.first.back() += 1;
  EXPECT_THROW(root_->set_shard_map(bad), std::invalid_argument);
  bad = map_of(9);
  bad.first[3] = 99;
  EXPECT_THROW(root_->set_shard_map(bad), std::invalid_argument);
  ShardMap old = map_of(0);
  old.replicas.assign(old.replicas.size(), {1, ReplicaState::Online});
  root_->set_shard_map(old);
  EXPECT_EQ(get({"a"})[0], cell(CellStatus::HitDram, "v:a"));
  EXPECT_THROW(leaves_[0]->set_shard_map(map_of(3)), std::invalid_argument);
  EXPECT_THROW(root_->set_owned({1, 4, {}, {}, {}}), std::invalid_argument);
}

TEST_F(RootTest, StoppingAnswersWhatWaits) {
  start(2, 1);
  manners(0).silent = true;
  manners(1).silent = true;
  auto answer = ask_async(*root_, {.columns = {{"pin", many_keys(10)}}, .timeout_ms = 20'000});
  std::this_thread::sleep_for(milliseconds(20));
  root_->stop();
  EXPECT_EQ(count(answer.get().columns.at(0), CellStatus::TimedOut), 10U);
}

// ---- the hot tier
// --------------------------------------------------------------------------------

TEST_F(RootTest, TheHotTierAnswersForASecondAtMost) {
  start(2, 1, {}, 8 * kMiB);
  put(*root_, {"a"}, "v:");
  EXPECT_EQ(get({"a"})[0], cell(CellStatus::HitDram, "v:a"));
  const int asked = manners(0).gets + manners(1).gets;
  EXPECT_EQ(get({"a"})[0], cell(CellStatus::HitDram, "v:a"));
  EXPECT_EQ(manners(0).gets + manners(1).gets, asked) << "from the hot tier";
  // Written past this root: seen within a second.
  put(*leaves_[shard("a") % 2], {"a"}, "new:");
  const auto since = steady_clock::now();
  while (get({"a"})[0].value != "new:a") {
    ASSERT_LT(steady_clock::now() - since, milliseconds(1500));
    std::this_thread::sleep_for(milliseconds(10));
  }
}

TEST_F(RootTest, AWriteThroughTheRootIsSeenThroughItAtOnce) {
  start(2, 2, {}, 8 * kMiB);
  for (int i = 0; i < 200; ++i) {
    const std::string value = std::to_string(i) + ":";
    ASSERT_EQ(put(*root_, {"a", "b"}, value).columns[0][0], WriteStatus::Stored);
    ASSERT_EQ(get({"a"})[0].value, value + "a");
    if (i % 10 == 0) {
      erase(*root_, {"a"});
      ASSERT_EQ(get({"a"})[0].status, CellStatus::Miss);
    }
  }
}

// A get that read the old value before a write must not put it into the hot tier after it.
TEST_F(RootTest, AnOlderReplyDoesNotEnterTheHotTierAfterAWrite) {
  start(1, 1, {}, 8 * kMiB);
  put(*root_, {"a"}, "old:");
  manners(0).delay_ms = 100;  // its reply is read at once and comes late
  auto old = ask_async(*root_, {.columns = {{"pin", {"a"}}}});
  std::this_thread::sleep_for(milliseconds(20));
  manners(0).delay_ms = 0;
  put(*root_, {"a"}, "new:");
  EXPECT_EQ(old.get().only().value, "old:a");
  EXPECT_EQ(get({"a"})[0].value, "new:a");
}

TEST(RootConfigTest, WhatARootMayNotHaveIsRefused) {
  const auto connector = std::make_shared<TestConnector>();
  NodeConfig config;
  config.engine = engine_config(8 * kMiB, {name_space("pin", {domain("all", kMiB)})});
  config.root.enabled = true;
  EXPECT_THROW(make_node(config, {}, nullptr, connector), std::invalid_argument)
      << "a hot tier without an end";
  config.engine.namespaces[0].domains[0].ttl_ms = 1000;
  EXPECT_NO_THROW(make_node(config, {}, nullptr, connector));
  EXPECT_THROW(make_node(config), std::invalid_argument) << "no way to the leaves";
  config.root.hedge_budget = 1.5;
  EXPECT_THROW(make_node(config, {}, nullptr, connector), std::invalid_argument);
  config.root = {};
  config.root.enabled = config.leaf.enabled = true;
  EXPECT_THROW(make_node(config, {}, nullptr, connector), std::invalid_argument);
}

}  // namespace
}  // namespace fc::testing
