// Shards that leave a node and come back: nothing that was written before may show again, whatever
// was on its way between segments, tiers and regions while they left (core/moved_keys.hpp).
#include <future>

#include "feature_cache/cluster.hpp"
#include "nvm_race_support.hpp"

namespace fc::testing {
namespace {

constexpr std::uint32_t kShards = 8;

std::uint32_t shard(std::string_view key) {
  return shard_of("pin", key, kShards);
}
void drop(Engine& engine, std::string_view key) {
  const std::uint32_t one = shard(key);
  engine.drop_shards(kShards, {&one, 1});
}
// A key of another shard than `key`.
std::string other_than(std::string_view key) {
  for (int i = 0;; ++i) {
    std::string other = "other " + std::to_string(i);
    if (shard(other) != shard(key)) return other;
  }
}
std::string same_as(std::string_view key) {
  for (int i = 0;; ++i) {
    std::string other = "same " + std::to_string(i);
    if (shard(other) == shard(key)) return other;
  }
}

class DropShards : public ::testing::Test {
 protected:
  DropShards() {
    EngineConfig config = engine_config(
        8 * kMiB, {name_space("pin", {domain("lasting", kMiB, PolicyKind::Lru),
                                      domain("brief", 512 * kKiB, PolicyKind::Lru, 10'000)})});
    config.namespaces[0].domains[1].refresh_ahead = 0.5;
    config.namespaces[0].negative_ttl_ms = 60'000;
    config.shard_count = kShards;
    engine_ = make_engine(config, clock_, false);
    ns_ = engine_->find_namespace("pin");
    brief_ = engine_->find_domain(ns_, "brief");
  }
  template <class Call>
  static std::future<void> in_thread(Call call) {
    return std::async(std::launch::async, std::move(call));
  }
  CellStatus status(std::string_view key) { return get(*engine_, ns_, key).status; }
  double counter(std::string_view name) { return Counters::of(*engine_).sum(name); }

  SequencePoints points_;  // first in, last out: threads of a failed test must not hang
  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
  DomainIndex brief_ = kNoDomain;
};

TEST_F(DropShards, HidesTheirItemsAndNoOthers) {
  for (int i = 0; i < 1000; ++i) put(*engine_, ns_, std::to_string(i), "old");
  const std::uint32_t some[] = {1, 6};
  engine_->drop_shards(kShards, some);
  for (int i = 0; i < 1000; ++i) {
    const std::uint32_t of = shard(std::to_string(i));
    EXPECT_EQ(status(std::to_string(i)),
              of == 1 || of == 6 ? CellStatus::Miss : CellStatus::HitDram);
  }
}

TEST_F(DropShards, WhatIsWrittenAfterItIsThere) {
  const std::string other = other_than("k");
  put(*engine_, ns_, "k", "old");
  put(*engine_, ns_, other, "old");
  drop(*engine_, "k");
  EXPECT_EQ(put(*engine_, ns_, "k", "new"), WriteStatus::Stored);
  EXPECT_EQ(get(*engine_, ns_, "k").value, "new");
  EXPECT_EQ(get(*engine_, ns_, other).value, "old");
  drop(*engine_, "k");
  EXPECT_EQ(status("k"), CellStatus::Miss);
  drop(*engine_, "k");
  put(*engine_, ns_, same_as("k"), "newer");
  EXPECT_EQ(get(*engine_, ns_, same_as("k")).value, "newer");
  EXPECT_EQ(status("k"), CellStatus::Miss);
}

// What nobody writes to costs no room: the segments that are open are filled by others.
TEST_F(DropShards, ManyDropsLeaveTheSegmentsAsTheyAre) {
  for (int i = 0; i < 100; ++i) put(*engine_, ns_, other_than("k"), "v");
  const double used = Counters::of(*engine_).domain("used_bytes", "pin", "lasting");
  for (int i = 0; i < 200; ++i) {
    drop(*engine_, "k");
    put(*engine_, ns_, other_than("k"), "v");
  }
  EXPECT_EQ(Counters::of(*engine_).domain("used_bytes", "pin", "lasting"), used);
}

TEST_F(DropShards, HidesNegativeAndLargeItems) {
  PutItem negative;
  negative.key = "none";
  negative.negative = true;
  put(*engine_, ns_, negative);
  put(*engine_, ns_, "large", patterned("large", 1, 300'000));
  ASSERT_EQ(status("none"), CellStatus::NotFound);
  drop(*engine_, "none");
  drop(*engine_, "large");
  EXPECT_EQ(status("none"), CellStatus::Miss);
  EXPECT_EQ(status("large"), CellStatus::Miss);
  put(*engine_, ns_, "large", patterned("large", 2, 300'000));
  EXPECT_EQ(get(*engine_, ns_, "large").value, patterned("large", 2, 300'000));
}

TEST_F(DropShards, ErasesAndFlushesGoOnAsBefore) {
  put(*engine_, ns_, "k", "old");
  drop(*engine_, "k");
  erase(*engine_, ns_, "k");
  EXPECT_EQ(counter("feature_cache_domain_items"), 0);
  put(*engine_, ns_, "k", "new");
  engine_->flush(ns_);
  EXPECT_EQ(status("k"), CellStatus::Miss);
  EXPECT_EQ(counter("feature_cache_domain_live_bytes"), 0);
}

TEST_F(DropShards, VoidsTheTokensOfWhatIsBeingFetched) {
  const Token token = *get(*engine_, ns_, "k").token;
  drop(*engine_, "k");
  EXPECT_FALSE(engine_->token_alive(ns_, "k", token));
  EXPECT_EQ(install(*engine_, ns_, "k", "older", token), InstallStatus::TokenVoid);
  const Got got = get(*engine_, ns_, "k");
  ASSERT_EQ(got.status, CellStatus::Miss);
  EXPECT_EQ(install(*engine_, ns_, "k", "fetched", *got.token), InstallStatus::Installed);
  EXPECT_EQ(get(*engine_, ns_, "k").value, "fetched");
}

TEST_F(DropShards, VoidsTheTokensOfRefreshesAndAsksForNone) {
  put(*engine_, ns_, "k", "old", brief_);
  for (int i = 0; i < 4; ++i) get(*engine_, ns_, "k");
  clock_.advance(6'000);
  const Got got = get(*engine_, ns_, "k");
  ASSERT_TRUE(got.refresh);
  drop(*engine_, "k");
  EXPECT_EQ(install(*engine_, ns_, "k", "older", *got.refresh_token), InstallStatus::TokenVoid);
  EXPECT_FALSE(get(*engine_, ns_, "k").refresh);
}

TEST_F(DropShards, AnotherNumberOfShardsIsRefused) {
  const std::uint32_t beyond = kShards;
  EXPECT_THROW(engine_->drop_shards(kShards, {&beyond, 1}), std::invalid_argument);
  EXPECT_THROW(engine_->drop_shards(kShards + 1, {}), std::invalid_argument);
  EXPECT_THROW(engine_->drop_shards(0, {}), std::invalid_argument);
  engine_->drop_shards(kShards, {});
}

TEST_F(DropShards, AnEngineThatIsNoLeafRefuses) {
  engine_ = make_engine(engine_config(8 * kMiB, {name_space("pin", {domain("all", kMiB)})}), clock_,
                        false);
  const std::uint32_t first = 0;
  EXPECT_THROW(engine_->drop_shards(0, {&first, 1}), std::invalid_argument);
  EXPECT_THROW(engine_->drop_shards(kShards, {&first, 1}), std::invalid_argument);
}

// What is hidden goes with its segment, and is not taken along by those that stay.
TEST_F(DropShards, EvictionKeepsNothingOfThem) {
  for (int i = 0; i < 500; ++i) {
    const std::string key = std::to_string(i);
    put(*engine_, ns_, key, patterned(key, 1, 400));
    get(*engine_, ns_, key);  // hit: worth keeping
  }
  const std::uint32_t all[] = {0, 1, 2, 3, 4, 5, 6, 7};
  engine_->drop_shards(kShards, all);
  for (int i = 0; i < 8'000; ++i) {
    const std::string key = "filler " + std::to_string(i);
    put(*engine_, ns_, key, patterned(key, 1, 400));
  }
  EXPECT_EQ(counter("feature_cache_domain_hidden_total"), 500);
  EXPECT_EQ(counter("feature_cache_domain_kept_total"), 0);
  for (int i = 0; i < 500; ++i) EXPECT_EQ(status(std::to_string(i)), CellStatus::Miss);
}

// ---- races in DRAM
// -------------------------------------------------------------------------------

// A kept item is copied to a younger segment while its shard is dropped: the copy must not count,
// neither in a segment of before nor in one that is opened after the drop.
class DropDuringAMove : public DropShards, public ::testing::WithParamInterface<const char*> {};

TEST_P(DropDuringAMove, TheItemIsGone) {
  put(*engine_, ns_, "first", patterned("first", 1, 400));
  get(*engine_, ns_, "first");
  points_.block(GetParam());
  auto writing = in_thread([&] {
    for (int i = 0; i < 4'000; ++i) {
      const std::string key = "k" + std::to_string(i);
      put(*engine_, ns_, key, patterned(key, 1, 400));
    }
  });
  ASSERT_TRUE(points_.wait_blocked(GetParam()));
  EXPECT_EQ(status("first"), CellStatus::HitDram);
  drop(*engine_, "first");
  EXPECT_EQ(status("first"), CellStatus::Miss);
  points_.release(GetParam());
  writing.get();
  EXPECT_EQ(status("first"), CellStatus::Miss);
  EXPECT_GE(counter("feature_cache_domain_hidden_total"), 1);
  engine_->flush(ns_);
  EXPECT_EQ(counter("feature_cache_domain_items"), 0);
  EXPECT_EQ(counter("feature_cache_domain_live_bytes"), 0);
  EXPECT_EQ(counter("feature_cache_domain_payload_bytes"), 0);
}

INSTANTIATE_TEST_SUITE_P(At, DropDuringAMove, ::testing::Values("domain:moving", "domain:copied"),
                         [](const auto& at) {
                           return std::string(at.param) == "domain:moving" ? "Moving" : "Copied";
                         });

// At each step of a drop an install of an older value finds its token void, or is hidden.
class InstallDuringADrop : public DropShards, public ::testing::WithParamInterface<const char*> {};

TEST_P(InstallDuringADrop, Loses) {
  put(*engine_, ns_, same_as("k"), "opens a segment");
  const Token before = *get(*engine_, ns_, "k").token;
  points_.block(GetParam());
  auto dropping = in_thread([&] { drop(*engine_, "k"); });
  ASSERT_TRUE(points_.wait_blocked(GetParam()));
  install(*engine_, ns_, "k", "older", before);
  EXPECT_EQ(status("k"), CellStatus::Miss);
  points_.release(GetParam());
  dropping.get();
  EXPECT_EQ(status("k"), CellStatus::Miss);
}

// And where the install is already under way.
TEST_P(InstallDuringADrop, LosesWhenItWasFilledBefore) {
  const Token before = *get(*engine_, ns_, "k").token;
  points_.block("write:filled");
  auto installing = in_thread([&] { install(*engine_, ns_, "k", "older", before); });
  ASSERT_TRUE(points_.wait_blocked("write:filled"));
  points_.block(GetParam());
  auto dropping = in_thread([&] { drop(*engine_, "k"); });
  ASSERT_TRUE(points_.wait_blocked(GetParam()));
  points_.release("write:filled");
  installing.get();
  points_.release(GetParam());
  dropping.get();
  EXPECT_EQ(status("k"), CellStatus::Miss);
}

INSTANTIATE_TEST_SUITE_P(At, InstallDuringADrop, ::testing::Values("drop:hidden", "drop:voided"),
                         [](const auto& at) {
                           return std::string(at.param) == "drop:hidden" ? "Hidden" : "Voided";
                         });

// A put that was under way may go either way; one that begins after the drop is there.
TEST_F(DropShards, PutsAroundADrop) {
  points_.block("write:filled");
  auto putting = in_thread([&] { put(*engine_, ns_, "k", "old"); });
  ASSERT_TRUE(points_.wait_blocked("write:filled"));
  drop(*engine_, "k");
  points_.release("write:filled");
  putting.get();
  EXPECT_EQ(status("k"), CellStatus::Miss) << "its room is as old as the drop";
  put(*engine_, ns_, "k", "new");
  EXPECT_EQ(get(*engine_, ns_, "k").value, "new");
}

// ---- races between the tiers
// ---------------------------------------------------------------------

class DropShardsBelow : public NvmRaces {
 protected:
  static EngineConfig leaf_config(const std::string& path) {
    EngineConfig config = usual_config(path);
    config.shard_count = kShards;
    return config;
  }
  void SetUp() override { start(leaf_config(folder_.file("nvm"))); }
  CellStatus status(std::string_view key) { return get(*engine_, ns_, key).status; }
  void push_more(std::size_t items) {
    const std::size_t until = pushed_ + items;
    push([&] { return pushed_ > until; });
  }
};

TEST_F(DropShardsBelow, HidesWhatIsOnTheDeviceWithoutReadingIt) {
  const std::string other = other_than("k");
  put(*engine_, ns_, other, "stays");
  bring_to_device("k", "old");
  ASSERT_TRUE(settled());
  const double reads = counter("feature_cache_nvm_device_reads_total");
  drop(*engine_, "k");
  EXPECT_EQ(status("k"), CellStatus::Miss);
  EXPECT_EQ(counter("feature_cache_nvm_device_reads_total"), reads);
  EXPECT_EQ(value_of(other), "stays");
  put(*engine_, ns_, "k", "new");
  EXPECT_EQ(value_of("k"), "new");
  push([&] { return on_device("k"); });
  EXPECT_EQ(value_of("k"), "new");
}

// Demoted while a region is open that was opened before the drop, and has items of that time.
TEST_F(DropShardsBelow, AnItemOfAfterTheDropIsThereInEveryTier) {
  bring_to_device("k", "old");
  ASSERT_EQ(regions("open"), 1);
  drop(*engine_, "k");
  const std::string same = same_as("k");
  put(*engine_, ns_, same, "new", other_);
  for (int i = 0; i < 40; ++i) {  // some of them fill a domain
    put(*engine_, ns_, "wide " + std::to_string(i), std::string(15'000, 'w'), other_);
    ASSERT_EQ(value_of(same), "new") << i;
    ASSERT_EQ(status("k"), CellStatus::Miss) << i;
  }
  EXPECT_EQ(status(same), CellStatus::HitNvm);
}

TEST_F(DropShardsBelow, DropDuringADemotion) {
  put(*engine_, ns_, "k", "old");
  points_.block("domain:demoting");
  auto evicting = in_thread([&] { push([&] { return pushed_ > 1000; }); });
  ASSERT_TRUE(points_.wait_blocked("domain:demoting"));
  EXPECT_EQ(value_of("k"), "old");
  drop(*engine_, "k");
  EXPECT_EQ(status("k"), CellStatus::Miss);
  points_.release("domain:demoting");
  evicting.get();
  EXPECT_EQ(status("k"), CellStatus::Miss);
}

// The copy has its room in a region that is opened after the drop: only the check that comes after
// it can tell.
TEST_F(DropShardsBelow, DropBeforeADemotionGetsItsRoom) {
  put(*engine_, ns_, "k", "old");
  points_.block("domain:judged");
  auto evicting = in_thread([&] { push([&] { return pushed_ > 1000; }); });
  ASSERT_TRUE(points_.wait_blocked("domain:judged"));
  drop(*engine_, "k");
  points_.release("domain:judged");
  evicting.get();
  EXPECT_EQ(status("k"), CellStatus::Miss);
  EXPECT_GE(counter("feature_cache_domain_hidden_total"), 1);
}

class DropWhileARegionIsWritten : public DropShardsBelow,
                                  public ::testing::WithParamInterface<const char*> {};

TEST_P(DropWhileARegionIsWritten, ItIsGoneFromBufferAndDevice) {
  put(*engine_, ns_, "k", "old");  // first out of DRAM: it is in the first region
  points_.block(GetParam());
  auto pushing = in_thread([&] {
    for (int i = 0; i < 900; ++i) put(*engine_, ns_, filler(i), std::string(284, 'x'));
  });
  ASSERT_TRUE(points_.wait_blocked(GetParam()));
  EXPECT_EQ(status("k"), CellStatus::HitNvm) << "from its buffer";
  drop(*engine_, "k");
  EXPECT_EQ(status("k"), CellStatus::Miss);
  points_.release(GetParam());
  pushing.get();
  ASSERT_TRUE(settled());
  EXPECT_EQ(status("k"), CellStatus::Miss);
  put(*engine_, ns_, "k", "new");
  EXPECT_EQ(value_of("k"), "new");
}

INSTANTIATE_TEST_SUITE_P(At, DropWhileARegionIsWritten,
                         ::testing::Values("nvm:region_full", "nvm:header_written",
                                           "nvm:region_written"),
                         [](const auto& at) {
                           std::string name = at.param;
                           name[name.find(':')] = '_';
                           return name;
                         });

TEST_F(DropShardsBelow, DropDuringARead) {
  bring_to_device("k", "old");
  Held held = hold({"k"});
  ASSERT_EQ(held.cells.size(), 1U);
  const Token before = held.cells[0].token;
  drop(*engine_, "k");
  const auto answers = read(held);
  ASSERT_TRUE(answers->wait(1));
  EXPECT_EQ(answers->at(0).status, CellStatus::Miss);
  EXPECT_FALSE(engine_->token_alive(ns_, "k", before));
  EXPECT_EQ(install(*engine_, ns_, "k", "fetched", answers->at(0).token), InstallStatus::Installed)
      << "what is fetched for it now is young enough";
  engine_->maintain();  // what was read is not promoted over it
  EXPECT_EQ(value_of("k"), "fetched");
  EXPECT_EQ(counter("feature_cache_namespace_nvm_promoted_total"), 0);
}

TEST_F(DropShardsBelow, DropDuringAPromotion) {
  bring_to_device("k", "old");
  ASSERT_TRUE(settled());  // nothing comes up while the device has its hands full
  EXPECT_EQ(status("k"), CellStatus::HitNvm);
  points_.block("promote:filled");
  auto promoting = in_thread([this] {
    eventually([this] {
      engine_->maintain();
      return points_.reached("promote:filled") != 0;
    });
  });
  ASSERT_TRUE(points_.wait_blocked("promote:filled"));
  drop(*engine_, "k");
  EXPECT_EQ(status("k"), CellStatus::Miss);
  points_.release("promote:filled");
  promoting.get();
  EXPECT_EQ(status("k"), CellStatus::Miss);
}

// What was read before the drop waits for its promotion, whose segment is opened after it.
TEST_F(DropShardsBelow, DropBeforeAPromotion) {
  bring_to_device("k", "old");
  ASSERT_TRUE(settled());
  EXPECT_EQ(status("k"), CellStatus::HitNvm);
  drop(*engine_, "k");
  put(*engine_, ns_, same_as("k"), "opens a segment");
  points_.block("promote:filled");
  auto promoting = in_thread([this] {
    eventually([this] {
      engine_->maintain();
      return points_.reached("promote:filled") != 0;
    });
  });
  ASSERT_TRUE(points_.wait_blocked("promote:filled"));
  points_.release("promote:filled");
  promoting.get();
  EXPECT_EQ(status("k"), CellStatus::Miss);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_promoted_total"), 0);
}

class DropDuringAReinsertion : public DropShardsBelow {
 protected:
  void SetUp() override {
    EngineConfig config = leaf_config(folder_.file("nvm"));
    config.namespaces[0].nvm.promotion = PromotionKind::Never;
    start(config);
    bring_to_device("k", "old");
    get(*engine_, ns_, "k");  // hit: worth keeping
  }
  std::future<void> push_until(const char* point) {
    return in_thread([this, point] {
      eventually([this, point] {
        for (int i = 0; i < 200; ++i) {
          put(*engine_, ns_, filler(pushed_++), std::string(284, 'x'));
        }
        return points_.reached(point) != 0;
      });
    });
  }
};

TEST_F(DropDuringAReinsertion, TheCopyIsInPlace) {
  points_.block("nvm:reinserting");
  auto pushing = push_until("nvm:reinserting");
  ASSERT_TRUE(points_.wait_blocked("nvm:reinserting"));
  drop(*engine_, "k");
  EXPECT_EQ(status("k"), CellStatus::Miss);
  points_.release("nvm:reinserting");
  pushing.get();
  ASSERT_TRUE(settled());
  EXPECT_EQ(status("k"), CellStatus::Miss);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_hidden_total"), 1);
}

TEST_F(DropDuringAReinsertion, LongBefore) {
  drop(*engine_, "k");
  points_.block("nvm:reinserting");
  auto pushing = push_until("nvm:reinserting");
  ASSERT_TRUE(points_.wait_blocked("nvm:reinserting"));
  points_.release("nvm:reinserting");
  pushing.get();
  ASSERT_TRUE(settled());
  EXPECT_EQ(status("k"), CellStatus::Miss);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_hidden_total"), 1);
}

}  // namespace
}  // namespace fc::testing
