// Scans and copies of the bundled engine, of one instance and of several, while others write.

#include "copy_contract.hpp"

#include <atomic>
#include <random>
#include <thread>

#include "testing/sequence_point.hpp"

namespace fc::testing {
namespace {

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(EngineContract);

EngineFactory over(std::uint32_t instances) {
  return {"over" + std::to_string(instances),
          [instances](const EngineConfig& config, const Clock& clock) {
            EngineConfig whole = config;
            whole.instances = instances;
            whole.memory_bytes += (instances - 1) * 2 * kMiB;
            return make_engine(whole, clock, false);
          }};
}

INSTANTIATE_TEST_SUITE_P(Bundled, CopyContract, ::testing::Values(over(1), over(3)),
                         [](const auto& with) { return with.param.name; });

// Keys that nobody touches are found by every scan, whatever is written, moved and evicted
// meanwhile, and what a scan gives of the others is a value that was put.
TEST_P(CopyContract, AScanIsRightWhileOthersWrite) {
  constexpr int kStill = 500;
  constexpr std::uint64_t kVersions = 8;
  for (int i = 0; i < kStill; ++i) {
    put_into(user_, all(), "still " + std::to_string(i), "still");
  }
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (int t = 0; t < 2; ++t) {
    writers.emplace_back([&, t] {
      std::mt19937_64 random(static_cast<std::uint64_t>(t));
      while (!stop) {
        const std::string key = "moving " + std::to_string(random() % 3000);
        const std::uint64_t version = random() % kVersions;
        if (random() % 4 == 0) {
          testing::erase(*engine_, pin_, key);
        } else {
          testing::put(*engine_, pin_, key, patterned(key, version, 50 + random() % 400));
        }
      }
    });
  }
  std::size_t worst = kStill;
  for (int round = 0; round < 8; ++round) {
    std::size_t still = 0;
    for (const auto& [key, item] : scanned(everything())) {
      if (key.starts_with("still")) {
        EXPECT_EQ(item.value, "still");
        ++still;
      } else {
        bool known = false;
        for (std::uint64_t version = 0; version < kVersions && !known; ++version) {
          known = item.value == patterned(key, version, item.value.size());
        }
        EXPECT_TRUE(known) << key;
      }
    }
    worst = std::min(worst, still);
  }
  stop = true;
  for (std::thread& writer : writers) writer.join();
  // One may be moved from before the scan to behind it, or back: rare, and no more than missed.
  EXPECT_GE(worst, kStill * 99 / 100);
}

// A delete that comes between a copy's snapshot and its install always wins.
TEST_P(CopyContract, CopiesNeverBringBackWhatWasDeleted) {
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> deletes{0};
  std::atomic<std::uint64_t> copied{0};
  std::thread copier([&] {
    while (!stop) {
      const auto tokens = engine_->tokens();
      // What the peer has is as old as the moment when it is read, which is after the snapshot.
      const std::uint64_t read = deletes.load();
      copied += copy_in(*tokens, "k", std::to_string(read)).installed;
    }
  });
  for (std::uint64_t number = 1; number <= 2000 || copied < 100; ++number) {
    deletes.store(number);
    testing::erase(*engine_, pin_, "k");
    const Got got = get(*engine_, pin_, "k");
    if (got.status == CellStatus::HitDram) {
      EXPECT_GE(std::stoull(got.value), number) << "read by the peer before this delete";
    }
  }
  stop = true;
  copier.join();
}

class CopySequences : public ::testing::Test {
 protected:
  ManualClock clock_;
  std::unique_ptr<Engine> engine_ = make_engine(
      engine_config(8 * kMiB, {name_space("pin", {domain("all", 2 * kMiB)})}), clock_, false);
};

// What a scan has loaded may be flushed and its segments reused before it copies: it is left out.
TEST_F(CopySequences, AFlushDuringAScan) {
  testing::put(*engine_, 0, "k", "old");
  SequencePoints points;
  points.block("scan:loaded");
  ScanBatch batch;
  ScanFilter filter;
  filter.domains = {0};
  std::uint64_t cursor = 0;
  std::thread scanner([&] {
    while (cursor != kScanEnd) cursor = engine_->scan(cursor, filter, 1 << 20, batch);
  });
  ASSERT_TRUE(points.wait_blocked("scan:loaded"));
  std::thread flusher([&] { engine_->flush(0); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  points.release("scan:loaded");
  scanner.join();
  flusher.join();
  // Before or after: never a piece of something else.
  if (batch.items() != 0) {
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(batch.bytes.data()), 4), "kold");
  }
}

}  // namespace
}  // namespace fc::testing
