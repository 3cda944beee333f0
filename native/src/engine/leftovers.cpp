#include "engine/leftovers.hpp"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

#include "memory/arena_header.hpp"
#include "nvm/format.hpp"
#include "nvm/heartbeat.hpp"
#include "persist/shared_file.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kOwnerWaitMs = 5'000;  // as for the memory of an instance that stays

template <class Struct>
bool read_at(const std::string& path, std::uint64_t offset, Struct& to) {
  std::ifstream file(path, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offset));
  std::vector<char> bytes(sizeof(Struct));
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) return false;
  std::memcpy(static_cast<void*>(&to), bytes.data(), bytes.size());
  return true;
}

bool is_of(const InstanceCounts& counts, std::uint32_t instance) noexcept {
  return counts.known() && counts.instance == instance;
}

bool is_arena_of(const std::string& path, std::uint32_t instance) {
  std::uint64_t magic = 0;
  InstanceCounts counts{};
  return read_at(path, 0, magic) && magic == kArenaMagic &&
         read_at(path, offsetof(ArenaHead, counts), counts) && is_of(counts, instance);
}

bool is_device_of(const std::string& path, std::uint32_t instance) {
  nvm::Superblock superblock{};
  if (!read_at(path, 0, superblock) || superblock.magic != nvm::kSuperblockMagic) return false;
  for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{4096}}) {
    nvm::Heartbeat beat;
    if (read_at(path, nvm::kHeartbeatOffset + offset, beat) && beat.magic == nvm::kHeartbeatMagic &&
        beat.checksum == beat.sum() && is_of(beat.counts, instance)) {
      return true;
    }
  }
  return false;
}

}  // namespace

void remove_leftovers(const EngineConfig& whole, std::uint32_t instances) {
  if (!whole.persist.enabled()) return;
  for (std::uint32_t i = instances; i < layout::kMaxInstances; ++i) {
    const std::string suffix = "-" + std::to_string(i);
    const std::string memory = whole.persist.dir + "/" + whole.persist.name + suffix;
    std::vector<std::string> leftovers;
    if (is_arena_of(memory + ".arena", i)) {
      // What is to be adopted with it, first: alone it would be another memory's.
      leftovers = {memory + ".nvm", memory + ".shards", memory + ".arena"};
    }
    for (const NvmDeviceConfig& device : whole.nvm.devices) {
      if (!is_device_of(device.path + suffix, i)) continue;
      leftovers.push_back(device.path + suffix);
      leftovers.push_back(whole.persist.journal.empty() ? device.path + suffix + ".journal"
                                                        : whole.persist.journal + suffix);
    }
    if (leftovers.empty()) continue;
    try {
      const OwnerLock lock(memory + ".lock", kOwnerWaitMs);
      for (const std::string& path : leftovers) unlink(path.c_str());
    } catch (const std::system_error&) {
      // Somebody uses it: it is not this node's.
    }
  }
}

}  // namespace fc
