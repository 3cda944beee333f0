// The engine with an NVM tier on a real file: what leaves DRAM is found there, what was overwritten
// is not, budgets hold, damage is noticed.
#include <fstream>
#include <set>

#include "index/index.hpp"
#include "nvm/format.hpp"
#include "nvm_support.hpp"

namespace fc::testing {
namespace {

// As one instance, and as three: each with a file of its own.
class NvmEngine : public NvmTest, public ::testing::WithParamInterface<std::uint32_t> {
 protected:
  void SetUp() override { begin(usual_config(folder_.file("nvm"))); }

  static std::uint32_t instances() { return GetParam(); }
  // The whole is what the test says; an instance must have the least of everything.
  void begin(EngineConfig config) {
    if (instances() == 1) return start(config);
    config.instances = instances();
    config.memory_bytes *= instances();
    for (NamespaceConfig& ns : config.namespaces) {
      for (DomainConfig& of : ns.domains) {
        of.budget_bytes = std::max(of.budget_bytes, instances() * 4 * 16 * kKiB);
      }
    }
    for (NvmDeviceConfig& device : config.nvm.devices) {
      device.bytes += instances() * (64 * kKiB + kRegionBytes);
    }
    start_plainly(config);
  }
};

TEST_P(NvmEngine, WhatLeavesDramIsFoundOnNvm) {
  fill(0, 6000);
  ASSERT_TRUE(settled());
  const Found found = check(0, 6000);
  EXPECT_EQ(found.missing, 0U);
  EXPECT_GT(found.nvm, 4500U);
  EXPECT_GT(found.dram, 400U);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_hits_total"), static_cast<double>(found.nvm));
  EXPECT_GT(counter("feature_cache_nvm_device_reads_total"), 20);
}

TEST_P(NvmEngine, NoMissOnTheWayDown) {
  // Each key is looked at as soon as the next ones push it down, through buffer and device.
  for (std::size_t i = 0; i < 6000; i += 100) {
    fill(i, i + 100);
    ASSERT_EQ(check(0, i + 100).missing, 0U) << i;
  }
}

TEST_P(NvmEngine, OverwrittenCopiesNeverShowAgain) {
  fill(0, 4000);
  fill(0, 4000, pin_, kNoDomain, 2);
  fill(10'000, 12'000);  // push the new versions down, too
  EXPECT_EQ(check(0, 4000, pin_, 2).missing, 0U);
  EXPECT_GT(counter("feature_cache_namespace_nvm_dropped_by_tag_total"), 3000);
}

TEST_P(NvmEngine, ErasedKeysAreGoneFromNvm) {
  fill(0, 4000);
  for (std::size_t i = 0; i < 4000; i += 2) erase(*engine_, pin_, key(i));
  for (std::size_t i = 0; i < 4000; ++i) {
    const Got got = get(*engine_, pin_, key(i));
    if (i % 2 == 0) {
      ASSERT_EQ(got.status, CellStatus::Miss) << i;
      ASSERT_TRUE(engine_->token_alive(pin_, key(i), *got.token));
    } else {
      ASSERT_TRUE(carries_value(got.status)) << i;
    }
  }
}

TEST_P(NvmEngine, ARejectedPutTakesTheOlderCopyAlong) {
  fill(0, 4000);
  const std::string huge(200 * kKiB, 'x');  // larger than the domain
  EXPECT_EQ(put(*engine_, pin_, key(3), huge, brief_), WriteStatus::Rejected);
  EXPECT_EQ(get(*engine_, pin_, key(3)).status, CellStatus::Miss);
}

TEST_P(NvmEngine, AFlushEmptiesNvmToo) {
  fill(0, 4000);
  fill(0, 1000, user_);
  EXPECT_GT(engine_->flush(pin_), 3900U);
  EXPECT_EQ(check(0, 4000).missing, 4000U);
  ASSERT_TRUE(settled());
  const Counters counters = Counters::of(*engine_);
  EXPECT_EQ(counters.at("feature_cache_namespace_nvm_items{namespace=pin}"), 0);
  EXPECT_EQ(counters.at("feature_cache_namespace_nvm_used_bytes{namespace=pin}"), 0);
  EXPECT_EQ(check(0, 1000, user_).missing, 0U) << "another namespace is not touched";
  fill(0, 4000, pin_, kNoDomain, 2);
  EXPECT_EQ(check(0, 4000, pin_, 2).missing, 0U);
}

TEST_P(NvmEngine, ANamespaceKeepsToItsBudget) {
  fill(0, 2000, user_);
  fill(0, 40'000);  // several times what pin may have
  ASSERT_TRUE(settled());
  const Counters counters = Counters::of(*engine_);
  EXPECT_LE(counters.at("feature_cache_namespace_nvm_used_bytes{namespace=pin}"),
            100.0 * kRegionBytes);
  EXPECT_EQ(check(0, 2000, user_).missing, 0U) << "pin took from user";
  const Found found = check(0, 40'000);
  EXPECT_GT(found.nvm, 16'000U);
  EXPECT_GT(counters.at("feature_cache_namespace_nvm_evicted_total{namespace=pin}"), 15'000);
}

TEST_P(NvmEngine, ANamespaceWithoutAShareStaysInDram) {
  fill(0, 3000, dram_);
  const Found found = check(0, 3000, dram_);
  EXPECT_EQ(found.nvm, 0U);
  EXPECT_GT(found.missing, 2000U);
}

TEST_P(NvmEngine, HitItemsAreReinsertedWhenTheirRegionGoes) {
  fill(0, 6000);
  ASSERT_TRUE(settled());
  for (int i = 0; i < 3; ++i) check(0, 80);
  fill(10'000, 36'000);
  ASSERT_TRUE(settled());
  EXPECT_GT(counter("feature_cache_namespace_nvm_reinserted_total"), 75);
  EXPECT_EQ(check(0, 80).missing, 0U);
  EXPECT_GT(check(200, 6000).missing, 5000U) << "what nobody asked for went";
}

TEST_P(NvmEngine, ExpiredItemsAreNeitherServedNorKept) {
  fill(0, 3000, pin_, brief_);
  ASSERT_TRUE(settled());
  EXPECT_EQ(check(0, 3000).missing, 0U);
  clock_.advance(61'000);
  EXPECT_EQ(check(0, 3000).missing, 3000U);
  EXPECT_TRUE(eventually([&] {
    const Counters counters = Counters::of(*engine_);
    return counters.at("feature_cache_namespace_nvm_used_bytes{namespace=pin}") <=
           instances() * kRegionBytes;
  })) << "their space did not come back";
}

TEST_P(NvmEngine, ItemsAboutToExpireAreNotWritten) {
  for (std::size_t i = 0; i < 2000; ++i) put(*engine_, pin_, key(i), value(i), brief_, 1500);
  EXPECT_EQ(counter("feature_cache_namespace_nvm_demoted_total"), 0);
  const Counters counters = Counters::of(*engine_);
  EXPECT_GT(
      counters.at("feature_cache_namespace_nvm_not_admitted_total{namespace=pin,reason=expiring}"),
      1000);
}

TEST_P(NvmEngine, NegativeEntriesStayInDram) {
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.namespaces[0].negative_ttl_ms = 60'000;
  begin(config);
  for (std::size_t i = 0; i < 20'000; ++i) {
    PutItem item;
    const std::string name = key(i);
    item.key = name;
    item.negative = true;
    put(*engine_, pin_, item);
  }
  EXPECT_EQ(counter("feature_cache_namespace_nvm_demoted_total"), 0);
}

TEST_P(NvmEngine, PromotesWhatIsHitTwice) {
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.namespaces[0].nvm.promotion = PromotionKind::SecondHit;
  begin(config);
  fill(0, 4000);
  ASSERT_TRUE(settled());
  EXPECT_EQ(check(0, 100).nvm, 100U);
  engine_->maintain();
  EXPECT_EQ(check(0, 100).nvm, 100U) << "once is not enough";
  // An item is offered just after its answer.
  EXPECT_TRUE(eventually([&] {
    engine_->maintain();
    return counter("feature_cache_namespace_nvm_promoted_total") == 100;
  }));
  EXPECT_EQ(check(0, 100).dram, 100U);
  fill(20'000, 22'000);  // down again
  EXPECT_EQ(check(0, 100).missing, 0U);
}

TEST_P(NvmEngine, AdmissionByFrequency) {
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.namespaces[0].nvm.admission = AdmissionKind::Frequency;
  config.namespaces[0].domains[0].policy = PolicyKind::Fifo;
  begin(config);
  fill(0, 600);
  check(0, 50);
  fill(1000, 4000);
  const Found asked = check(0, 50);
  EXPECT_GE(asked.nvm, 48U);
  EXPECT_LT(check(50, 600).nvm, 30U) << "asked once: not worth a write";
}

TEST_P(NvmEngine, AdmissionRejectsFirst) {
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.namespaces[0].nvm.admission = AdmissionKind::RejectFirst;
  begin(config);
  fill(0, 100);
  fill(1000, 2500);
  EXPECT_EQ(check(0, 100).missing, 100U);
  fill(0, 100);
  fill(3000, 4500);
  EXPECT_GE(check(0, 100).nvm, 95U);
}

TEST_P(NvmEngine, AWriteBudgetBoundsWhatIsWritten) {
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.nvm.write_bytes_per_second = 100'000;
  begin(config);
  const auto started = std::chrono::steady_clock::now();
  fill(0, 20'000);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  EXPECT_LE(counter("feature_cache_namespace_nvm_demoted_bytes_total"),
            2.0 * kMiB + 100'000 * (seconds + 0.5));
  const Counters counters = Counters::of(*engine_);
  EXPECT_GT(counters.at(
                "feature_cache_namespace_nvm_not_admitted_total{namespace=pin,reason=write_rate}"),
            10'000);
}

TEST_P(NvmEngine, ValuesOfEverySizeGoDownAndComeBack) {
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.memory_bytes = 48 * kMiB;
  config.namespaces[0].domains[0].budget_bytes = 2 * kMiB;
  begin(config);
  std::map<std::string, std::string> model;
  for (std::size_t i = 0; i < 400; ++i) {
    const std::size_t bytes = i % 7 == 0 ? 40'000 + i : (i * 97) % 9000;
    model[key(i)] = patterned(key(i), 7, bytes);
    put(*engine_, pin_, key(i), model[key(i)]);
    if (i % 10 == 9) {
      ASSERT_TRUE(settled());
    }
  }
  fill(1000, 9000);
  ASSERT_TRUE(settled());
  std::size_t nvm = 0;
  for (const auto& [name, expected] : model) {
    const Got got = get(*engine_, pin_, name);
    if (got.status == CellStatus::HitNvm) ++nvm;
    if (carries_value(got.status)) {
      ASSERT_TRUE(got.value == expected) << name;
    }
  }
  EXPECT_GT(nvm, 350U);
}

TEST_P(NvmEngine, NeighboursAreReadTogether) {
  fill(0, 6000);
  ASSERT_TRUE(settled());
  const double before = counter("feature_cache_nvm_device_reads_total");
  const Found found = check(0, 1000);
  const double reads = counter("feature_cache_nvm_device_reads_total") - before;
  EXPECT_EQ(found.nvm, 1000U);
  EXPECT_LT(reads, 40 * instances()) << "a thousand neighbours";
  EXPECT_GT(counter("feature_cache_nvm_reads_coalesced_total"), 900);
}

TEST_P(NvmEngine, WritesTakeHardlyAnyOtherKeyAlong) {
  // Every put drops what may be its key's on NVM. Other keys are lost as seldom as tags of 18 bits
  // promise: at most once in 10,000 writes.
  EngineConfig config = usual_config(folder_.file("nvm"));
  config.memory_bytes = 64 * kMiB;
  config.namespaces[0].nvm.budget_bytes = 1000ull * kRegionBytes;
  config.nvm = nvm_config(folder_.file("nvm"), 1030);
  begin(config);
  constexpr std::size_t kItems = scaled(150'000);
  fill(0, kItems);
  std::size_t missing = 0;
  for (std::size_t i = 0; i < kItems; i += 10'000) missing += check(i, i + 10'000).missing;
  EXPECT_LE(missing, kItems / 10'000);
  EXPECT_LE(counter("feature_cache_index_below_dropped_total"), kItems / 10'000);
}

INSTANTIATE_TEST_SUITE_P(Instances, NvmEngine, ::testing::Values(1u, 3u));

}  // namespace
}  // namespace fc::testing
