// What the tests of a damaged or interrupted NVM tier share: engines of small regions with ledgers,
// and their files as one life left them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <system_error>

#include "crash_support.hpp"
#include "nvm/device.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
inline constexpr std::size_t kRegionBytes = 64 * kKiB;
inline constexpr std::size_t kRegions = 24;
inline constexpr std::size_t kDeviceBytes = 64 * kKiB + kRegions * kRegionBytes;
inline constexpr std::size_t kKeys = 1600;
inline constexpr std::size_t kOthers = 700;

using Files = std::map<std::string, std::string>;  // by name

class NvmRecovery : public ::testing::Test {
 protected:
  NvmRecovery() {
    NamespaceConfig pin = name_space("pin", {domain("all", 128 * kKiB, PolicyKind::Fifo)});
    NamespaceConfig user = name_space("user", {domain("all", 64 * kKiB, PolicyKind::Fifo)});
    pin.nvm.budget_bytes = 14 * kRegionBytes;
    user.nvm.budget_bytes = 6 * kRegionBytes;
    config_ = engine_config(7 * kMiB, {pin, user});
    config_.expected_item_bytes = 300;
    config_.persist.dir = folder_.path();
    config_.persist.name = "crash";
    config_.nvm.devices = {{folder_.file("nvm"), kDeviceBytes}};
    config_.nvm.region_bytes = kRegionBytes;
    config_.nvm.direct = false;  // tmpfs knows no other way
    config_.nvm.queue_depth = 32;
    config_.nvm.io_threads = 2;
    config_.nvm.read_memory_bytes = 4 * kMiB;
    config_.nvm.write_buffers = 4;
  }

  std::unique_ptr<Engine> start() const { return make_engine(config_, clock_, false); }
  std::shared_ptr<NvmDevice> open(std::size_t device = 0) const {
    const NvmDeviceConfig& of = config_.nvm.devices[device];
    return open_device(of.path, of.bytes, {config_.nvm.io, false, config_.nvm.io_threads});
  }
  void lose_memory() const {
    std::filesystem::remove(folder_.file("crash.arena"));
    std::filesystem::remove(folder_.file("crash.nvm"));
  }

  // Not faster than the regions are written.
  static void pour(const Keeper& keeper, std::size_t begin, std::size_t end) {
    for (std::size_t key = begin; key < end; key += 50) {
      keeper.put(key, std::min(key + 50, end));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  // Overwrites, deletes and a flush, of much that was on NVM by then.
  void work(Engine& engine) const {
    const Keeper pin(engine, ledger_);
    const Keeper user(engine, others_, "user");
    pour(pin, 0, kKeys);
    pour(pin, 0, kKeys / 4);
    pin.erase(0, kKeys, 9);
    pour(user, 0, kOthers);
    user.flush();
    pour(user, 0, kOthers / 2);
    user.erase(0, kOthers, 7);
  }
  // What a life leaves that ends in order, or at once.
  void leave(bool in_order) {
    const End end = end_of([&] {
      const auto engine = start();
      work(*engine);
      if (in_order && !engine->shutdown()) _exit(2);
      kill(getpid(), SIGKILL);
    });
    ASSERT_EQ(end, End::Killed);
    take();
  }
  void leave_at(const char* point) {
    const End end = end_of([&] {
      const auto engine = start();
      work(*engine);
      const Assassin assassin(point);
      const Keeper pin(*engine, ledger_);
      for (unsigned round = 0; round < 200; ++round)
        pour(pin, round % 8 * 200, round % 8 * 200 + 200);
    });
    ASSERT_EQ(end, End::Killed);
    take();
  }

  void take() {
    files_.clear();
    for (const auto& file : std::filesystem::directory_iterator(folder_.path())) {
      if (file.is_regular_file()) files_[file.path().filename()] = read(file.path());
    }
    ASSERT_EQ(files_["nvm"].size(), kDeviceBytes);
  }
  static std::string read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  void restore(const Files& files) const {
    for (const auto& file : std::filesystem::directory_iterator(folder_.path())) {
      std::filesystem::remove(file.path());
    }
    for (const auto& [name, bytes] : files) write(name, bytes);
  }
  void write(const std::string& name, const std::string& bytes) const {
    const std::string path = folder_.file(name);
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    std::filesystem::permissions(
        path, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  }
  template <class Struct>
  Struct at(const std::string& file, std::uint64_t offset) const {
    Struct read;
    std::memcpy(static_cast<void*>(&read), files_.at(file).data() + offset, sizeof(read));
    return read;
  }
  static constexpr std::uint64_t region_at(std::size_t region) {
    return 64 * kKiB + region * kRegionBytes;
  }

  // What is wrong; empty: nothing. A key of two versions may have either.
  static std::string wrong(Engine& engine, const Ledger& ledger, const char* ns, std::size_t keys,
                           std::size_t* hits = nullptr) {
    std::vector<std::string> names;
    for (std::size_t key = 0; key < keys; ++key) names.push_back(Ledger::name_of(key));
    const std::vector<std::string_view> views(names.begin(), names.end());
    const std::vector<Got> got = get_all(engine, engine.find_namespace(ns), views);
    for (std::size_t key = 0; key < keys; ++key) {
      if (!carries_value(got[key].status)) continue;
      if (hits != nullptr) ++*hits;
      const auto is = [&](std::uint32_t version) {
        return (version & Ledger::kGone) == 0 && got[key].value == Ledger::value_of(key, version);
      };
      if (is(ledger[key].acknowledged) || is(ledger[key].begun)) continue;
      const bool gone = (ledger[key].acknowledged & Ledger::kGone) != 0;
      return names[key] + " of " + ns + (gone ? " has come back" : " has a wrong value");
    }
    return {};
  }
  std::string all_wrong(Engine& engine, std::size_t* hits = nullptr) const {
    const std::string pin = wrong(engine, ledger_, "pin", kKeys, hits);
    return pin.empty() ? wrong(engine, others_, "user", kOthers, hits) : pin;
  }

  CrashFolder folder_;
  Ledger ledger_;
  Ledger others_;
  ManualClock clock_;
  EngineConfig config_;
  Files files_;
};

}  // namespace fc::testing
