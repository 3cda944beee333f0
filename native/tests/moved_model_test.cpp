// One instance of a node against a plain map of the whole world: shards leave it and come back, the
// number of instances changes, it restarts in order or is cut off, its memory is lost, and all the
// while others write to what is not its own. What it answers for is the latest value or nothing.
// Repeat a failure with FC_TEST_SEED.
#include <fstream>
#include <random>

#include "core/hash.hpp"
#include "core/placement.hpp"
#include "restart_support.hpp"

namespace fc::testing {
namespace {

struct MovedCase {
  friend void PrintTo(const MovedCase& with, std::ostream* to) { *to << with.name; }

  std::string name;
  std::uint32_t shards;     // 0: no leaf
  std::uint32_t instances;  // at most
  bool nvm;
  DurabilityKind durability = DurabilityKind::DropNvm;
};

class MovedModel : public ::testing::TestWithParam<MovedCase> {
 protected:
  static constexpr std::size_t kKeys = 1500;
  static constexpr std::uint32_t kRegions = 32;

  struct Key {
    std::string name;
    KeyHash hash;
    std::uint64_t version = 0;  // 0: there is none
  };

  MovedModel() {
    const MovedCase& with = GetParam();
    random_.seed(seed_of(with.name.size() * 1000 + with.shards));
    for (std::size_t i = 0; i < kKeys; ++i) {
      Key& key = keys_.emplace_back();
      key.name = "key " + std::to_string(i);
      key.hash = hash_key(namespace_seed("pin"), key.name);
    }
    held_.resize(with.shards);
    for (std::uint32_t s = 0; s < with.shards; ++s) held_[s] = pick(2) == 0;
    config_ = engine_config(8 * kMiB, {name_space("pin", {domain("all", 256 * kKiB)})});
    config_.expected_item_bytes = 200;
    if (with.nvm) {
      config_.namespaces[0] = with_nvm(config_.namespaces[0], kRegions, PromotionKind::SecondHit);
      config_.nvm = nvm_config(folder_.file("device"), kRegions + 4);
    }
    config_.persist.dir = shared_.path();
    config_.persist.name = "cache";
    config_.persist.durability = with.durability;
    config_.shard_count = with.shards;
    config_.instance_count = with.instances;
  }

