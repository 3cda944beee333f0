#include "persist/free_memory.hpp"

#include <linux/magic.h>
#include <sys/statfs.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <optional>
#include <string_view>

namespace fc {
namespace {

constexpr std::uint64_t kKiB = 1024;

// The number that text starts with; none: it is "max" or something else.
std::optional<std::uint64_t> number(std::string_view text) {
  std::uint64_t value = 0;
  if (std::from_chars(text.data(), text.data() + text.size(), value).ec != std::errc{}) {
    return std::nullopt;
  }
  return value;
}

// Of a file of lines "name value" or "name: value".
std::uint64_t field(std::string_view text, std::string_view name) {
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    if (!line.starts_with(name)) continue;
    std::string_view rest = line.substr(name.size());
    if (rest.empty() || (rest[0] != ' ' && rest[0] != ':')) continue;
    rest.remove_prefix(std::min(rest.find_first_not_of(": \t"), rest.size()));
    return number(rest).value_or(0);
  }
  return 0;
}

// The files that say it differ between the two versions of cgroups.
struct CgroupFiles {
  const char* limit;
  const char* used;
  const char* inactive;
  const char* active;
};
constexpr CgroupFiles kVersion2{"memory.max", "memory.current", "inactive_file", "active_file"};
constexpr CgroupFiles kVersion1{"memory.limit_in_bytes", "memory.usage_in_bytes",
                                "total_inactive_file", "total_active_file"};

void limit_by_cgroup(FreeMemory& room, const std::string& folder, const CgroupFiles& files) {
  const auto limit = number(small_file(folder + "/" + files.limit));
  const auto used = number(small_file(folder + "/" + files.used));
  if (!limit || !used) return;
  // Cached files count as used there and give way when memory is asked for. Those on tmpfs are not
  // among them: the kernel counts them as anonymous.
  const std::string all = small_file(folder + "/memory.stat");
  const std::uint64_t cached = field(all, files.inactive) + field(all, files.active);
  const std::uint64_t kept = *used > cached ? *used - cached : 0;
  room.limit(*limit > kept ? *limit - kept : 0, "the cgroup " + folder);
}

void limit_by_ancestors(FreeMemory& room, const std::string& mount, std::string path,
                        const CgroupFiles& files) {
  while (!path.empty() && path != "/") {
    limit_by_cgroup(room, mount + path, files);
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
  limit_by_cgroup(room, mount, files);
}

void limit_by_huge_pages(FreeMemory& room, std::uint64_t page_bytes) {
  const std::string folder =
      "/sys/kernel/mm/hugepages/hugepages-" + std::to_string(page_bytes / kKiB) + "kB/";
  const auto free_pages = number(small_file(folder + "free_hugepages"));
  if (!free_pages) return;
  const auto of = [&folder](const char* name) {
    return number(small_file(folder + name)).value_or(0);
  };
  const auto less = [](std::uint64_t a, std::uint64_t b) { return a > b ? a - b : 0; };
  const std::uint64_t pages = less(*free_pages, of("resv_hugepages")) +
                              less(of("nr_overcommit_hugepages"), of("surplus_hugepages"));
  room.limit(pages * page_bytes, "the machine's free huge pages (sysctl vm.nr_hugepages)");
}

}  // namespace

std::string small_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

FreeMemory free_cgroup_memory(const std::string& membership, const std::string& root) {
  FreeMemory room;
  for (std::string_view rest = membership; !rest.empty();) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    // number:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string_view::npos ? first : line.find(':', first + 1);
    if (second == std::string_view::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line.substr(first + 1, second - first - 1)).push_back(',');
    const std::string path(line.substr(second + 1));
    if (controllers == ",,") {
      limit_by_ancestors(room, root, path, kVersion2);
      limit_by_ancestors(room, root + "/unified", path, kVersion2);
    } else if (controllers.find(",memory,") != std::string::npos) {
      limit_by_ancestors(room, root + "/memory", path, kVersion1);
    }
  }
  return room;
}

FreeMemory free_memory(const std::string& directory) {
  FreeMemory room;
  struct statfs mount {};
  const bool known = statfs(directory.c_str(), &mount) == 0;
  // A mount without a limit of its own says that it has no blocks.
  if (known && mount.f_blocks != 0) {
    room.limit(mount.f_bavail * static_cast<std::uint64_t>(mount.f_bsize),
               "the mount of " + directory);
  }
  if (known && static_cast<std::uint32_t>(mount.f_type) == HUGETLBFS_MAGIC) {
    // Huge pages are set apart: neither the machine's other memory nor a memory cgroup has them.
    limit_by_huge_pages(room, static_cast<std::uint64_t>(mount.f_bsize));
    return room;
  }
  const FreeMemory machine = free_memory();
  room.limit(machine.bytes, machine.of);
  return room;
}

FreeMemory free_memory() {
  FreeMemory room;
  // Without swap: a cache that lies there is slower than none.
  if (const std::uint64_t available = field(small_file("/proc/meminfo"), "MemAvailable")) {
    room.limit(available * kKiB, "the machine's memory");
  }
  const FreeMemory cgroup = free_cgroup_memory(small_file("/proc/self/cgroup"), "/sys/fs/cgroup");
  room.limit(cgroup.bytes, cgroup.of);
  return room;
}

std::string not_enough(const FreeMemory& room, std::uint64_t bytes) {
  constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
  return std::to_string((bytes + kMiB - 1) / kMiB) + " MiB are needed and " + room.of + " has " +
         std::to_string(room.bytes / kMiB) + " MiB free; free some, allow more, or make memory " +
         "smaller";
}

}  // namespace fc
