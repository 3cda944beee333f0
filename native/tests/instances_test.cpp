// How a node's config is divided among its instances.
#include <algorithm>
#include <filesystem>
#include <functional>
#include <stdexcept>

#include "core/instances.hpp"
#include "core/layout.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

EngineConfig node(std::uint32_t instances) {
  EngineConfig config = engine_config(
      40 * kMiB, {name_space("pin", {domain("lasting", 10 * kMiB), domain("brief", 3 * kMiB)}),
                  name_space("user", {domain("all", 7 * kMiB)})});
  config.instances = instances;
  return config;
}

std::string refusal_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

std::uint64_t budgets_of(const EngineConfig& config) {
  std::uint64_t sum = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& of : ns.domains) sum += of.budget_bytes;
  }
  return sum;
}

TEST(Instances, OneIsTheWhole) {
  const std::vector<EngineConfig> parts = split_instances(node(1));
  ASSERT_EQ(parts.size(), 1U);
  EXPECT_EQ(parts[0].memory_bytes, 40 * kMiB);
  EXPECT_EQ(parts[0].instance_count, 1U);
  EXPECT_EQ(parts[0].namespaces[0].domains[0].budget_bytes, 10 * kMiB);
}

TEST(Instances, ThePartOfOneIsNotDividedAgain) {
  const EngineConfig part = split_instances(node(3))[1];
  const std::vector<EngineConfig> parts = split_instances(part);
  ASSERT_EQ(parts.size(), 1U);
  EXPECT_EQ(parts[0].instance, 1U);
  EXPECT_EQ(parts[0].instance_count, 3U);
  EXPECT_EQ(parts[0].memory_bytes, part.memory_bytes);
}

TEST(Instances, BudgetsAreTheNodesToTheLastSegment) {
  for (std::uint32_t count = 2; count <= 9; ++count) {
    const EngineConfig whole = node(count);
    const std::vector<EngineConfig> parts = split_instances(whole);
    ASSERT_EQ(parts.size(), count);
    std::vector<std::uint64_t> sums;
    for (std::size_t n = 0; n < 2; ++n) {
      for (std::size_t d = 0; d < whole.namespaces[n].domains.size(); ++d) {
        std::uint64_t sum = 0;
        for (const EngineConfig& part : parts) {
          const std::uint64_t bytes = part.namespaces[n].domains[d].budget_bytes;
          EXPECT_EQ(bytes % whole.segment_bytes, 0U);
          sum += bytes;
        }
        EXPECT_EQ(sum, whole.namespaces[n].domains[d].budget_bytes) << count;
      }
    }
    for (std::uint32_t i = 0; i < count; ++i) {
      EXPECT_EQ(parts[i].instance, i);
      EXPECT_EQ(parts[i].instance_count, count);
      EXPECT_EQ(parts[i].memory_bytes, 40 * kMiB / count);
      sums.push_back(budgets_of(parts[i]));
    }
    const auto [least, most] = std::minmax_element(sums.begin(), sums.end());
    EXPECT_LE(*most - *least, whole.segment_bytes) << "of " << count;
  }
}

// A node whose domains take all that its instances' plans leave for them.
TEST(Instances, DomainsOfAHundredPercentFit) {
  for (const std::uint32_t count : {2u, 3u, 5u, 7u}) {
    for (const std::uint32_t segment_bytes : {0u, 16u << 10}) {
      EngineConfig whole = node(count);
      whole.segment_bytes = segment_bytes;
      std::uint64_t available = ~std::uint64_t{0};
      for (const EngineConfig& part : split_instances(whole)) {
        available = std::min(available, Geometry::plan(part).domain_bytes());
      }
      available *= count;
      whole.namespaces[0].domains[0].budget_bytes = available / 2;
      whole.namespaces[0].domains[1].budget_bytes = available / 5;
      whole.namespaces[1].domains[0].budget_bytes = available - available / 2 - available / 5;
      for (const EngineConfig& part : split_instances(whole)) {
        EXPECT_LE(budgets_of(part), Geometry::plan(part).domain_bytes()) << count;
      }
    }
  }
}

