// Which instance goes to which NUMA node, by a description of machines that we do not have.
#include "core/numa.hpp"

#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

namespace fc::testing {
namespace {

// A folder like /sys/devices/system/node.
class Description {
 public:
  Description() {
    std::string name = (std::filesystem::temp_directory_path() / "fc_numa_XXXXXX").string();
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  ~Description() { std::filesystem::remove_all(root_); }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  void online(const std::string& list) { write("online", list + "\n"); }
  void node(int number, const std::string& processors, std::uint64_t kilobytes) {
    const std::string folder = "node" + std::to_string(number);
    std::filesystem::create_directory(root_ / folder);
    write(folder + "/cpulist", processors + "\n");
    const std::string of = "Node " + std::to_string(number);
    write(folder + "/meminfo", of + " MemTotal:       " + std::to_string(kilobytes) + " kB\n" + of +
                                   " MemFree:        12 kB\n");
  }
  std::string root() const { return root_.string(); }

 private:
  void write(const std::string& name, const std::string& text) {
    std::ofstream(root_ / name) << text;
  }
  std::filesystem::path root_;
};

std::vector<int> nodes_of(const std::vector<NumaNode>& nodes, std::uint32_t instances) {
  std::vector<int> numbers;
  for (std::uint32_t i = 0; i < instances; ++i) {
    const NumaNode* node = node_for(nodes, i, instances);
    numbers.push_back(node == nullptr ? -1 : node->number);
  }
  return numbers;
}

TEST(Numa, InstancesGoRoundTheNodesThatHaveMemory) {
  Description machine;
  machine.online("0-1,4,6");
  machine.node(0, "0-3,16-19", 1000);
  machine.node(1, "4-7", 0);  // processors alone
  machine.node(4, "", 1000);  // memory alone
  // Node 6 is named and not there.
  const std::vector<NumaNode> nodes = numa_nodes(machine.root());
  ASSERT_EQ(nodes.size(), 2U);
  EXPECT_EQ(nodes[0].number, 0);
  EXPECT_EQ(nodes[0].processors, (std::vector<int>{0, 1, 2, 3, 16, 17, 18, 19}));
  EXPECT_EQ(nodes[1].number, 4);
  EXPECT_TRUE(nodes[1].processors.empty());
  EXPECT_EQ(nodes_of(nodes, 5), (std::vector<int>{0, 4, 0, 4, 0}));
  EXPECT_EQ(nodes_of(nodes, 1), (std::vector<int>{-1})) << "one instance has the whole machine";
}

TEST(Numa, MachinesOfOneNodeOrWithoutADescriptionBindNothing) {
  Description one;
  one.online("0");
  one.node(0, "0-1", 1000);
  EXPECT_EQ(nodes_of(numa_nodes(one.root()), 3), (std::vector<int>{-1, -1, -1}));
  EXPECT_TRUE(numa_nodes(one.root() + "/nothing").empty());
}

TEST(Numa, ListsOfProcessorsAsTheKernelWritesThem) {
  using Numbers = std::vector<int>;
  EXPECT_EQ(parse_processors("0"), (Numbers{0}));
  EXPECT_EQ(parse_processors("0-2,5,7-8\n"), (Numbers{0, 1, 2, 5, 7, 8}));
  EXPECT_EQ(parse_processors(""), Numbers{});
  EXPECT_EQ(parse_processors("\n"), Numbers{});
  EXPECT_EQ(parse_processors("x,3,-2,4-"), (Numbers{3, 4}));
}

// A node that every machine with NUMA in its kernel has; where it has none, or a container may not
// ask, both calls say so and change nothing.
TEST(Numa, MemoryAndThreadsPreferTheNodeTheyAreGiven) {
  constexpr std::size_t kBytes = 1 << 20;
  void* const data =
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(data, MAP_FAILED);
  int mode = -1;
  const bool asks = syscall(SYS_get_mempolicy, &mode, nullptr, 0, data, MPOL_F_ADDR) == 0;
  if (place_memory(data, kBytes, 0)) {
    ASSERT_TRUE(asks);
    ASSERT_EQ(syscall(SYS_get_mempolicy, &mode, nullptr, 0, data, MPOL_F_ADDR), 0);
    EXPECT_EQ(mode, MPOL_PREFERRED);
  } else if (asks) {
    ASSERT_EQ(syscall(SYS_get_mempolicy, &mode, nullptr, 0, data, MPOL_F_ADDR), 0);
    EXPECT_EQ(mode, MPOL_DEFAULT);
  }
  EXPECT_FALSE(place_memory(data, kBytes, -1));
  munmap(data, kBytes);
  // In a thread of its own: what a thread prefers stays with it and those that it starts.
  std::thread([] {
    int of_thread = -1;
    const bool preferred = prefer_node({0, {0}});
    if (syscall(SYS_get_mempolicy, &of_thread, nullptr, 0, nullptr, 0) != 0) return;
    EXPECT_EQ(of_thread, preferred ? MPOL_PREFERRED : MPOL_DEFAULT);
    int of_child = -1;
    std::thread([&] { syscall(SYS_get_mempolicy, &of_child, nullptr, 0, nullptr, 0); }).join();
    EXPECT_EQ(of_child, of_thread);
    EXPECT_FALSE(prefer_node({-1, {}}));
  }).join();
}

}  // namespace
}  // namespace fc::testing