  std::uint64_t pick(std::uint64_t below) { return random_() % below; }
  bool is_leaf() const { return config_.shard_count != 0; }
  bool held(const Key& key) const {
    return !is_leaf() || held_[shard_of(key.hash.high, config_.shard_count)];
  }
  bool ours(const Key& key) const {
    return held(key) && instance_of(key.hash.high, config_.instance_count) == config_.instance;
  }
  Key& pick_key() {
    // Few are asked often.
    const double skewed = static_cast<double>(pick(1'000'000)) / 1e6;
    return keys_[static_cast<std::size_t>(skewed * skewed * static_cast<double>(kKeys))];
  }
  std::string value_of(const Key& key) const {
    return patterned(key.name, key.version,
                     key.version % 61 == 60 ? 40'000 : 20 + key.version % 400);
  }
  std::vector<std::uint32_t> shards_held() const {
    std::vector<std::uint32_t> shards;
    for (std::uint32_t s = 0; s < held_.size(); ++s) {
      if (held_[s]) shards.push_back(s);
    }
    return shards;
  }

  void start() {
    engine_ = make_engine(config_, clock_, false);
    ns_ = engine_->find_namespace("pin");
    if (!is_leaf()) return;
    // What was not kept starts from nothing, and so does now and then what was: it was away too
    // long.
    const KeptShards kept = engine_->kept_shards();
    EXPECT_EQ(kept.shard_count, config_.shard_count);
    kept_ += kept.shards.size();
    for (const std::uint32_t shard : kept.shards) {
      EXPECT_TRUE(held_[shard]) << "shard " << shard << " was not held";
      if (pick(3) != 0) continue;
      write_elsewhere(shard);
      engine_->drop_shards(config_.shard_count, {&shard, 1});
    }
    engine_->hold_shards(config_.shard_count, shards_held());
  }
  void write_elsewhere(std::uint32_t shard) {
    for (Key& key : keys_) {
      if (shard_of(key.hash.high, config_.shard_count) == shard && pick(2) == 0) ++version_of(key);
    }
  }
  std::uint64_t& version_of(Key& key) {
    key.version = ++last_version_;
    return last_version_;
  }

  void do_write() {
    for (std::size_t i = 1 + pick(40); i > 0; --i) {
      Key& key = pick_key();
      version_of(key);
      if (!ours(key)) continue;  // another one has it
      if (pick(10) == 0) {
        key.version = 0;
        erase(*engine_, ns_, key.name);
      } else if (put(*engine_, ns_, key.name, value_of(key)) != WriteStatus::Stored) {
        key.version = 0;
      }
    }
  }
  void do_read() {
    std::vector<const Key*> asked;
    std::vector<std::string_view> names;
    for (std::size_t i = 1 + pick(100); i > 0; --i) {
      const Key& key = pick_key();
      if (!ours(key)) continue;
      asked.push_back(&key);
      names.push_back(key.name);
    }
    const std::vector<Got> got = get_all(*engine_, ns_, names);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const Key& key = *asked[i];
      if (!carries_value(got[i].status)) {
        ++misses_;
        tokens_.emplace_back(&keys_[static_cast<std::size_t>(asked[i] - keys_.data())],
                             *got[i].token);
        continue;
      }
      ++hits_;
      if (got[i].status == CellStatus::HitNvm) ++nvm_hits_;
      ASSERT_NE(key.version, 0U) << key.name << " was deleted";
      ASSERT_TRUE(got[i].value == value_of(key)) << key.name << " has an older value";
    }
  }
  // What was fetched under a token: the latest value, or, when the token must be void, an older.
  void do_install() {
    for (std::size_t i = pick(20); i > 0 && !tokens_.empty(); --i) {
      auto [key, token] = tokens_.back();
      tokens_.pop_back();
      if (!ours(*key) || key->version == 0) continue;
      install(*engine_, ns_, key->name, value_of(*key), token);
    }
  }
  void do_late_install() {
    if (tokens_.empty()) return;
    auto [key, token] = tokens_.back();
    tokens_.pop_back();
    if (!ours(*key)) return;
    const std::uint32_t shard = shard_of(key->hash.high, config_.shard_count);
    const std::string older = value_of(*key);
    engine_->drop_shards(config_.shard_count, {&shard, 1});
    write_elsewhere(shard);
    ASSERT_EQ(install(*engine_, ns_, key->name, older, token), InstallStatus::TokenVoid);
  }
  void do_move() {
    const auto shard = static_cast<std::uint32_t>(pick(config_.shard_count));
    held_[shard] = !held_[shard];
    if (!held_[shard] && pick(2) == 0) engine_->drop_shards(config_.shard_count, {&shard, 1});
    engine_->hold_shards(config_.shard_count, shards_held());
    tokens_.clear();
  }
  void do_restart() {
    tokens_.clear();
    const bool in_order = pick(2) == 0;
    if (in_order) {
      EXPECT_TRUE(engine_->shutdown());
    }
    engine_.reset();
    const std::uint64_t what = pick(10);
    if (what == 0) {  // a reboot
      for (const char* file : {"cache.arena", "cache.nvm", "cache.shards"}) {
        std::filesystem::remove(shared_.file(file));
      }
    } else if (what == 1) {
      std::filesystem::remove(shared_.file("cache.shards"));
    } else if (what == 2 && is_leaf()) {
      damage(shared_.file("cache.shards"));
    }
    if (GetParam().instances > 1 && pick(3) != 0) {
      config_.instance_count = 1 + static_cast<std::uint32_t>(pick(GetParam().instances));
    }
    clock_.advance(pick(5'000));
    start();
  }
  void damage(const std::string& path) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    const std::uint64_t at = pick(2) == 0 ? pick(40) : 4096 + pick(config_.shard_count * 8);
    file.seekg(static_cast<std::streamoff>(at));
    const char flipped = static_cast<char>(file.get() ^ (1 << pick(8)));
    file.seekp(static_cast<std::streamoff>(at));
    file.put(flipped);
  }

  Folder folder_;
  SharedFolder shared_;
  std::mt19937_64 random_;
  ManualClock clock_;
  EngineConfig config_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
  std::vector<Key> keys_;
  std::vector<bool> held_;
  std::vector<std::pair<Key*, Token>> tokens_;
  std::uint64_t last_version_ = 0;
  std::uint64_t hits_ = 0;
  std::uint64_t nvm_hits_ = 0;
  std::uint64_t misses_ = 0;
  std::uint64_t kept_ = 0;
  std::uint64_t hits_after_starts_ = 0;
};

TEST_P(MovedModel, AnswersTheLatestOrNothing) {
  start();
  const std::size_t operations = scaled(6000);
  for (std::size_t i = 0; i < operations; ++i) {
    SCOPED_TRACE("operation " + std::to_string(i));
    const std::uint64_t kind = pick(1000);
    if (kind < 450) {
      do_write();
    } else if (kind < 850) {
      do_read();
    } else if (kind < 940) {
      do_install();
    } else if (kind < 970) {
      engine_->maintain();
    } else if (kind < 990 && is_leaf()) {
      do_move();
    } else if (kind < 994 && is_leaf()) {
      do_late_install();
    } else if (kind >= 990) {
      do_restart();
      const std::uint64_t before = hits_;
      do_read();
      hits_after_starts_ += hits_ - before;
    }
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(hits_, operations);
  EXPECT_GT(misses_, operations / 10);
  EXPECT_GT(hits_after_starts_, operations / 200) << "nothing is kept over starts";
  if (GetParam().nvm) {
    EXPECT_GT(nvm_hits_, operations / 10);
  }
  if (is_leaf()) {
    EXPECT_GT(kept_, operations / 200);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, MovedModel,
    ::testing::Values(MovedCase{"LeafInDram", 12, 1, false}, MovedCase{"LeafWithNvm", 12, 1, true},
                      MovedCase{"LeafOfSeveralInstances", 12, 5, true, DurabilityKind::Sync},
                      MovedCase{"InstancesInDram", 0, 5, false},
                      MovedCase{"InstancesWithNvm", 0, 5, true},
                      MovedCase{"InstancesWithAJournal", 0, 5, true, DurabilityKind::Sync}),
    [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace fc::testing
