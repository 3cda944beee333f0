// A node with an NVM tier on a file whose device fails, delays and stalls as a test wants.
#pragma once

#include <unistd.h>

#include <filesystem>

#include "node_support.hpp"
#include "testing/fault_device.hpp"

namespace fc::testing {

// Three namespaces on NVM: `pin` asks the store and speculates, `user` asks the store, `local` has
// none. Nothing is promoted, so that a key that went to NVM is read from there again and again.
class NodeNvmTest : public NodeTest {
 protected:
  static constexpr std::uint64_t kDomain = 128 * kKiB;
  static constexpr std::uint64_t kRegion = 64 * kKiB;
  static constexpr std::uint64_t kShare = 16 * kRegion;
  static constexpr std::size_t kFiller = 1'000;  // bytes

  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() /
            ("feature_cache_node_" + std::to_string(::getpid()) + ".nvm");
    start_nvm(nvm_config());
  }
  ~NodeNvmTest() override { stop_nvm(); }

  NodeConfig nvm_config() const {
    NodeConfig config;
    config.engine =
        engine_config(16 * kMiB, {name_space("pin", {domain("all", kDomain, PolicyKind::Fifo)}),
                                  name_space("user", {domain("all", kDomain, PolicyKind::Fifo)}),
                                  name_space("local", {domain("all", kDomain, PolicyKind::Fifo)})});
    for (NamespaceConfig& ns : config.engine.namespaces) {
      ns.nvm.budget_bytes = kShare;
      ns.nvm.promotion = PromotionKind::Never;
      if (ns.name != "local") ns.store = "store";
    }
    config.engine.namespaces[0].negative_ttl_ms = 60'000;
    config.engine.namespaces[0].speculative = {.enabled = true, .after_us = 2'000, .budget = 1.0};
    config.engine.nvm.region_bytes = static_cast<std::uint32_t>(kRegion);
    config.engine.nvm.read_memory_bytes = 4 * kMiB;
    config.engine.nvm.devices = {{path_.string(), 64 * kRegion}};
    StoreConfig store;
    store.name = "store";
    store.timeout_ms = 20'000;
    config.stores.push_back(store);
    return config;
  }
  void start_nvm(const NodeConfig& config) {
    stop_nvm();
    const NvmDeviceConfig& file = config.engine.nvm.devices.at(0);
    device_ = std::make_shared<FaultDevice>(
        open_device(file.path, file.bytes, {.io = IoKind::Threads, .io_threads = 2}));
    node_ = make_node(config, {device_});
    fillers_ = 0;
  }
  // What is stalled would keep the engine from ending.
  void stop_nvm() {
    if (device_ != nullptr) device_->clear();
    node_.reset();
    device_.reset();
    std::filesystem::remove(path_);
  }

  void put_in(const std::string& ns, const std::string& key, const std::string& value) {
    Engine& engine = node_->engine();
    ASSERT_EQ(testing::put(engine, engine.find_namespace(ns), key, value), WriteStatus::Stored);
  }
  void fill(const std::string& ns, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      put_in(ns, "filler" + std::to_string(fillers_++), std::string(kFiller, 'f'));
    }
  }
  std::uint64_t device_reads() const { return device_->counts().reads; }
  // Puts values and sends them down, until they are read from the device and not from a buffer.
  void put_down(const std::string& ns, const std::vector<std::string>& keys) {
    for (const std::string& key : keys) put_in(ns, key, value_of(key));
    for (int i = 0; i < 500; ++i) {
      fill(ns, 20);
      // At the device's pace: what it has no room for by now is dropped.
      ASSERT_TRUE(soon([&] { return !writing(); }));
      if (i < 8) continue;  // not out of DRAM yet
      const std::uint64_t before = device_reads();
      const Answer got = ask(Ask{.columns = {{ns, keys}}, .cache_only = true}).get();
      bool all = true;
      for (std::size_t k = 0; k < keys.size(); ++k) {
        const CellStatus status = got.columns.at(0).at(k).status;
        all &= status == CellStatus::HitNvm;
        if (status == CellStatus::Miss) put_in(ns, keys[k], value_of(keys[k]));
      }
      if (all && device_reads() > before) return;
    }
    FAIL() << "the keys did not come to the device";
  }
  // Whether regions are on their way to the device, or being emptied for others.
  bool writing() const {
    const Counters counters = Counters::of(*node_);
    const auto regions = [&](const std::string& state) {
      return counters.at("feature_cache_nvm_device_regions{device=" + device_->path() +
                         ",state=" + state + "}");
    };
    return regions("writing") + regions("emptying") != 0;
  }
  static std::string value_of(const std::string& key) { return "ssd's " + key; }
  Cell on_ssd(const std::string& key) const { return cell(CellStatus::HitNvm, value_of(key)); }
  FaultDevice::RuleId stall_reads() { return device_->add(FaultRule::stall().reads()); }

  double speculative(const std::string& what, const std::string& ns = "pin") {
    return Counters::of(*node_).at("feature_cache_speculative_" + what + "_total{namespace=" + ns +
                                   "}");
  }
  // Waits for what another thread is about to bring.
  template <class Done>
  static bool soon(Done done) {
    for (int i = 0; i < 10'000; ++i) {
      if (done()) return true;
      std::this_thread::sleep_for(milliseconds(1));
    }
    return false;
  }

  std::filesystem::path path_;
  std::shared_ptr<FaultDevice> device_;
  std::size_t fillers_ = 0;
};

}  // namespace fc::testing
