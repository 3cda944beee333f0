// A node of several instances, beyond what every engine promises: where keys go, what adds up, what
// starts and ends together, and how large it may be.
#include <atomic>
#include <set>
#include <stdexcept>
#include <system_error>

#include "core/hash.hpp"
#include "core/placement.hpp"
#include "engine/fan_out_engine.hpp"
#include "engine/merged_counters.hpp"
#include "nvm_support.hpp"
#include "restart_support.hpp"

namespace fc::testing {
namespace {

std::string name_of(std::size_t i) {
  return "key " + std::to_string(i);
}

std::string instance_counter(const std::string& what, std::uint32_t instance) {
  return "feature_cache_instance_" + what + "{instance=" + std::to_string(instance) + "}";
}

EngineConfig node_config(std::uint32_t instances) {
  EngineConfig config = engine_config(
      instances * 4 * kMiB,
      {name_space("pin", {domain("lasting", instances * kMiB), domain("brief", instances * kMiB)}),
       name_space("user", {domain("all", instances * kMiB / 2)})});
  config.instances = instances;
  return config;
}

class FanOut : public ::testing::Test {
 protected:
  void start(const EngineConfig& config, RecoveryProgress* progress = nullptr) {
    engine_.reset();
    engine_ = make_engine(config, clock_, false, {}, progress);
    pin_ = engine_->find_namespace("pin");
    lasting_ = engine_->find_domain(pin_, "lasting");
  }
  void fill(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(put(*engine_, pin_, name_of(i), patterned(name_of(i), 1, 100)),
                WriteStatus::Stored);
    }
  }
  std::size_t found(std::size_t count) {
    std::size_t hits = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const Got got = get(*engine_, pin_, name_of(i));
      if (!carries_value(got.status)) continue;
      EXPECT_EQ(got.value, patterned(name_of(i), 1, 100));
      ++hits;
    }
    return hits;
  }
  double at(const std::string& name) { return Counters::of(*engine_).at(name); }

  Folder folder_;
  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex pin_ = kNoNamespace;
  DomainIndex lasting_ = kNoDomain;
};

TEST_F(FanOut, KeysAreOnTheInstanceThatPlacementNames) {
  constexpr std::size_t kKeys = 3000;
  start(node_config(3));
  std::array<double, 3> expected{};
  for (std::size_t i = 0; i < kKeys; ++i) {
    ++expected[instance_of(hash_key(namespace_seed("pin"), name_of(i)).high, 3)];
  }
  fill(kKeys);
  EXPECT_EQ(found(kKeys), kKeys);
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(at(instance_counter("items", i)), expected[i]);
    EXPECT_EQ(at(instance_counter("hits_total", i)), expected[i]);
    EXPECT_EQ(at(instance_counter("memory_bytes", i)), 4 * kMiB);
    EXPECT_EQ(at(instance_counter("numa_node", i)), -1) << "this machine has one node";
    EXPECT_GT(at(instance_counter("used_bytes", i)), expected[i] * 100);
  }
  EXPECT_EQ(Counters::of(*engine_).domain("items", "pin", "lasting"), kKeys);
  EXPECT_EQ(at("feature_cache_namespace_hits_total{namespace=pin}"), kKeys);
  EXPECT_EQ(at("feature_cache_memory_budget_bytes"), 12 * kMiB);
}

TEST_F(FanOut, ACommonGaugeIsShownOnceAndOthersAddUp) {
  EngineConfig config = node_config(3);
  config.namespaces[0].domains[1].ttl_ms = 5000;
  config.memory_bytes *= 4;
  config.namespaces[0] = with_nvm(config.namespaces[0], 24);
  config.nvm = nvm_config(folder_.file("nvm"), 30);
  start(config);
  const Counters counters = Counters::of(*engine_);
  EXPECT_EQ(counters.at("feature_cache_segment_bytes"), 16 * kKiB);
  EXPECT_EQ(counters.at("feature_cache_nvm_region_bytes"), kRegionBytes);
  EXPECT_EQ(counters.domain("ttl_seconds", "pin", "brief"), 5);
  EXPECT_EQ(counters.domain("budget_bytes", "pin", "lasting"), 3 * kMiB);
  EXPECT_EQ(counters.at("feature_cache_namespace_nvm_budget_bytes{namespace=pin}"),
            24 * kRegionBytes);
}

