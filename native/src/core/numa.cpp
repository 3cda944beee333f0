#include "core/numa.hpp"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>
#include <iterator>
#include <string_view>

namespace fc {
namespace {

constexpr int kMostNodes = 1024;  // the kernel's own limit
constexpr std::size_t kWordBits = 8 * sizeof(unsigned long);
using NodeMask = std::array<unsigned long, kMostNodes / kWordBits>;

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Of a line "Node 0 MemTotal:  123456 kB".
bool has_memory(const std::string& meminfo) {
  constexpr std::string_view kField = "MemTotal:";
  const std::size_t at = meminfo.find(kField);
  if (at == std::string::npos) return false;
  const std::size_t from = meminfo.find_first_not_of(" \t", at + kField.size());
  return from != std::string::npos && meminfo[from] >= '1' && meminfo[from] <= '9';
}

NodeMask mask_of(std::int32_t node) noexcept {
  NodeMask mask{};
  const auto bit = static_cast<std::size_t>(node);
  mask[bit / kWordBits] = 1ul << (bit % kWordBits);
  return mask;
}

bool is_node(std::int32_t node) noexcept {
  return node >= 0 && node < kMostNodes;
}

}  // namespace

std::vector<int> parse_processors(const std::string& list) {
  constexpr int kMost = 1 << 16;  // what a damaged list may make us count
  std::vector<int> numbers;
  const char* at = list.data();
  const char* const end = at + list.size();
  while (at < end) {
    int first = 0;
    auto [next, error] = std::from_chars(at, end, first);
    if (error == std::errc{} && first >= 0) {
      int last = first;
      if (next < end && *next == '-') {
        const auto range = std::from_chars(next + 1, end, last);
        if (range.ec != std::errc{}) last = first;
      }
      for (int i = first; i <= std::min(last, kMost); ++i) numbers.push_back(i);
    }
    at = std::find(at, end, ',');
    if (at < end) ++at;
  }
  return numbers;
}

std::vector<NumaNode> numa_nodes(const std::string& root) {
  std::vector<NumaNode> nodes;
  for (const int number : parse_processors(text_of(root + "/online"))) {
    if (!is_node(number)) continue;
    const std::string folder = root + "/node" + std::to_string(number);
    // A node of processors alone has nothing to bind to.
    if (!has_memory(text_of(folder + "/meminfo"))) continue;
    nodes.push_back({number, parse_processors(text_of(folder + "/cpulist"))});
  }
  return nodes;
}

const NumaNode* node_for(const std::vector<NumaNode>& nodes, std::uint32_t instance,
                         std::uint32_t instances) noexcept {
  if (nodes.size() < 2 || instances < 2) return nullptr;
  return &nodes[instance % nodes.size()];
}

bool prefer_node(const NumaNode& node) noexcept {
  if (!is_node(node.number)) return false;
  const NodeMask mask = mask_of(node.number);
  // Preferred, not bound: where a node is full, a cache of which a part is far is better than none.
  if (syscall(SYS_set_mempolicy, MPOL_PREFERRED, mask.data(), kMostNodes) != 0) return false;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  cpu_set_t near;
  CPU_ZERO(&near);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return true;
  for (const int processor : node.processors) {
    if (processor < CPU_SETSIZE && CPU_ISSET(processor, &allowed)) CPU_SET(processor, &near);
  }
  // Of none that is allowed: memory alone is what is near.
  if (CPU_COUNT(&near) != 0) (void)sched_setaffinity(0, sizeof(near), &near);
  return true;
}

bool place_memory(void* data, std::size_t bytes, std::int32_t node) noexcept {
  if (!is_node(node)) return false;
  const NodeMask mask = mask_of(node);
  return syscall(SYS_mbind, data, bytes, MPOL_PREFERRED, mask.data(), kMostNodes, 0) == 0;
}

}  // namespace fc
