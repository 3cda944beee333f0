// NVM tiers whose processes were killed at chosen places or at any request to the device, whose
// devices failed at the stop, and that find other devices than they left. Nothing may be wrong
// then, and what was deleted, overwritten or flushed must not come back.
#include "nvm/heartbeat.hpp"
#include "nvm_recovery_support.hpp"
#include "testing/fault_device.hpp"

namespace fc::testing {
namespace {

// Dies at the n-th request that changes a device, before the device sees it.
class MortalDevice final : public NvmDevice {
 public:
  MortalDevice(std::shared_ptr<NvmDevice> device, std::uint64_t lives)
      : device_(std::move(device)), lives_(lives) {}
  void arm() { armed_ = true; }
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override {
    return std::make_unique<Queue>(*this, device_->make_queue(depth));
  }
  const std::string& path() const noexcept override { return device_->path(); }
  std::uint64_t bytes() const noexcept override { return device_->bytes(); }
  const char* io() const noexcept override { return device_->io(); }
  bool direct() const noexcept override { return device_->direct(); }
  const std::string& fallback() const noexcept override { return device_->fallback(); }

 private:
  struct Queue final : IoQueue {
    Queue(MortalDevice& of, std::unique_ptr<IoQueue> queue) : device(of), inner(std::move(queue)) {}
    void submit(std::span<IoRequest* const> requests) override {
      for (const IoRequest* request : requests) {
        if (request->kind != IoRequest::Kind::Read) device.count();
      }
      inner->submit(requests);
    }
    std::size_t wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) override {
      return inner->wait(ended, timeout_ns);
    }
    void wake() noexcept override { inner->wake(); }
    MortalDevice& device;
    const std::unique_ptr<IoQueue> inner;
  };
  void count() {
    if (armed_ && lives_.fetch_sub(1) <= 1) kill(getpid(), SIGKILL);
  }
  const std::shared_ptr<NvmDevice> device_;
  std::atomic<std::uint64_t> lives_;
  std::atomic<bool> armed_{false};
};

// ---- kills

struct Kill {
  const char* point;
  enum When { Work, Stop, SameBoot, Reboot } when;
  DurabilityKind durability;
};

class NvmRecoveryKill : public NvmRecovery, public ::testing::WithParamInterface<Kill> {
 protected:
  // Lives on, and checks that all is right in this one and after every kind of end.
  void expect_well(bool reboot) {
    for (int life = 0; life < 4 && !HasFailure(); ++life) {
      if (reboot) lose_memory();
      const auto engine = start();
      const Keeper pin(*engine, ledger_);
      const Keeper user(*engine, others_, "user");
      pin.compare(true);
      user.compare(true);
      if (HasFailure()) {
        std::printf("life %d, memory %s, nvm %s: %s\n", life, engine->start_report().memory.c_str(),
                    engine->start_report().nvm.c_str(), engine->start_report().nvm_reason.c_str());
        return;
      }
      pour(pin, 0, 900);
      pin.erase(0, 900, 7);
      if (life == 1) user.flush();
      pour(user, 100, 400);
      pin.compare(true);
      user.compare(true);
      if (life != 2) {
        EXPECT_TRUE(engine->shutdown());
      }
      reboot = life != 1;
    }
  }
  void die() {
    const Kill& what = GetParam();
    config_.persist.durability = what.durability;
    if (what.when == Kill::SameBoot || what.when == Kill::Reboot) leave(true);
    if (HasFatalFailure()) return;
    if (what.when == Kill::Reboot) lose_memory();
    const End end = end_of([&] {
      if (what.when == Kill::SameBoot || what.when == Kill::Reboot) {
        const Assassin assassin(what.point);
        start();
        _exit(3);
      }
      const auto engine = start();
      work(*engine);
      const Assassin assassin(what.point);
      if (what.when == Kill::Stop) {
        engine->shutdown();
        _exit(3);
      }
      const Keeper pin(*engine, ledger_);
      for (std::size_t round = 0; round < 400; ++round) {
        const std::size_t begin = round % 12 * 600;
        pour(pin, begin, begin + 600);
        pin.touch(begin / 2, begin / 2 + 100, 2);
      }
    });
    ASSERT_EQ(end, End::Killed) << what.point << " is never reached, or the child fails";
  }
};

TEST_P(NvmRecoveryKill, TheSameBootGoesOn) {
  die();
  if (!HasFatalFailure()) expect_well(false);
}
TEST_P(NvmRecoveryKill, ARebootGoesOn) {
  die();
  if (!HasFatalFailure()) expect_well(true);
}

std::vector<Kill> kills() {
  std::vector<Kill> kills;
  for (const DurabilityKind kind : {DurabilityKind::DropNvm, DurabilityKind::Sync}) {
    for (const char* point : {"nvm:header_written", "nvm:region_written", "nvm:reinserting",
                              "nvm:region_emptied", "nvm:region_full", "nvm:appended"}) {
      kills.push_back({point, Kill::Work, kind});
    }
    for (const char* point : {"nvm:trimming", "nvm:clean_mark", "leave:summed"}) {
      kills.push_back({point, Kill::Stop, kind});
    }
    kills.push_back({"nvm:adopting", Kill::SameBoot, kind});
    for (const char* point : {"nvm:state_cleared", "nvm:rebuilding"}) {
      kills.push_back({point, Kill::Reboot, kind});
    }
  }
  kills.push_back({"journal:install", Kill::SameBoot, DurabilityKind::Sync});
  kills.push_back({"journal:renamed", Kill::Reboot, DurabilityKind::Sync});
  return kills;
}

std::string name_of(const ::testing::TestParamInfo<Kill>& with) {
  std::string name = with.param.point;
  std::replace(name.begin(), name.end(), ':', '_');
  const char* const kWhen[] = {"Work", "Stop", "SameBoot", "Reboot"};
  return name + kWhen[with.param.when] +
         (with.param.durability == DurabilityKind::Sync ? "Sync" : "Drop");
}

INSTANTIATE_TEST_SUITE_P(All, NvmRecoveryKill, ::testing::ValuesIn(kills()), name_of);

// ---- kills at any request, and between them

class NvmRecoveryRequests : public NvmRecovery,
                            public ::testing::WithParamInterface<DurabilityKind> {
 protected:
  NvmRecoveryRequests() { config_.persist.durability = GetParam(); }

  // Deletes and overwrites after a start, an orderly stop, and a reboot. What is wrong then.
  std::string goes_on(bool reboot) const {
    if (reboot) lose_memory();
    std::string nvm;
    {
      const auto engine = start();
      nvm = engine->start_report().nvm;
      const std::string found = all_wrong(*engine);
      if (!found.empty()) return found + ", the tier was " + nvm;
      const NamespaceIndex pin = engine->find_namespace("pin");
      for (std::size_t key = 0; key < kKeys; ++key) {
        if (key % 5 == 1) erase(*engine, pin, Ledger::name_of(key));
        if (key % 5 == 2) put(*engine, pin, Ledger::name_of(key), "new");
      }
      if (!engine->shutdown()) return "it does not stop in order";
    }
    lose_memory();
    const auto engine = start();
    for (std::size_t key = 0; key < kKeys; ++key) {
      const Got got = get(*engine, engine->find_namespace("pin"), Ledger::name_of(key));
      if (!carries_value(got.status)) continue;
      const std::uint32_t version = ledger_[key].acknowledged;
      const bool gone = key % 5 == 1 || (version & Ledger::kGone) != 0;
      const bool right =
          key % 5 == 2 ? got.value == "new" : !gone && got.value == Ledger::value_of(key, version);
      if (!right) {
        return Ledger::name_of(key) + (key % 5 == 1 ? ", deleted" : ", not its latest") +
               ", is there after a reboot; the tier was " + nvm + ", then " +
               engine->start_report().nvm;
      }
    }
    return {};
  }
  // Dies at request after request of a start, or of a stop, and then starts, after a reboot or not.
  void die_at_each(bool in_start, bool memory_lost, bool reboot) {
    for (std::uint64_t n = 1; n < 400 && !HasFailure(); n += n < 24 ? 1 : 7) {
      restore(files_);
      if (memory_lost) lose_memory();
      const End end = end_of([&] {
        const auto device = std::make_shared<MortalDevice>(open(), n);
        if (in_start) device->arm();
        const auto engine = make_engine(config_, clock_, false, {device});
        device->arm();
        if (!in_start) engine->shutdown();
        _exit(3);
      });
      ASSERT_NE(end, End::Failed);
      EXPECT_EQ(goes_on(reboot), "") << "request " << n;
      if (end == End::Killed) continue;
      std::printf("%llu requests\n", static_cast<unsigned long long>(n));
      return;
    }
  }
  // Dies while it reads regions from `from` on.
  void die_at_reads(bool reboot) {
    for (const std::size_t from : {0, 8, 16}) {
      restore(files_);
      lose_memory();
      const End end = end_of([&] {
        const auto device = std::make_shared<FaultDevice>(open());
        const auto rule = device->add(FaultRule::stall().reads().range(
            region_at(from) + kRegionBytes - 4096, kDeviceBytes - region_at(from)));
        std::thread([&] {
          if (device->wait_hits(rule, 1)) kill(getpid(), SIGKILL);
        }).detach();
        make_engine(config_, clock_, false, {device});
        _exit(3);
      });
      ASSERT_EQ(end, End::Killed);
      EXPECT_EQ(goes_on(reboot), "") << "region " << from;
    }
  }
};

TEST_P(NvmRecoveryRequests, OfAStop) {
  leave(false);
  for (const bool reboot : {false, true}) {
    if (!HasFailure()) die_at_each(false, false, reboot);
  }
}
TEST_P(NvmRecoveryRequests, OfAStartInTheSameBoot) {
  leave(false);
  for (const bool reboot : {false, true}) {
    if (!HasFailure()) die_at_each(true, false, reboot);
  }
}
TEST_P(NvmRecoveryRequests, OfARebuildAndAReboot) {
  leave(true);
  if (!HasFailure()) die_at_each(true, true, true);
  if (!HasFailure()) die_at_reads(true);
}
TEST_P(NvmRecoveryRequests, OfARebuildAndTheSameBoot) {
  leave(true);
  if (!HasFailure()) die_at_each(true, true, false);
}
TEST_P(NvmRecoveryRequests, OfReadsOfARebuildAndTheSameBoot) {
  leave(true);
  if (!HasFailure()) die_at_reads(false);
}

INSTANTIATE_TEST_SUITE_P(All, NvmRecoveryRequests,
                         ::testing::Values(DurabilityKind::DropNvm, DurabilityKind::Sync),
                         [](const auto& with) {
                           return with.param == DurabilityKind::Sync ? "Sync" : "Drop";
                         });

// ---- devices

class NvmRecoveryDevices : public NvmRecovery {
 protected:
  // Stops with faults; returns what shutdown() says, and what a reboot finds then.
  bool stop_with(const std::vector<FaultRule>& rules, std::string* nvm) {
    const End end = end_of([&] {
      const auto device = std::make_shared<FaultDevice>(open());
      const auto engine = make_engine(config_, clock_, false, {device});
      work(*engine);
      for (const FaultRule& rule : rules) device->add(rule);
      ledger_.note() = engine->shutdown() ? 1 : 0;
      kill(getpid(), SIGKILL);
    });
    EXPECT_EQ(end, End::Killed);
    lose_memory();
    const auto engine = start();
    *nvm = engine->start_report().nvm;
    EXPECT_EQ(all_wrong(*engine), "");
    work(*engine);
    EXPECT_EQ(all_wrong(*engine), "");
    EXPECT_TRUE(engine->shutdown());
    return ledger_.note() != 0;
  }
  void use_two() {
    config_.memory_bytes = 12 * kMiB;
    config_.nvm.devices.push_back({folder_.file("second"), kDeviceBytes});
  }
  std::size_t hits_after_reboot(std::string* nvm) {
    lose_memory();
    const auto engine = start();
    *nvm = engine->start_report().nvm;
    std::size_t hits = 0;
    EXPECT_EQ(all_wrong(*engine, &hits), "");
    return hits;
  }
};

TEST_F(NvmRecoveryDevices, ThatFailAtTheStopAreNotBelieved) {
  const std::uint64_t beats = nvm::kHeartbeatOffset;
  std::string nvm;
  EXPECT_FALSE(stop_with({FaultRule::fail(EIO).writes()}, &nvm));
  EXPECT_EQ(nvm, "empty");
  EXPECT_FALSE(stop_with({FaultRule::fail(EIO).writes().range(beats, 8192)}, &nvm));
  EXPECT_EQ(nvm, "empty");
  EXPECT_FALSE(stop_with({FaultRule::fail(EIO).syncs()}, &nvm));
  EXPECT_EQ(nvm, "empty");
  EXPECT_FALSE(stop_with({FaultRule::torn(40, EIO).writes().range(beats, 8192)}, &nvm));
  EXPECT_EQ(nvm, "empty");
  // Some fail: whatever it says, nothing is wrong.
  for (const std::uint64_t times : {1, 2, 5}) {
    const auto some = [&](FaultRule rule) {
      return rule.writes().range(region_at(0), kDeviceBytes).times(times);
    };
    stop_with({some(FaultRule::fail(EIO))}, &nvm);
    stop_with({some(FaultRule::torn(4096))}, &nvm);
    stop_with({some(FaultRule::torn(512, EIO))}, &nvm);
    stop_with({some(FaultRule::corrupt(3))}, &nvm);
  }
  stop_with({FaultRule::fail(EIO).writes().range(region_at(0), kDeviceBytes).rate(0.4)}, &nvm);
  stop_with({FaultRule::fail(EIO).reads().rate(0.5)}, &nvm);
  stop_with({FaultRule::corrupt(8).reads().rate(0.5)}, &nvm);
}

TEST_F(NvmRecoveryDevices, ThatAreOthersStartEmpty) {
  use_two();
  const EngineConfig both = config_;
  const auto expect = [&](const EngineConfig& config, const char* wanted, const char* what) {
    config_ = config;
    std::string nvm;
    const std::size_t hits = hits_after_reboot(&nvm);
    EXPECT_EQ(nvm, wanted) << what;
    EXPECT_EQ(hits > 0, nvm == "rebuilt") << what;
    config_ = both;
  };
  leave(true);
  if (HasFatalFailure()) return;
  expect(both, "rebuilt", "as they were");
  EngineConfig other = both;
  std::swap(other.nvm.devices[0], other.nvm.devices[1]);
  restore(files_);
  expect(other, "empty", "swapped");
  other = both;
  other.nvm.devices.pop_back();
  restore(files_);
  expect(other, "empty", "one of two");
  other = both;
  other.nvm.devices[1].bytes += kRegionBytes;
  restore(files_);
  expect(other, "empty", "one is larger");
  other.nvm.devices[1].bytes -= 4 * kRegionBytes;
  restore(files_);
  expect(other, "empty", "one is smaller");
  other = both;
  other.nvm.devices[1].path = folder_.file("moved");
  restore(files_);
  std::filesystem::rename(folder_.file("second"), folder_.file("moved"));
  expect(other, "rebuilt", "at another path");
  restore(files_);
  std::filesystem::copy_file(folder_.file("nvm"), folder_.file("second"),
                             std::filesystem::copy_options::overwrite_existing);
  expect(both, "empty", "one twice");
}

TEST_F(NvmRecoveryDevices, OneOfWhichIsNewServeNothing) {
  use_two();
  leave(true);
  if (HasFatalFailure()) return;
  std::filesystem::remove(folder_.file("second"));
  std::string nvm;
  EXPECT_EQ(hits_after_reboot(&nvm), 0U);
  EXPECT_EQ(nvm, "empty");
}

TEST_F(NvmRecoveryDevices, WithSmallerSharesKeepTheNewest) {
  leave(true);
  if (HasFatalFailure()) return;
  const EngineConfig before = config_;
  std::string nvm;
  const std::size_t all = hits_after_reboot(&nvm);
  restore(files_);
  config_.namespaces[0].nvm.budget_bytes = 4 * kRegionBytes;
  const std::size_t some = hits_after_reboot(&nvm);
  EXPECT_EQ(nvm, "rebuilt");
  EXPECT_GT(some, 0U);
  EXPECT_LT(some, all);
  {
    const auto engine = start();
    work(*engine);
    EXPECT_EQ(all_wrong(*engine), "");
    EXPECT_TRUE(engine->shutdown());
  }
  config_ = before;
  EXPECT_GT(hits_after_reboot(&nvm), 0U);
}

TEST_F(NvmRecoveryDevices, WithANamespaceThatIsGoneGiveItsRegionsBack) {
  leave(true);
  if (HasFatalFailure()) return;
  const EngineConfig before = config_;
  lose_memory();
  config_.namespaces.pop_back();
  {
    const auto engine = start();
    EXPECT_EQ(engine->start_report().nvm, "rebuilt");
    EXPECT_TRUE(engine->shutdown());
  }
  config_ = before;
  lose_memory();
  const auto engine = start();
  EXPECT_EQ(engine->start_report().nvm, "rebuilt");
  std::size_t pin = 0;
  std::size_t user = 0;
  EXPECT_EQ(wrong(*engine, ledger_, "pin", kKeys, &pin), "");
  EXPECT_EQ(wrong(*engine, others_, "user", kOthers, &user), "");
  EXPECT_GT(pin, 0U);
  EXPECT_EQ(user, 0U);
}

}  // namespace
}  // namespace fc::testing
