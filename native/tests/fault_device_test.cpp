// The device that fails at will fails as it was told, and otherwise does not.
#include "testing/fault_device.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <ctime>
#include <random>
#include <thread>

#include "core/clock.hpp"
#include "device_support.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

constexpr std::uint64_t kDeviceBytes = 4 * kMiB;

class FaultDeviceTest : public ::testing::TestWithParam<IoKind> {
 protected:
  FaultDeviceTest() {
    DeviceOptions options;
    options.io = GetParam();
    options.io_threads = 4;
    real_ = open_device(directory_.file(), kDeviceBytes, options);
    device_ = std::make_unique<FaultDevice>(real_, seed_of(5));
    queue_ = device_->make_queue(256);
  }

  std::int64_t write(std::uint64_t offset, const AlignedBytes& bytes) {
    return run_request(*queue_, write_of(offset, bytes));
  }
  std::int64_t read(std::uint64_t offset, const AlignedBytes& bytes) {
    return run_request(*queue_, read_of(offset, bytes));
  }
  // What is on the device, past all rules.
  AlignedBytes on_device(std::uint64_t offset, std::size_t bytes) {
    AlignedBytes got(bytes);
    EXPECT_EQ(run_request(*real_->make_queue(1), read_of(offset, got)), got.size());
    return got;
  }
  static std::uint32_t bits_apart(const AlignedBytes& a, const AlignedBytes& b) {
    std::uint32_t apart = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      apart +=
          static_cast<std::uint32_t>(std::popcount(std::to_integer<std::uint8_t>(a[i] ^ b[i])));
    }
    return apart;
  }

  TemporaryDirectory directory_;
  std::shared_ptr<NvmDevice> real_;
  std::unique_ptr<FaultDevice> device_;
  std::unique_ptr<IoQueue> queue_;
};

TEST_P(FaultDeviceTest, WithoutRulesItIsTheDevice) {
  EXPECT_EQ(device_->path(), real_->path());
  EXPECT_EQ(device_->bytes(), real_->bytes());
  EXPECT_STREQ(device_->io(), real_->io());
  EXPECT_EQ(device_->direct(), real_->direct());
  const AlignedBytes data(2 * kBlock, 9);
  const AlignedBytes got(2 * kBlock);
  EXPECT_EQ(write(kBlock, data), data.size());
  EXPECT_EQ(read(kBlock, got), got.size());
  EXPECT_EQ(run_request(*queue_, sync_of()), 0);
  EXPECT_TRUE(got == data);
  const FaultCounts counts = device_->counts();
  EXPECT_EQ(counts.reads, 1U);
  EXPECT_EQ(counts.writes, 1U);
  EXPECT_EQ(counts.syncs, 1U);
  EXPECT_EQ(counts.read_bytes, 2 * kBlock);
  EXPECT_EQ(counts.written_bytes, 2 * kBlock);
}

TEST_P(FaultDeviceTest, FailsWithoutTouchingTheDevice) {
  const AlignedBytes old(kBlock, 1);
  EXPECT_EQ(write(0, old), std::int64_t{kBlock});
  const auto rule = device_->add(FaultRule::fail(ENOSPC).writes());
  const AlignedBytes data(kBlock, 2);
  EXPECT_EQ(write(0, data), -ENOSPC);
  const AlignedBytes got(kBlock);
  EXPECT_EQ(read(0, got), std::int64_t{kBlock}) << "reads are not meant";
  EXPECT_TRUE(got == old);
  EXPECT_EQ(device_->hits(rule), 1U);
  device_->remove(rule);
  EXPECT_EQ(write(0, data), std::int64_t{kBlock});
  EXPECT_EQ(device_->hits(rule), 1U);
}

TEST_P(FaultDeviceTest, RulesChooseByKindRangeRateAndTimes) {
  const AlignedBytes one(kBlock);
  const AlignedBytes two(2 * kBlock);
  device_->add(FaultRule::fail(EIO).syncs());
  EXPECT_EQ(run_request(*queue_, sync_of()), -EIO);
  EXPECT_EQ(read(0, one), std::int64_t{kBlock});
  device_->clear();

  device_->add(FaultRule::fail(EIO).range(2 * kBlock, kBlock));
  EXPECT_EQ(read(2 * kBlock, one), -EIO);
  EXPECT_EQ(read(kBlock, one), std::int64_t{kBlock});
  EXPECT_EQ(read(3 * kBlock, one), std::int64_t{kBlock});
  EXPECT_EQ(read(kBlock, two), -EIO) << "it touches the range";
  device_->clear();

  device_->add(FaultRule::fail(EIO).times(2));
  EXPECT_EQ(read(0, one), -EIO);
  EXPECT_EQ(read(0, one), -EIO);
  EXPECT_EQ(read(0, one), std::int64_t{kBlock});
  device_->clear();

  const auto rule = device_->add(FaultRule::fail(EIO).reads().rate(0.25));
  constexpr int kTries = 400;
  int failed = 0;
  for (int i = 0; i < kTries; ++i) failed += read(0, one) < 0 ? 1 : 0;
  EXPECT_EQ(device_->hits(rule), static_cast<std::uint64_t>(failed));
  EXPECT_GT(failed, kTries / 8);
  EXPECT_LT(failed, kTries / 2);
}

