// Devices that fail under a running engine: reads and writes that fail, bring or leave wrong bytes,
// stand still; devices that go out of service and come back. Whatever happens, what is found is
// right, and what is lost is counted.
#include <future>

#include "nvm_support.hpp"

namespace fc::testing {
namespace {

constexpr std::uint64_t kFirstRegion = 64 * kKiB;

class NvmFaults : public NvmTest {
 protected:
  static constexpr std::size_t kItems = 4000;

  void start_full(EngineConfig config) {
    config.nvm.errors_max = 1'000'000'000;
    start(config);
    fill(0, kItems);
    ASSERT_TRUE(settled());
    before_ = check(0, kItems);
    ASSERT_EQ(before_.missing, 0U);
    ASSERT_GT(before_.nvm, kItems / 2);
  }
  void SetUp() override { start_full(usual_config(folder_.file("nvm"))); }

  // Every absent key has a token that lives.
  void expect_tokens(std::size_t from, std::size_t to) {
    const std::vector<Got> got = look(from, to);
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (got[i].status != CellStatus::Miss) continue;
      ASSERT_TRUE(engine_->token_alive(pin_, key(from + i), *got[i].token)) << from + i;
    }
  }
  // Gets keys one by one. Each that lies on the device costs a read of its own.
  Found check_singly(std::size_t from, std::size_t to, std::size_t step = 1) {
    Found found;
    for (std::size_t i = from; i < to; i += step) {
      const Found one = check(i, i + 1);
      found.dram += one.dram;
      found.nvm += one.nvm;
      found.missing += one.missing;
    }
    return found;
  }

