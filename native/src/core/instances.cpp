#include "core/instances.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <stdexcept>

#include "core/layout.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kDeviceBlockBytes = 4096;
constexpr std::uint64_t kLeastReadMemory = 2 * layout::kMaxNvmRecordBytes;

bool is_block_device(const std::string& path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && S_ISBLK(status.st_mode);
}

// The least that a share of a number may be is one, where the whole is not nothing.
template <class T>
T share_of(T whole, T parts) {
  return whole == 0 ? 0 : std::max<T>(whole / parts, 1);
}

// Cuts each domain's budget into whole segments. What does not come out even goes round from where
// the domain before left off, so that no instance gets more than one segment above its share of
// all.
void split_domains(std::vector<EngineConfig>& parts, const EngineConfig& whole) {
  const std::uint64_t count = parts.size();
  for (EngineConfig& part : parts) {
    for (NamespaceConfig& ns : part.namespaces) {
      for (DomainConfig& domain : ns.domains) domain.budget_bytes /= count;
    }
  }
  const std::uint64_t segment_bytes =
      whole.segment_bytes != 0 ? whole.segment_bytes : automatic_segment_bytes(parts.front());
  std::uint64_t turn = 0;
  for (std::size_t n = 0; n < whole.namespaces.size(); ++n) {
    for (std::size_t d = 0; d < whole.namespaces[n].domains.size(); ++d) {
      const std::uint64_t segments = whole.namespaces[n].domains[d].budget_bytes / segment_bytes;
      for (EngineConfig& part : parts) {
        part.namespaces[n].domains[d].budget_bytes = segments / count * segment_bytes;
      }
      for (std::uint64_t left = segments % count; left != 0; --left) {
        parts[turn++ % count].namespaces[n].domains[d].budget_bytes += segment_bytes;
      }
    }
  }
}

void split_devices(std::vector<EngineConfig>& parts, const EngineConfig& whole,
                   bool devices_whole) {
  const auto count = static_cast<std::uint32_t>(parts.size());
  const NvmConfig& nvm = whole.nvm;
  const auto block = std::find_if(nvm.devices.begin(), nvm.devices.end(),
                                  [](const auto& device) { return is_block_device(device.path); });
  if (devices_whole || block != nvm.devices.end()) {
    if (nvm.devices.size() % count != 0) {
      throw std::invalid_argument(
          std::to_string(nvm.devices.size()) + " nvm devices cannot be divided among " +
          std::to_string(count) + " instances" +
          (devices_whole ? "" : ": " + block->path + " is a block device, which is not cut") +
          "; give a multiple of " + std::to_string(count) +
          ", or choose the number of instances by it");
    }
    for (std::uint32_t i = 0; i < count; ++i) {
      parts[i].nvm.devices.clear();
      for (std::size_t d = i; d < nvm.devices.size(); d += count) {
        parts[i].nvm.devices.push_back(nvm.devices[d]);
      }
    }
    return;
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    NvmConfig& part = parts[i].nvm;
    for (NvmDeviceConfig& device : part.devices) {
      device.bytes = device.bytes / count / kDeviceBlockBytes * kDeviceBlockBytes;
      if (i != 0) device.path += "-" + std::to_string(i);
    }
    // They share the devices that the files lie on.
    part.queue_depth = share_of(nvm.queue_depth, count);
    part.io_threads = share_of(nvm.io_threads, count);
    part.read_memory_bytes =
        std::min(nvm.read_memory_bytes, std::max(nvm.read_memory_bytes / count, kLeastReadMemory));
  }
}

}  // namespace

std::string in_each(const EngineConfig& part) {
  if (part.instance_count == 1) return {};
  return " in each of " + std::to_string(part.instance_count) + " instances";
}

std::vector<EngineConfig> split_instances(const EngineConfig& whole, bool devices_whole) {
  whole.validate();
  const std::uint32_t count = whole.instances_wanted();
  if (count == 1 || whole.instance_count != 1) return {whole};  // that is a part already
  EngineConfig part = whole;
  part.instances = 1;
  part.instance_count = count;
  part.memory_bytes = whole.memory_bytes / count;
  for (NamespaceConfig& ns : part.namespaces) ns.nvm.budget_bytes /= count;
  part.nvm.queued_reads = share_of(whole.nvm.queued_reads, count);
  part.nvm.write_bytes_per_second =
      share_of<std::uint64_t>(whole.nvm.write_bytes_per_second, count);
  std::vector<EngineConfig> parts(count, part);
  split_domains(parts, whole);
  split_devices(parts, whole, devices_whole);
  for (std::uint32_t i = 1; i < count; ++i) {
    const std::string suffix = "-" + std::to_string(i);
    parts[i].instance = i;
    parts[i].persist.name += suffix;
    if (!parts[i].persist.journal.empty()) parts[i].persist.journal += suffix;
  }
  return parts;
}

}  // namespace fc
