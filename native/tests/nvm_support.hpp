// What the tests of the NVM tier share: a file of their own, and engines over it.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

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

// An engine over devices that fail when they are told to, with values that say whose they are. No
// file may end up larger than it was made, whatever a test did to it.
class NvmTest : public ::testing::Test {
 protected:
  static EngineConfig usual_config(const std::string& path) {
    EngineConfig config = engine_config(
        24 * kMiB,
        {with_nvm(name_space("pin", {domain("lasting", 256 * kKiB, PolicyKind::Fifo),
                                     domain("brief", 128 * kKiB, PolicyKind::Fifo, 60'000)}),
                  100),
         with_nvm(name_space("user", {domain("all", 128 * kKiB, PolicyKind::Fifo)}), 20),
         name_space("dram", {domain("all", 128 * kKiB, PolicyKind::Fifo)})});
    config.expected_item_bytes = 300;
    config.nvm = nvm_config(path, 128);
    return config;
  }
  // One namespace whose regions are soon full, so that little data makes the log empty them; no
  // number of errors takes the device out of service.
  static EngineConfig small_config(const std::string& path) {
    EngineConfig config = engine_config(
        24 * kMiB,
        {with_nvm(name_space("pin", {domain("all", 128 * kKiB, PolicyKind::Fifo)}), kSmallBudget)});
    config.expected_item_bytes = 300;
    config.nvm = nvm_config(path, kSmallBudget + 4);
    config.nvm.errors_max = 1'000'000'000;
    return config;
  }
  static constexpr std::uint32_t kSmallBudget = 24;
  static constexpr std::size_t kItemsOfRegion = 195;  // about

  void start(const EngineConfig& config) {
    stop();
    for (const NvmDeviceConfig& device : config.nvm.devices) {
      faults_.push_back(
          std::make_shared<FaultDevice>(open_device(device.path, device.bytes,
                                                    {.io = config.nvm.io,
                                                     .direct = config.nvm.direct,
                                                     .io_threads = config.nvm.io_threads})));
    }
    if (!faults_.empty()) fault_ = faults_.front();
    adopt(config, {faults_.begin(), faults_.end()});
  }
  // As the daemon does: the engine opens its devices itself.
  void start_plainly(const EngineConfig& config) {
    stop();
    adopt(config, {});
  }
  void stop() {
    for (const auto& fault : faults_) fault->clear();
    engine_.reset();
    faults_.clear();
    fault_.reset();
  }
  void TearDown() override {
    stop();
    for (const auto& [path, bytes] : file_bytes_) {
      EXPECT_EQ(std::filesystem::file_size(path), bytes) << path << " has grown or shrunk";
    }
  }

  static std::string key(std::size_t i) {
    std::string text = std::to_string(i);
    return "key " + std::string(12 - text.size(), '0') + text;
  }
  std::string value(std::size_t i, std::uint64_t version = 1) const {
    return patterned(key(i), version, value_bytes_);
  }
  void fill(std::size_t from, std::size_t to, NamespaceIndex ns = kNoNamespace,
            DomainIndex domain = kNoDomain, std::uint64_t version = 1) {
    for (std::size_t i = from; i < to; ++i) {
      ASSERT_EQ(put(*engine_, ns == kNoNamespace ? pin_ : ns, key(i), value(i, version), domain),
                WriteStatus::Stored);
      // Not faster than the device takes it: what finds no write buffer is dropped.
      if (i % fill_step_ == fill_step_ - 1) {
        ASSERT_TRUE(settled());
      }
    }
  }
  double counter(std::string_view name) { return Counters::of(*engine_).sum(name); }
  // Of the namespace "pin".
  double pin_counter(const std::string& name) {
    return Counters::of(*engine_).at("feature_cache_namespace_nvm_" + name + "{namespace=pin}");
  }
  double lost(const std::string& reason) {
    return Counters::of(*engine_).at(
        "feature_cache_namespace_nvm_lost_reads_total{namespace=pin,reason=" + reason + "}");
  }
  double refused(const std::string& reason) {
    return Counters::of(*engine_).at(
        "feature_cache_namespace_nvm_not_admitted_total{namespace=pin,reason=" + reason + "}");
  }
  bool in_service(std::size_t device = 0) {
    return Counters::of(*engine_).at(
               "feature_cache_nvm_device_in_service{device=" + faults_[device]->path() + "}") != 0;
  }
  bool settled() {
    return eventually([&] {
      const Counters counters = Counters::of(*engine_);
      double busy = 0;
      for (const auto& [path, bytes] : file_bytes_) {
        for (const char* state : {"writing", "emptying"}) {
          busy += counters.at("feature_cache_nvm_device_regions{device=" + path +
                              ",state=" + state + "}");
        }
      }
      return busy == 0;
    });
  }

  std::vector<Got> look(std::size_t from, std::size_t to, NamespaceIndex ns = kNoNamespace) {
    std::vector<std::string> keys;
    for (std::size_t i = from; i < to; ++i) keys.push_back(key(i));
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    return get_all(*engine_, ns == kNoNamespace ? pin_ : ns, views);
  }
  // Gets all keys in one batch; returns how many are there, each checked.
  struct Found {
    std::size_t dram = 0;
    std::size_t nvm = 0;
    std::size_t missing = 0;
    std::size_t hits() const { return dram + nvm; }
  };
  Found check(std::size_t from, std::size_t to, NamespaceIndex ns = kNoNamespace,
              std::uint64_t version = 1) {
    const std::vector<Got> got = look(from, to, ns);
    Found found;
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (got[i].status == CellStatus::HitDram) ++found.dram;
      if (got[i].status == CellStatus::HitNvm) ++found.nvm;
      if (got[i].status == CellStatus::Miss) ++found.missing;
      if (carries_value(got[i].status)) {
        EXPECT_TRUE(got[i].value == value(from + i, version))
            << key(from + i) << " has a wrong value";
      }
    }
    EXPECT_EQ(found.hits() + found.missing, to - from);
    return found;
  }
  // Every entry that the index has for NVM is a key's that is found there: none was left behind.
  bool items_add_up(std::size_t from, std::size_t to) {
    return eventually([&] {
      if (!settled()) return false;
      const std::vector<Got> got = look(from, to);
      const auto found = std::count_if(
          got.begin(), got.end(), [](const Got& one) { return one.status == CellStatus::HitNvm; });
      return static_cast<double>(found) == pin_counter("items");
    });
  }

  // What came last is there. A busy machine may have left no region clean for some of it just then:
  // that was counted.
  void expect_taken(std::size_t from, std::size_t to) {
    const std::size_t missing = check(from, to).missing;
    EXPECT_LT(missing, (to - from) / 5) << "nothing new is taken";
    EXPECT_LE(static_cast<double>(missing),
              refused("buffers") + counter("feature_cache_index_below_dropped_total"));
  }

  Folder folder_;
  ManualClock clock_;
  std::vector<std::shared_ptr<FaultDevice>> faults_;  // one a device
  std::shared_ptr<FaultDevice> fault_;                // the first one
  std::map<std::string, std::uint64_t> file_bytes_;   // by path, of the latest engine
  std::size_t value_bytes_ = 284;
  std::size_t fill_step_ = 400;  // items between two looks at the device
  std::unique_ptr<Engine> engine_;
  NamespaceIndex pin_ = kNoNamespace;
  NamespaceIndex user_ = kNoNamespace;
  NamespaceIndex dram_ = kNoNamespace;
  DomainIndex brief_ = kNoDomain;

 private:
  void adopt(const EngineConfig& config, std::vector<std::shared_ptr<NvmDevice>> devices) {
    const bool devices_given = !devices.empty();
    engine_ = make_engine(config, clock_, false, std::move(devices));
    // Of a small share few regions are clean ahead of what comes.
    fill_step_ =
        config.namespaces[0].nvm.budget_bytes < 50 * kRegionBytes ? kItemsOfRegion / 2 : 400;
    file_bytes_.clear();
    for (const EngineConfig& part : split_instances(config, devices_given)) {
      for (const NvmDeviceConfig& device : part.nvm.devices) {
        file_bytes_.emplace(device.path, device.bytes);
      }
    }
    pin_ = engine_->find_namespace("pin");
    user_ = engine_->find_namespace("user");
    dram_ = engine_->find_namespace("dram");
    brief_ = engine_->find_domain(pin_, "brief");
  }
};

}  // namespace fc::testing
