// How much memory a file on tmpfs or hugetlbfs may still take, asked before its pages are: where
// there is too little, the kernel's answer is not an error but the death of some process.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace fc {

struct FreeMemory {
  std::uint64_t bytes = std::numeric_limits<std::uint64_t>::max();
  std::string of;  // whose that limit is: "the mount of /dev/shm", "the cgroup /sys/fs/cgroup/..."

  void limit(std::uint64_t to, const std::string& whose) {
    if (to >= bytes) return;
    bytes = to;
    of = whose;
  }
};

// For files in `directory`: the least of what its mount, the machine and the cgroups above this
// process have. What cannot be read is no limit.
FreeMemory free_memory(const std::string& directory);

// For memory of this process: the least of what the machine and those cgroups have.
FreeMemory free_memory();

// What a refusal says: how much is needed, what there is and of what.
std::string not_enough(const FreeMemory& room, std::uint64_t bytes);

// Of the cgroups alone: `membership` is what /proc/self/cgroup says, `root` where cgroups are
// mounted. In a container the path there may be the host's, so every part of it is tried.
FreeMemory free_cgroup_memory(const std::string& membership, const std::string& root);

// The whole of a small file; empty when it cannot be read.
std::string small_file(const std::string& path);

}  // namespace fc
