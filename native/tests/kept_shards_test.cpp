// What a leaf finds of its shards, and an instance of its keys, when it starts again: however the
// process before ended, whatever became of its files, and over how many instances the node was
// split meanwhile.
#include <fstream>

#include "core/hash.hpp"
#include "core/moved_keys.hpp"
#include "core/placement.hpp"
#include "crash_support.hpp"
#include "feature_cache/cluster.hpp"
#include "memory/arena_header.hpp"
#include "memory/shard_file.hpp"
#include "persist_support.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
namespace {

constexpr std::uint32_t kShards = 8;
constexpr int kKeys = 1200;

std::string key(int i) {
  return "key " + std::to_string(i);
}
std::uint32_t shard(const std::string& of) {
  return shard_of("pin", of, kShards);
}

class KeptShardsTest : public ::testing::Test {
 protected:
  KeptShardsTest() {
    NamespaceConfig pin = name_space("pin", {domain("all", kMiB)});
    config_ = engine_config(4 * kMiB, {pin});
    config_.expected_item_bytes = 300;
    config_.persist.dir = folder_.path();
    config_.persist.name = "cache";
    config_.shard_count = kShards;
  }
  Engine& start() {
    engine_.reset();
    engine_ = make_engine(config_, clock_, false);
    ns_ = engine_->find_namespace("pin");
    return *engine_;
  }
  Engine& restart(bool in_order) {
    if (in_order) {
      EXPECT_TRUE(engine_->shutdown());
    }
    return start();
  }
  void hold(const std::vector<std::uint32_t>& shards) { engine_->hold_shards(kShards, shards); }
  void drop(const std::vector<std::uint32_t>& shards) { engine_->drop_shards(kShards, shards); }
  void fill(const std::string& value) {
    for (int i = 0; i < kKeys; ++i) put(*engine_, ns_, key(i), value);
  }
  // The shards of which items are found; all of its items then, or one is missing.
  std::vector<std::uint32_t> found(const std::string& value) {
    std::array<int, kShards> hits{};
    std::array<int, kShards> all{};
    for (int i = 0; i < kKeys; ++i) {
      const Got got = get(*engine_, ns_, key(i));
      ++all[shard(key(i))];
      if (got.status == CellStatus::Miss) continue;
      EXPECT_EQ(got.value, value);
      ++hits[shard(key(i))];
    }
    std::vector<std::uint32_t> shards;
    for (std::uint32_t s = 0; s < kShards; ++s) {
      if (hits[s] == 0) continue;
      EXPECT_EQ(hits[s], all[s]) << "some of shard " << s << " are missing";
      shards.push_back(s);
    }
    return shards;
  }
  std::vector<std::uint32_t> kept() const { return engine_->kept_shards().shards; }
  std::string file(const std::string& suffix) const { return folder_.file("cache." + suffix); }