TEST_P(FaultDeviceTest, DelaysRunSideBySide) {
  constexpr std::uint64_t kDelay = 100 * kMillisecond;
  constexpr std::size_t kLate = 100;
  device_->add(FaultRule::delay(kDelay).range(0, kMiB));
  const AlignedBytes buffers((kLate + 1) * kBlock);
  std::vector<IoRequest> requests(kLate + 1);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].offset = i < kLate ? i * kBlock : 2 * kMiB;
    requests[i].data = buffers.data() + i * kBlock;
    requests[i].bytes = kBlock;
  }
  const std::uint64_t start = monotonic_ns();
  submit(*queue_, requests);
  EXPECT_EQ(wait_for(*queue_, 1).front(), &requests.back()) << "the one that is not late";
  wait_for(*queue_, kLate);
  const std::uint64_t passed = monotonic_ns() - start;
  EXPECT_GE(passed, kDelay);
  EXPECT_LT(passed, kLate / 10 * kDelay) << "the delays add up";
  for (const IoRequest& request : requests) EXPECT_TRUE(request.ok());
}

TEST_P(FaultDeviceTest, EndsInTheOrderOfTheDelays) {
  const AlignedBytes buffers(3 * kBlock);
  std::vector<IoRequest> requests(3);
  for (std::uint64_t i = 0; i < 3; ++i) {
    device_->add(FaultRule::delay((3 - i) * 5 * kMillisecond).range(i * kBlock, kBlock));
    requests[i] = read_of(i * kBlock, buffers);
    requests[i].data = buffers.data() + i * kBlock;
    requests[i].bytes = kBlock;
  }
  submit(*queue_, requests);
  const std::vector<IoRequest*> expected{&requests[2], &requests[1], &requests[0]};
  EXPECT_EQ(wait_for(*queue_, 3), expected);
}

