// What a config may not say, and that the parts of a plan fit into the memory they were given.
#include <bit>
#include <functional>
#include <stdexcept>

#include "core/layout.hpp"
#include "feature_cache/node.hpp"
#include "support.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
namespace {

EngineConfig good() {
  return engine_config(4 * kMiB, {name_space("pin", {domain("all", 1 * kMiB)})});
}

std::string refusal_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

struct Bad {
  const char* says;
  std::function<void(EngineConfig&)> spoil;
};

TEST(Config, EngineRefusalsNameTheField) {
  const std::vector<Bad> bad{
      {"at least one namespace", [](auto& c) { c.namespaces.clear(); }},
      {"namespace needs a name", [](auto& c) { c.namespaces[0].name = ""; }},
      {"namespace pin twice", [](auto& c) { c.namespaces.push_back(c.namespaces[0]); }},
      {"more than 256 namespaces", [](auto& c) { c.namespaces.resize(257, c.namespaces[0]); }},
      {"namespace pin: needs at least one domain",
       [](auto& c) { c.namespaces[0].domains.clear(); }},
      {"domain needs a name", [](auto& c) { c.namespaces[0].domains[0].name = ""; }},
      {"domain all twice",
       [](auto& c) { c.namespaces[0].domains.push_back(c.namespaces[0].domains[0]); }},
      {"default_domain none", [](auto& c) { c.namespaces[0].default_domain = "none"; }},
      {"ttl is above one year",
       [](auto& c) { c.namespaces[0].domains[0].ttl_ms = layout::kMaxTtlMs + 1; }},
      {"ttl_jitter", [](auto& c) { c.namespaces[0].domains[0].ttl_jitter = 1.0; }},
      {"ttl_jitter", [](auto& c) { c.namespaces[0].domains[0].ttl_jitter = -0.1; }},
      {"ttl_jitter", [](auto& c) { c.namespaces[0].domains[0].ttl_jitter = std::nan(""); }},
      {"refresh_ahead", [](auto& c) { c.namespaces[0].domains[0].refresh_ahead = 2.0; }},
      {"unknown domain other", [](auto& c) { c.namespaces[0].rules = {{"other", "p", 0}}; }},
      {"a rule needs", [](auto& c) { c.namespaces[0].rules = {{"all", "", 0}}; }},
      {"asked_at_least is above", [](auto& c) { c.namespaces[0].rules = {{"all", "", 16}}; }},
      {"negative_ttl", [](auto& c) { c.namespaces[0].negative_ttl_ms = layout::kMaxTtlMs + 1; }},
      {"segment_bytes", [](auto& c) { c.segment_bytes = 3 * 16384; }},
      {"segment_bytes", [](auto& c) { c.segment_bytes = 8192; }},
      {"segment_bytes", [](auto& c) { c.segment_bytes = 2u << 20; }},
      {"expected_item_bytes", [](auto& c) { c.expected_item_bytes = 0; }},
      {"max_value_bytes", [](auto& c) { c.max_value_bytes = (8u << 20) + 1; }},
      {"max_instance_bytes must be positive", [](auto& c) { c.max_instance_bytes = 0; }},
      {"makes 65 instances", [](auto& c) { c.instances = 65; }},
      {"makes 4096 instances", [](auto& c) { c.max_instance_bytes = kKiB; }},
      {"instance 3 of 3", [](auto& c) { c.instance = c.instance_count = 3; }},
      {"too small", [](auto& c) { c.memory_bytes = 300 * kKiB; }},
      {"too small", [](auto& c) { c.memory_bytes = 0; }},
      {"domain all", [](auto& c) { c.namespaces[0].domains[0].budget_bytes = 1; }},
      {"budgets add up", [](auto& c) { c.namespaces[0].domains[0].budget_bytes = 4 * kMiB; }},
  };
  const ManualClock clock;
  EXPECT_EQ(refusal_of([&] { make_engine(good(), clock, false); }), "accepted");
  for (const Bad& spoiled : bad) {
    EngineConfig config = good();
    spoiled.spoil(config);
    EXPECT_NE(refusal_of([&] { make_engine(config, clock, false); }).find(spoiled.says),
              std::string::npos)
        << "should say: " << spoiled.says
        << "\nbut says: " << refusal_of([&] { make_engine(config, clock, false); });
  }
}

TEST(Config, NodeRefusalsNameTheField) {
  NodeConfig node;
  node.engine = good();
  node.engine.namespaces[0].store = "redis";
  const auto refusal = [&] { return refusal_of([&] { node.validate(); }); };
  EXPECT_EQ(refusal(), "namespace pin names the unknown store redis");
  node.stores.push_back({});
  node.stores[0].name = "redis";
  EXPECT_EQ(refusal(), "accepted");
  node.stores[0].max_batch_keys = 0;
  EXPECT_EQ(refusal(), "store redis: max_batch_keys must be positive");
  node.stores[0].max_batch_keys = 1;
  node.stores[0].concurrency = 0;
  EXPECT_EQ(refusal(), "store redis: concurrency must be positive");
  node.stores[0].concurrency = 1;
  node.stores[0].timeout_ms = 0;
  EXPECT_EQ(refusal(), "store redis: timeout must be positive");
  node.stores[0].timeout_ms = 1;
  node.stores.push_back(node.stores[0]);
  EXPECT_EQ(refusal(), "store redis twice");
  node.stores.pop_back();
  node.max_batch_keys = 0;
  EXPECT_EQ(refusal(), "max_batch_keys must be positive");
}

TEST(Config, AsFewInstancesAsTheirSizeAllows) {
  EngineConfig config = good();
  EXPECT_EQ(config.instances_wanted(), 1U);
  config.memory_bytes = std::uint64_t{256} << 30;
  EXPECT_EQ(config.instances_wanted(), 1U);
  ++config.memory_bytes;
  EXPECT_EQ(config.instances_wanted(), 2U);
  config.memory_bytes = std::uint64_t{1536} << 30;
  EXPECT_EQ(config.instances_wanted(), 6U);
  config.max_instance_bytes = std::uint64_t{512} << 30;
  EXPECT_EQ(config.instances_wanted(), 3U);
  config.instances = 2;
  EXPECT_EQ(config.instances_wanted(), 2U) << "what is given counts";
}

TEST(Config, PoliciesByName) {
  for (const PolicyKind kind :
       {PolicyKind::S3Fifo, PolicyKind::Lru, PolicyKind::Fifo, PolicyKind::TinyLfu}) {
    EXPECT_EQ(parse_policy(policy_name(kind)), kind);
  }
  EXPECT_NE(refusal_of([] { parse_policy("lfu"); }).find("'lfu'"), std::string::npos);
}

// ---- geometry
// -------------------------------------------------------------------------------------

EngineConfig random_config(std::mt19937_64& random) {
  const auto pick = [&](std::uint64_t least, std::uint64_t most) {
    return least + random() % (most - least + 1);
  };
  EngineConfig config;
  config.memory_bytes = pick(6 * kMiB, 120 * kMiB);
  config.segment_bytes =
      random() % 3 == 0 ? 0 : static_cast<std::uint32_t>(16 * kKiB << pick(0, 3));
  config.expected_item_bytes = static_cast<std::uint32_t>(std::uint64_t{1} << pick(0, 13));
  config.huge_pages = false;
  const std::size_t namespaces = pick(1, 3);
  for (std::size_t n = 0; n < namespaces; ++n) {
    std::vector<DomainConfig> domains;
    const std::size_t count = pick(1, 3);
    for (std::size_t d = 0; d < count; ++d) {
      domains.push_back(
          domain("d" + std::to_string(d), 4 * kMiB / 8, static_cast<PolicyKind>(random() % 4)));
    }
    config.namespaces.push_back(name_space("n" + std::to_string(n), domains));
    if (random() % 3 == 0) config.namespaces.back().rules = {{"d0", "", 2}};
  }
  return config;
}

// The budget covers all that the engine allocates, whatever the shape.
TEST(Geometry, PartsNeverExceedTheMemory) {
  std::mt19937_64 random(seed_of(11));
  std::size_t built = 0;
  for (int i = 0; i < 60; ++i) {
    EngineConfig config = random_config(random);
    Geometry plan;
    try {
      plan = Geometry::plan(config);
    } catch (const std::invalid_argument&) {
      continue;
    }
    ASSERT_TRUE(std::has_single_bit(plan.segment_bytes));
    ASSERT_GT(plan.domain_bytes(), 0U);
    // All budgets together: what the plan says is there, can be had.
    std::size_t domains = 0;
    for (const NamespaceConfig& ns : config.namespaces) domains += ns.domains.size();
    const std::uint64_t share = plan.domain_bytes() / plan.segment_bytes / domains;
    if (share < layout::kMinDomainSegments) continue;
    config.segment_bytes = plan.segment_bytes;
    for (NamespaceConfig& ns : config.namespaces) {
      for (DomainConfig& of : ns.domains) of.budget_bytes = share * plan.segment_bytes;
    }
    const ManualClock clock;
    const std::unique_ptr<Engine> engine = make_engine(config, clock, false);
    const Counters counters = Counters::of(*engine);
    const double parts = counters.at("feature_cache_arena_bytes") +
                         counters.at("feature_cache_index_bytes") +
                         counters.at("feature_cache_side_bytes");
    ASSERT_LE(parts, static_cast<double>(config.memory_bytes))
        << config.memory_bytes << " bytes, items of " << config.expected_item_bytes;
    ASSERT_GT(parts, static_cast<double>(config.memory_bytes) * 0.6) << "most of it is used";
    ++built;
  }
  EXPECT_GT(built, 40U);
}

TEST(Geometry, LargeMemoriesAddUp) {
  for (const std::uint64_t gib : {1, 16, 64, 200}) {
    for (const PolicyKind policy : {PolicyKind::S3Fifo, PolicyKind::TinyLfu, PolicyKind::Lru}) {
      EngineConfig config =
          engine_config(gib * 1024 * kMiB, {name_space("pin", {domain("all", kMiB, policy)})});
      config.segment_bytes = kMiB;
      config.expected_item_bytes = 216;
      const Geometry plan = Geometry::plan(config);
      const std::uint64_t arena = std::uint64_t{plan.segment_count} * plan.segment_bytes;
      const std::uint64_t index = plan.bucket_count * 64;
      ASSERT_EQ(arena + index + plan.side_bytes, config.memory_bytes);
      const double items = static_cast<double>(plan.bucket_count * 8) * layout::kIndexLoadLimit;
      const double policy_bytes = policy == PolicyKind::S3Fifo    ? items * 0.9 * 2
                                  : policy == PolicyKind::TinyLfu ? items * 8
                                                                  : 0;
      EXPECT_GE(static_cast<double>(plan.side_bytes), policy_bytes + 74.0 * plan.segment_count);
      EXPECT_GT(arena, config.memory_bytes * 9 / 10);
    }
  }
}

// "at least N are needed" is true.
TEST(Geometry, TheLeastMemoryThatARefusalNamesIsEnough) {
  for (const std::uint32_t item_bytes : {1, 8, 64, 1'000}) {
    for (const PolicyKind policy : {PolicyKind::S3Fifo, PolicyKind::TinyLfu}) {
      EngineConfig config = engine_config(
          1, {name_space("pin", {domain("a", 64 * kKiB, policy), domain("b", 64 * kKiB, policy)})});
      config.expected_item_bytes = item_bytes;
      const std::string refusal = refusal_of([&] { Geometry::plan(config); });
      const std::string says = "at least ";
      const std::size_t at = refusal.find(says);
      ASSERT_NE(at, std::string::npos) << refusal;
      config.memory_bytes = std::stoull(refusal.substr(at + says.size()));
      const ManualClock clock;
      EXPECT_EQ(refusal_of([&] { make_engine(config, clock, false); }), "accepted");
      EXPECT_LT(config.memory_bytes, 3 * kMiB);
    }
  }
}

}  // namespace
}  // namespace fc::testing