// Whoever adds a gauge says here which of the two it is.
class GaugeNames final : public CounterVisitor {
 public:
  void counter(std::string_view, std::string_view, Labels, std::uint64_t) override {}
  void gauge(std::string_view name, std::string_view, Labels, double) override {
    names.emplace(name);
  }
  void histogram(std::string_view, std::string_view, Labels, std::span<const double>,
                 std::span<const std::uint64_t>, double) override {}
  std::set<std::string> names;
};

TEST_F(FanOut, EveryGaugeIsKnownToAddUpOrToBeCommon) {
  const std::set<std::string> add_up{
      "feature_cache_arena_bytes",         "feature_cache_domain_budget_bytes",
      "feature_cache_domain_entry_budget", "feature_cache_domain_items",
      "feature_cache_domain_live_bytes",   "feature_cache_domain_payload_bytes",
      "feature_cache_domain_policy_bytes", "feature_cache_domain_used_bytes",
      "feature_cache_index_bytes",         "feature_cache_index_slots",
      "feature_cache_instance_items",      "feature_cache_instance_memory_bytes",
      "feature_cache_instance_numa_node",  "feature_cache_instance_used_bytes",
      "feature_cache_memory_budget_bytes", "feature_cache_namespace_nvm_budget_bytes",
      "feature_cache_namespace_nvm_items", "feature_cache_namespace_nvm_used_bytes",
      "feature_cache_nvm_cells_queued",    "feature_cache_nvm_device_bytes",
      "feature_cache_nvm_device_regions",  "feature_cache_nvm_index_slots",
      "feature_cache_nvm_journal_bytes",   "feature_cache_nvm_memory_bytes",
      "feature_cache_nvm_reads_in_flight", "feature_cache_side_bytes",
  };
  SharedFolder shared;
  EngineConfig config = node_config(2);
  config.memory_bytes *= 4;
  config.namespaces[0] = with_nvm(config.namespaces[0], 24);
  config.nvm = nvm_config(folder_.file("nvm"), 30);
  config.persist.dir = shared.path();
  config.persist.durability = DurabilityKind::Bounded;
  start(config);
  GaugeNames gauges;
  engine_->visit(gauges);
  for (const std::string& name : gauges.names) {
    EXPECT_NE(add_up.contains(name), gauge_is_common(name)) << name;
  }
}