TEST_P(FaultDeviceTest, DelaysAreExactAndCostNoProcessor) {
  constexpr std::uint64_t kDelay = 5 * kMillisecond;
  device_->add(FaultRule::delay(kDelay));
  const AlignedBytes buffer(kBlock);
  const auto processor_ns = [] {
    timespec used{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return static_cast<std::uint64_t>(used.tv_sec) * 1'000'000'000 +
           static_cast<std::uint64_t>(used.tv_nsec);
  };
  const std::uint64_t processor_before = processor_ns();
  std::uint64_t least_over = kForever;
  // The least of several: a busy machine may hold up any one.
  int tries = 0;
  for (; tries < 10 || (tries < 100 && least_over >= kMillisecond / 5); ++tries) {
    const std::uint64_t start = monotonic_ns();
    EXPECT_EQ(read(0, buffer), std::int64_t{kBlock});
    const std::uint64_t passed = monotonic_ns() - start;
    EXPECT_GE(passed, kDelay);
    least_over = std::min(least_over, passed - kDelay);
  }
  std::cout << "least overshoot " << least_over / 1000 << " us, processor "
            << (processor_ns() - processor_before) / 1000 << " us" << std::endl;
  EXPECT_LT(least_over, kMillisecond / 5);
  EXPECT_LT(processor_ns() - processor_before, static_cast<std::uint64_t>(tries) * kDelay / 2);
}

TEST_P(FaultDeviceTest, DrawsDelaysFromTheirQuantiles) {
  constexpr std::uint64_t kHour = 3600'000 * kMillisecond;
  // A step: one of ten never ends, as far as this test goes.
  device_->add(FaultRule::delay_quantiles({{0.9, 0}, {0.9, kHour}}));
  const AlignedBytes buffers(200 * kBlock);
  std::vector<IoRequest> requests(200);
  for (std::uint64_t i = 0; i < requests.size(); ++i) {
    requests[i].data = buffers.data() + i * kBlock;
    requests[i].bytes = kBlock;
  }
  submit(*queue_, requests);
  std::vector<IoRequest*> ended(256);
  std::size_t in_time = 0;
  while (const std::size_t count = queue_->wait(ended, 200 * kMillisecond)) in_time += count;
  EXPECT_LT(in_time, 195U);
  EXPECT_GT(in_time, 150U);
  queue_.reset();  // drops the others

  queue_ = device_->make_queue(1);
  device_->clear();
  device_->add(FaultRule::delay_quantiles({{0.0, 2 * kMillisecond}, {1.0, 4 * kMillisecond}}));
  const std::uint64_t start = monotonic_ns();
  for (int i = 0; i < 10; ++i) run_request(*queue_, requests.front());
  EXPECT_GE(monotonic_ns() - start, 21 * kMillisecond) << "ten draws from a slope, none the least";
}

TEST_P(FaultDeviceTest, ShortTransfersMoveAPart) {
  const AlignedBytes old(2 * kBlock, 1);
  EXPECT_EQ(write(0, old), old.size());
  device_->add(FaultRule::short_transfer(kBlock + 100));
  const AlignedBytes got(2 * kBlock);
  EXPECT_EQ(read(0, got), std::int64_t{kBlock} + 100);
  EXPECT_TRUE(got.all(1, 0, kBlock + 100));
  EXPECT_FALSE(got.all(1, kBlock + 100, 2 * kBlock)) << "the rest is not the file's";
  const AlignedBytes data(2 * kBlock, 2);
  EXPECT_EQ(write(0, data), std::int64_t{kBlock} + 100);
  const AlignedBytes now = on_device(0, 2 * kBlock);
  EXPECT_TRUE(now.all(2, 0, kBlock + 100));
  EXPECT_TRUE(now.all(1, kBlock + 100, 2 * kBlock));
  device_->clear();
  device_->add(FaultRule::short_transfer(0));
  EXPECT_EQ(read(0, got), 0);
  EXPECT_EQ(write(0, data), 0);
}

TEST_P(FaultDeviceTest, TornWritesReachTheDeviceInPart) {
  const AlignedBytes old(4 * kBlock, 1);
  const AlignedBytes data(4 * kBlock, 2);
  for (const int error : {0, EIO}) {
    for (const std::uint32_t kept : {0U, 512U, kBlock, 2 * kBlock + 17, 4 * kBlock}) {
      device_->clear();
      EXPECT_EQ(write(0, old), old.size());
      device_->add(FaultRule::torn(kept, error));
      EXPECT_EQ(write(0, data), error == 0 ? std::int64_t{data.size()} : -error);
      const AlignedBytes now = on_device(0, 4 * kBlock);
      EXPECT_TRUE(now.all(2, 0, kept)) << kept;
      EXPECT_TRUE(now.all(1, kept, 4 * kBlock)) << kept;
    }
  }
  const AlignedBytes got(kBlock);
  EXPECT_EQ(read(0, got), std::int64_t{kBlock}) << "reads are not torn";
}

TEST_P(FaultDeviceTest, CorruptsWhatIsReadOrWritten) {
  AlignedBytes data(2 * kBlock);
  data.fill_random(3);
  const AlignedBytes copy(2 * kBlock);
  std::copy_n(data.data(), data.size(), copy.data());
  EXPECT_EQ(write(0, data), data.size());
  device_->add(FaultRule::corrupt(3).reads());
  const AlignedBytes got(2 * kBlock);
  EXPECT_EQ(read(0, got), got.size());
  EXPECT_EQ(bits_apart(got, data), 3U);
  EXPECT_EQ(bits_apart(on_device(0, 2 * kBlock), data), 0U);
  device_->clear();
  device_->add(FaultRule::corrupt(1).writes());
  EXPECT_EQ(write(0, data), data.size());
  EXPECT_TRUE(data == copy) << "the caller's data are its own";
  EXPECT_EQ(bits_apart(on_device(0, 2 * kBlock), data), 1U);
}

TEST_P(FaultDeviceTest, AStallHoldsUntilTheRuleIsRemoved) {
  const AlignedBytes old(kBlock, 1);
  EXPECT_EQ(write(0, old), std::int64_t{kBlock});
  const auto rule = device_->add(FaultRule::stall().range(0, kBlock));
  const AlignedBytes data(kBlock, 2);
  IoRequest stalled = write_of(0, data);
  submit(*queue_, stalled);
  EXPECT_TRUE(device_->wait_hits(rule, 1));
  const AlignedBytes got(kBlock);
  EXPECT_EQ(read(kBlock, got), std::int64_t{kBlock}) << "others go on";
  IoRequest* ended = nullptr;
  EXPECT_EQ(queue_->wait({&ended, 1}, 5 * kMillisecond), 0U);
  EXPECT_TRUE(on_device(0, kBlock) == old) << "the device has not seen it";
  // While the queue's thread waits, or just before: either way it must hear of it.
  std::thread remover([&] { device_->remove(rule); });
  EXPECT_EQ(wait_for(*queue_, 1).front(), &stalled);
  remover.join();
  EXPECT_TRUE(stalled.ok());
  EXPECT_TRUE(on_device(0, kBlock) == data);
}

TEST_P(FaultDeviceTest, ActionsAddUp) {
  const AlignedBytes buffer(kBlock);
  device_->add(FaultRule::delay(2 * kMillisecond));
  device_->add(FaultRule::delay(6 * kMillisecond));
  device_->add(FaultRule::fail(EIO));
  device_->add(FaultRule::fail(ENOSPC));
  const std::uint64_t start = monotonic_ns();
  EXPECT_EQ(read(0, buffer), -EIO) << "the oldest";
  EXPECT_GE(monotonic_ns() - start, 6 * kMillisecond) << "the longest";
}

TEST_P(FaultDeviceTest, AChangeOfRulesIsNoWake) {
  const auto rule = device_->add(FaultRule::stall());
  const AlignedBytes buffer(kBlock);
  IoRequest stalled = read_of(0, buffer);
  submit(*queue_, stalled);
  const auto other = device_->add(FaultRule::fail(EIO).syncs());
  IoRequest* ended = nullptr;
  const std::uint64_t start = monotonic_ns();
  std::thread remover([&] { device_->remove(other); });
  EXPECT_EQ(queue_->wait({&ended, 1}, 10 * kMillisecond), 0U);
  EXPECT_GE(monotonic_ns() - start, 10 * kMillisecond);
  remover.join();
  queue_->wake();
  EXPECT_EQ(queue_->wait({&ended, 1}, kForever), 0U) << "a wake is one";
  device_->remove(rule);
  EXPECT_EQ(wait_for(*queue_, 1).front(), &stalled);
}

TEST_P(FaultDeviceTest, AQueueEndsWithRequestsHeld) {
  const AlignedBytes buffers(3 * kBlock);
  device_->add(FaultRule::stall().range(0, kBlock));
  device_->add(FaultRule::delay(3600'000 * kMillisecond).range(kBlock, kBlock));
  std::vector<IoRequest> requests(3);
  for (std::uint64_t i = 0; i < 3; ++i) {
    requests[i] = read_of(i * kBlock, buffers);
    requests[i].data = buffers.data() + i * kBlock;
    requests[i].bytes = kBlock;
  }
  submit(*queue_, requests);
  queue_.reset();
}

TEST_P(FaultDeviceTest, RulesChangeUnderTraffic) {
  std::atomic<bool> stop{false};
  std::thread changer([&] {
    std::mt19937_64 random(seed_of(8));
    while (!stop.load()) {
      const FaultRule rules[] = {FaultRule::delay(random() % kMillisecond),
                                 FaultRule::fail(EIO).rate(0.3),
                                 FaultRule::stall().rate(0.3),
                                 FaultRule::corrupt(1).rate(0.3),
                                 FaultRule::torn(512).rate(0.3),
                                 FaultRule::short_transfer(kBlock).rate(0.3)};
      const auto first = device_->add(rules[random() % std::size(rules)]);
      const auto second = device_->add(rules[random() % std::size(rules)]);
      std::this_thread::yield();
      device_->remove(first);
      if (random() % 2 == 0) {
        device_->clear();
      } else {
        device_->remove(second);
      }
    }
  });
  constexpr std::size_t kDepth = 32;
  const AlignedBytes buffers(kDepth * 2 * kBlock);
  std::vector<IoRequest> requests(kDepth);
  std::vector<IoRequest*> idle;
  for (std::size_t i = 0; i < kDepth; ++i) {
    requests[i].kind = i % 3 == 0 ? IoRequest::Kind::Write : IoRequest::Kind::Read;
    requests[i].offset = i * 2 * kBlock;
    requests[i].data = buffers.data() + i * 2 * kBlock;
    requests[i].bytes = 2 * kBlock;
    idle.push_back(&requests[i]);
  }
  std::vector<IoRequest*> ended(kDepth);
  for (std::size_t done = 0; done < scaled(3000);) {
    queue_->submit(idle);
    idle.clear();
    const std::size_t count = queue_->wait(ended, kForever);
    idle.assign(ended.begin(), ended.begin() + static_cast<std::ptrdiff_t>(count));
    done += count;
  }
  stop.store(true);
  changer.join();
  device_->clear();
  wait_for(*queue_, kDepth - idle.size());
}

INSTANTIATE_TEST_SUITE_P(Queues, FaultDeviceTest, ::testing::Values(IoKind::Uring, IoKind::Threads),
                         [](const auto& given) {
                           return std::string(given.param == IoKind::Uring ? "uring" : "threads");
                         });

}  // namespace
}  // namespace fc::testing
