// What an instance finds of its NVM tier when the number of instances or a leaf's shards changed,
// with its memory there and after a reboot; and stamps that were damaged.
#include <fstream>

#include "core/hash.hpp"
#include "core/placement.hpp"
#include "feature_cache/cluster.hpp"
#include "memory/arena.hpp"
#include "nvm/region.hpp"
#include "restart_support.hpp"

namespace fc::testing {
namespace {

constexpr int kKeys = 3000;
constexpr std::uint32_t kShards = 8;

class MovedNvm : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kRegions = 40;

  MovedNvm() {
    config_ = engine_config(
        8 * kMiB,
        {with_nvm(name_space("pin", {domain("all", 128 * kKiB, PolicyKind::Fifo)}), kRegions)});
    config_.nvm = nvm_config(folder_.file("device"), kRegions + 4);
    config_.persist.dir = shared_.path();
    config_.persist.name = "cache";
    config_.instance_count = 4;
  }
  static std::string key(int i) { return "key " + std::to_string(i); }
  static std::uint64_t high(int i) { return hash_key(namespace_seed("pin"), key(i)).high; }
  bool is_here(int i, std::uint32_t instances) const {
    return instance_of(high(i), instances) == config_.instance;
  }
  bool is_here(int i) const { return is_here(i, config_.instance_count); }

