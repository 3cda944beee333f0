// Which memory lies near which processors, and how threads and mappings say what they want of it.
//
// All of it is advice: on a machine of one node, in a container that may not ask, or where a node
// is full, memory comes from wherever there is some. By system calls: what libnuma has beyond them
// is not needed here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fc {

struct NumaNode {
  std::int32_t number = 0;
  std::vector<int> processors;  // empty: memory alone
};

// The nodes that have memory, in order; empty where the machine does not say. `root`: of the
// kernel's description, another one for tests.
std::vector<NumaNode> numa_nodes(const std::string& root = "/sys/devices/system/node");

// The node for each of `instances`, in turn; nullptr where there are fewer than two of either:
// one instance is not bound to a part of the machine.
const NumaNode* node_for(const std::vector<NumaNode>& nodes, std::uint32_t instance,
                         std::uint32_t instances) noexcept;

// The calling thread, and those that it starts from now on, run on the node's processors and take
// memory from it first. False: the kernel does not allow it; nothing has changed.
bool prefer_node(const NumaNode& node) noexcept;

// Pages of the mapping that are not there yet come from the node, whoever touches them first.
bool place_memory(void* data, std::size_t bytes, std::int32_t node) noexcept;

// Numbers of a list such as "0-3,8"; what is no number or range is left out.
std::vector<int> parse_processors(const std::string& list);

}  // namespace fc