TEST_F(FanOut, ResizesToTheSegmentAndSaysWhatTheNodeHas) {
  start(node_config(3));
  // 65 segments over three: 22, 22 and 21.
  EXPECT_EQ(engine_->resize(lasting_, 65 * 16 * kKiB), 3 * kMiB);
  EXPECT_EQ(Counters::of(*engine_).domain("budget_bytes", "pin", "lasting"), 65 * 16 * kKiB);
  const auto refusal = [&](std::uint64_t bytes) -> std::string {
    try {
      engine_->resize(lasting_, bytes);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal(11 * 16 * kKiB), "the least budget of a domain over 3 instances is " +
                                         std::to_string(12 * 16 * kKiB) + " bytes");
  const std::string beyond = refusal(100 * kMiB);
  ASSERT_TRUE(beyond.starts_with("only ")) << beyond;
  const std::uint64_t free_bytes = std::stoull(beyond.substr(5));
  EXPECT_NE(refusal(free_bytes + 16 * kKiB), "accepted");
  EXPECT_EQ(Counters::of(*engine_).domain("budget_bytes", "pin", "lasting"), 65 * 16 * kKiB);
  EXPECT_EQ(engine_->resize(lasting_, free_bytes), 65 * 16 * kKiB) << "all that is free";
}

TEST_F(FanOut, StartsAndEndsTogetherAndFindsEachItsOwn) {
  constexpr std::size_t kKeys = 2000;
  SharedFolder shared;
  EngineConfig config = node_config(3);
  config.persist.dir = shared.path();
  start(config);
  EXPECT_EQ(engine_->start_report().memory, "new");
  fill(kKeys);
  EXPECT_TRUE(engine_->shutdown());
  RecoveryProgress progress;
  start(config, &progress);
  EXPECT_EQ(engine_->start_report().memory, "clean");
  EXPECT_EQ(engine_->start_report().memory_items, kKeys) << "of all instances";
  EXPECT_EQ(found(kKeys), kKeys);
  engine_.reset();  // as after a kill
  start(config, &progress);
  const StartReport& report = engine_->start_report();
  EXPECT_EQ(report.memory, "checked");
  EXPECT_TRUE(report.memory_reason.starts_with("instance 0: the owner before ended"))
      << report.memory_reason;
  EXPECT_EQ(report.memory_items, kKeys);
  EXPECT_STREQ(progress.phase.load(), "memory");
  EXPECT_GT(progress.total.load(), 0U);
  EXPECT_EQ(progress.done.load(), progress.total.load()) << "of what all had begun";
  EXPECT_EQ(found(kKeys), kKeys);
}

TEST_F(FanOut, TheWorstOfAStartIsToldWithWhoseItWas) {
  SharedFolder shared;
  EngineConfig config = node_config(3);
  config.persist.dir = shared.path();
  start(config);
  fill(1000);
  EXPECT_TRUE(engine_->shutdown());
  engine_.reset();
  std::filesystem::resize_file(shared.path() + "/feature-cache-1.arena", 4096);
  start(config);
  const StartReport& report = engine_->start_report();
  EXPECT_EQ(report.memory, "cold");
  EXPECT_TRUE(report.memory_reason.starts_with("instance 1: what is at " + shared.path()))
      << report.memory_reason;
  EXPECT_EQ(report.set_aside, 1U);
  const std::size_t left = found(1000);
  EXPECT_GT(left, 500U) << "the other two have theirs";
  EXPECT_LT(left, 800U);
}

TEST_F(FanOut, WhatOneInstanceCannotStartWithIsToldAndNothingStays) {
  SharedFolder shared;
  EngineConfig config = node_config(3);
  config.persist.dir = shared.path();
  start(config);
  EXPECT_THROW(make_engine(config, clock_, false), std::system_error) << "it is in use";
  engine_.reset();
  EXPECT_NO_THROW(start(config)) << "who failed let go of what it had";
}

// ---- NVM
// -----------------------------------------------------------------------------------------

class OneAtATime final : public NvmReader {
 public:
  void answer(std::span<const NvmAnswer> answers) override {
    EXPECT_EQ(inside_.fetch_add(1), 0) << "calls for one reader overlap";
    for (const NvmAnswer& answer : answers) {
      EXPECT_EQ(answer.status, CellStatus::HitNvm);
      EXPECT_TRUE(positions_.insert(answer.cell.position).second) << "answered twice";
    }
    answered_.fetch_add(answers.size());
    inside_.fetch_sub(1);
  }
  void late(std::span<const NvmCell>) override {}
  bool wanted() const noexcept override { return true; }
  std::size_t answered() const { return answered_.load(); }

 private:
  std::atomic<int> inside_{0};
  std::atomic<std::size_t> answered_{0};
  std::set<std::uint32_t> positions_;
};

EngineConfig nvm_node(const std::string& path) {
  EngineConfig config = engine_config(
      48 * kMiB, {with_nvm(name_space("pin", {domain("all", 192 * kKiB, PolicyKind::Fifo)}), 300)});
  config.expected_item_bytes = 300;
  config.instances = 3;
  config.nvm = nvm_config(path, 310);
  return config;
}

TEST_F(FanOut, ReadsOfSeveralInstancesComeToOneReaderOneAtATime) {
  start(nvm_node(folder_.file("nvm")));
  constexpr std::size_t kKeys = 12'000;
  fill(kKeys);
  ASSERT_TRUE(eventually([&] {
    const Counters counters = Counters::of(*engine_);
    double writing = 0;
    double sealed = 0;
    for (const char* file : {"nvm", "nvm-1", "nvm-2"}) {
      const std::string regions =
          "feature_cache_nvm_device_regions{device=" + folder_.file(file) + ",state=";
      writing += counters.at(regions + "writing}");
      sealed += counters.at(regions + "sealed}");
    }
    return writing == 0 && sealed > 6;
  }));
  EXPECT_TRUE(std::filesystem::exists(folder_.file("nvm")));
  EXPECT_TRUE(std::filesystem::exists(folder_.file("nvm-1")));
  EXPECT_TRUE(std::filesystem::exists(folder_.file("nvm-2")));
  std::vector<std::string> names;
  for (std::size_t i = 0; i < kKeys; ++i) names.push_back(name_of(i));
  const std::vector<std::string_view> keys(names.begin(), names.end());
  std::vector<CellStatus> statuses(kKeys);
  std::vector<std::uint32_t> lengths(kKeys);
  Buffer values;
  std::vector<NvmCell> cells;
  GetColumn column;
  column.ns = pin_;
  column.keys = keys;
  column.statuses = statuses;
  column.lengths = lengths;
  column.values = &values;
  column.nvm = &cells;
  engine_->get(column);
  std::set<std::uint16_t> instances;
  for (const NvmCell& cell : cells) instances.insert(cell.instance);
  ASSERT_EQ(instances.size(), 3U);
  // Some are given back unread: their regions are free to go.
  const std::size_t half = cells.size() / 2;
  engine_->release(std::span(cells).subspan(half));
  cells.resize(half);
  const auto reader = std::make_shared<OneAtATime>();
  engine_->read(cells, reader);
  EXPECT_TRUE(eventually([&] { return reader->answered() == half; }));
}

TEST_F(FanOut, DevicesThatAreGivenWholeGoRound) {
  EngineConfig config = nvm_node(folder_.file("unused"));
  config.nvm.devices.clear();
  std::vector<std::shared_ptr<NvmDevice>> devices;
  for (const char* name : {"a", "b", "c"}) {
    config.nvm.devices.push_back({folder_.file(name), 64 * kKiB + 110 * kRegionBytes});
    devices.push_back(
        open_device(folder_.file(name), config.nvm.devices.back().bytes, {.io_threads = 2}));
  }
  engine_ = make_engine(config, clock_, false, devices);
  pin_ = engine_->find_namespace("pin");
  fill(3000);
  EXPECT_EQ(found(3000), 3000U);
  for (const auto& device : devices) {
    EXPECT_EQ(at("feature_cache_nvm_device_in_service{device=" + device->path() + "}"), 1);
  }
  config.instances = 2;
  EXPECT_THROW(make_engine(config, clock_, false, devices), std::invalid_argument);
}

// ---- NUMA and size
// -------------------------------------------------------------------------------

TEST_F(FanOut, InstancesGoToTheNodesOfTheMachine) {
  // A description with two nodes; both are this machine's only one, so that the kernel agrees.
  const std::vector<NumaNode> nodes{{0, {0}}, {0, {}}};
  engine_ = make_instances(node_config(3), clock_, true, {}, nullptr, MemoryClaim::Whole, nodes);
  pin_ = engine_->find_namespace("pin");
  fill(500);
  EXPECT_EQ(found(500), 500U);
  const bool allowed = at(instance_counter("numa_node", 0)) == 0;
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(at(instance_counter("numa_node", i)), allowed ? 0 : -1);
  }
  // One that this machine does not have is no reason not to start.
  const std::vector<NumaNode> others{{900, {900}}, {901, {901}}};
  engine_ = make_instances(node_config(2), clock_, true, {}, nullptr, MemoryClaim::Whole, others);
  EXPECT_EQ(at(instance_counter("numa_node", 0)), -1);
}

