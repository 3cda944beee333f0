// What every queue of every device keeps to: io_uring and threads, direct and buffered.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "core/clock.hpp"
#include "device_support.hpp"
#include "nvm/transfer.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

constexpr std::uint64_t kDeviceBytes = 8 * kMiB;
constexpr std::uint64_t kDeviceBlocks = kDeviceBytes / kBlock;

struct Variant {
  IoKind io = IoKind::Uring;
  bool direct = true;
};

class DeviceContract : public ::testing::TestWithParam<Variant> {
 protected:
  DeviceOptions options() const {
    DeviceOptions made;
    made.io = GetParam().io;
    made.direct = GetParam().direct;
    made.io_threads = 4;
    return made;
  }
  std::shared_ptr<NvmDevice> open() const {
    return open_device(directory_.file(), kDeviceBytes, options());
  }

  TemporaryDirectory directory_;
};

TEST_P(DeviceContract, SaysWhatItGot) {
  const auto device = open();
  EXPECT_EQ(device->path(), directory_.file());
  EXPECT_EQ(device->bytes(), kDeviceBytes);
  EXPECT_STREQ(device->io(), GetParam().io == IoKind::Uring ? "io_uring" : "threads");
  if (device->direct() == GetParam().direct) {
    EXPECT_EQ(device->fallback(), "");
  } else {
    EXPECT_EQ(device->fallback(), "O_DIRECT: Invalid argument");
  }
}

TEST_P(DeviceContract, ReadsBackWhatWasWritten) {
  const auto device = open();
  const auto queue = device->make_queue(32);
  std::mt19937_64 random(seed_of(11));
  std::map<std::uint64_t, AlignedBytes> model;
  for (std::size_t round = 0; round < scaled(20); ++round) {
    std::vector<IoRequest> writes;
    std::set<std::uint64_t> chosen;  // no two requests of a batch touch one block
    while (chosen.size() < 16) chosen.insert(random() % kDeviceBlocks);
    for (const std::uint64_t block : chosen) {
      AlignedBytes& bytes = model.insert_or_assign(block, AlignedBytes(kBlock)).first->second;
      bytes.fill_random(random());
      writes.push_back(write_of(block * kBlock, bytes));
    }
    submit(*queue, writes);
    for (const IoRequest* ended : wait_for(*queue, writes.size())) EXPECT_TRUE(ended->ok());
  }
  EXPECT_TRUE(run_request(*queue, sync_of()) == 0);
  for (const auto& [block, bytes] : model) {
    const AlignedBytes got(kBlock);
    EXPECT_EQ(run_request(*queue, read_of(block * kBlock, got)), std::int64_t{kBlock});
    EXPECT_TRUE(got == bytes) << "block " << block;
  }
}

TEST_P(DeviceContract, MovesManyBlocksInOneRequest) {
  const auto device = open();
  const auto queue = device->make_queue(4);
  const AlignedBytes region(3 * kMiB + kBlock);
  region.fill_random(7);
  EXPECT_EQ(run_request(*queue, write_of(kMiB, region)), region.size());
  const AlignedBytes got(region.size());
  EXPECT_EQ(run_request(*queue, read_of(kMiB, got)), region.size());
  EXPECT_TRUE(got == region);
}

