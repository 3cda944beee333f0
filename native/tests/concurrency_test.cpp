// Many threads at once, with values that tell when they are wrong: each names its key and version
// and is torn if any byte is off. Run under both sanitizers.
#include <array>
#include <atomic>
#include <mutex>
#include <set>
#include <thread>

#include "nvm_support.hpp"

namespace fc::testing {
namespace {

constexpr std::uint64_t kValueBytesLeast = 16;

std::string key_name(std::size_t number) {
  return "key " + std::to_string(number);
}

// Eight bytes of key number, eight of version, then a pattern of both.
std::string self_verifying(std::size_t number, std::uint64_t version, std::size_t bytes) {
  std::string value = patterned(key_name(number), version, std::max(bytes, kValueBytesLeast));
  std::memcpy(value.data(), &number, 8);
  std::memcpy(value.data() + 8, &version, 8);
  return value;
}

// The version that a value carries; fails when it is torn or another key's.
std::uint64_t verified_version(std::size_t number, const std::string& value) {
  std::size_t said = 0;
  std::uint64_t version = 0;
  if (value.size() < kValueBytesLeast) {
    ADD_FAILURE() << "a value of " << value.size() << " bytes";
    return 0;
  }
  std::memcpy(&said, value.data(), 8);
  std::memcpy(&version, value.data() + 8, 8);
  EXPECT_EQ(said, number) << "another key's value";
  EXPECT_TRUE(value == self_verifying(number, version, value.size())) << "torn";
  return version;
}

// Sizes from small to several segments; by version, so that overwrites change the size.
std::size_t size_of(std::size_t number, std::uint64_t version) {
  const std::uint64_t mixed = (number * 31 + version * 17) % 64;
  return mixed == 0 ? 50'000 : mixed < 4 ? 6'000 : 16 + mixed * 5;
}

struct Load {
  std::size_t keys;
  std::size_t writers;
  std::size_t readers;
  std::size_t rounds;  // of each writer
};

class Concurrent : public ::testing::Test {
 protected:
  void start(EngineConfig config) {
    engine_ = make_engine(config, clock_, false);
    ns_ = engine_->find_namespace("pin");
    other_ns_ = engine_->find_namespace("user");
  }
  static EngineConfig tiny_config(PolicyKind policy) {
    return engine_config(8 * kMiB,
                         {name_space("pin", {domain("lasting", 640 * kKiB, policy),
                                             domain("brief", 320 * kKiB, policy, 3'000, 0.1)}),
                          name_space("user", {domain("all", 320 * kKiB, policy)})});
  }
  // With a tier below that evicts, keeps and promotes.
  EngineConfig tiny_config_with_nvm(PolicyKind policy, IoKind io) {
    EngineConfig config = tiny_config(policy);
    config.memory_bytes = 24 * kMiB;
    config.nvm = nvm_config(folder_.file("nvm"), 40);
    config.nvm.io = io;
    config.namespaces[0] = with_nvm(config.namespaces[0], 30, PromotionKind::SecondHit);
    config.namespaces[1] = with_nvm(config.namespaces[1], 6, PromotionKind::Always);
    return config;
  }
  // Runs `body(index)` in `threads` threads until all have returned.
  template <class Body>
  static void run_all(std::size_t threads, Body body) {
    std::vector<std::thread> running;
    for (std::size_t i = 0; i < threads; ++i) running.emplace_back(body, i);
    for (std::thread& thread : running) thread.join();
  }

  Folder folder_;
  ManualClock clock_;
  std::unique_ptr<Engine> engine_;
  NamespaceIndex ns_ = kNoNamespace;
  NamespaceIndex other_ns_ = kNoNamespace;
};

// One writer a key (its versions are in order), readers of all, operators in between.
//
// For each key `acknowledged` is the version that the last finished call has made the oldest that
// may show: a put's own, or after an erase the next one to come. A reader notes it before it asks;
// whatever it gets must not be older.
struct ChurnCase {
  friend void PrintTo(const ChurnCase& with, std::ostream* to) { *to << with.name; }
  std::string name;
  PolicyKind policy;
  bool nvm = false;
  IoKind io = IoKind::Auto;
  std::uint32_t instances = 1;
};
class Churn : public Concurrent, public ::testing::WithParamInterface<ChurnCase> {};

TEST_P(Churn, NoReaderSeesAnOlderVersionThanWasAcknowledged) {
  constexpr std::size_t kKeys = 1'500;
  constexpr std::size_t kWriters = 2;
  constexpr std::size_t kReaders = 2;
  const std::size_t rounds = scaled(12'000);
  EngineConfig config = GetParam().nvm ? tiny_config_with_nvm(GetParam().policy, GetParam().io)
                                       : tiny_config(GetParam().policy);
  const std::uint32_t instances = GetParam().instances;
  config.instances = instances;
  config.memory_bytes *= instances;
  if (GetParam().nvm) {
    // The least that each may have.
    config.namespaces[1].nvm.budget_bytes *= instances;
    config.nvm.devices[0].bytes += (instances - 1) * 8 * kRegionBytes;
  }
  const std::uint64_t brief_least = (instances == 1 ? 100 : 200) * kKiB;
  start(config);
  const std::uint64_t seed = seed_of(42);
  std::vector<std::atomic<std::uint64_t>> acknowledged(kKeys);
  std::atomic<std::size_t> writers_left{kWriters};
  std::atomic<std::uint64_t> hits{0};
  std::atomic<std::uint64_t> nvm_hits{0};
  const DomainIndex brief = engine_->find_domain(ns_, "brief");
  const DomainIndex lasting = engine_->find_domain(ns_, "lasting");

  const auto write = [&](std::size_t writer) {
    std::mt19937_64 random(seed + writer);
    std::vector<std::uint64_t> versions(kKeys, 0);
    for (std::size_t round = 0; round < rounds; ++round) {
      const std::size_t base = random() % kKeys;
      std::vector<std::size_t> numbers;
      for (std::size_t i = 0; i < 8; ++i) {
        const std::size_t number = (base + i * 97) % kKeys;
        if (number % kWriters == writer) numbers.push_back(number);
      }
      if (random() % 10 == 0) {
        for (const std::size_t number : numbers) {
          erase(*engine_, ns_, key_name(number));
          acknowledged[number].store(++versions[number]);
        }
        continue;
      }
      for (const std::size_t number : numbers) {
        const std::uint64_t version = ++versions[number];
        const std::string value = self_verifying(number, version, size_of(number, version));
        const DomainIndex to = random() % 3 == 0 ? brief : lasting;
        // Rejected or stored: what was older is gone.
        static_cast<void>(put(*engine_, ns_, key_name(number), value, to,
                              random() % 5 == 0 ? 200 + random() % 4'000 : 0));
        acknowledged[number].store(version);
      }
    }
    --writers_left;
  };
  const auto read = [&](std::size_t reader) {
    std::mt19937_64 random(seed + 100 + reader);
    while (writers_left.load() != 0) {
      std::vector<std::string> keys;
      std::vector<std::uint64_t> least;
      std::vector<std::size_t> numbers;
      for (std::size_t i = 0; i < 100; ++i) numbers.push_back(random() % kKeys);
      for (const std::size_t number : numbers) keys.push_back(key_name(number));
      for (const std::size_t number : numbers) least.push_back(acknowledged[number].load());
      const std::vector<std::string_view> views(keys.begin(), keys.end());
      const std::vector<Got> got = get_all(*engine_, ns_, views);
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (!carries_value(got[i].status)) {
          ASSERT_EQ(got[i].status, CellStatus::Miss);
          continue;
        }
        hits.fetch_add(1, std::memory_order_relaxed);
        if (got[i].status == CellStatus::HitNvm) nvm_hits.fetch_add(1, std::memory_order_relaxed);
        ASSERT_GE(verified_version(numbers[i], got[i].value), least[i])
            << keys[i] << ": older than was acknowledged";
      }
      if (HasFatalFailure()) return;
    }
  };
  const auto operate = [&] {
    std::mt19937_64 random(seed + 200);
    while (writers_left.load() != 0) {
      switch (random() % 8) {
        case 0:
          engine_->flush(random() % 2 == 0 ? ns_ : other_ns_);
          break;
        case 1:
          engine_->resize(lasting, 200 * kKiB + random() % (400 * kKiB));
          break;
        case 2:
          engine_->resize(brief, brief_least + random() % (200 * kKiB));
          break;
        case 3:
          clock_.advance(random() % 300);
          break;
        case 4: {
          Counters::of(*engine_);
          put(*engine_, other_ns_, "k" + std::to_string(random() % 100), std::string(3'000, 'u'));
          break;
        }
        default:
          engine_->maintain();
          break;
      }
      std::this_thread::yield();
    }
  };
  run_all(kWriters + kReaders + 1, [&](std::size_t i) {
    if (i < kWriters) {
      write(i);
    } else if (i < kWriters + kReaders) {
      read(i - kWriters);
    } else {
      operate();
    }
  });
  EXPECT_GT(hits.load(), 1'000U);
  if (GetParam().nvm) {
    EXPECT_GT(nvm_hits.load(), 100U);
  }
  for (const NamespaceIndex ns : {ns_, other_ns_}) engine_->flush(ns);
  const Counters counters = Counters::of(*engine_);
  EXPECT_EQ(counters.sum("feature_cache_domain_items"), 0);
  EXPECT_EQ(counters.sum("feature_cache_domain_live_bytes"), 0);
  EXPECT_EQ(counters.sum("feature_cache_domain_payload_bytes"), 0);
  EXPECT_EQ(counters.sum("feature_cache_domain_used_bytes"), 0);
  if (!GetParam().nvm) return;
  EXPECT_TRUE(eventually(
      [&] { return Counters::of(*engine_).sum("feature_cache_namespace_nvm_used_bytes") == 0; }));
  EXPECT_EQ(Counters::of(*engine_).sum("feature_cache_namespace_nvm_items"), 0);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Churn,
    ::testing::Values(ChurnCase{"s3fifo", PolicyKind::S3Fifo}, ChurnCase{"lru", PolicyKind::Lru},
                      ChurnCase{"fifo", PolicyKind::Fifo},
                      ChurnCase{"tinylfu", PolicyKind::TinyLfu},
                      ChurnCase{"s3fifo_nvm", PolicyKind::S3Fifo, true},
                      ChurnCase{"lru_nvm_threads", PolicyKind::Lru, true, IoKind::Threads},
                      ChurnCase{"three_instances", PolicyKind::S3Fifo, false, IoKind::Auto, 3},
                      ChurnCase{"three_instances_nvm", PolicyKind::S3Fifo, true, IoKind::Auto, 3}),
    [](const auto& tested) { return tested.param.name; });

// Nobody evicts from NVM here and nobody is faster than the device: whatever is put is there at
// every moment, on its way down, on the device and on its way up.
TEST_F(Concurrent, APresentKeyNeverReadsAsAMissBetweenTheTiers) {
  constexpr std::size_t kKeys = 4'000;
  const std::size_t rounds = scaled(20'000);
  EngineConfig config = tiny_config_with_nvm(PolicyKind::S3Fifo, IoKind::Auto);
  config.expected_item_bytes = 300;
  config.nvm = nvm_config(folder_.file("nvm"), 400);
  config.nvm.write_buffers = 48;
  config.namespaces[0].nvm.budget_bytes = 360ull * kRegionBytes;
  start(config);
  const DomainIndex lasting = engine_->find_domain(ns_, "lasting");
  std::vector<std::uint64_t> versions(kKeys, 1);
  const auto write_one = [&](std::size_t number) {
    const std::uint64_t version = versions[number]++;
    ASSERT_EQ(put(*engine_, ns_, key_name(number), self_verifying(number, version, 200), lasting),
              WriteStatus::Stored);
  };
  const auto not_admitted = [&] {
    return Counters::of(*engine_).sum("feature_cache_namespace_nvm_not_admitted_total");
  };
  const auto catch_up = [&] {
    ASSERT_TRUE(eventually([&] {
      const Counters counters = Counters::of(*engine_);
      return counters.at("feature_cache_nvm_device_regions{device=" + folder_.file("nvm") +
                         ",state=writing}") == 0;
    }));
  };
  for (std::size_t number = 0; number < kKeys; ++number) {
    write_one(number);
    if (number % 500 == 0) catch_up();
  }
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> nvm_hits{0};
  std::mutex missed_mutex;
  std::set<std::string> missed;
  run_all(3, [&](std::size_t thread) {
    std::mt19937_64 random(seed_of(11) + thread);
    if (thread == 0) {
      for (std::size_t round = 0; round < rounds; ++round) {
        write_one(random() % kKeys);
        if (round % 500 == 0) catch_up();
        if (round % 50 == 0) engine_->maintain();  // what was read comes up
      }
      done = true;
      return;
    }
    while (!done.load()) {
      std::vector<std::string> keys;
      for (std::size_t i = 0; i < 50; ++i) keys.push_back(key_name(random() % kKeys));
      const std::vector<std::string_view> views(keys.begin(), keys.end());
      const std::vector<Got> got = get_all(*engine_, ns_, views);
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (got[i].status == CellStatus::HitNvm) ++nvm_hits;
        if (got[i].status != CellStatus::Miss) continue;
        const std::lock_guard lock(missed_mutex);
        missed.insert(keys[i]);
      }
    }
  });
  ASSERT_EQ(not_admitted(), 0) << "the test was faster than the device";
  EXPECT_GT(nvm_hits.load(), 1'000U);
  EXPECT_GT(Counters::of(*engine_).sum("feature_cache_namespace_nvm_promoted_total"), 100);
  // A key may be lost to a write of another one of its tag: of 24,000 writes among so few, one at
  // the most.
  EXPECT_LE(missed.size(), 1U);
}

// Fetches race with puts and deletes of the same keys: an install never undoes either.
TEST_F(Concurrent, InstallsNeverUndoAcknowledgedWrites) {
  constexpr std::size_t kKeys = 64;
  const std::size_t rounds = scaled(150'000);
  start(tiny_config(PolicyKind::S3Fifo));
  std::vector<std::atomic<std::uint64_t>> store(kKeys);  // the feature store's versions
  std::atomic<std::uint64_t> installed{0};
  std::atomic<std::uint64_t> lost{0};
  std::atomic<bool> done{false};
  run_all(3, [&](std::size_t thread) {
    std::mt19937_64 random(seed_of(7) + thread);
    if (thread == 0) {
      // The source of truth: writes the store, then the cache (a put, or an invalidation).
      // On a busy machine the readers may hardly run: go on until races were met, within a bound.
      const auto enough = [&] { return installed.load() > 100 && lost.load() > 10; };
      for (std::size_t round = 0; round < rounds || (!enough() && round < 50 * rounds); ++round) {
        const std::size_t number = random() % kKeys;
        const std::uint64_t version = store[number].load() + 1;
        store[number].store(version);
        const std::string key = key_name(number);
        if (random() % 2 == 0) {
          put(*engine_, ns_, key, self_verifying(number, version, 40));
        } else {
          erase(*engine_, ns_, key);
        }
        // Acknowledged: from here on nobody may see an older one.
        const Got got = get(*engine_, ns_, key);
        if (got.status == CellStatus::HitDram) {
          ASSERT_EQ(verified_version(number, got.value), version) << key;
        }
        if (random() % 4 == 0) std::this_thread::yield();
      }
      done.store(true);
      return;
    }
    while (!done.load()) {
      const std::size_t number = random() % kKeys;
      const std::string key = key_name(number);
      const Got got = get(*engine_, ns_, key);
      if (got.status != CellStatus::Miss) continue;
      const std::uint64_t fetched = store[number].load();
      if (fetched == 0) continue;
      for (std::uint64_t spins = random() % 50; spins > 0; --spins) std::this_thread::yield();
      const std::string value = self_verifying(number, fetched, 40);
      if (install(*engine_, ns_, key, value, *got.token) == InstallStatus::Installed) {
        installed.fetch_add(1);
      } else {
        lost.fetch_add(1);
      }
    }
  });
  EXPECT_GT(installed.load(), 100U);
  EXPECT_GT(lost.load(), 10U) << "no race was tested";
}

// The index is full of others that come and go, so entries move between buckets all the time; keys
// that nobody removes must be found by every get.
TEST_F(Concurrent, MovesOfTheIndexNeverHideAPresentKey) {
  EngineConfig config = engine_config(
      3 * kMiB, {name_space("pin", {domain("steady", 512 * kKiB), domain("churned", 1 * kMiB)}),
                 name_space("user", {domain("all", 64 * kKiB)})});
  config.expected_item_bytes = 120;
  start(config);
  const DomainIndex steady = engine_->find_domain(ns_, "steady");
  const DomainIndex churned = engine_->find_domain(ns_, "churned");
  const auto budget = [&](const char* name) {
    return static_cast<std::size_t>(Counters::of(*engine_).domain("entry_budget", "pin", name));
  };
  const std::size_t steady_keys = budget("steady") * 9 / 10;
  const std::size_t churned_keys = budget("churned") * 3;
  for (std::size_t i = 0; i < steady_keys; ++i) {
    ASSERT_EQ(put(*engine_, ns_, key_name(i), self_verifying(i, 1, 16), steady),
              WriteStatus::Stored);
  }
  const std::size_t rounds = scaled(250'000);
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> gets{0};
  run_all(3, [&](std::size_t thread) {
    std::mt19937_64 random(seed_of(9) + thread);
    if (thread == 0) {
      for (std::size_t round = 0; round < rounds; ++round) {
        put(*engine_, ns_, "churn " + std::to_string(random() % churned_keys), "x", churned);
      }
      done.store(true);
      return;
    }
    while (!done.load()) {
      std::vector<std::string> keys;
      std::vector<std::size_t> numbers;
      for (std::size_t i = 0; i < 200; ++i) {
        numbers.push_back(random() % steady_keys);
        keys.push_back(key_name(numbers.back()));
      }
      const std::vector<std::string_view> views(keys.begin(), keys.end());
      const std::vector<Got> got = get_all(*engine_, ns_, views);
      for (std::size_t i = 0; i < got.size(); ++i) {
        ASSERT_EQ(got[i].status, CellStatus::HitDram) << keys[i] << " is hidden";
        ASSERT_EQ(verified_version(numbers[i], got[i].value), 1U);
      }
      gets.fetch_add(got.size());
    }
  });
  const Counters counters = Counters::of(*engine_);
  EXPECT_GT(counters.at("feature_cache_index_moves_total"), 100) << "nothing moved";
  EXPECT_GT(gets.load(), 5'000U);
}

// Overwrites of a few keys by all threads at once: the index never holds a key twice.
TEST_F(Concurrent, AKeyIsNeverInTheIndexTwice) {
  constexpr std::size_t kKeys = 20;
  start(tiny_config(PolicyKind::S3Fifo));
  const std::array<DomainIndex, 2> to{engine_->find_domain(ns_, "lasting"),
                                      engine_->find_domain(ns_, "brief")};
  run_all(4, [&](std::size_t thread) {
    std::mt19937_64 random(seed_of(3) + thread);
    for (std::size_t round = 0; round < scaled(40'000); ++round) {
      const std::size_t number = random() % kKeys;
      put(*engine_, ns_, key_name(number), self_verifying(number, round, 100), to[random() % 2]);
    }
  });
  EXPECT_EQ(Counters::of(*engine_).sum("feature_cache_domain_items"), kKeys);
  for (std::size_t number = 0; number < kKeys; ++number) {
    EXPECT_EQ(get(*engine_, ns_, key_name(number)).status, CellStatus::HitDram);
    erase(*engine_, ns_, key_name(number));
    EXPECT_EQ(get(*engine_, ns_, key_name(number)).status, CellStatus::Miss) << "a second entry";
  }
  EXPECT_EQ(Counters::of(*engine_).sum("feature_cache_domain_items"), 0);
}

// Readers that never rest do not keep writers from memory: segments come back from limbo.
TEST_F(Concurrent, WritersGetMemoryWhileReadersNeverRest) {
  start(engine_config(2 * kMiB, {name_space("pin", {domain("all", 256 * kKiB)})}));
  std::atomic<bool> done{false};
  run_all(3, [&](std::size_t thread) {
    if (thread == 0) {
      for (std::size_t i = 0; i < scaled(20'000); ++i) {
        ASSERT_EQ(put(*engine_, ns_, key_name(i % 3'000), self_verifying(i % 3'000, i, 1'000)),
                  WriteStatus::Stored);
      }
      done.store(true);
      return;
    }
    std::vector<std::string> keys;
    for (std::size_t i = 0; i < 3'000; ++i) keys.push_back(key_name(i));
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    while (!done.load()) get_all(*engine_, ns_, views);
  });
}

// The engine's own thread lets time pass, too.
TEST_F(Concurrent, BackgroundThreadGivesExpiredMemoryBack) {
  EngineConfig config =
      engine_config(4 * kMiB, {name_space("pin", {domain("all", kMiB, PolicyKind::S3Fifo, 400)})});
  const BootClock clock;
  const std::unique_ptr<Engine> engine = make_engine(config, clock, true);
  const NamespaceIndex ns = engine->find_namespace("pin");
  for (std::size_t i = 0; i < 1'000; ++i) {
    ASSERT_EQ(put(*engine, ns, key_name(i), self_verifying(i, 1, 400)), WriteStatus::Stored);
  }
  ASSERT_GT(Counters::of(*engine).domain("used_bytes", "pin", "all"), 300'000);
  double used = 1;
  for (int tries = 0; tries < 200 && used > 0; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    used = Counters::of(*engine).domain("used_bytes", "pin", "all");
  }
  EXPECT_EQ(used, 0);
}

}  // namespace
}  // namespace fc::testing