TEST_F(FanOut, MemoryThatTheMachineDoesNotHaveIsRefusedBeforeItServes) {
  EngineConfig config = engine_config(std::uint64_t{1536} << 30,
                                      {name_space("pin", {domain("lasting", 1ull << 40)})});
  config.segment_bytes = 0;
  try {
    make_engine(config, clock_, false);
    FAIL() << "accepted";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOMEM);
    EXPECT_NE(std::string(error.what()).find("1572864 MiB are needed"), std::string::npos)
        << error.what();
  }
}

// Six instances of 256 GiB, mapped without the memory behind them: what a test touches is there.
TEST_F(FanOut, ANodeOfATebibyteAndAHalfMapsAndServes) {
  EngineConfig config = engine_config(
      std::uint64_t{1536} << 30,
      {name_space("pin", {domain("lasting", std::uint64_t{1} << 40, PolicyKind::Lru)}),
       name_space("user", {domain("all", std::uint64_t{200} << 30, PolicyKind::Lru)})});
  config.segment_bytes = 0;
  config.expected_item_bytes = 1000;
  engine_ = make_instances(config, clock_, false, {}, nullptr, MemoryClaim::Lazy, {});
  pin_ = engine_->find_namespace("pin");
  for (std::uint32_t i = 0; i < 6; ++i) {
    EXPECT_EQ(at(instance_counter("memory_bytes", i)), static_cast<double>(256ull << 30));
  }
  EXPECT_EQ(Counters::of(*engine_).domain("budget_bytes", "pin", "lasting"),
            static_cast<double>(1ull << 40));
  EXPECT_GT(at("feature_cache_index_slots"), 1e9);
  constexpr std::size_t kKeys = scaled(20'000);
  fill(kKeys);
  EXPECT_EQ(found(kKeys), kKeys);
  for (std::uint32_t i = 0; i < 6; ++i) {
    EXPECT_NEAR(at(instance_counter("items", i)), kKeys / 6.0, kKeys / 30.0);
  }
  erase(*engine_, pin_, name_of(7));
  EXPECT_EQ(get(*engine_, pin_, name_of(7)).status, CellStatus::Miss);
  EXPECT_EQ(engine_->flush(pin_), kKeys - 1);
}

}  // namespace
}  // namespace fc::testing