TEST_P(DeviceContract, EndsEachRequestOnce) {
  constexpr std::size_t kDepth = 64;
  const auto device = open();
  const auto queue = device->make_queue(kDepth);
  std::mt19937_64 random(seed_of(12));
  const AlignedBytes buffers(kDepth * kBlock);
  std::vector<IoRequest> requests(kDepth);
  std::vector<IoRequest*> idle;
  for (std::size_t i = 0; i < kDepth; ++i) {
    requests[i].data = buffers.data() + i * kBlock;
    requests[i].bytes = kBlock;
    idle.push_back(&requests[i]);
  }
  const std::size_t wanted = scaled(5000);
  std::size_t submitted = 0;
  std::size_t done = 0;
  std::vector<IoRequest*> ended(kDepth);
  while (done < wanted) {
    const std::size_t count = std::min(random() % (idle.size() + 1), wanted - submitted);
    const std::span batch = std::span(idle).last(count);
    for (IoRequest* request : batch) {
      request->offset = random() % kDeviceBlocks * kBlock;
      request->result = -1;
      request->owner = queue.get();  // under way
    }
    queue->submit(batch);
    submitted += count;
    idle.resize(idle.size() - count);
    const std::size_t room = 1 + random() % kDepth;
    const std::uint64_t timeout = random() % 3 == 0 || submitted == done ? 0 : kForever;
    const std::size_t got = queue->wait(std::span(ended).first(room), timeout);
    EXPECT_LE(got, room);
    for (std::size_t i = 0; i < got; ++i) {
      EXPECT_TRUE(ended[i]->ok());
      EXPECT_EQ(ended[i]->owner, queue.get()) << "it ended twice";
      ended[i]->owner = nullptr;
      idle.push_back(ended[i]);
    }
    done += got;
  }
  EXPECT_EQ(queue->wait(ended, 0), 0U);
}

TEST_P(DeviceContract, HandsOutAsManyAsThereIsRoomFor) {
  const auto device = open();
  const auto queue = device->make_queue(8);
  const AlignedBytes buffers(8 * kBlock);
  std::vector<IoRequest> requests(8);
  for (std::size_t i = 0; i < 8; ++i) {
    requests[i].data = buffers.data() + i * kBlock;
    requests[i].bytes = kBlock;
  }
  submit(*queue, requests);
  IoRequest* ended[3];
  std::set<IoRequest*> seen;
  while (seen.size() < 8) {
    const std::size_t count = queue->wait(ended, kForever);
    ASSERT_LE(count, 3U);
    seen.insert(ended, ended + count);
  }
}

TEST_P(DeviceContract, WakeEndsOneWait) {
  const auto device = open();
  const auto queue = device->make_queue(1);
  IoRequest* ended = nullptr;
  queue->wake();
  queue->wake();
  EXPECT_EQ(queue->wait({&ended, 1}, kForever), 0U) << "the wake before it";
  const std::uint64_t start = monotonic_ns();
  EXPECT_EQ(queue->wait({&ended, 1}, 2 * kMillisecond), 0U);
  EXPECT_GE(monotonic_ns() - start, 2 * kMillisecond) << "the wake was taken already";
  queue->wake();
  EXPECT_EQ(queue->wait({&ended, 1}, 0), 0U);
  const std::uint64_t again = monotonic_ns();
  EXPECT_EQ(queue->wait({&ended, 1}, 2 * kMillisecond), 0U);
  EXPECT_GE(monotonic_ns() - again, 2 * kMillisecond) << "a poll takes a wake, too";
}

// Each producer counts up and wakes: a lost wake would leave the reader waiting for ever.
TEST_P(DeviceContract, LosesNoWake) {
  const auto device = open();
  const auto queue = device->make_queue(4);
  const std::uint64_t wakes = scaled(1000);
  std::atomic<std::uint64_t> wanted{0};
  std::atomic<std::uint64_t> seen{0};
  std::vector<std::thread> producers;
  for (int i = 0; i < 2; ++i) {
    producers.emplace_back([&] {
      for (std::uint64_t n = 0; n < wakes; ++n) {
        const std::uint64_t mine = wanted.fetch_add(1) + 1;
        queue->wake();
        while (seen.load() < mine) std::this_thread::yield();
      }
    });
  }
  const AlignedBytes buffer(kBlock);
  IoRequest read = read_of(0, buffer);
  bool under_way = false;
  IoRequest* ended = nullptr;
  while (seen.load() < 2 * wakes) {
    if (!under_way && seen.load() % 4 == 0) {
      submit(*queue, read);
      under_way = true;
    }
    if (queue->wait({&ended, 1}, kForever) != 0) under_way = false;
    seen.store(wanted.load());
  }
  while (under_way) under_way = queue->wait({&ended, 1}, kForever) == 0;
  for (std::thread& producer : producers) producer.join();
}

