// What the tests of the NVM tier share: a file of their own, and engines over it.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <thread>

#include "nvm/device.hpp"
#include "support.hpp"
#include "testing/fault_device.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {

// A folder for a test's files; on the disk of the checkout, since /tmp may be memory.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::current_path() / "nvm-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no folder for the test");
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline constexpr std::uint32_t kRegionBytes = 64 * 1024;

// One file of `regions` regions; namespaces say themselves what they have of it.
inline NvmConfig nvm_config(const std::string& path, std::uint32_t regions) {
  NvmConfig config;
  config.devices = {{path, 64 * kKiB + std::uint64_t{regions} * kRegionBytes}};
  config.region_bytes = kRegionBytes;
  config.queue_depth = 32;
  config.io_threads = 4;
  config.read_memory_bytes = 4 * kMiB;
  config.probe_interval_ms = 20;
  config.write_buffers = 16;
  return config;
}

inline NamespaceConfig with_nvm(NamespaceConfig ns, std::uint32_t regions,
                                PromotionKind promotion = PromotionKind::Never) {
  ns.nvm.budget_bytes = std::uint64_t{regions} * kRegionBytes;
  ns.nvm.promotion = promotion;
  return ns;
}

// Waits for something that another thread brings about; false when it does not come.
inline bool eventually(const std::function<bool()>& holds,
                       std::chrono::milliseconds patience = std::chrono::seconds(20)) {
  const auto until = std::chrono::steady_clock::now() + patience;
  while (!holds()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace fc::testing
