// What a new engine makes of the NVM tier that an earlier one left, in the same boot: regions on
// the device, regions that were never written, and devices that are not what they were.
#include <array>
#include <random>
#include <unordered_map>

#include <sys/resource.h>

#include <csignal>
#include <fstream>

#include "memory_device.hpp"
#include "nvm/heartbeat.hpp"
#include "restart_support.hpp"

namespace fc::testing {
namespace {

class NvmAdoption : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kRegions = 24;

  NvmAdoption() {
    config_ = engine_config(
        8 * kMiB, {with_nvm(name_space("pin", {domain("all", 256 * kKiB)}), kRegions / 2),
                   with_nvm(name_space("user", {domain("all", 256 * kKiB)}), kRegions / 2)});
    config_.nvm = nvm_config(folder_.file("device"), kRegions + 4);
    config_.persist.dir = shared_.path();
    config_.persist.name = "cache";
  }
  Engine& start() {
    engine_.reset();
    engine_ = make_engine(config_, clock_, false);
    return *engine_;
  }
  void restart(bool in_order) {
    if (in_order) {
      EXPECT_TRUE(engine_->shutdown());
    }
    start();
  }
  const StartReport& report() const { return engine_->start_report(); }
  NamespaceIndex ns(const char* name) const { return engine_->find_namespace(name); }
  static std::string value_of(int key) {
    return std::string(100 + static_cast<std::size_t>(key) % 200,
                       static_cast<char>('a' + key % 26));
  }
  void fill(const char* name, int begin, int end) {
    for (int k = begin; k < end; ++k) {
      ASSERT_EQ(put(*engine_, ns(name), "key" + std::to_string(k), value_of(k)),
                WriteStatus::Stored);
      // Demotion does not wait for buffers; a test that wants all of them there does.
      if (k % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  std::array<int, 2> count(const char* name, int begin, int end) {
    std::array<int, 2> hits{};
    for (int k = begin; k < end; ++k) {
      const Got got = get(*engine_, ns(name), "key" + std::to_string(k));
      if (!carries_value(got.status)) continue;
      EXPECT_EQ(got.value, value_of(k));
      ++hits[got.status == CellStatus::HitNvm ? 1 : 0];
    }
    return hits;
  }

  Folder folder_;
  SharedFolder shared_;
  ManualClock clock_;
  EngineConfig config_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(NvmAdoption, BothTiersAreKeptHoweverTheProcessEnded) {
  start();
  EXPECT_EQ(report().nvm, "new");
  fill("pin", 0, 3000);
  const std::array<int, 2> before = count("pin", 0, 3000);
  ASSERT_GT(before[1], 1000);
  for (const bool in_order : {true, false, true}) {
    restart(in_order);
    EXPECT_EQ(report().nvm, "kept") << report().nvm_reason;
    const std::array<int, 2> after = count("pin", 0, 3000);
    EXPECT_EQ(after[0], before[0]);
    EXPECT_EQ(after[1], before[1]);
    EXPECT_EQ(report().nvm_items, static_cast<std::uint64_t>(before[1]));
    EXPECT_EQ(report().nvm_dropped, 0U);
  }
}

TEST_F(NvmAdoption, AFlushAndDeletesHold) {
  start();
  fill("pin", 0, 2000);
  fill("user", 0, 2000);
  engine_->flush(ns("user"));
  for (int k = 0; k < 1000; ++k) erase(*engine_, ns("pin"), "key" + std::to_string(k));
  restart(false);
  EXPECT_EQ(count("user", 0, 2000), (std::array<int, 2>{}));
  EXPECT_EQ(count("pin", 0, 1000), (std::array<int, 2>{}));
  EXPECT_GT(count("pin", 1000, 2000)[1], 0);
  fill("user", 0, 2000);
  restart(true);
  EXPECT_GT(count("user", 0, 2000)[1], 0);
}

TEST_F(NvmAdoption, AnotherDeviceStartsEmptyAndDramStays) {
  start();
  fill("pin", 0, 2000);
  const std::array<int, 2> before = count("pin", 0, 2000);
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  std::filesystem::remove(folder_.file("device"));
  start();
  EXPECT_EQ(report().nvm, "empty");
  EXPECT_NE(report().nvm_reason, "");
  const std::array<int, 2> after = count("pin", 0, 2000);
  EXPECT_EQ(after[0], before[0]);
  EXPECT_EQ(after[1], 0);
  fill("pin", 2000, 4000);
  EXPECT_GT(count("pin", 2000, 4000)[1], 0);
}

TEST_F(NvmAdoption, TheTierTakenAwayLeavesNoEntryBehind) {
  start();
  fill("pin", 0, 2000);
  const std::array<int, 2> before = count("pin", 0, 2000);
  ASSERT_TRUE(engine_->shutdown());
  const NvmConfig nvm = config_.nvm;
  config_.nvm = {};
  for (NamespaceConfig& of : config_.namespaces) of.nvm = {};
  start();
  EXPECT_EQ(report().nvm, "off");
  if (report().memory != "cold") {
    const std::array<int, 2> after = count("pin", 0, 2000);
    EXPECT_EQ(after[0], before[0]);
    EXPECT_EQ(after[1], 0);
  }
}

TEST_F(NvmAdoption, RegionsKeepTheirSizeWhereTheConfigLeavesItOpen) {
  config_.nvm.region_bytes = 0;
  start();
  fill("pin", 0, 2000);
  const std::array<int, 2> before = count("pin", 0, 2000);
  ASSERT_GT(before[1], 0);
  ASSERT_TRUE(engine_->shutdown());
  config_.namespaces[1].nvm.budget_bytes += 2 * kRegionBytes;
  config_.namespaces[0].nvm.budget_bytes += kRegionBytes;
  start();
  EXPECT_EQ(report().nvm, "kept") << report().nvm_reason;
  EXPECT_EQ(count("pin", 0, 2000)[1], before[1]);
}

TEST_F(NvmAdoption, ANamespaceThatIsGoneGivesItsRegionsBack) {
  start();
  fill("pin", 0, 2000);
  fill("user", 0, 2000);
  const std::array<int, 2> before = count("pin", 0, 2000);
  ASSERT_TRUE(engine_->shutdown());
  const NamespaceConfig user = config_.namespaces[1];
  config_.namespaces.pop_back();
  start();
  EXPECT_EQ(report().nvm, "kept") << report().nvm_reason;
  EXPECT_EQ(count("pin", 0, 2000)[1], before[1]);
  fill("pin", 2000, 6000);
  ASSERT_TRUE(engine_->shutdown());
  config_.namespaces.push_back(user);
  start();
  EXPECT_EQ(count("user", 0, 2000), (std::array<int, 2>{}));
}

// Shared memory is gone, the device is not.
class NvmReboot : public NvmAdoption {
 protected:
  void reboot(bool in_order) {
    if (in_order) {
      EXPECT_TRUE(engine_->shutdown());
    }
    engine_.reset();
    std::filesystem::remove(shared_.file("cache.arena"));
    std::filesystem::remove(shared_.file("cache.nvm"));
    start();
  }
};

TEST_F(NvmReboot, AfterAnOrderlyStopTheTierIsRebuilt) {
  start();
  fill("pin", 0, 3000);
  fill("user", 0, 1000);
  for (int k = 0; k < 500; ++k) erase(*engine_, ns("pin"), "key" + std::to_string(k));
  engine_->flush(ns("user"));
  const std::array<int, 2> before = count("pin", 0, 3000);
  ASSERT_GT(before[1], 500);
  for (int life = 0; life < 3; ++life) {
    reboot(true);
    EXPECT_EQ(report().memory, "new");
    EXPECT_EQ(report().nvm, "rebuilt") << report().nvm_reason;
    const std::array<int, 2> after = count("pin", 0, 3000);
    EXPECT_EQ(after[0], 0);
    EXPECT_EQ(after[1], before[1]);
    EXPECT_EQ(count("pin", 0, 500), (std::array<int, 2>{}));
    EXPECT_EQ(count("user", 0, 1000), (std::array<int, 2>{}));
  }
  fill("user", 0, 2000);
  fill("pin", 3000, 4000);
  restart(false);
  EXPECT_EQ(report().nvm, "kept") << report().nvm_reason;
  EXPECT_GT(count("user", 0, 2000)[1], 0);
}

TEST_F(NvmReboot, WithoutOneTheTierStartsEmptyUnlessAJournalWasKept) {
  for (const DurabilityKind kind :
       {DurabilityKind::DropNvm, DurabilityKind::Sync, DurabilityKind::Bounded}) {
    config_.persist.durability = kind;
    config_.persist.durability_window_ms = 10;
    start();
    engine_->flush(ns("pin"));
    fill("pin", 0, 3000);
    for (int k = 0; k < 500; ++k) erase(*engine_, ns("pin"), "key" + std::to_string(k));
    for (int k = 500; k < 600; ++k) put(*engine_, ns("pin"), "key" + std::to_string(k), "new");
    if (kind == DurabilityKind::Bounded) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    reboot(false);
    if (kind == DurabilityKind::DropNvm) {
      EXPECT_EQ(report().nvm, "empty");
      EXPECT_EQ(count("pin", 0, 3000), (std::array<int, 2>{}));
      continue;
    }
    EXPECT_EQ(report().nvm, "rebuilt") << report().nvm_reason;
    EXPECT_EQ(count("pin", 0, 500), (std::array<int, 2>{}));
    for (int k = 500; k < 600; ++k) {
      EXPECT_NE(get(*engine_, ns("pin"), "key" + std::to_string(k)).value, value_of(k));
    }
    EXPECT_GT(count("pin", 600, 3000)[1], 300);
  }
}

TEST_F(NvmReboot, WhatIsSpilledComesBack) {
  config_.persist.spill_on_shutdown = true;
  config_.namespaces[0].domains[0].budget_bytes = 512 * kKiB;
  start();
  fill("pin", 0, 1000);
  const std::array<int, 2> before = count("pin", 0, 1000);
  EXPECT_EQ(before[0], 1000);
  reboot(true);
  EXPECT_EQ(report().nvm, "rebuilt") << report().nvm_reason;
  EXPECT_GE(count("pin", 0, 1000)[1], 950);
}

TEST_F(NvmReboot, TimeGoesOnAndAClockSetBackIsDoubted) {
  config_.persist.spill_on_shutdown = true;
  start();
  for (int k = 0; k < 200; ++k) {
    put(*engine_, ns("pin"), "brief" + std::to_string(k), value_of(k), kNoDomain, 10'000);
    put(*engine_, ns("pin"), "long" + std::to_string(k), value_of(k), kNoDomain, 100'000);
  }
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  std::filesystem::remove(shared_.file("cache.arena"));
  clock_.advance(20'000);
  start();
  int kept = 0;
  for (int k = 0; k < 200; ++k) {
    EXPECT_EQ(get(*engine_, ns("pin"), "brief" + std::to_string(k)).status, CellStatus::Miss);
    kept += carries_value(get(*engine_, ns("pin"), "long" + std::to_string(k)).status) ? 1 : 0;
  }
  EXPECT_GT(kept, 150);
}

// Of an error that comes and goes no more is left than of a region that is gone.
TEST_F(NvmReboot, WhatCouldNotBeReadOnceStaysAway) {
  start();
  fill("pin", 0, 3000);
  ASSERT_GT(count("pin", 0, 3000)[1], 500);
  ASSERT_TRUE(engine_->shutdown());
  const auto forget = [&] {
    engine_.reset();
    std::filesystem::remove(shared_.file("cache.arena"));
    std::filesystem::remove(shared_.file("cache.nvm"));
  };
  forget();
  const NvmDeviceConfig& of = config_.nvm.devices[0];
  auto faults = std::make_shared<FaultDevice>(open_device(of.path, of.bytes, {.io_threads = 4}));
  // Every second header, every third trailer.
  std::vector<FaultDevice::RuleId> rules;
  for (std::uint64_t r = 1; r < kRegions + 4; ++r) {
    const std::uint64_t at = layout::kNvmDataOffset + r * kRegionBytes;
    if (r % 2 == 0) {
      rules.push_back(faults->add(FaultRule::fail(EIO).reads().range(at, kBlockBytes)));
    } else if (r % 3 == 0) {
      rules.push_back(faults->add(
          FaultRule::fail(EIO).reads().range(at + kRegionBytes - kBlockBytes, kBlockBytes)));
    }
  }
  engine_ = make_engine(config_, clock_, false, {faults});
  ASSERT_EQ(report().nvm, "rebuilt") << report().nvm_reason;
  for (const FaultDevice::RuleId rule : rules) faults->remove(rule);
  for (int k = 0; k < 3000; ++k) erase(*engine_, ns("pin"), "key" + std::to_string(k));
  ASSERT_TRUE(engine_->shutdown());
  forget();
  faults.reset();
  start();
  EXPECT_EQ(report().nvm, "rebuilt") << report().nvm_reason;
  EXPECT_EQ(count("pin", 0, 3000), (std::array<int, 2>{}));
}

// Only a rebuild that was cut off is done again over memory that there is: of other starts that
// were, it is not known what memory did without these devices.
TEST_F(NvmReboot, AStateThatNoRebuildLeftUnfinishedMakesNoListCount) {
  start();
  fill("pin", 0, 3000);
  ASSERT_GT(count("pin", 0, 3000)[1], 500);
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  std::filesystem::copy_file(folder_.file("device"), folder_.file("earlier"));
  start();
  for (int k = 0; k < 3000; ++k) erase(*engine_, ns("pin"), "key" + std::to_string(k));
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  for (const bool emptied : {true, false}) {
    std::filesystem::copy_file(folder_.file("earlier"), folder_.file("device"),
                               std::filesystem::copy_options::overwrite_existing);
    const std::string zeros(emptied ? 8192 : sizeof(std::uint64_t), '\0');
    std::fstream file(shared_.file("cache.nvm"),
                      std::ios::binary | std::ios::in | std::ios::out |
                          (emptied ? std::ios::trunc : std::ios::openmode{}));
    file.write(zeros.data(), static_cast<std::streamsize>(zeros.size()));
    file.close();
    start();
    EXPECT_EQ(report().memory, "clean") << report().memory_reason;
    EXPECT_EQ(report().nvm, "empty") << emptied;
    EXPECT_EQ(count("pin", 0, 3000), (std::array<int, 2>{})) << emptied;
    ASSERT_TRUE(engine_->shutdown());
    engine_.reset();
  }
}

// No file of this process grows meanwhile.
class NoRoom {
 public:
  explicit NoRoom(std::uint64_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit less{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &less);
  }
  ~NoRoom() {
    setrlimit(RLIMIT_FSIZE, &before_);
    (void)std::signal(SIGXFSZ, handler_);
  }
  NoRoom(const NoRoom&) = delete;
  NoRoom& operator=(const NoRoom&) = delete;

 private:
  rlimit before_{};
  void (*const handler_)(int);
};

// Whoever is told that a delete holds is told so after the device knows that no journal does.
TEST_F(NvmReboot, AJournalThatFailsIsBelievedNoMore) {
  config_.persist.durability = DurabilityKind::Sync;
  config_.persist.journal = shared_.file("journal");
  const auto memory = std::make_shared<MemoryDevice>("memory", config_.nvm.devices[0].bytes);
  const auto faults = std::make_shared<FaultDevice>(memory);
  engine_ = make_engine(config_, clock_, false, {faults});
  fill("pin", 0, 2000);
  int gone = 0;
  while (gone < 2000 &&
         get(*engine_, ns("pin"), "key" + std::to_string(gone)).status != CellStatus::HitNvm) {
    ++gone;
  }
  ASSERT_LT(gone, 2000);
  const std::string key = "key" + std::to_string(gone);
  std::vector<std::byte> then(memory->bytes());
  {
    const NoRoom full(std::filesystem::file_size(config_.persist.journal));
    faults->add(
        FaultRule::delay(50'000'000).writes().range(nvm::kHeartbeatOffset, 2 * kBlockBytes));
    erase(*engine_, ns("pin"), key);
    IoRequest look;
    look.data = then.data();
    look.bytes = static_cast<std::uint32_t>(then.size());
    ASSERT_EQ(run_request(*memory->make_queue(1), look), static_cast<std::int64_t>(then.size()));
  }
  engine_.reset();
  std::filesystem::copy_file(config_.persist.journal, shared_.file("journal then"));
  for (const bool earlier_beat : {false, true}) {
    std::filesystem::remove(shared_.file("cache.arena"));
    std::filesystem::remove(shared_.file("cache.nvm"));
    std::filesystem::copy_file(shared_.file("journal then"), config_.persist.journal,
                               std::filesystem::copy_options::overwrite_existing);
    memory->data() = then;
    // The one that came last is damaged: the other one says the same.
    if (earlier_beat) {
      const auto last = nvm::read_heartbeat(*memory);
      ASSERT_TRUE(last.has_value());
      memory->data()[nvm::kHeartbeatOffset + (last->sequence & 1) * kBlockBytes] ^= std::byte{1};
    }
    engine_ = make_engine(config_, clock_, false, {memory});
    EXPECT_EQ(report().nvm, "empty");
    EXPECT_EQ(get(*engine_, ns("pin"), key).status, CellStatus::Miss);
    engine_.reset();
  }
}

class NvmRestartModel : public NvmReboot, public ::testing::WithParamInterface<DurabilityKind> {};

TEST_P(NvmRestartModel, NothingIsWrongAndNothingComesBack) {
  std::mt19937_64 random(seed_of(71));
  config_.persist.durability = GetParam();
  for (NamespaceConfig& of : config_.namespaces) of.domains[0].budget_bytes = 96 * kKiB;
  std::array<std::unordered_map<std::string, std::string>, 2> model;
  const std::array<const char*, 2> names{"pin", "user"};
  start();
  std::size_t from_nvm = 0;
  std::size_t starts = 0;
  for (std::size_t step = 0; step < scaled(60'000); ++step) {
    const std::size_t n = random() % 2;
    const std::string key = "k" + std::to_string(random() % 6000);
    const std::uint64_t what = random() % 1000;
    if (what < 500) {
      const std::string value(random() % 400, static_cast<char>('a' + random() % 26));
      if (put(*engine_, ns(names[n]), key, value) == WriteStatus::Stored) {
        model[n][key] = value;
      } else {
        model[n].erase(key);
      }
    } else if (what < 600) {
      erase(*engine_, ns(names[n]), key);
      model[n].erase(key);
    } else if (what < 996) {
      const Got got = get(*engine_, ns(names[n]), key);
      if (!carries_value(got.status)) continue;
      ASSERT_TRUE(model[n].contains(key)) << key << " came back after start " << starts;
      ASSERT_EQ(got.value, model[n][key]);
      from_nvm += got.status == CellStatus::HitNvm ? 1 : 0;
    } else if (what < 997 && random() % 4 == 0) {
      engine_->flush(ns(names[n]));
      model[n].clear();
    } else if (what >= 999 && step % 2 == 0) {
      ++starts;
      const bool in_order = random() % 2 == 0;
      if (random() % 3 != 0) {
        restart(in_order);
        ASSERT_EQ(report().nvm, "kept") << report().nvm_reason;
        ASSERT_EQ(report().nvm_dropped, 0U);
        ASSERT_EQ(report().memory_dropped, 0U);
        continue;
      }
      reboot(in_order);
      const bool believed = in_order || GetParam() == DurabilityKind::Sync;
      ASSERT_EQ(report().nvm, believed ? "rebuilt" : "empty") << report().nvm_reason;
    }
  }
  EXPECT_GT(from_nvm, scaled(200));
  EXPECT_GT(starts, scaled(10));
}

INSTANTIATE_TEST_SUITE_P(All, NvmRestartModel,
                         ::testing::Values(DurabilityKind::DropNvm, DurabilityKind::Sync),
                         [](const auto& with) {
                           return with.param == DurabilityKind::Sync ? "Sync" : "DropNvm";
                         });

}  // namespace
}  // namespace fc::testing