TEST_P(DeviceContract, WaitsNoLongerThanItIsTold) {
  const auto device = open();
  const auto queue = device->make_queue(1);
  IoRequest* ended = nullptr;
  EXPECT_EQ(queue->wait({&ended, 1}, 0), 0U);
  for (const std::uint64_t timeout : {kMillisecond / 10, 3 * kMillisecond}) {
    const std::uint64_t start = monotonic_ns();
    EXPECT_EQ(queue->wait({&ended, 1}, timeout), 0U);
    EXPECT_GE(monotonic_ns() - start, timeout);
  }
}

TEST_P(DeviceContract, ItsEndWaitsForWhatIsUnderWay) {
  const auto device = open();
  const AlignedBytes data(64 * kBlock, 0x5A);
  std::vector<IoRequest> writes(64);
  {
    const auto queue = device->make_queue(64);
    for (std::size_t i = 0; i < writes.size(); ++i) {
      writes[i].kind = IoRequest::Kind::Write;
      writes[i].offset = i * kBlock;
      writes[i].data = data.data() + i * kBlock;
      writes[i].bytes = kBlock;
    }
    submit(*queue, writes);
  }
  for (const IoRequest& write : writes) EXPECT_TRUE(write.ok());
  const auto queue = device->make_queue(1);
  const AlignedBytes got(64 * kBlock);
  EXPECT_EQ(run_request(*queue, read_of(0, got)), got.size());
  EXPECT_TRUE(got == data);
}

TEST_P(DeviceContract, AFileCutUnderneathIsAnError) {
  const auto device = open();
  const auto queue = device->make_queue(2);
  for (const off_t left : {off_t{2} * kBlock, off_t{2} * kBlock + 100, off_t{0}}) {
    ASSERT_EQ(truncate(directory_.file().c_str(), left), 0);
    const AlignedBytes got(4 * kBlock);
    IoRequest read = read_of(0, got);
    submit(*queue, read);
    EXPECT_EQ(wait_for(*queue, 1).front(), &read);
    EXPECT_FALSE(read.ok());
    EXPECT_EQ(read.result, left);
  }
}

