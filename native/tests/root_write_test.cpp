// Writes through a root, and what a leaf takes of them.

#include "cluster_support.hpp"
#include "upstream/leaf_shards.hpp"

namespace fc::testing {
namespace {

class RootWriteTest : public ClusterTest {};

TEST_F(RootWriteTest, GoToAllReplicas) {
  start(3, 3);
  const std::vector<std::string> keys = many_keys(60);
  const Written answer = put(*root_, keys, "v:");
  EXPECT_EQ(answer.columns[0], std::vector<WriteStatus>(keys.size(), WriteStatus::Stored));
  for (const auto& leaf : leaves_) {
    EXPECT_EQ(count(ask(*leaf, {.columns = {{"pin", keys}}}).columns[0], CellStatus::HitDram),
              keys.size());
  }
  erase(*root_, keys);
  for (const auto& leaf : leaves_) {
    EXPECT_EQ(count(ask(*leaf, {.columns = {{"pin", keys}}}).columns[0], CellStatus::Miss),
              keys.size());
  }
}

TEST_F(RootWriteTest, GoToWarmingReplicasWhichAreNotRead) {
  start(2, 2);
  ShardMap map = map_of(2);
  for (ShardMap::Replica& replica : map.replicas) {
    if (replica.leaf == 1) replica.state = ReplicaState::Warming;
  }
  root_->set_shard_map(map);
  const std::vector<std::string> keys = many_keys(40);
  EXPECT_EQ(put(*root_, keys, "v:").columns[0],
            std::vector<WriteStatus>(keys.size(), WriteStatus::Stored));
  EXPECT_EQ(manners(1).writes, 1);
  EXPECT_EQ(count(get(keys), CellStatus::HitDram), keys.size());
  EXPECT_EQ(manners(1).gets, 0);
}

TEST_F(RootWriteTest, ArePartialWhereAReplicaIsGoneAndErrorsWhereAllAre) {
  start(2, 2);
  const std::vector<std::string> keys = many_keys(40);
  manners(1).dead = true;
  EXPECT_EQ(put(*root_, keys, "v:").columns[0],
            std::vector<WriteStatus>(keys.size(), WriteStatus::Partial));
  EXPECT_EQ(erase(*root_, keys).columns[0],
            std::vector<WriteStatus>(keys.size(), WriteStatus::Partial));
  manners(0).dead = true;
  EXPECT_EQ(put(*root_, keys, "v:").columns[0],
            std::vector<WriteStatus>(keys.size(), WriteStatus::Error));
}

TEST_F(RootWriteTest, ASilentReplicaIsWaitedForUntilTheDeadline) {
  start(2, 2);
  manners(1).silent = true;
  const auto started = steady_clock::now();
  EXPECT_EQ(put(*root_, {"a"}, "v:", 0, 100).columns[0][0], WriteStatus::Partial);
  EXPECT_LT(steady_clock::now() - started, milliseconds(1000));
}

TEST_F(RootWriteTest, ValuesThatNoLeafTakesAreRejected) {
  start(2, 2);
  client::PutRequest request;
  const std::vector<std::string> keys{"a"};
  request.columns.push_back({.keys = column_of("pin", keys), .values = {}, .ttl_ms = {}});
  const std::string large(3 * kMiB, 'x');  // above the domain's budget
  request.columns[0].values.parts = {large};
  const Written answer = write(*root_, &Node::batch_put, encoded(request));
  EXPECT_EQ(answer.columns.at(0).at(0), WriteStatus::Rejected);
}

TEST_F(RootWriteTest, TtlsOfEachKeyGoAlong) {
  start(2, 1);
  const std::vector<std::string> keys = many_keys(20);
  client::PutRequest request;
  request.columns.push_back({.keys = column_of("pin", keys), .values = {}, .ttl_ms = {}});
  for (std::size_t i = 0; i < keys.size(); ++i) {
    request.columns[0].values.parts.push_back("v");
    request.columns[0].ttl_ms.push_back(i % 2 == 0 ? 100 : 60'000);
  }
  write(*root_, &Node::batch_put, encoded(request));
  std::this_thread::sleep_for(milliseconds(250));
  const std::vector<Cell> cells = get(keys);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(cells[i].status, i % 2 == 0 ? CellStatus::Miss : CellStatus::HitDram);
  }
}

// A root whose map names fewer replicas than there are must not have its write acknowledged.
TEST_F(RootWriteTest, ByAnOlderMapWaitForTheNewerOneAndReachTheNewReplica) {
  start(2, 1);
  const std::vector<std::string> keys = many_keys(30);
  replicas_ = 2;  // each leaf gets the other's shards, too
  for (std::uint32_t l = 0; l < 2; ++l) own(l, 2, 2);
  std::thread late([this] {
    std::this_thread::sleep_for(milliseconds(60));
    root_->set_shard_map(map_of(2));
  });
  EXPECT_EQ(put(*root_, keys, "v:").columns[0],
            std::vector<WriteStatus>(keys.size(), WriteStatus::Stored));
  late.join();
  for (const auto& leaf : leaves_) {
    EXPECT_EQ(count(ask(*leaf, {.columns = {{"pin", keys}}}).columns[0], CellStatus::HitDram),
              keys.size());
  }
  EXPECT_EQ(counter("feature_cache_root_writes_again_total"), 1);
}

TEST_F(RootWriteTest, ByAnOlderMapFailWhereNoNewerOneComes) {
  start(2, 1);
  replicas_ = 2;
  for (std::uint32_t l = 0; l < 2; ++l) own(l, 2, 2);
  const auto started = steady_clock::now();
  EXPECT_EQ(put(*root_, {"a"}, "v:", 0, 200).columns[0][0], WriteStatus::Error);
  EXPECT_LT(steady_clock::now() - started, milliseconds(1000));
  EXPECT_EQ(count(get({"a"}), CellStatus::Miss), 1U);
}

TEST_F(RootWriteTest, ThatWaitForANewerMapEndWithTheNode) {
  start(2, 1);
  replicas_ = 2;
  for (std::uint32_t l = 0; l < 2; ++l) own(l, 2, 2);
  std::thread stopper([this] {
    std::this_thread::sleep_for(milliseconds(50));
    root_->stop();
  });
  EXPECT_EQ(put(*root_, {"a"}, "v:", 0, 20'000).columns[0][0], WriteStatus::Error);
  stopper.join();
}

// ---- the leaf
// ------------------------------------------------------------------------------------

class LeafTest : public ClusterTest {
 protected:
  void SetUp() override { start(2, 1); }
  Node& leaf() { return *leaves_[0]; }
  static bool even(const std::string& key) { return shard(key) % 2 == 0; }
};

TEST_F(LeafTest, AnswersForItsShardsAlone) {
  const std::vector<std::string> keys = many_keys(200);
  const Written written = put(leaf(), keys, "v:");
  const Answer answer = ask(leaf(), {.columns = {{"pin", keys}}});
  EXPECT_EQ(written.map_version, 1U);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(written.columns[0][i], even(keys[i]) ? WriteStatus::Stored : WriteStatus::Error);
    EXPECT_EQ(answer.columns[0][i], even(keys[i]) ? cell(CellStatus::HitDram, "v:" + keys[i])
                                                  : cell(CellStatus::WrongShard));
  }
}

TEST_F(LeafTest, BeforeItIsToldOfShardsItOwnsNone) {
  NodeConfig config;
  config.engine = leaf_engine();
  config.leaf.enabled = true;
  const std::unique_ptr<Node> young = make_node(config);
  EXPECT_EQ(ask(*young, {.columns = {{"pin", {"a"}}}}).only(), cell(CellStatus::WrongShard));
  EXPECT_EQ(put(*young, {"a"}, "v").columns[0][0], WriteStatus::Error);
}

// What it holds may be older than what others were told while it was away.
TEST_F(LeafTest, TakesWritesForShardsThatItDoesNotReadYet) {
  const std::vector<std::string> keys = many_keys(100);
  put(leaf(), keys, "old:");
  OwnedShards owned{2, kShards, {}, {}, {}};
  for (std::uint32_t s = 0; s < kShards; s += 2) {
    owned.shards.push_back(s);
    owned.readable.push_back(s < kShards / 2 ? 1 : 0);
  }
  leaf().set_owned(owned);
  const Written written = put(leaf(), keys, "new:");
  const Answer answer = ask(leaf(), {.columns = {{"pin", keys}}});
  for (std::size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(written.columns[0][i] == WriteStatus::Stored, even(keys[i]));
    const bool readable = even(keys[i]) && shard(keys[i]) < kShards / 2;
    EXPECT_EQ(answer.columns[0][i].status, readable ? CellStatus::HitDram : CellStatus::WrongShard);
  }
}

TEST_F(LeafTest, RefusesWritesByAMapOlderThanItsShardsReplicas) {
  own(0, 7, 5);
  const std::vector<std::string> keys = many_keys(50);
  for (const auto& [version, taken] :
       std::vector<std::pair<std::uint64_t, bool>>{{4, false}, {5, true}, {9, true}, {0, true}}) {
    const Written written = put(leaf(), keys, "v:", version);
    EXPECT_EQ(written.map_version, 7U);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      EXPECT_EQ(written.columns[0][i] == WriteStatus::Stored, taken && even(keys[i]));
    }
  }
}

TEST_F(LeafTest, TellsAReturningReplicaWhatItMissed) {
  std::vector<std::string> keys;
  for (const std::string& key : many_keys(100)) {
    if (even(key)) keys.push_back(key);
  }
  put(leaf(), {keys[0], keys[1]}, "v:");
  erase(leaf(), {keys[2]});
  const std::vector<std::uint32_t> of_two{shard(keys[0]), shard(keys[2])};
  // The leaf is younger than that.
  EXPECT_FALSE(leaf().recent_writes(kShards, of_two, 3'600'000).complete);
  std::this_thread::sleep_for(milliseconds(60));
  put(leaf(), {keys[3]}, "v:");
  RecentWrites writes = leaf().recent_writes(kShards, {{shard(keys[3])}}, 50);
  ASSERT_TRUE(writes.complete);
  EXPECT_EQ(writes.map_version, 1U);
  ASSERT_EQ(writes.columns.size(), 1U);
  EXPECT_EQ(writes.columns[0].ns, "pin");
  EXPECT_EQ(writes.columns[0].keys, std::vector<std::string>{keys[3]});
  EXPECT_FALSE(leaf().recent_writes(kShards, {{1}}, 10).complete) << "not its own";
  EXPECT_FALSE(leaf().recent_writes(kShards + 1, {{0}}, 10).complete) << "another cluster's";
  EXPECT_THROW(root_->recent_writes(kShards, {{0}}, 10), std::invalid_argument);
}

// Between two spells of owning a shard its writes went to others.
TEST_F(LeafTest, KnowsNothingOfTheTimeBeforeAShardCame) {
  std::this_thread::sleep_for(milliseconds(60));
  EXPECT_TRUE(leaf().recent_writes(kShards, {{0, 2}}, 30).complete);
  own(0, 2);  // as before: it stays as old
  EXPECT_TRUE(leaf().recent_writes(kShards, {{0, 2}}, 30).complete);
  leaf().set_owned(
      {.version = 3, .shard_count = kShards, .shards = {0}, .written_since = {}, .readable = {}});
  own(0, 4);
  EXPECT_TRUE(leaf().recent_writes(kShards, {{0}}, 30).complete) << "it never went";
  EXPECT_FALSE(leaf().recent_writes(kShards, {{0, 2}}, 30).complete);
  std::this_thread::sleep_for(milliseconds(60));
  EXPECT_TRUE(leaf().recent_writes(kShards, {{0, 2}}, 30).complete);
}

TEST_F(LeafTest, ItsLogOfWritesIsBounded) {
  RecentWriteLog log(64 << 10);
  std::vector<RecentWrites::Column> columns(1);
  std::this_thread::sleep_for(milliseconds(60));
  for (int i = 0; i < 100; ++i) log.add(0, "key", 0);
  EXPECT_TRUE(log.since(50, 1, {true}, columns));
  EXPECT_EQ(columns[0].keys.size(), 100U);
  for (int i = 0; i < 10'000; ++i) log.add(0, "key", 0);
  EXPECT_LT(log.size(), 1200U);
  EXPECT_FALSE(log.since(50, 1, {true}, columns)) << "it does not reach back";
}

// What was a leaf's when a write began stays so until it has ended.
TEST_F(LeafTest, ShardsThatItGivesAwayTakeNoWriteAfterwards) {
  const std::vector<std::string> keys = many_keys(400);
  std::atomic<bool> given_away{false};
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    while (!stop) {
      const bool after = given_away;
      const Written written = put(leaf(), keys, "v:");
      if (!after) continue;
      for (const WriteStatus status : written.columns[0]) EXPECT_EQ(status, WriteStatus::Error);
    }
  });
  for (int round = 0; round < 50; ++round) {
    leaf().set_owned({3, kShards, {}, {}, {}});
    given_away = true;
    erase(leaf(), keys);  // refused, too
    std::this_thread::sleep_for(milliseconds(1));
    given_away = false;
    std::this_thread::sleep_for(milliseconds(2));
    own(0, 3);
  }
  stop = true;
  writer.join();
}

TEST_F(LeafTest, ShardsChangeWhileWritesNeverCease) {
  const std::vector<std::string> keys = many_keys(200);
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (int t = 0; t < 6; ++t) {
    writers.emplace_back([&] {
      while (!stop) erase(leaf(), keys);
    });
  }
  const auto started = steady_clock::now();
  for (std::uint64_t version = 3; version < 23; ++version) {
    own(0, version);
    EXPECT_EQ(leaf().recent_writes(kShards, {{0}}, 0).map_version, version);
  }
  EXPECT_LT(steady_clock::now() - started, milliseconds(5000));
  stop = true;
  for (std::thread& writer : writers) writer.join();
}

TEST_F(LeafTest, OwnedShardsThatContradictThemselvesAreRefused) {
  EXPECT_THROW(leaf().set_owned({1, 0, {}, {}, {}}), std::invalid_argument);
  EXPECT_THROW(leaf().set_owned({1, 4, {4}, {}, {}}), std::invalid_argument);
  EXPECT_THROW(leaf().set_owned({1, 4, {1, 2}, {0}, {}}), std::invalid_argument);
  EXPECT_THROW(leaf().set_owned({1, 4, {1, 2}, {}, {1}}), std::invalid_argument);
}

}  // namespace
}  // namespace fc::testing