  Found before_;
};

// ---- reads
// ---------------------------------------------------------------------------------------

TEST_F(NvmFaults, ReadsThatFailAreMissesAndTheKeysCanBeFetched) {
  const auto rule = fault_->add(FaultRule::fail(EIO).reads());
  const Found found = check(0, kItems);
  EXPECT_EQ(found.dram, before_.dram) << "DRAM was harmed";
  EXPECT_GT(found.missing, before_.nvm - 2 * kItemsOfRegion) << "what is still in memory is found";
  EXPECT_EQ(found.nvm + found.missing, before_.nvm);
  EXPECT_EQ(lost("device"), static_cast<double>(found.missing));
  EXPECT_GT(fault_->hits(rule), 5U);
  expect_tokens(0, kItems);
  // What a store says is kept under the token, and is a DRAM hit from then on.
  for (std::size_t i = 0; i < 100; ++i) {
    const Got got = get(*engine_, pin_, key(i));
    ASSERT_EQ(got.status, CellStatus::Miss) << i;
    ASSERT_EQ(install(*engine_, pin_, key(i), value(i, 2), *got.token), InstallStatus::Installed);
  }
  EXPECT_EQ(check(0, 100, pin_, 2).dram, 100U);
  EXPECT_EQ(lost("checksum"), 0);
  fault_->clear();
  // What could not be read was not lost; what was fetched meanwhile is not shown as it was before.
  EXPECT_EQ(check(100, kItems).missing, 0U);
  fill(20'000, 22'000);
  EXPECT_EQ(check(0, 100, pin_, 2).nvm, 100U);
}

TEST_F(NvmFaults, ReadsThatFailNowAndThenLoseThatManyCells) {
  const auto rule = fault_->add(FaultRule::fail(EIO).reads().rate(0.3));
  const Found found = check_singly(0, 1000);
  EXPECT_EQ(found.missing, fault_->hits(rule));
  EXPECT_EQ(lost("device"), static_cast<double>(found.missing));
  EXPECT_GT(found.missing, 200U);
  EXPECT_GT(found.nvm, 500U);
  EXPECT_EQ(counter("feature_cache_nvm_device_read_errors_total"),
            static_cast<double>(found.missing));
}

TEST_F(NvmFaults, AnUnreadableRegionTakesNoOtherAlong) {
  fault_->add(FaultRule::fail(EIO).reads().range(kFirstRegion + 3 * kRegionBytes, kRegionBytes));
  const Found found = check(0, kItems);
  EXPECT_GT(found.missing, kItemsOfRegion / 2);
  EXPECT_LT(found.missing, kItemsOfRegion * 3 / 2);
  EXPECT_EQ(lost("device"), static_cast<double>(found.missing));
  EXPECT_EQ(found.dram, before_.dram);
  fault_->clear();
  EXPECT_EQ(check(0, kItems).missing, 0U);
}

TEST_F(NvmFaults, ShortReadsAreErrors) {
  for (const std::uint32_t bytes : {0U, 100U, 512U, 4096U}) {
    const double before = lost("device");
    fault_->add(FaultRule::short_transfer(bytes).reads());
    const Found found = check(0, 2000);
    EXPECT_GT(found.missing, 1500U) << bytes;
    EXPECT_EQ(lost("device") - before, static_cast<double>(found.missing));
    expect_tokens(0, 500);
    fault_->clear();
  }
  EXPECT_EQ(lost("checksum"), 0);
  EXPECT_EQ(check(0, kItems).missing, 0U);
}

TEST_F(NvmFaults, OtherBytesAreNeverServed) {
  // So many bits that every record of the few blocks that a single read brings is hit.
  fault_->add(FaultRule::corrupt(3000).reads());
  const double items = pin_counter("items");
  const Found alone = check_singly(0, 300);
  EXPECT_EQ(alone.missing, 300U);
  EXPECT_EQ(lost("checksum"), 300);
  EXPECT_EQ(counter("feature_cache_nvm_checksum_errors_total"), 300);
  EXPECT_EQ(pin_counter("items"), items - 300) << "damaged entries stay";
  expect_tokens(0, 300);
  fault_->clear();
  EXPECT_EQ(check(0, 300).missing, 300U) << "dropped is dropped";
  // In a long read some are hit and some are not.
  fault_->add(FaultRule::corrupt(60).reads());
  const Found together = check(300, kItems);
  EXPECT_GT(together.missing, 100U);
  EXPECT_GT(together.nvm, 100U);
  EXPECT_EQ(together.dram, before_.dram);
  EXPECT_EQ(lost("checksum"), static_cast<double>(300 + together.missing));
  fault_->clear();
  EXPECT_EQ(check(300, kItems).missing, together.missing);
  EXPECT_TRUE(items_add_up(0, kItems));
  EXPECT_EQ(lost("device"), 0);
}

// ---- writes
// --------------------------------------------------------------------------------------

struct WriteFault {
  const char* name;
  FaultRule rule;
  bool told;  // the engine hears of it
};

void PrintTo(const WriteFault& fault, std::ostream* out) {
  *out << fault.name;
}

class NvmWriteFaults : public NvmTest, public ::testing::WithParamInterface<WriteFault> {
 protected:
  void SetUp() override { start(small_config(folder_.file("nvm"))); }
  void expect_well(std::size_t first) {
    fault_->clear();
    // Everything that was written badly goes, and its entries with it.
    const std::size_t end = first + 5600;
    fill(first, end);
    EXPECT_TRUE(items_add_up(0, end));
    expect_taken(end - 3000, end);
    EXPECT_EQ(counter("feature_cache_nvm_device_outages_total"), 0);
  }
};

TEST_P(NvmWriteFaults, SomeWrites) {
  FaultRule rule = GetParam().rule;
  const auto id = fault_->add(rule.writes().rate(0.4));
  fill(0, 3000);
  ASSERT_TRUE(settled());
  EXPECT_GT(fault_->hits(id), 8U);
  const Found found = check(0, 3000);
  EXPECT_GT(found.dram, 300U) << "DRAM was harmed";
  EXPECT_GT(found.nvm, 200U);
  EXPECT_TRUE(items_add_up(0, 3000));
  EXPECT_EQ(counter("feature_cache_nvm_device_write_errors_total") > 0, GetParam().told);
  EXPECT_EQ(lost("checksum"), counter("feature_cache_nvm_checksum_errors_total"));
  expect_well(3000);
}

TEST_P(NvmWriteFaults, AllWrites) {
  FaultRule rule = GetParam().rule;
  fault_->add(rule.writes());
  fill(0, 4000);
  ASSERT_TRUE(settled());
  const Found found = check(0, 4000);
  EXPECT_GT(found.dram, 300U) << "DRAM was harmed";
  // Told of it, the engine drops a region at once; else its reader finds out.
  if (GetParam().told) {
    EXPECT_LT(found.nvm, 2 * kItemsOfRegion);
    EXPECT_EQ(lost("checksum"), 0);
  } else {
    EXPECT_GT(lost("checksum"), 1000);
  }
  EXPECT_EQ(counter("feature_cache_namespace_nvm_demoted_total"),
            pin_counter("items") + pin_counter("evicted_total") + lost("checksum"));
  EXPECT_TRUE(items_add_up(0, 4000));
  expect_well(4000);
}

INSTANTIATE_TEST_SUITE_P(
    Faults, NvmWriteFaults,
    ::testing::Values(WriteFault{"error", FaultRule::fail(EIO), true},
                      WriteFault{"no_space", FaultRule::fail(ENOSPC), true},
                      WriteFault{"short_write", FaultRule::short_transfer(kBlockBytes), true},
                      WriteFault{"torn_with_error", FaultRule::torn(20'000, EIO), true},
                      WriteFault{"torn_unseen", FaultRule::torn(20'000), false},
                      WriteFault{"torn_in_a_block", FaultRule::torn(3000), false},
                      WriteFault{"not_done_at_all", FaultRule::torn(0), false},
                      WriteFault{"wrong_bytes", FaultRule::corrupt(5000), false}),
    [](const auto& given) { return std::string(given.param.name); });

class NvmStalls : public NvmTest {
 protected:
  static constexpr std::size_t kItems = 12'000;

  void SetUp() override {
    EngineConfig config = usual_config(folder_.file("nvm"));
    config.nvm.write_buffers = 8;
    start(config);
    started_ = fault_->counts();
    stall_ = fault_->add(FaultRule::stall().writes());
    // More than the buffers hold. Nothing waits for the device.
    for (std::size_t i = 0; i < kItems; ++i) put(*engine_, pin_, key(i), value(i));
    ASSERT_TRUE(fault_->wait_hits(stall_, 1));
  }
  double demoted() { return pin_counter("demoted_total"); }

  FaultCounts started_;
  FaultDevice::RuleId stall_ = 0;
};

TEST_F(NvmStalls, WhatFindsNoBufferIsRefusedAndTheRestIsReadFromMemory) {
  EXPECT_GT(refused("buffers"), static_cast<double>(kItems) / 2);
  EXPECT_GT(demoted(), 7.0 * kItemsOfRegion);
  EXPECT_EQ(pin_counter("items"), demoted());
  const Found found = check(0, kItems);
  EXPECT_EQ(static_cast<double>(found.nvm), demoted());
  EXPECT_EQ(static_cast<double>(found.missing), refused("buffers"));
  EXPECT_EQ(fault_->counts().reads, started_.reads) << "a region in memory was read";
  // Keys may be changed while their region stands.
  for (std::size_t i = 0; i < 400; ++i) {
    if (i % 2 == 0) {
      erase(*engine_, pin_, key(i));
    } else {
      put(*engine_, pin_, key(i), value(i, 2));
    }
  }
  fault_->remove(stall_);
  ASSERT_TRUE(settled());
  for (std::size_t i = 0; i < 400; ++i) {
    const Got got = get(*engine_, pin_, key(i));
    EXPECT_EQ(got.status, i % 2 == 0 ? CellStatus::Miss : CellStatus::HitDram) << i;
    if (i % 2 != 0) {
      EXPECT_TRUE(got.value == value(i, 2)) << i;
    }
  }
  EXPECT_TRUE(items_add_up(0, kItems));
  EXPECT_GT(check(400, kItems).nvm, 5U * kItemsOfRegion) << "they were not written";
  fill(20'000, 24'000);
  EXPECT_EQ(check(20'000, 24'000).missing, 0U) << "the buffers did not come back";
  EXPECT_EQ(counter("feature_cache_nvm_device_write_errors_total"), 0);
}

TEST_F(NvmStalls, AFlushDoesNotWaitForTheDevice) {
  EXPECT_GT(engine_->flush(pin_), 7U * kItemsOfRegion);
  EXPECT_EQ(check(0, kItems).missing, kItems);
  for (std::size_t i = 0; i < 2000; ++i) put(*engine_, pin_, key(i), value(i, 2));
  fault_->remove(stall_);
  ASSERT_TRUE(settled());
  EXPECT_TRUE(items_add_up(0, kItems));
  EXPECT_GT(check(0, 2000, pin_, 2).dram, 300U);
}

TEST_F(NvmStalls, AnEngineEndsWhenTheStalledWriteDoes) {
  std::future<void> ended = std::async(std::launch::async, [this] { engine_.reset(); });
  EXPECT_EQ(ended.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout)
      << "it left its write behind";
  fault_->remove(stall_);
  ASSERT_EQ(ended.wait_for(std::chrono::seconds(20)), std::future_status::ready);
}

TEST_F(NvmStalls, AnEngineEndsWhenStalledReadsDo) {
  fault_->remove(stall_);
  ASSERT_TRUE(settled());
  const auto reads = fault_->add(FaultRule::stall().reads());
  std::future<Found> looking = std::async(std::launch::async, [this] { return check(0, kItems); });
  ASSERT_TRUE(fault_->wait_hits(reads, 4));
  fault_->remove(reads);
  EXPECT_EQ(static_cast<double>(looking.get().nvm), pin_counter("items"));
}

// ---- outages
// -------------------------------------------------------------------------------------

class NvmOutage : public NvmTest {
 protected:
  static constexpr std::size_t kItems = 4000;

  EngineConfig config() const {
    EngineConfig config = usual_config(folder_.file("nvm"));
    config.nvm.errors_max = 8;
    config.namespaces[0].nvm.promotion = PromotionKind::Always;
    return config;
  }
  void SetUp() override {
    start(config());
    fill(0, kItems);
    ASSERT_TRUE(settled());
  }
  bool out_of_service() {
    return eventually([this] {
      for (std::size_t i = 0; i < kItems && in_service(); i += kItemsOfRegion) check(i, i + 1);
      return !in_service();
    });
  }
  double outages() { return counter("feature_cache_nvm_device_outages_total"); }
};

TEST_F(NvmOutage, FailsServesOnAndComesBackEmpty) {
  fault_->add(FaultRule::fail(EIO));
  const std::size_t dram = check(0, kItems).dram;
  EXPECT_GT(dram, 300U);
  ASSERT_TRUE(out_of_service());
  EXPECT_EQ(outages(), 1);
  ASSERT_TRUE(eventually([&] { return counter("feature_cache_nvm_device_probes_total") > 2; }));
  // Gets leave the device alone: no read but those of the probes, which end at their first write.
  const FaultCounts counts = fault_->counts();
  const Found found = check(0, kItems);
  EXPECT_EQ(fault_->counts().reads, counts.reads);
  EXPECT_EQ(found.dram, dram);
  EXPECT_EQ(found.nvm, 0U);
  EXPECT_EQ(pin_counter("items"), 0);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_used_bytes"), 0);

  // Life goes on. Nothing of it may be undone when the device is back.
  for (std::size_t i = 0; i < 1000; ++i) {
    if (i % 2 == 0) {
      ASSERT_EQ(erase(*engine_, pin_, key(i)), WriteStatus::Stored);
    } else {
      ASSERT_EQ(put(*engine_, pin_, key(i), value(i, 2)), WriteStatus::Stored);
      ASSERT_EQ(get(*engine_, pin_, key(i)).status, CellStatus::HitDram);
    }
  }
  fill(10'000, 12'000);
  EXPECT_GT(refused("out_of_service"), 1500);
  EXPECT_GT(check(10'000, 12'000).dram, 300U);
  EXPECT_FALSE(in_service());
  EXPECT_EQ(outages(), 1) << "counted once";

  fault_->clear();
  ASSERT_TRUE(eventually([this] { return in_service(); }));
  EXPECT_EQ(check(0, 10'000).hits(), 0U) << "an older value shows again";
  EXPECT_EQ(pin_counter("items"), 0);
  fill(20'000, 24'000);
  EXPECT_EQ(check(20'000, 24'000).missing, 0U) << "it is not used again";
  EXPECT_EQ(check(0, 10'000).hits(), 0U);
  EXPECT_TRUE(items_add_up(0, 24'000));
}

TEST_F(NvmOutage, WritesThatFailTakeItOutToo) {
  fault_->add(FaultRule::fail(EIO).writes());
  for (std::size_t i = 10'000; in_service() && i < 20'000; ++i) {
    put(*engine_, pin_, key(i), value(i));
  }
  ASSERT_TRUE(eventually([this] { return !in_service(); }));
  ASSERT_TRUE(eventually([this] { return pin_counter("items") == 0; }));
  EXPECT_EQ(check(0, kItems).nvm, 0U);
  fault_->clear();
  ASSERT_TRUE(eventually([this] { return in_service(); }));
  EXPECT_EQ(check(0, kItems).nvm, 0U);
  fill(20'000, 24'000);
  EXPECT_EQ(check(20'000, 24'000).missing, 0U);
}

TEST_F(NvmOutage, DamageTakesItOutToo) {
  fault_->add(FaultRule::corrupt(3000).reads());
  ASSERT_TRUE(out_of_service());
  EXPECT_GE(lost("checksum"), 8);
  fault_->clear();
  ASSERT_TRUE(eventually([this] { return in_service(); }));
  EXPECT_EQ(check(0, 2000).hits(), 0U);
}

TEST_F(NvmOutage, AFewErrorsAmongManyGoodReadsDoNot) {
  fault_->add(FaultRule::fail(EIO).reads().times(7));
  check(0, kItems);
  fault_->clear();
  for (int round = 0; round < 500; ++round) check(0, 1);  // a read each
  fault_->add(FaultRule::fail(EIO).reads().times(7));
  check(0, kItems);
  EXPECT_TRUE(in_service());
  EXPECT_EQ(outages(), 0);
}

TEST_F(NvmOutage, InTheMiddleOfABatch) {
  EngineConfig shallow = config();
  shallow.nvm.queue_depth = 4;
  start(shallow);
  fill(0, kItems);
  ASSERT_TRUE(settled());
  const auto stall = fault_->add(FaultRule::stall().reads());
  auto looking = std::async(std::launch::async, [this] { return look(0, kItems); });
  ASSERT_TRUE(fault_->wait_hits(stall, 4));
  // Some reads are under way, others wait for their turn; now the device goes out by its writes.
  const auto errors = fault_->add(FaultRule::fail(EIO).writes());
  for (std::size_t i = 10'000; in_service() && i < 20'000; ++i) {
    put(*engine_, pin_, key(i), value(i));
  }
  ASSERT_TRUE(eventually([this] { return !in_service(); }));
  for (std::size_t i = 0; i < 1000; ++i) put(*engine_, pin_, key(i), value(i, 2));
  ASSERT_TRUE(eventually([this] { return pin_counter("items") == 0; }));
  fault_->remove(stall);
  // A value that was read before the outage is as good as any, since its get came before that.
  const std::vector<Got> got = looking.get();
  Found found;
  for (std::size_t i = 0; i < got.size(); ++i) {
    found.nvm += got[i].status == CellStatus::HitNvm ? 1 : 0;
    found.missing += got[i].status == CellStatus::Miss ? 1 : 0;
    if (!carries_value(got[i].status)) continue;
    EXPECT_TRUE(got[i].value == value(i) || (i < 1000 && got[i].value == value(i, 2))) << key(i);
  }
  EXPECT_GT(found.nvm, 0U);
  EXPECT_GT(found.missing, kItems / 4);
  EXPECT_GT(lost("out_of_service"), 0);
  engine_->maintain();  // what was read is not brought up: it has been overwritten or lost since
  EXPECT_GT(check(0, 1000, pin_, 2).dram, 300U);
  EXPECT_EQ(check(1000, 10'000).hits(), 0U);
  EXPECT_FALSE(in_service());
  fault_->remove(errors);
  ASSERT_TRUE(eventually([this] { return in_service(); }));
  check(0, 1000, pin_, 2);
  EXPECT_EQ(check(1000, 10'000).hits(), 0U);
  fill(20'000, 24'000);
  EXPECT_EQ(check(20'000, 24'000).missing, 0U) << "stalled reads left regions behind";
}

TEST_F(NvmOutage, AgainAndAgain) {
  std::mt19937_64 random(seed_of(41));
  std::map<std::size_t, std::uint64_t> versions;  // 0: erased
  constexpr std::size_t kKeys = 3000;
  // How often the device leaves is a matter of time: go on until it has, within a bound.
  for (std::size_t round = 0; round < scaled(25) || (outages() <= 3 && round < 20 * scaled(25));
       ++round) {
    const auto rule = fault_->add(random() % 2 == 0 ? FaultRule::fail(EIO).rate(0.5)
                                                    : FaultRule::corrupt(2000).rate(0.5));
    for (std::size_t step = 0; step < 2000; ++step) {
      const std::size_t i = random() % kKeys;
      if (random() % 8 == 0) {
        versions[i] = 0;
        erase(*engine_, pin_, key(i));
      } else {
        put(*engine_, pin_, key(i), value(i, versions[i] = round * 2000 + step + 2));
      }
      if (step % 500 == 499) look(0, kKeys);
    }
    fault_->remove(rule);
    if (round % 2 == 0) {
      ASSERT_TRUE(eventually([this] { return in_service(); }));
    }
    const std::vector<Got> got = look(0, kKeys);
    for (const auto& [i, version] : versions) {
      if (!carries_value(got[i].status)) continue;
      ASSERT_NE(version, 0U) << key(i) << " was erased, round " << round;
      ASSERT_TRUE(got[i].value == value(i, version)) << key(i) << ", round " << round;
    }
  }
  EXPECT_GT(outages(), 3);
  ASSERT_TRUE(eventually([this] { return in_service(); }));
  EXPECT_TRUE(items_add_up(0, kItems));
}

TEST_F(NvmOutage, OneOfTwoDevices) {
  EngineConfig config = small_config(folder_.file("first"));
  config.nvm.devices.push_back(config.nvm.devices[0]);
  config.nvm.devices[1].path = folder_.file("second");
  for (NvmDeviceConfig& device : config.nvm.devices) {
    device.bytes = kFirstRegion + 14 * kRegionBytes;
  }
  config.nvm.errors_max = 8;
  start(config);
  fill(0, kItems);
  ASSERT_TRUE(settled());
  EXPECT_EQ(check(0, kItems).missing, 0U);
  faults_[0]->add(FaultRule::fail(EIO));
  ASSERT_TRUE(out_of_service());
  EXPECT_TRUE(in_service(1));
  ASSERT_TRUE(items_add_up(0, kItems));
  const Found half = check(0, kItems);
  EXPECT_GT(half.nvm, 8U * kItemsOfRegion) << "the other device's items are gone, too";
  EXPECT_LT(half.nvm, 13U * kItemsOfRegion);
  // The device that is left goes on turning over: what comes down now is found, the oldest goes.
  fill(10'000, 16'000);
  EXPECT_FALSE(in_service(0));
  expect_taken(14'500, 16'000);
  EXPECT_TRUE(items_add_up(0, 16'000));
  faults_[0]->clear();
  ASSERT_TRUE(eventually([this] { return in_service(0); }));
  const FaultCounts before = faults_[0]->counts();
  fill(20'000, 28'000);
  expect_taken(24'000, 28'000);
  EXPECT_GT(faults_[0]->counts().written_bytes - before.written_bytes, 10U * kRegionBytes);
  EXPECT_TRUE(items_add_up(0, 28'000));
}

}  // namespace
}  // namespace fc::testing