TEST_P(DeviceContract, AnErrorIsAResult) {
  const auto device = open();
  const auto queue = device->make_queue(2);
  void* forbidden = mmap(nullptr, kBlock, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(forbidden, MAP_FAILED);
  const AlignedBytes buffer(kBlock);
  IoRequest read = read_of(0, buffer);
  read.data = static_cast<std::byte*>(forbidden);
  EXPECT_EQ(run_request(*queue, read), -EFAULT);
  read.data = buffer.data();
  EXPECT_EQ(run_request(*queue, read), std::int64_t{kBlock}) << "the queue is as good as before";
  munmap(forbidden, kBlock);
}

TEST_P(DeviceContract, QueuesOfSeveralThreadsDoNotMeet) {
  const auto device = open();
  std::vector<std::thread> threads;
  for (std::uint64_t mine = 0; mine < 3; ++mine) {
    threads.emplace_back([&device, mine] {
      const auto queue = device->make_queue(8);
      for (std::uint64_t round = 0; round < scaled(50); ++round) {
        const AlignedBytes data(8 * kBlock);
        data.fill_random(mine * 1000 + round);
        std::vector<IoRequest> requests(8);
        for (std::uint64_t i = 0; i < 8; ++i) {
          requests[i] = write_of((mine * 8 + i) * kBlock, data);
          requests[i].data = data.data() + i * kBlock;
          requests[i].bytes = kBlock;
        }
        submit(*queue, requests);
        for (const IoRequest* ended : wait_for(*queue, 8)) EXPECT_TRUE(ended->ok());
        const AlignedBytes got(8 * kBlock);
        EXPECT_EQ(run_request(*queue, read_of(mine * 8 * kBlock, got)), got.size());
        EXPECT_TRUE(got == data);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(DeviceContract, AQueueMadeByAThreadThatEndedWorks) {
  const auto device = open();
  std::unique_ptr<IoQueue> queue;
  std::thread([&] { queue = device->make_queue(2); }).join();
  const AlignedBytes data(kBlock, 3);
  EXPECT_EQ(run_request(*queue, write_of(0, data)), std::int64_t{kBlock});
  std::thread waker([&] { queue->wake(); });
  IoRequest* ended = nullptr;
  EXPECT_EQ(queue->wait({&ended, 1}, kForever), 0U);
  waker.join();
}

TEST_P(DeviceContract, AQueueHoldsItsFile) {
  auto device = open();
  auto queue = device->make_queue(1);
  device.reset();
  const AlignedBytes data(kBlock, 3);
  EXPECT_EQ(run_request(*queue, write_of(0, data)), std::int64_t{kBlock});
  EXPECT_NE(open_error(directory_.file(), kDeviceBytes), "") << "its lock, too";
  queue.reset();
  EXPECT_EQ(open_error(directory_.file(), kDeviceBytes), "");
}

TEST_P(DeviceContract, RefusesADepthThatMakesNoSense) {
  const auto device = open();
  EXPECT_THROW(device->make_queue(0), std::invalid_argument);
  EXPECT_THROW(device->make_queue(1u << 20), std::invalid_argument);
}

// The kernel moves less than asked, or nothing for now: rare, so the rule is tested by itself.
TEST(Transfer, GoesOnWithTheRest) {
  IoRequest request;
  request.offset = kMiB;
  request.bytes = 8 * kBlock;
  Transfer transfer(&request);
  EXPECT_TRUE(transfer.goes_on(2 * kBlock));
  EXPECT_TRUE(transfer.goes_on(kBlock + 100)) << "back to the block's boundary";
  EXPECT_EQ(transfer.offset(), kMiB + 3 * kBlock);
  EXPECT_EQ(transfer.bytes(), 5 * kBlock);
  EXPECT_TRUE(transfer.goes_on(-EAGAIN));
  EXPECT_TRUE(transfer.goes_on(-EINTR));
  EXPECT_FALSE(transfer.goes_on(5 * kBlock));
  EXPECT_TRUE(request.ok());
}

TEST(Transfer, EndsWhereTheFileEnds) {
  IoRequest request;
  request.bytes = 8 * kBlock;
  Transfer cut(&request);
  EXPECT_TRUE(cut.goes_on(kBlock));
  EXPECT_FALSE(cut.goes_on(100));
  EXPECT_EQ(request.result, std::int64_t{kBlock} + 100);
  Transfer failed(&request);
  EXPECT_TRUE(failed.goes_on(kBlock));
  EXPECT_FALSE(failed.goes_on(-ENOSPC));
  EXPECT_EQ(request.result, -ENOSPC);
}

TEST(Transfer, GivesUpTryingAgain) {
  IoRequest request;
  request.bytes = kBlock;
  Transfer transfer(&request);
  std::uint32_t tries = 0;
  while (transfer.goes_on(-EAGAIN)) ++tries;
  EXPECT_EQ(tries, Transfer::kRetriesMax);
  EXPECT_EQ(request.result, -EAGAIN);
}

INSTANTIATE_TEST_SUITE_P(
    Queues, DeviceContract,
    ::testing::Values(Variant{IoKind::Uring, true}, Variant{IoKind::Uring, false},
                      Variant{IoKind::Threads, true}, Variant{IoKind::Threads, false}),
    [](const auto& given) {
      return std::string(given.param.io == IoKind::Uring ? "uring" : "threads") +
             (given.param.direct ? "_direct" : "_buffered");
    });

}  // namespace
}  // namespace fc::testing
