// What a new engine makes of the memory that an earlier one left: after an orderly stop, after
// none, for another config, and when it is not what it should be.
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <unordered_map>

#include "memory/arena_header.hpp"
#include "restart_support.hpp"

namespace fc::testing {
namespace {

class AdoptionTest : public ::testing::Test {
 protected:
  AdoptionTest() {
    config_ = engine_config(
        4 * kMiB, {name_space("pin", {domain("lasting", kMiB), domain("brief", kMiB / 2)}),
                   name_space("user", {domain("all", kMiB / 2, PolicyKind::TinyLfu)})});
    config_.persist.dir = folder_.path();
    config_.persist.name = "cache";
  }

  Engine& start() {
    engine_.reset();  // first: one owner at a time
    engine_ = make_engine(config_, clock_, false);
    return *engine_;
  }
  Engine& restart(bool in_order) {
    if (in_order) {
      EXPECT_TRUE(engine_->shutdown());
    }
    return start();
  }
  const StartReport& report() const { return engine_->start_report(); }
  NamespaceIndex ns(const char* name) const { return engine_->find_namespace(name); }
  std::string value_of(int key) const {
    return std::string(1 + static_cast<std::size_t>(key) % 300, static_cast<char>('a' + key % 26));
  }
  void fill(const char* name, int begin, int end, std::uint64_t ttl_ms = 0) {
    for (int k = begin; k < end; ++k) {
      ASSERT_EQ(put(*engine_, ns(name), "key" + std::to_string(k), value_of(k), kNoDomain, ttl_ms),
                WriteStatus::Stored);
    }
  }
  void expect_all(const char* name, int begin, int end) {
    for (int k = begin; k < end; ++k) {
      const Got got = get(*engine_, ns(name), "key" + std::to_string(k));
      ASSERT_EQ(got.status, CellStatus::HitDram) << name << " key" << k;
      ASSERT_EQ(got.value, value_of(k));
    }
  }
  void expect_none(const char* name, int begin, int end) {
    for (int k = begin; k < end; ++k) {
      ASSERT_EQ(get(*engine_, ns(name), "key" + std::to_string(k)).status, CellStatus::Miss);
    }
  }
  // Changes bytes of the arena's file while nobody has it.
  void damage(std::uint64_t offset, const std::string& bytes) {
    std::fstream file(folder_.file("cache.arena"), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    ASSERT_TRUE(file.good());
  }

  SharedFolder folder_;
  ManualClock clock_;
  EngineConfig config_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(AdoptionTest, AnOrderlyStopKeepsAll) {
  start();
  EXPECT_EQ(report().memory, "new");
  fill("pin", 0, 1000);
  fill("user", 0, 500);
  restart(true);
  EXPECT_EQ(report().memory, "clean") << report().memory_reason;
  EXPECT_EQ(report().memory_items, 1500U);
  EXPECT_EQ(report().memory_dropped, 0U);
  expect_all("pin", 0, 1000);
  expect_all("user", 0, 500);
  fill("pin", 1000, 1200);
  restart(true);
  EXPECT_EQ(report().memory_items, 1700U);
  expect_all("pin", 0, 1200);
}

TEST_F(AdoptionTest, WithoutOneAllIsCheckedAndKept) {
  start();
  fill("pin", 0, 1000);
  fill("user", 0, 500);
  restart(false);
  EXPECT_EQ(report().memory, "checked");
  EXPECT_NE(report().memory_reason, "");
  EXPECT_EQ(report().memory_items, 1500U);
  expect_all("pin", 0, 1000);
  expect_all("user", 0, 500);
}

TEST_F(AdoptionTest, WhatWasDeletedOverwrittenOrFlushedStaysSo) {
  for (const bool in_order : {true, false}) {
    start();
    engine_->flush(ns("pin"));
    fill("pin", 0, 300);
    fill("user", 0, 100);
    for (int k = 0; k < 100; ++k) erase(*engine_, ns("pin"), "key" + std::to_string(k));
    for (int k = 100; k < 200; ++k) {
      ASSERT_EQ(put(*engine_, ns("pin"), "key" + std::to_string(k), "new"), WriteStatus::Stored);
    }
    engine_->flush(ns("user"));
    restart(in_order);
    expect_none("pin", 0, 100);
    expect_all("pin", 200, 300);
    expect_none("user", 0, 100);
    for (int k = 100; k < 200; ++k) {
      ASSERT_EQ(get(*engine_, ns("pin"), "key" + std::to_string(k)).value, "new");
    }
  }
}

TEST_F(AdoptionTest, TimeGoesOnWhileNobodyServes) {
  for (const bool in_order : {true, false}) {
    start();
    fill("pin", 0, 100, 10'000);
    fill("user", 0, 100, 60'000);
    if (in_order) {
      EXPECT_TRUE(engine_->shutdown());
    }
    engine_.reset();
    clock_.advance(9'000);
    start();
    expect_all("pin", 0, 100);
    engine_.reset();
    clock_.advance(2'000);
    start();
    expect_none("pin", 0, 100);
    expect_all("user", 0, 100);
  }
}

TEST_F(AdoptionTest, ALargeRecordIsKept) {
  start();
  const std::string large(100 * kKiB, 'L');
  ASSERT_EQ(put(*engine_, ns("pin"), "large", large), WriteStatus::Stored);
  for (const bool in_order : {true, false}) {
    restart(in_order);
    EXPECT_EQ(get(*engine_, ns("pin"), "large").value, large);
  }
  erase(*engine_, ns("pin"), "large");
  restart(false);
  EXPECT_EQ(report().memory_items, 0U);
}

TEST_F(AdoptionTest, NamespacesAndDomainsAreMatchedByName) {
  start();
  fill("pin", 0, 200);
  const DomainIndex brief = engine_->find_domain(ns("pin"), "brief");
  for (int k = 200; k < 300; ++k) {
    put(*engine_, ns("pin"), "key" + std::to_string(k), value_of(k), brief);
  }
  fill("user", 0, 100);
  ASSERT_TRUE(engine_->shutdown());
  // Another order, one added, and one domain gone.
  config_.namespaces = {name_space("new", {domain("all", kMiB / 4)}),
                        name_space("user", {domain("all", kMiB / 2, PolicyKind::TinyLfu)}),
                        name_space("pin", {domain("lasting", kMiB)})};
  start();
  EXPECT_EQ(report().memory, "checked");
  EXPECT_EQ(report().memory_dropped, 100U);
  expect_all("pin", 0, 200);
  expect_none("pin", 200, 300);
  expect_all("user", 0, 100);
  fill("new", 0, 100);
  restart(true);
  EXPECT_EQ(report().memory, "clean") << report().memory_reason;
  expect_all("new", 0, 100);
  // A namespace that was away comes back empty.
  ASSERT_TRUE(engine_->shutdown());
  const NamespaceConfig user = config_.namespaces[1];
  config_.namespaces.erase(config_.namespaces.begin() + 1);
  start();
  expect_all("pin", 0, 200);
  ASSERT_TRUE(engine_->shutdown());
  config_.namespaces.push_back(user);
  start();
  expect_none("user", 0, 100);
  expect_all("pin", 0, 200);
}

TEST_F(AdoptionTest, AShrunkDomainKeepsWhatFits) {
  start();
  fill("pin", 0, 4000);
  const auto before = Counters::of(*engine_).domain("items", "pin", "lasting");
  ASSERT_TRUE(engine_->shutdown());
  config_.namespaces[0].domains[0].budget_bytes = kMiB / 4;
  start();
  EXPECT_EQ(report().memory, "clean");
  const auto after = Counters::of(*engine_).domain("items", "pin", "lasting");
  EXPECT_GT(after, 0.15 * before);
  EXPECT_LT(after, 0.4 * before);
  EXPECT_LE(Counters::of(*engine_).domain("used_bytes", "pin", "lasting"),
            static_cast<double>(kMiB / 4));
  fill("pin", 4000, 8000);
}

TEST_F(AdoptionTest, WhatDoesNotFitIsStartedAnewWithItsReason) {
  start();
  fill("pin", 0, 100);
  ASSERT_TRUE(engine_->shutdown());
  config_.memory_bytes = 5 * kMiB;
  start();
  EXPECT_EQ(report().memory, "cold");
  EXPECT_NE(report().memory_reason.find("memory was"), std::string::npos) << report().memory_reason;
  EXPECT_EQ(report().set_aside, 0U);
  expect_none("pin", 0, 100);
  fill("pin", 0, 100);
  expect_all("pin", 0, 100);
}

TEST_F(AdoptionTest, AnUnknownFormatIsSetAside) {
  start();
  fill("pin", 0, 100);
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  damage(offsetof(ArenaHeader, version), std::string("\x63\0\0\0", 4));
  start();
  EXPECT_EQ(report().memory, "cold");
  EXPECT_NE(report().memory_reason.find("version 99"), std::string::npos) << report().memory_reason;
  EXPECT_EQ(report().set_aside, 1U);
  EXPECT_TRUE(std::filesystem::exists(folder_.file("cache.arena.set-aside")));
  expect_none("pin", 0, 100);
}

TEST_F(AdoptionTest, AHalfMadeFileIsMadeAnew) {
  start();
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  damage(0, std::string(8, '\0'));
  start();
  EXPECT_EQ(report().memory, "new");
  EXPECT_EQ(report().set_aside, 0U);
}

TEST_F(AdoptionTest, MemoryOfAnotherBootIsNotTrusted) {
  start();
  fill("pin", 0, 100);
  ASSERT_TRUE(engine_->shutdown());
  engine_.reset();
  ArenaHeader header;
  std::ifstream(folder_.file("cache.arena"), std::ios::binary)
      .read(reinterpret_cast<char*>(&header), sizeof(header));
  header.boot_id.fill('0');
  header.checksum = header.sum();
  damage(0, std::string(reinterpret_cast<const char*>(&header), offsetof(ArenaHeader, state)));
  start();
  EXPECT_EQ(report().memory, "cold");
  expect_none("pin", 0, 100);
}

TEST_F(AdoptionTest, OneOwnerAtATime) {
  start();
  EXPECT_THROW(make_engine(config_, clock_, false), std::system_error);
}

// Random calls with a restart now and then, in order or not, against a plain map.
class RestartModel : public AdoptionTest, public ::testing::WithParamInterface<bool> {};

TEST_P(RestartModel, NothingIsWrongAndNothingComesBack) {
  const bool evicts = GetParam();
  std::mt19937_64 random(seed_of(evicts ? 41 : 42));
  config_.namespaces[0].domains[0].ttl_ms = 20'000;
  config_.namespaces[0].domains[0].ttl_jitter = 0;
  struct Stored {
    std::string value;
    std::uint64_t expires_ms;
  };
  std::array<std::unordered_map<std::string, Stored>, 2> model;
  const std::array<const char*, 2> names{"pin", "user"};
  const int keys = evicts ? 20'000 : 800;
  start();
  const auto check = [&](std::size_t n, const std::string& key) {
    const Got got = get(*engine_, ns(names[n]), key);
    const auto found = model[n].find(key);
    const std::uint64_t now = clock_.now_ms();
    if (got.status == CellStatus::HitDram) {
      ASSERT_NE(found, model[n].end()) << key << " came back";
      ASSERT_EQ(got.value, found->second.value);
      ASSERT_TRUE(found->second.expires_ms == 0 ||
                  now < found->second.expires_ms + ManualClock::kTickMs);
    } else if (!evicts && found != model[n].end()) {
      ASSERT_TRUE(found->second.expires_ms != 0 &&
                  now + 2 * ManualClock::kTickMs >= found->second.expires_ms)
          << key << " is gone";
    }
  };
  for (std::size_t step = 0; step < scaled(60'000); ++step) {
    const std::size_t n = random() % 2;
    const std::string key = "k" + std::to_string(random() % static_cast<unsigned>(keys));
    const std::uint64_t what = random() % 1000;
    if (what < 500) {
      const std::string value(random() % (random() % 200 == 0 ? 40'000 : 300),
                              static_cast<char>('a' + random() % 26));
      const std::uint64_t ttl = random() % 3 == 0 ? 1 + random() % 30'000 : 0;
      const WriteStatus status = put(*engine_, ns(names[n]), key, value, kNoDomain, ttl);
      if (status != WriteStatus::Stored) {
        ASSERT_TRUE(evicts);
        model[n].erase(key);
        continue;
      }
      const std::uint64_t lives = ttl != 0 ? ttl : n == 0 ? 20'000 : 0;
      model[n][key] = {value, lives == 0 ? 0 : clock_.now_ms() + lives};
    } else if (what < 650) {
      erase(*engine_, ns(names[n]), key);
      model[n].erase(key);
    } else if (what < 990) {
      check(n, key);
    } else if (what < 996) {
      clock_.advance(random() % 500);
      engine_->maintain();
    } else if (what < 997) {
      if (random() % 4 == 0) {
        engine_->flush(ns(names[n]));
        model[n].clear();
      }
    } else if (what < 998 && step % 3 == 0) {
      restart(random() % 2 == 0);
      ASSERT_NE(report().memory, "cold") << report().memory_reason;
      ASSERT_EQ(report().memory_dropped, 0U);
      if (random() % 5 == 0) {
        for (std::size_t m = 0; m < 2; ++m) {
          for (int k = 0; k < keys; ++k) check(m, "k" + std::to_string(k));
        }
      }
    }
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(All, RestartModel, ::testing::Bool(), [](const auto& with) {
  return with.param ? "Evicting" : "NeverEvicting";
});

}  // namespace
}  // namespace fc::testing
