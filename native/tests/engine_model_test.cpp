// The engine against a plain map: thousands of random calls, the same on both. A hit is the latest
// value and unexpired, what was deleted, flushed or overwritten never shows again, and where
// nothing can be evicted nothing is missing. Repeat a failure with FC_TEST_SEED.
#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "nvm_support.hpp"

namespace fc::testing {
namespace {

struct ModelCase {
  friend void PrintTo(const ModelCase& with, std::ostream* to) { *to << with.name; }

  std::string name;
  PolicyKind policy;
  std::uint64_t memory_bytes;
  std::uint64_t budget_bytes;  // of each domain
  std::size_t keys;
  std::size_t value_bytes_most;
  std::size_t operations;
  bool evicts;
  double jitter;
  std::uint32_t nvm_regions = 0;  // of each namespace
  std::uint32_t instances = 1;
};

struct Stored {
  std::string value;
  bool negative = false;
  std::uint64_t expires_ms = 0;      // at the latest; 0: never
  std::uint64_t lives_until_ms = 0;  // at the least, as far as time goes
};

struct HeldToken {
  std::size_t ns;
  std::string key;
  Token token;
  bool alive = true;  // as far as the model knows
};

class EngineModel : public ::testing::TestWithParam<ModelCase> {
 protected:
  static constexpr std::uint64_t kNegativeTtlMs = 3'000;
  static constexpr std::size_t kNamespaces = 2;