TEST(Instances, EveryOneHasFilesOfItsOwn) {
  EngineConfig whole = node(3);
  whole.persist.dir = "/dev/shm";
  whole.persist.journal = "/tmp/journal";
  whole.nvm.devices = {{"/tmp/no such a", 30 * kMiB}, {"/tmp/no such b", 30 * kMiB + 12288}};
  whole.nvm.write_bytes_per_second = 100;
  whole.nvm.queue_depth = 2;
  whole.nvm.read_memory_bytes = 15 * kMiB;
  whole.namespaces[0].nvm.budget_bytes = 36 * kMiB;
  const std::vector<EngineConfig> parts = split_instances(whole);
  EXPECT_EQ(parts[0].persist.name, "feature-cache");
  EXPECT_EQ(parts[1].persist.name, "feature-cache-1");
  EXPECT_EQ(parts[2].persist.name, "feature-cache-2");
  EXPECT_EQ(parts[0].persist.journal, "/tmp/journal");
  EXPECT_EQ(parts[2].persist.journal, "/tmp/journal-2");
  EXPECT_EQ(parts[0].nvm.devices[1].path, "/tmp/no such b");
  EXPECT_EQ(parts[2].nvm.devices[1].path, "/tmp/no such b-2");
  EXPECT_EQ(parts[2].nvm.devices[0].bytes, 10 * kMiB);
  EXPECT_EQ(parts[0].nvm.devices[1].bytes, 10 * kMiB + 4096);
  EXPECT_EQ(parts[1].namespaces[0].nvm.budget_bytes, 12 * kMiB);
  EXPECT_EQ(parts[1].nvm.write_bytes_per_second, 33U);
  EXPECT_EQ(parts[1].nvm.queue_depth, 1U) << "never none";
  EXPECT_EQ(parts[1].nvm.read_memory_bytes, 5 * kMiB);
}

TEST(Instances, WholeDevicesGoRound) {
  EngineConfig whole = node(2);
  for (const char* path : {"a", "b", "c", "d"}) whole.nvm.devices.push_back({path, 8 * kMiB});
  const std::vector<EngineConfig> parts = split_instances(whole, true);
  ASSERT_EQ(parts[0].nvm.devices.size(), 2U);
  EXPECT_EQ(parts[0].nvm.devices[1].path, "c");
  EXPECT_EQ(parts[1].nvm.devices[0].path, "b");
  EXPECT_EQ(parts[1].nvm.devices[1].path, "d");
  EXPECT_EQ(parts[1].nvm.devices[1].bytes, 8 * kMiB);
  whole.instances = 3;
  const std::string said = refusal_of([&] { split_instances(whole, true); });
  EXPECT_NE(said.find("4 nvm devices cannot be divided among 3 instances"), std::string::npos)
      << said;
}

TEST(Instances, ABlockDeviceIsNotCut) {
  // The test's own, made as root; where that is not allowed, no block device can be had at all.
  const std::filesystem::path node_path = std::filesystem::absolute("instances_block_device");
  std::filesystem::remove(node_path);
  const std::string make = "mknod '" + node_path.string() + "' b 7 250";
  ASSERT_EQ(std::system(make.c_str()), 0) << make;
  EngineConfig whole = node(2);
  whole.nvm.devices = {{node_path.string(), 0}};
  const std::string said = refusal_of([&] { split_instances(whole); });
  std::filesystem::remove(node_path);
  EXPECT_NE(said.find("1 nvm devices cannot be divided among 2 instances: " + node_path.string() +
                      " is a block device"),
            std::string::npos)
      << said;
}

TEST(Instances, TooLittleMemoryIsSaidOfEach) {
  EngineConfig whole = node(40);
  const std::vector<EngineConfig> parts = split_instances(whole);
  const std::string said = refusal_of([&] { Geometry::plan(parts.front()); });
  EXPECT_NE(said.find("memory of 1048576 bytes is too small for 3 domains"), std::string::npos)
      << said;
  EXPECT_NE(said.find("are needed in each of 40 instances"), std::string::npos) << said;
}

}  // namespace
}  // namespace fc::testing
