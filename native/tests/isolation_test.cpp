// What one tenant cannot do to another, and what the engine cannot do to the machine.
#include "core/hash.hpp"
#include "index/index.hpp"
#include "support.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
namespace {

class Isolation : public ::testing::Test {
 protected:
  void start(EngineConfig config) {
    engine_ = make_engine(config, clock_, false);
    ns_ = engine_->find_namespace("pin");
  }
  DomainIndex domain_named(std::string_view name) { return engine_->find_domain(ns_, name); }
  std::size_t put_many(const std::string& prefix, std::size_t count, std::string_view value,
                       DomainIndex to) {
    std::size_t stored = 0;
    for (std::size_t i = 0; i < count; ++i) {
      stored += put(*engine_, ns_, prefix + std::to_string(i), value, to) == WriteStatus::Stored;
    }
    return stored;
  }
  std::vector<std::string> present(const std::string& prefix, std::size_t count) {
    std::vector<std::string> keys;
    for (std::size_t i = 0; i < count; ++i) {
      std::string key = prefix + std::to_string(i);
      if (get(*engine_, ns_, key).status == CellStatus::HitDram) keys.push_back(std::move(key));
    }
    return keys;
  }

  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
};

TEST_F(Isolation, FloodOfOneByteValuesEvictsNobodyElse) {
  EngineConfig config = engine_config(
      6 * kMiB, {name_space("pin", {domain("mine", 2 * kMiB), domain("flooded", 2 * kMiB)})});
  config.expected_item_bytes = 100;
  start(config);
  const DomainIndex mine = domain_named("mine");
  const DomainIndex flooded = domain_named("flooded");
  put_many("mine ", 10'000, std::string(90, 'v'), mine);
  const std::vector<std::string> before = present("mine ", 10'000);
  ASSERT_EQ(before.size(), 10'000U);
  const std::size_t flood = scaled(300'000);
  EXPECT_EQ(put_many("flood ", flood, "x", flooded), flood)
      << "a full share of the index evicts, it does not refuse";
  EXPECT_EQ(present("mine ", 10'000), before);
  const Counters counters = Counters::of(*engine_);
  EXPECT_LE(counters.domain("items", "pin", "flooded"),
            counters.domain("entry_budget", "pin", "flooded"));
  EXPECT_GT(counters.domain("evictions_total", "pin", "flooded"), flood / 2);
  EXPECT_EQ(counters.domain("evictions_total", "pin", "mine"), 0);
}

// The same when every domain has filled its share of the index, so that buckets are full.
TEST_F(Isolation, FloodIntoAFullIndexEvictsNobodyElse) {
  EngineConfig config =
      engine_config(4 * kMiB, {name_space("pin", {domain("mine", 1200 * kKiB, PolicyKind::Fifo),
                                                  domain("flooded", 1200 * kKiB)})});
  config.expected_item_bytes = 100;
  start(config);
  const std::size_t share =
      static_cast<std::size_t>(Counters::of(*engine_).domain("entry_budget", "pin", "mine"));
  put_many("mine ", share, "v", domain_named("mine"));
  put_many("flood ", 2 * share, "x", domain_named("flooded"));
  const std::vector<std::string> before = present("mine ", share);
  EXPECT_GT(before.size(), share * 97 / 100);
  const std::size_t more = scaled(100'000);
  const std::size_t stored = put_many("more ", more, "x", domain_named("flooded"));
  EXPECT_GT(stored, more - more / 1000) << "a full index evicts instead of failing";
  EXPECT_EQ(present("mine ", share), before);
}

TEST_F(Isolation, OneDomainAloneFillsTheIndexAndGoesOn) {
  EngineConfig config = engine_config(4 * kMiB, {name_space("pin", {domain("all", 2 * kMiB)})});
  config.expected_item_bytes = 200;
  start(config);
  constexpr std::size_t kKeys = scaled(200'000);
  EXPECT_EQ(put_many("k ", kKeys, "", kNoDomain), kKeys);
  const Counters counters = Counters::of(*engine_);
  const double items = counters.domain("items", "pin", "all");
  const double budget = counters.domain("entry_budget", "pin", "all");
  EXPECT_LE(items, budget);
  EXPECT_GT(items, budget * 0.85);
  std::size_t latest = 0;
  for (std::size_t i = kKeys - 200; i < kKeys; ++i) {
    latest += get(*engine_, ns_, "k " + std::to_string(i)).status == CellStatus::HitDram;
  }
  EXPECT_GE(latest, 199U) << "what came last is there";
}

// Keys of two namespaces that agree in bucket and tag, and by name: only the namespace differs.
TEST_F(Isolation, SameKeyOfAnotherNamespaceIsNeverTakenForThisOne) {
  EngineConfig config = engine_config(2 * kMiB, {name_space("pin", {domain("all", 256 * kKiB)}),
                                                 name_space("user", {domain("all", 256 * kKiB)})});
  config.expected_item_bytes = 1000;
  const Geometry geometry = Geometry::plan(config);
  std::vector<Bucket> buckets(geometry.bucket_count);
  const Index places(buckets.data(), geometry.bucket_count);
  const std::uint64_t pin_seed = namespace_seed("pin");
  const std::uint64_t user_seed = namespace_seed("user");
  std::vector<std::string> colliding;
  for (std::uint64_t i = 0; i < 40'000'000 && colliding.size() < 2; ++i) {
    const std::string key = std::to_string(i);
    const std::uint64_t pin = hash_key(pin_seed, key).low;
    const std::uint64_t user = hash_key(user_seed, key).low;
    if (Index::tag_of(pin) != Index::tag_of(user)) continue;
    const Place a = places.place_of(pin);
    const Place b = places.place_of(user);
    if (a.home == b.home || a.home == b.partner || a.partner == b.home) colliding.push_back(key);
  }
  ASSERT_EQ(colliding.size(), 2U) << "no such keys; the test proves nothing";
  start(config);
  const NamespaceIndex user = engine_->find_namespace("user");
  for (const std::string& key : colliding) {
    put(*engine_, ns_, key, "pin's");
    EXPECT_EQ(get(*engine_, user, key).status, CellStatus::Miss);
    erase(*engine_, user, key);
    EXPECT_EQ(get(*engine_, ns_, key).value, "pin's");
    put(*engine_, user, key, "user's");
    EXPECT_EQ(get(*engine_, ns_, key).value, "pin's");
    EXPECT_EQ(get(*engine_, user, key).value, "user's");
    engine_->flush(user);
    EXPECT_EQ(get(*engine_, ns_, key).value, "pin's");
    EXPECT_EQ(get(*engine_, user, key).status, CellStatus::Miss);
  }
}

// ---- expired bytes come back without any read
// -----------------------------------------------------

class Expiry : public Isolation {
 protected:
  struct Kind {
    std::uint64_t ttl_ms;  // 0: never
    std::size_t items;
  };
  static constexpr std::size_t kValueBytes = 200;
  static constexpr std::size_t kItemBytes = kValueBytes + 24;

  double used() { return Counters::of(*engine_).domain("used_bytes", "pin", "all"); }
  double items() { return Counters::of(*engine_).domain("items", "pin", "all"); }
  void pass(std::uint64_t ms) {
    for (std::uint64_t left = ms; left > 0;) {
      const std::uint64_t step = std::min<std::uint64_t>(left, 100);
      clock_.advance(step);
      engine_->maintain();
      left -= step;
    }
  }
  // Writes all kinds mixed, then checks each at twice its time.
  void write_and_wait(const std::vector<Kind>& kinds, double slack_bytes) {
    std::vector<std::uint64_t> ttls;
    for (const Kind& kind : kinds) ttls.insert(ttls.end(), kind.items, kind.ttl_ms);
    std::mt19937_64 random(seed_of(5));
    std::shuffle(ttls.begin(), ttls.end(), random);
    for (std::size_t i = 0; i < ttls.size(); ++i) {
      const std::string key = "key " + std::to_string(100'000 + i);
      ASSERT_EQ(put(*engine_, ns_, key, patterned(key, 1, kValueBytes), kNoDomain, ttls[i]),
                WriteStatus::Stored);
    }
    ASSERT_EQ(items(), static_cast<double>(ttls.size())) << "the test must not evict";
    std::uint64_t passed = 0;
    for (const Kind& kind : kinds) {
      if (kind.ttl_ms == 0) break;
      pass(2 * kind.ttl_ms - passed);
      passed = 2 * kind.ttl_ms;
      double due = 0;
      double others = 0;
      for (const Kind& other : kinds) {
        const bool is_due = other.ttl_ms != 0 && other.ttl_ms <= kind.ttl_ms;
        (is_due ? due : others) += static_cast<double>(other.items);
      }
      EXPECT_LE(items(), others + 0.05 * due) << "indexed after twice " << kind.ttl_ms;
      EXPECT_LE(used(), (others * 1.02 + 0.05 * due) * kItemBytes + slack_bytes)
          << "bytes in use after twice " << kind.ttl_ms;
    }
  }
};

TEST_F(Expiry, GivesItsBytesBackUnread) {
  start(engine_config(
      8 * kMiB, {name_space("pin", {domain("all", 4 * kMiB, PolicyKind::S3Fifo, 10'000, 0.1)})}));
  for (int i = 0; i < 10'000; ++i) {
    put(*engine_, ns_, "key " + std::to_string(i), std::string(kValueBytes, 'v'));
    if (i % 100 == 0) pass(100);  // ten seconds of writing
  }
  const double full = used();
  EXPECT_GT(full, 9'000.0 * kItemBytes);
  pass(20'000);
  EXPECT_LE(used(), full * 0.05);
  EXPECT_EQ(items(), 0);
}

TEST_F(Expiry, OfMixedItemsEachByItsOwnTime) {
  start(engine_config(16 * kMiB, {name_space("pin", {domain("all", 10 * kMiB)})}));
  write_and_wait({{2'000, 6'000}, {5'000, 6'000}, {15'000, 6'000}, {60'000, 6'000}, {0, 6'000}},
                 10 * 16 * kKiB);
}

TEST_F(Expiry, OfMixedItemsInASmallDomain) {
  start(engine_config(4 * kMiB, {name_space("pin", {domain("all", 20 * 16 * kKiB)})}));
  write_and_wait({{2'000, 300}, {10'000, 300}, {60'000, 300}, {0, 100}}, 4 * 16 * kKiB);
}

TEST_F(Expiry, OfMoreKindsThanThereAreOpenSegments) {
  start(engine_config(24 * kMiB, {name_space("pin", {domain("all", 16 * kMiB)})}));
  std::vector<Kind> kinds;
  for (std::uint64_t ttl = 1'000; ttl < 600'000; ttl = ttl * 3 / 2) kinds.push_back({ttl, 1'500});
  kinds.push_back({0, 1'500});
  write_and_wait(kinds, 20 * 16 * kKiB);
}

TEST_F(Expiry, OfFewShortLivedItemsAmongManyThatLast) {
  start(engine_config(16 * kMiB, {name_space("pin", {domain("all", 10 * kMiB)})}));
  write_and_wait({{2'000, 200}, {0, 20'000}}, 4 * 16 * kKiB);
}

TEST_F(Expiry, OfLargeValues) {
  start(engine_config(16 * kMiB,
                      {name_space("pin", {domain("all", 10 * kMiB, PolicyKind::S3Fifo, 5'000)})}));
  for (int i = 0; i < 20; ++i) {
    put(*engine_, ns_, "key " + std::to_string(i), std::string(300'000, 'v'));
  }
  EXPECT_GT(used(), 20 * 300'000.0);
  pass(10'000);
  EXPECT_EQ(used(), 0);
}

}  // namespace
}  // namespace fc::testing