  void start() {
    engine_.reset();
    engine_ = make_engine(config_, clock_, false);
    ns_ = engine_->find_namespace("pin");
  }
  void restart(bool reboot) {
    EXPECT_TRUE(engine_->shutdown());
    engine_.reset();
    if (reboot) {
      for (const char* file : {"cache.arena", "cache.nvm", "cache.shards"}) {
        std::filesystem::remove(shared_.file(file));
      }
    }
    start();
    EXPECT_EQ(engine_->start_report().nvm, reboot ? "rebuilt" : "kept")
        << engine_->start_report().nvm_reason;
  }
  void split_over(std::uint32_t instances, bool reboot) {
    config_.instance_count = instances;
    restart(reboot);
  }
  void write(const std::string& value) {
    for (int i = 0; i < kKeys; ++i) {
      if (!is_here(i)) continue;
      put(*engine_, ns_, key(i), value + std::string(200, '.'));
      // Not faster than the device takes it.
      if (i % 200 == 199) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  // How many keys are there, by tier; only such that `may`.
  struct Hits {
    int dram = 0;
    int nvm = 0;
  };
  Hits hits(const std::string& value, const std::function<bool(int)>& may) {
    Hits found;
    for (int i = 0; i < kKeys; ++i) {
      if (!is_here(i)) continue;
      const Got got = get(*engine_, ns_, key(i));
      if (!carries_value(got.status)) continue;
      EXPECT_TRUE(may(i)) << key(i) << " has come back";
      EXPECT_EQ(got.value, value + std::string(200, '.'));
      ++(got.status == CellStatus::HitNvm ? found.nvm : found.dram);
    }
    return found;
  }
  static bool any(int) { return true; }

  Folder folder_;
  SharedFolder shared_;
  ManualClock clock_;
  EngineConfig config_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
};

class MovedNvmOverStarts : public MovedNvm, public ::testing::WithParamInterface<bool> {};

TEST_P(MovedNvmOverStarts, ANodeThatGrowsAndShrinksBringsNoOldCopyBack) {
  start();
  write("old");
  const int before = hits("old", any).nvm;
  ASSERT_GT(before, 200);
  split_over(5, GetParam());
  const auto stays = [this](int i) { return is_here(i, 5); };
  EXPECT_GT(hits("old", any).nvm, before / 2) << "what still maps to it is kept";
  split_over(4, GetParam());
  EXPECT_GT(hits("old", stays).nvm, before / 2);
  restart(GetParam());
  EXPECT_GT(hits("old", stays).nvm, before / 2);
  write("new");
  split_over(5, false);
  split_over(4, GetParam());
  EXPECT_GT(hits("new", stays).nvm, before / 2);
}

INSTANTIATE_TEST_SUITE_P(Memory, MovedNvmOverStarts, ::testing::Bool(),
                         [](const auto& reboots) { return reboots.param ? "IsGone" : "IsThere"; });

// Once in one way, once in the other.
TEST_F(MovedNvm, ARebootBetweenTheChangesForgetsNone) {
  start();
  write("old");
  split_over(5, false);
  restart(true);
  split_over(4, false);
  EXPECT_GT(hits("old", [this](int i) { return is_here(i, 5); }).nvm, 100);
}

// Which shards left and came is known to memory alone.
TEST_F(MovedNvm, ALeafsRebuiltTierIsHidden) {
  config_.instance_count = 1;
  config_.shard_count = kShards;
  const std::uint32_t all[] = {0, 1, 2, 3, 4, 5, 6, 7};
  start();
  engine_->hold_shards(kShards, all);
  write("old");
  ASSERT_GT(hits("old", any).nvm, 200);
  restart(false);
  ASSERT_GT(hits("old", any).nvm, 200);
  restart(true);
  EXPECT_EQ(engine_->kept_shards().shards.size(), 0U);
  EXPECT_GT(engine_->start_report().nvm_items, 0U);
  EXPECT_EQ(hits("old", [](int) { return false; }).nvm, 0);
  write("new");
  EXPECT_GT(hits("new", any).nvm, 200);
}

// A whole node, by the way that the daemon makes it, with files as large for each instance.
class MovedNode : public MovedNvm {
 protected:
  void start_over(std::uint32_t instances) {
    config_ = engine_config(
        instances * 8 * kMiB,
        {with_nvm(name_space("pin", {domain("all", instances * 128 * kKiB, PolicyKind::Fifo)}),
                  instances * kRegions)});
    config_.nvm = nvm_config(folder_.file("device"), kRegions + 4);
    config_.nvm.devices[0].bytes *= instances;
    // Instances start at once; the thread sanitizer does not see how liburing unmaps its rings.
    config_.nvm.io = IoKind::Threads;
    config_.persist.dir = shared_.path();
    config_.persist.name = "cache";
    config_.instances = instances;
    if (engine_ != nullptr) {
      EXPECT_TRUE(engine_->shutdown());
    }
    start();
  }
  std::string file(const std::string& name) const { return shared_.file(name); }
};

TEST_F(MovedNode, AnInstanceThatComesAgainStartsEmpty) {
  for (const std::uint32_t fewer : {4U, 1U}) {
    start_over(5);
    write("old");
    const auto of_last = [](int i) { return instance_of(high(i), 5) == 4; };
    const Hits before = hits("old", any);
    ASSERT_GT(before.nvm, 100);
    start_over(5);
    EXPECT_GT(hits("old", any).nvm, before.nvm / 2);
    start_over(fewer);
    for (const char* suffix : {"arena", "nvm"}) {
      EXPECT_FALSE(std::filesystem::exists(file("cache-4." + std::string(suffix)))) << suffix;
      EXPECT_TRUE(std::filesystem::exists(file("cache." + std::string(suffix)))) << suffix;
    }
    EXPECT_FALSE(std::filesystem::exists(folder_.file("device-4")));
    EXPECT_TRUE(std::filesystem::exists(folder_.file("device")));
    start_over(5);
    const Hits after = hits("old", [&](int i) {
      return !of_last(i) && instance_of(high(i), fewer) == instance_of(high(i), 5);
    });
    EXPECT_GT(after.dram + after.nvm, 200);
    write("new");
    start_over(5);
    EXPECT_GT(hits("new", any).nvm, before.nvm / 2);
    engine_->shutdown();
    engine_.reset();
    for (const auto& left : std::filesystem::directory_iterator(shared_.path())) {
      std::filesystem::remove(left.path());
    }
  }
}

// Another cache that is called like an instance of this one keeps what is its own.
TEST_F(MovedNode, WhatIsNoInstancesIsLeftAlone) {
  config_.instance_count = 1;
  config_.persist.name = "cache-1";
  config_.nvm.devices[0].path = folder_.file("device-1");
  start();
  write("other's");
  EXPECT_TRUE(engine_->shutdown());
  engine_.reset();
  const EngineConfig other = config_;
  start_over(1);
  engine_.reset();
  EXPECT_TRUE(std::filesystem::exists(file("cache-1.arena")));
  EXPECT_TRUE(std::filesystem::exists(folder_.file("device-1")));
  config_ = other;
  start();
  EXPECT_EQ(engine_->start_report().memory, "clean");
  EXPECT_EQ(engine_->start_report().nvm, "kept");
}

// A stamp that does not fit its check is older than all: what it says otherwise does not count.
TEST_F(MovedNvm, DamagedStampsHideTheirSegmentsAndRegions) {
  config_.instance_count = 1;
  config_.shard_count = kShards;
  start();
  std::vector<std::uint32_t> all{0, 1, 2, 3, 4, 5, 6, 7};
  engine_->hold_shards(kShards, all);
  write("old");
  engine_->drop_shards(kShards, {all.data(), 4});
  EXPECT_TRUE(engine_->shutdown());
  engine_.reset();
  const auto dropped = [](int i) { return shard_of(high(i), kShards) < 4; };
  const auto damage = [](const std::string& path, std::uint64_t at, std::uint64_t step,
                         std::uint64_t end) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    for (; at < end; at += step) {
      file.seekg(static_cast<std::streamoff>(at));
      const int byte = file.get();
      file.seekp(static_cast<std::streamoff>(at));
      file.put(static_cast<char>(byte ^ 0x40));  // by 64 later than it was
    }
  };
  const std::uint64_t segments = 300;
  damage(shared_.file("cache.arena"), sizeof(ArenaHead) + offsetof(SegmentMeta, stamp_word),
         sizeof(SegmentMeta), sizeof(ArenaHead) + segments * sizeof(SegmentMeta));
  damage(shared_.file("cache.nvm"), 4096 + offsetof(nvm::Region, stamp_word), sizeof(nvm::Region),
         4096 + (kRegions + 4) * sizeof(nvm::Region));
  start();
  EXPECT_EQ(engine_->start_report().nvm, "kept");
  EXPECT_EQ(engine_->start_report().memory, "checked");
  EXPECT_GT(engine_->start_report().nvm_items, 0U);
  const Hits found = hits("old", [&](int i) { return !dropped(i); });
  EXPECT_EQ(found.dram + found.nvm, 0);
}

}  // namespace
}  // namespace fc::testing