  void SetUp() override {
    const ModelCase& with = GetParam();
    random_.seed(seed_of(with.name.size() * 1000 + with.keys));
    std::vector<NamespaceConfig> namespaces;
    for (const char* name : {"pin", "user"}) {
      NamespaceConfig ns = name_space(
          name, {domain("lasting", with.budget_bytes, with.policy),
                 domain("brief", with.budget_bytes, with.policy, 5'000, with.jitter),
                 domain("asked", with.budget_bytes, PolicyKind::S3Fifo, 20'000, with.jitter)});
      ns.rules = {{"brief", "key 1", 0}, {"asked", "key 2", 2}};
      ns.negative_ttl_ms = kNegativeTtlMs;
      if (with.nvm_regions != 0) {
        ns = with_nvm(ns, with.nvm_regions, PromotionKind::SecondHit);
      }
      namespaces.push_back(ns);
    }
    EngineConfig config = engine_config(with.memory_bytes, namespaces);
    config.instances = with.instances;
    if (with.nvm_regions != 0) {
      config.nvm = nvm_config(folder_.file("nvm"), kNamespaces * with.nvm_regions + with.instances);
      config.nvm.write_buffers = 64;
    }
    engine_ = make_engine(config, clock_, false);
    for (std::size_t n = 0; n < kNamespaces; ++n) {
      ns_[n] = engine_->find_namespace(namespaces[n].name);
      for (const DomainConfig& of : namespaces[n].domains) {
        domains_[n].push_back(engine_->find_domain(ns_[n], of.name));
      }
    }
  }

  static std::size_t operations() { return scaled(GetParam().operations); }
  std::uint64_t pick(std::uint64_t below) { return random_() % below; }
  // Few keys are asked often, as in life.
  std::string pick_key() {
    const double skewed = std::pow(static_cast<double>(pick(1'000'000)) / 1e6, 2.0);
    return "key " +
           std::to_string(static_cast<std::size_t>(skewed * static_cast<double>(GetParam().keys)));
  }
  std::string pick_value(const std::string& key) {
    const std::size_t most = GetParam().value_bytes_most;
    const std::uint64_t kind = pick(100);
    const std::size_t bytes = kind < 70 ? pick(200) : kind < 97 ? pick(most / 8 + 1) : pick(most);
    return patterned(key, ++version_, bytes);
  }

  // What the model knows after a value has entered by `item`; the domain's TTL is only known
  // between bounds, since the rules may have chosen any domain.
  void remember(std::size_t n, const PutItem& item) {
    Stored stored;
    stored.value = item.value;
    stored.negative = item.negative;
    const std::uint64_t now = clock_.now_ms();
    std::uint64_t least = item.ttl_ms;
    std::uint64_t most = item.ttl_ms;
    if (item.ttl_ms == 0 && item.negative) {
      least = most = kNegativeTtlMs;
    } else if (item.ttl_ms == 0) {
      const bool routed = item.domain == kNoDomain;
      if (routed ? item.key.starts_with("key 1") : item.domain == domains_[n][1]) {
        least = most = 5'000;
      } else if (!routed && item.domain == domains_[n][2]) {
        least = most = 20'000;
      } else if (routed && item.key.starts_with("key 2")) {
        least = 20'000;
        most = 0;  // perhaps the default domain: never
      } else {
        least = most = 0;
      }
    }
    const std::uint64_t tick = ManualClock::kTickMs;
    stored.expires_ms = most == 0 ? 0 : now + std::max(most, tick);
    const auto surely =
        static_cast<std::uint64_t>(static_cast<double>(least) * (1.0 - GetParam().jitter));
    stored.lives_until_ms = least == 0 ? ~0ull : now + surely - std::min(surely, 2 * tick);
    model_[n][std::string(item.key)] = std::move(stored);
  }
  void void_tokens(std::size_t n, std::string_view key, bool all = false) {
    for (HeldToken& held : tokens_) {
      if (held.ns == n && (all || held.key == key)) held.alive = false;
    }
  }
  PutItem pick_item(std::size_t n, const std::string& key, const std::string& value) {
    PutItem item;
    item.key = key;
    item.value = value;
    if (pick(3) == 0) item.domain = domains_[n][pick(3)];
    if (pick(4) == 0) item.ttl_ms = 100 + pick(30'000);
    return item;
  }

  void do_put() {
    const std::size_t n = pick(kNamespaces);
    const std::size_t count = 1 + pick(12);
    std::vector<std::string> keys;
    std::vector<std::string> values;
    for (std::size_t i = 0; i < count; ++i) {
      keys.push_back(pick_key());
      values.push_back(pick_value(keys.back()));
    }
    std::vector<PutItem> items;
    for (std::size_t i = 0; i < count; ++i) items.push_back(pick_item(n, keys[i], values[i]));
    std::vector<WriteStatus> statuses(count);
    engine_->put(ns_[n], items, statuses);
    for (std::size_t i = 0; i < count; ++i) {
      void_tokens(n, keys[i]);
      if (statuses[i] == WriteStatus::Stored) {
        remember(n, items[i]);
      } else {
        ASSERT_EQ(statuses[i], WriteStatus::Rejected);
        ASSERT_TRUE(GetParam().evicts) << "there is room for " << values[i].size();
        model_[n].erase(keys[i]);
      }
    }
  }
  void do_get() {
    const std::size_t n = pick(kNamespaces);
    std::vector<std::string> keys;
    for (std::size_t count = 1 + pick(300); count > 0; --count) keys.push_back(pick_key());
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    const std::vector<Got> got = get_all(*engine_, ns_[n], views);
    for (std::size_t i = 0; i < keys.size(); ++i)
      ASSERT_NO_FATAL_FAILURE(check(n, keys[i], got[i]));
  }
  void check(std::size_t n, const std::string& key, const Got& got) {
    const auto found = model_[n].find(key);
    const std::uint64_t now = clock_.now_ms();
    if (got.status == CellStatus::Miss) {
      ++misses_;
      if (!GetParam().evicts && found != model_[n].end()) {
        ASSERT_GE(now, found->second.lives_until_ms) << key << " is missing";
      }
      if (pick(4) == 0) {
        if (tokens_.size() == 40) tokens_.erase(tokens_.begin() + static_cast<long>(pick(40)));
        tokens_.push_back({n, key, *got.token});
      }
      return;
    }
    ++hits_;
    ASSERT_NE(found, model_[n].end()) << key << " was never put, deleted or flushed";
    const Stored& stored = found->second;
    ASSERT_TRUE(stored.expires_ms == 0 || now < stored.expires_ms) << key << " has expired";
    if (stored.negative) {
      ASSERT_EQ(got.status, CellStatus::NotFound);
    } else {
      ASSERT_TRUE(carries_value(got.status));
      if (got.status == CellStatus::HitNvm) ++nvm_hits_;
      ASSERT_TRUE(got.value == stored.value) << key << " has another value than the latest";
    }
  }
  void do_erase() {
    const std::size_t n = pick(kNamespaces);
    const std::string key = pick_key();
    erase(*engine_, ns_[n], key);
    void_tokens(n, key);
    model_[n].erase(key);
  }
  void do_install() {
    if (tokens_.empty()) return;
    const std::size_t at = pick(tokens_.size());
    const HeldToken held = tokens_[at];
    if (pick(2) == 0) tokens_.erase(tokens_.begin() + static_cast<std::ptrdiff_t>(at));
    const std::string value = pick_value(held.key);
    PutItem item = pick_item(held.ns, held.key, value);
    if (pick(4) == 0) {
      item.negative = true;
      item.value = {};
      item.ttl_ms = 0;
    }
    const bool alive = engine_->token_alive(ns_[held.ns], held.key, held.token);
    switch (install(*engine_, ns_[held.ns], item, held.token)) {
      case InstallStatus::Installed:
        ASSERT_TRUE(held.alive) << held.key << ": a late result won";
        ASSERT_TRUE(alive);
        remember(held.ns, item);
        ++installed_;
        break;
      case InstallStatus::TokenVoid:
        ASSERT_FALSE(alive);
        // Two keys may share a token's stripe, so a live one may be void; rarely.
        if (held.alive) ++needlessly_void_;
        break;
      case InstallStatus::Rejected:
        ASSERT_TRUE(GetParam().evicts);
        break;
    }
  }
  void do_flush() {
    const std::size_t n = pick(kNamespaces);
    // An item that has died on its way between the tiers may be counted in both for a moment.
    const std::uint64_t dropped = engine_->flush(ns_[n]);
    if (GetParam().nvm_regions == 0) {
      ASSERT_LE(dropped, model_[n].size());
    }
    void_tokens(n, {}, true);
    model_[n].clear();
  }
  void do_resize() {
    const std::size_t n = pick(kNamespaces);
    const DomainIndex of = domains_[n][pick(3)];
    const std::uint64_t budget = GetParam().budget_bytes;
    try {
      engine_->resize(of, budget / 2 + pick(budget));
    } catch (const std::invalid_argument&) {
      // The others have it all.
    }
  }
  void check_budgets() {
    const Counters counters = Counters::of(*engine_);
    for (const char* ns : {"pin", "user"}) {
      for (const char* name : {"lasting", "brief", "asked"}) {
        ASSERT_LE(counters.domain("used_bytes", ns, name),
                  counters.domain("budget_bytes", ns, name));
        ASSERT_LE(counters.domain("live_bytes", ns, name), counters.domain("used_bytes", ns, name));
        ASSERT_LE(counters.domain("payload_bytes", ns, name),
                  counters.domain("live_bytes", ns, name));
      }
    }
  }

  Folder folder_;
  std::mt19937_64 random_;
  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  std::array<NamespaceIndex, kNamespaces> ns_{};
  std::array<std::vector<DomainIndex>, kNamespaces> domains_;
  std::array<std::unordered_map<std::string, Stored>, kNamespaces> model_;
  std::vector<HeldToken> tokens_;
  std::uint64_t version_ = 0;
  std::uint64_t hits_ = 0;
  std::uint64_t nvm_hits_ = 0;
  std::uint64_t misses_ = 0;
  std::uint64_t installed_ = 0;
  std::uint64_t needlessly_void_ = 0;
};

TEST_P(EngineModel, AnswersAsAMapWould) {
  for (std::size_t i = 0; i < operations(); ++i) {
    SCOPED_TRACE("operation " + std::to_string(i));
    const std::uint64_t kind = pick(1000);
    if (kind < 450) {
      do_put();
    } else if (kind < 780) {
      do_get();
    } else if (kind < 840) {
      do_erase();
    } else if (kind < 930) {
      do_install();
    } else if (kind < 960) {
      clock_.advance(pick(800));
    } else if (kind < 990) {
      engine_->maintain();
    } else if (kind < 994) {
      do_flush();
    } else if (GetParam().evicts) {
      do_resize();
    }
    if (HasFatalFailure()) return;
    if (i % 64 == 0) check_budgets();
  }
  EXPECT_GT(hits_, operations());
  if (GetParam().nvm_regions != 0) {
    // The few operations that the thread sanitizer allows hardly fill DRAM.
    constexpr std::size_t kShare = scaled(5) == 5 ? 4 : 40;
    EXPECT_GT(nvm_hits_, operations() / kShare);
  }
  EXPECT_GT(misses_, operations() / 10);
  EXPECT_GT(installed_, operations() / 50);
  EXPECT_LT(needlessly_void_, installed_ / 10 + 5);
}

// Nothing is left in the index when all is gone: counts that drift would show here.
TEST_P(EngineModel, CountsComeBackToNothing) {
  for (std::size_t i = 0; i < scaled(400); ++i) do_put();
  clock_.advance(400ull * 24 * 3600 * 1000);
  engine_->maintain();
  for (std::size_t n = 0; n < kNamespaces; ++n) engine_->flush(ns_[n]);
  const Counters counters = Counters::of(*engine_);
  EXPECT_EQ(counters.sum("feature_cache_domain_items"), 0);
  EXPECT_EQ(counters.sum("feature_cache_domain_live_bytes"), 0);
  EXPECT_EQ(counters.sum("feature_cache_domain_payload_bytes"), 0);
  EXPECT_EQ(counters.sum("feature_cache_domain_used_bytes"), 0);
  if (GetParam().nvm_regions == 0) return;
  EXPECT_TRUE(eventually(
      [&] { return Counters::of(*engine_).sum("feature_cache_namespace_nvm_used_bytes") == 0; }));
  EXPECT_EQ(Counters::of(*engine_).sum("feature_cache_namespace_nvm_items"), 0);
}

constexpr std::uint64_t kTiny = 160 * kKiB;

INSTANTIATE_TEST_SUITE_P(
    Cases, EngineModel,
    ::testing::Values(
        ModelCase{"S3FifoTiny", PolicyKind::S3Fifo, 4 * kMiB, kTiny, 700, 3 * 16384, 4000, true,
                  0.1},
        ModelCase{"LruTiny", PolicyKind::Lru, 4 * kMiB, kTiny, 700, 3 * 16384, 4000, true, 0.0},
        ModelCase{"FifoTiny", PolicyKind::Fifo, 4 * kMiB, kTiny, 700, 3 * 16384, 4000, true, 0.1},
        ModelCase{"TinyLfuTiny", PolicyKind::TinyLfu, 4 * kMiB, kTiny, 700, 3 * 16384, 4000, true,
                  0.1},
        ModelCase{"SmallValues", PolicyKind::S3Fifo, 4 * kMiB, kTiny, 40'000, 8, 4000, true, 0.1},
        ModelCase{"LargeValues", PolicyKind::S3Fifo, 24 * kMiB, 3 * kMiB, 200, kMiB, 300, true,
                  0.1},
        ModelCase{"NvmTiny", PolicyKind::S3Fifo, 24 * kMiB, kTiny, 3000, 3 * 16384, 4000, true, 0.1,
                  12},
        ModelCase{"NvmLarge", PolicyKind::Lru, 24 * kMiB, kTiny, 3000, 16384, 4000, true, 0.1, 200},
        ModelCase{"FanOutTiny", PolicyKind::S3Fifo, 12 * kMiB, 2 * kTiny, 1000, 3 * 16384, 4000,
                  true, 0.1, 0, 3},
        ModelCase{"FanOutNvm", PolicyKind::S3Fifo, 72 * kMiB, 2 * kTiny, 6000, 3 * 16384, 4000,
                  true, 0.1, 24, 3},
        ModelCase{"FanOutNeverEvicts", PolicyKind::S3Fifo, 200 * kMiB, 24 * kMiB, 2000, 20'000,
                  4000, false, 0.1, 0, 3},
        ModelCase{"NeverEvicts", PolicyKind::S3Fifo, 180 * kMiB, 20 * kMiB, 2000, 20'000, 4000,
                  false, 0.1}),
    [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace fc::testing