  using Shards = std::vector<std::uint32_t>;
  CrashFolder folder_;
  ManualClock clock_;
  EngineConfig config_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
};

TEST_F(KeptShardsTest, AFirstStartFindsNone) {
  start();
  EXPECT_EQ(engine_->kept_shards().shard_count, kShards);
  EXPECT_EQ(kept(), Shards{});
  EXPECT_EQ(engine_->kept_shards().away_ms, 0U);
}

TEST_F(KeptShardsTest, WhatWasHeldIsThereHoweverTheProcessEnded) {
  start();
  hold({1, 2, 5});
  fill("v");
  for (const bool in_order : {true, false, true}) {
    restart(in_order);
    EXPECT_EQ(kept(), (Shards{1, 2, 5}));
    EXPECT_EQ(found("v"), (Shards{1, 2, 5}));
  }
}

TEST_F(KeptShardsTest, WhatWasDroppedStaysDropped) {
  start();
  hold({1, 2, 5});
  fill("old");
  drop({2});
  restart(false);
  EXPECT_EQ(kept(), (Shards{1, 2, 5}));
  EXPECT_EQ(found("old"), (Shards{1, 5}));
  const std::string of_two = [] {
    for (int i = 0;; ++i) {
      if (shard(key(i)) == 2) return key(i);
    }
  }();
  put(*engine_, ns_, of_two, "new");
  hold({1, 2, 5});
  restart(false);
  EXPECT_EQ(get(*engine_, ns_, of_two).value, "new");
}

// Over several instances a shard is kept where all of them kept it.
TEST_F(KeptShardsTest, OfANodeOfSeveralInstancesAllKeepItOrNone) {
  config_.memory_bytes *= 3;
  config_.instances = 3;
  for (NamespaceConfig& ns : config_.namespaces) ns.domains[0].budget_bytes *= 3;
  start();
  hold({1, 2, 5});
  fill("v");
  for (const bool in_order : {true, false}) {
    restart(in_order);
    EXPECT_EQ(kept(), (Shards{1, 2, 5}));
    EXPECT_EQ(found("v"), (Shards{1, 2, 5}));
  }
  hold({1, 5});
  restart(false);
  EXPECT_EQ(kept(), (Shards{1, 5}));
  EXPECT_EQ(found("v"), (Shards{1, 5}));
  engine_.reset();
  ASSERT_TRUE(std::filesystem::remove(folder_.file("cache-1.shards")));
  start();
  EXPECT_EQ(kept(), Shards{}) << "a third of each shard is missing";
  EXPECT_EQ(engine_->kept_shards().away_ms, 0U);
}

// A shard that leaves, in this process or the next, and comes back: nothing of before.
TEST_F(KeptShardsTest, WhatIsNoLongerHeldIsDropped) {
  start();
  hold({1, 2});
  fill("old");
  hold({1});
  EXPECT_EQ(found("old"), (Shards{0, 1, 3, 4, 5, 6, 7})) << "what was never held may be there yet";
  hold({1, 2, 3});
  EXPECT_EQ(get(*engine_, ns_,
                [] {
                  for (int i = 0;; ++i) {
                    if (shard(key(i)) == 2) return key(i);
                  }
                }())
                .status,
            CellStatus::Miss);
  restart(true);
  EXPECT_EQ(found("old"), (Shards{1, 3}));
}

TEST_F(KeptShardsTest, AwayCountsFromTheLastSignOfLifeOfWhoHeldThem) {
  start();
  hold({1});
  clock_.advance(10'000);
  engine_->maintain();
  clock_.advance(70);
  restart(false);
  EXPECT_EQ(engine_->kept_shards().away_ms, 70U);
  clock_.advance(1'000);
  engine_->maintain();  // nobody has said that the time before was made up for
  restart(false);
  EXPECT_EQ(engine_->kept_shards().away_ms, 1'070U);
  EXPECT_EQ(kept(), (Shards{1}));
  hold({1});
  clock_.advance(30);
  restart(true);
  EXPECT_EQ(engine_->kept_shards().away_ms, 30U);
}

TEST_F(KeptShardsTest, WithoutTheirFileAllIsHidden) {
  start();
  hold({1, 2});
  fill("old");
  engine_->shutdown();
  engine_.reset();
  std::filesystem::remove(file("shards"));
  start();
  EXPECT_EQ(kept(), Shards{});
  EXPECT_EQ(found("old"), Shards{});
  EXPECT_SAYS(engine_->start_report().memory_reason, "nothing is known of its shards");
  fill("new");
  hold({1, 2});
  restart(false);
  EXPECT_EQ(found("new"), (Shards{1, 2}));
}

TEST_F(KeptShardsTest, OfAnotherNumberOfShardsAllIsHidden) {
  start();
  hold({1, 2});
  fill("old");
  config_.shard_count = kShards + 1;
  restart(true);
  EXPECT_EQ(kept(), Shards{});
  EXPECT_EQ(found("old"), Shards{});
  config_.shard_count = kShards;
  restart(true);
  EXPECT_EQ(found("old"), Shards{});
}

TEST_F(KeptShardsTest, AfterALifeThatWasNoLeafsAllIsHidden) {
  start();
  hold({1, 2});
  fill("old");
  config_.shard_count = 0;
  restart(true);
  EXPECT_EQ(found("old").size(), kShards) << "who asks for no shards asks for all";
  EXPECT_EQ(engine_->kept_shards().shard_count, 0U);
  config_.shard_count = kShards;
  restart(true);
  EXPECT_EQ(found("old"), Shards{});
}

TEST_F(KeptShardsTest, OfAnotherMemoryAllIsForgotten) {
  start();
  hold({1, 2});
  engine_->shutdown();
  engine_.reset();
  std::filesystem::remove(file("arena"));
  start();
  EXPECT_EQ(kept(), Shards{});
}

TEST_F(KeptShardsTest, AFileOfAnUnknownFormatIsSetAside) {
  start();
  hold({1});
  fill("old");
  engine_->shutdown();
  engine_.reset();
  std::string bytes = read_file(file("shards"));
  bytes[offsetof(ShardFileHeader, version)] = 9;
  write_file(file("shards"), bytes);
  start();
  EXPECT_EQ(engine_->start_report().set_aside, 1U);
  EXPECT_TRUE(std::filesystem::exists(file("shards.set-aside")));
  EXPECT_EQ(found("old"), Shards{});
}

// Each byte of the file, with one bit flipped and with all of them: what is dropped stays so.
TEST_F(KeptShardsTest, DamageHidesMoreAndNeverLess) {
  start();
  hold({1, 2, 5});
  fill("old");
  drop({2});
  hold({1, 2});
  engine_->shutdown();
  engine_.reset();
  const std::string arena = read_file(file("arena"));
  const std::string shards = read_file(file("shards"));
  ASSERT_GE(shards.size(), 4096 + kShards * 8);
  std::size_t kept_some = 0;
  std::vector<std::size_t> places;
  for (std::size_t at = 0; at < sizeof(ShardFileHeader); ++at) places.push_back(at);
  for (std::size_t at = 4096; at < 4096 + kShards * 8; ++at) places.push_back(at);
  for (const std::size_t at : places) {
    for (const int mask : {1 << at % 8, 0xff}) {
      SCOPED_TRACE("byte " + std::to_string(at) + ", bits " + std::to_string(mask));
      std::string bytes = shards;
      bytes[at] = static_cast<char>(bytes[at] ^ mask);
      write_file(file("shards"), bytes);
      write_file(file("arena"), arena);
      start();
      const Shards there = found("old");
      EXPECT_TRUE(there == Shards{1} || there == Shards{}) << there.size();
      kept_some += there.size();
      // Its time may be unknown: that is long ago.
      if (!kept().empty() && at >= offsetof(ShardFileHeader, alive) && at < 4096) {
        EXPECT_EQ(engine_->kept_shards().away_ms, clock_.now_ms());
      }
      engine_.reset();
      std::filesystem::remove(file("shards.set-aside"));
    }
  }
  EXPECT_GT(kept_some, places.size()) << "damage to a word costs no other shard";
  for (const std::size_t bytes : {0, 10, 4096, 5000}) {
    write_file(file("shards"), shards.substr(0, bytes));
    write_file(file("arena"), arena);
    const std::string refused = error_of([&] { start(); });
    if (refused.empty()) {
      EXPECT_EQ(found("old"), bytes > 4096 ? Shards{1} : Shards{}) << bytes;
    }
    engine_.reset();
  }
}

// Killed at each step of a drop, of holding others and of a start.
class KilledWhileShardsMove : public KeptShardsTest,
                              public ::testing::WithParamInterface<const char*> {};

TEST_P(KilledWhileShardsMove, HidesWhatItMust) {
  const End end = end_of([&] {
    start();
    hold({1, 2, 3});
    fill("old");
    drop({3});  // and acknowledged
    const Assassin assassin(GetParam());
    drop({1});
    hold({2});
  });
  ASSERT_EQ(end, End::Killed);
  for (const bool in_order : {false, true}) {
    start();
    for (const std::uint32_t shard : found("old")) {
      EXPECT_TRUE(shard == 1 || shard == 2) << shard;
    }
    if (in_order) engine_->shutdown();
    engine_.reset();
  }
  start();
  const Shards all = found("old");
  EXPECT_TRUE(std::find(all.begin(), all.end(), 2) != all.end());
}

std::string name_of_point(const ::testing::TestParamInfo<const char*>& at) {
  std::string name = at.param;
  name[name.find(':')] = '_';
  return name;
}
INSTANTIATE_TEST_SUITE_P(At, KilledWhileShardsMove,
                         ::testing::Values("drop:written", "drop:hidden", "drop:voided",
                                           "hold:left"),
                         name_of_point);

class KilledInAStart : public KilledWhileShardsMove {};

TEST_P(KilledInAStart, OfALeafOfWhichNothingIsKnown) {
  start();
  hold({1, 2});
  fill("old");
  engine_.reset();
  std::filesystem::remove(file("shards"));
  const End end = end_of([&] {
    const Assassin assassin(GetParam());
    start();
  });
  ASSERT_EQ(end, End::Killed);
  start();
  EXPECT_EQ(kept(), Shards{});
  EXPECT_EQ(found("old"), Shards{});
}

TEST_P(KilledInAStart, WhatWasHeldIsFoundByTheNext) {
  start();
  hold({1, 2});
  fill("old");
  drop({2});
  engine_.reset();
  clock_.advance(5'000);
  const End end = end_of([&] {
    const Assassin assassin("moves:settled");
    start();
  });
  ASSERT_EQ(end, End::Killed);
  start();
  EXPECT_EQ(kept(), (Shards{1, 2}));
  EXPECT_EQ(engine_->kept_shards().away_ms, 5'000U);
  EXPECT_EQ(found("old"), Shards{1});
}

INSTANTIATE_TEST_SUITE_P(At, KilledInAStart, ::testing::Values("moves:settled", "shards:written"),
                         name_of_point);

// ---- the number of instances
// ---------------------------------------------------------------------

class Instances : public KeptShardsTest {
 protected:
  Instances() {
    config_.shard_count = 0;
    config_.instance_count = 4;
    config_.instance = 1;
  }
  KeyHash hash(int i) const { return hash_key(namespace_seed("pin"), key(i)); }
  bool is_here(int i, std::uint32_t instances) const {
    return instance_of(hash(i).high, instances) == config_.instance;
  }
  void split_over(std::uint32_t instances, bool in_order = true) {
    config_.instance_count = instances;
    restart(in_order);
  }
  // Of the keys that are here under the count of now.
  void write(const std::string& value) {
    for (int i = 0; i < kKeys; ++i) {
      if (is_here(i, config_.instance_count)) put(*engine_, ns_, key(i), value);
    }
  }
  void expect(const std::function<bool(int)>& there, const std::string& value) {
    std::size_t hits = 0;
    for (int i = 0; i < kKeys; ++i) {
      if (!is_here(i, config_.instance_count)) continue;
      const Got got = get(*engine_, ns_, key(i));
      EXPECT_EQ(got.status, there(i) ? CellStatus::HitDram : CellStatus::Miss) << key(i);
      if (carries_value(got.status)) {
        EXPECT_EQ(got.value, value);
        ++hits;
      }
    }
    EXPECT_GT(hits, 50U);
  }
};

TEST_F(Instances, ANodeThatGrowsAndShrinksBringsNoOldCopyBack) {
  for (const bool in_order : {true, false}) {
    config_.instance_count = 4;
    std::filesystem::remove(file("arena"));
    start();
    write("old");
    split_over(5, in_order);
    expect([](int) { return true; }, "old");
    split_over(4, in_order);
    expect([&](int i) { return is_here(i, 5); }, "old");
    restart(in_order);
    expect([&](int i) { return is_here(i, 5); }, "old");
    write("new");
    split_over(5, in_order);
    split_over(4, in_order);
    expect([&](int i) { return is_here(i, 5); }, "new");
  }
}

// Room under a stamp of before is not given to what was written after.
TEST_F(Instances, WhatIsWrittenAfterTheChangeStays) {
  start();
  write("old");
  split_over(5);
  split_over(4, false);
  for (int i = 0; i < kKeys; ++i) {
    if (is_here(i, 4) && !is_here(i, 5)) put(*engine_, ns_, key(i), "new");
  }
  for (int i = 0; i < kKeys; ++i) {
    if (!is_here(i, 4)) continue;
    EXPECT_EQ(get(*engine_, ns_, key(i)).value, is_here(i, 5) ? "old" : "new") << key(i);
  }
}

TEST_F(Instances, AHistoryThatIsTooLongHidesWhatIsOlder) {
  start();
  write("old");
  for (std::uint32_t i = 0; i < 6; ++i) split_over(i % 2 == 0 ? 5 : 4);
  expect([&](int i) { return is_here(i, 5); }, "old");  // 4 5 4 5 4 5 4: seven
  split_over(5);
  expect([&](int i) { return is_here(i, 4); }, "old");  // eight
  split_over(4);
  for (int i = 0; i < kKeys; ++i) {
    if (is_here(i, 4)) {
      EXPECT_EQ(get(*engine_, ns_, key(i)).status, CellStatus::Miss);
    }
  }
  write("new");
  split_over(5);
  expect([&](int i) { return is_here(i, 4); }, "new");
}

TEST_F(Instances, AnotherInstancesMemoryIsHidden) {
  start();
  write("old");
  engine_->shutdown();
  config_.instance = 2;
  start();
  for (int i = 0; i < kKeys; ++i) EXPECT_EQ(get(*engine_, ns_, key(i)).status, CellStatus::Miss);
}

TEST_F(Instances, DamagedCountsHideAll) {
  start();
  write("old");
  engine_->shutdown();
  engine_.reset();
  const std::string arena = read_file(file("arena"));
  for (std::size_t at = 0; at < sizeof(InstanceCounts); ++at) {
    std::string bytes = arena;
    bytes[sizeof(ArenaHeader) + at] = static_cast<char>(bytes[sizeof(ArenaHeader) + at] ^ 0x10);
    write_file(file("arena"), bytes);
    start();
    std::size_t hits = 0;
    for (int i = 0; i < kKeys; ++i) {
      hits += get(*engine_, ns_, key(i)).status == CellStatus::Miss ? 0 : 1;
    }
    EXPECT_EQ(hits, 0U) << "byte " << at;
    put(*engine_, ns_, "k", "new");
    EXPECT_EQ(get(*engine_, ns_, "k").value, "new");
    engine_.reset();
  }
}

// A start that was cut off before it served changes nothing.
TEST_F(Instances, AStartThatIsKilledHidesNothingThatStays) {
  start();
  write("old");
  engine_->shutdown();
  engine_.reset();
  const End end = end_of([&] {
    const Assassin assassin("moves:settled");
    config_.instance_count = 5;
    start();
  });
  ASSERT_EQ(end, End::Killed);
  start();
  expect([&](int i) { return is_here(i, 5); }, "old");
}

}  // namespace
}  // namespace fc::testing
