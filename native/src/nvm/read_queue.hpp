// Reads of one device: the batches that wait, the reads under way, and who hears of them.
//
// A batch comes sorted by place. Its next read is formed when its turn comes: neighbours within the
// gap limit become one read; a record that is being read already is waited for, not read again.
// Batches take turns, a read each, so that a huge batch does not keep small ones waiting. At most
// `queue_depth` reads are under way, in at most `read_memory_bytes` of buffers.
//
// Lateness counts from the moment at which the device got the read, beyond the time that the reads
// before it take (ServiceTime); what waits here for its turn is not late.
//
// Threads: one of its own submits, waits, checks and delivers. Any thread may read().
#pragma once

#include <atomic>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/counter.hpp"
#include "core/latency.hpp"
#include "feature_cache/engine.hpp"
#include "nvm/regions.hpp"
#include "nvm/service_time.hpp"

namespace fc::nvm {

enum class ReadOutcome : std::uint8_t {
  Hit,
  OtherKey,  // the tag was another key's
  Damaged,   // checksum or sizes are wrong
  DeviceError,
  OutOfService,
  Refused,    // too many wait
  Abandoned,  // nobody wanted it any more when its turn came
};

struct ReadResult {
  NvmCell cell;
  ReadOutcome outcome = ReadOutcome::Hit;
  RecordView record;  // of a Hit; valid during the call
  std::uint64_t generation = 0;
};

// Called from the device's thread; must not block.
class ReadWaiter {
 public:
  virtual ~ReadWaiter() = default;
  virtual void done(std::span<const ReadResult> results) = 0;
  virtual void late(std::span<const NvmCell> cells) = 0;
  virtual bool wanted() const noexcept = 0;
};

// Of a namespace: when its reads are late.
struct LateRule {
  bool enabled = false;
  std::uint64_t after_ns = 0;  // 0: a quantile
  double quantile = 0.99;
};

// What the queues of all devices share.
struct ReadCounters {
  Counter shared;
  Counter coalesced;  // records beyond the first of a read
  Counter refused;
  Counter abandoned;
  Counter checksum_errors;
  LatencyHistogram read_seconds;
  LatencyHistogram queue_seconds;
  std::atomic<std::uint64_t> queued{0};  // cells that wait for their turn
  std::atomic<std::uint64_t> in_flight{0};
};

class ReadQueue {
 public:
  ReadQueue(Regions& regions, std::size_t device, const NvmConfig& config,
            std::vector<LateRule> rules, ReadCounters& counters);
  ~ReadQueue() { stop(); }
  ReadQueue(const ReadQueue&) = delete;
  ReadQueue& operator=(const ReadQueue&) = delete;

  // Cells of this device, each pinned. Their pins are given back as they end.
  void read(std::vector<NvmCell> cells, std::shared_ptr<ReadWaiter> waiter);
  // Ends what waits as Abandoned, and waits for what is under way. What comes later is Abandoned at
  // once. Idempotent.
  void stop();

 private:
  struct Batch {
    std::shared_ptr<ReadWaiter> waiter;
    std::vector<NvmCell> cells;  // sorted by place
    std::size_t next = 0;        // the first one that has had no turn
    std::size_t delivered = 0;
    std::uint64_t came_ns = 0;
  };
  struct Target {
    NvmCell cell;
    Batch* batch;
    bool named_late = false;
  };
  struct FreeData {
    void operator()(std::byte* data) const noexcept { std::free(data); }
  };
  struct Read {
    IoRequest request;
    std::uint32_t region = 0;
    std::uint32_t begin = 0;  // within the region
    std::uint64_t submitted_ns = 0;
    std::uint64_t expected_queue_ns = 0;
    std::vector<Target> targets;
    std::unique_ptr<std::byte[], FreeData> data;
    std::size_t capacity = 0;
    std::size_t place = 0;  // in under_way_
    bool may_be_late = false;
  };
  struct Delivery {
    Batch* batch;
    ReadResult result;
  };

  void run();
  void take_inbox();
  void fill();
  bool take_turn(Batch& batch);
  bool fits(std::size_t bytes);
  void drop_buffer(Read& read);
  void start(Batch& batch, std::size_t count, std::uint32_t begin, std::uint32_t end);
  void handle(Read& read, std::uint64_t now_ns);
  void check(const Read& read, const Target& target);
  void result(Batch& batch, const NvmCell& cell, ReadOutcome outcome);
  void deliver();
  void name_late(std::uint64_t now_ns);
  std::uint64_t late_after(NamespaceIndex ns) const noexcept;
  Read& take_read(std::size_t bytes);
  void set_aside(Read& read);
  void end_all();
  void end_now(std::span<const NvmCell> cells, ReadWaiter& waiter, ReadOutcome outcome);

  Regions& regions_;
  DevicePart& part_;
  const NvmConfig config_;
  const std::vector<LateRule> rules_;
  const bool may_be_late_;
  ReadCounters& counters_;
  const std::unique_ptr<IoQueue> queue_;

  std::mutex inbox_mutex_;
  std::vector<std::unique_ptr<Batch>> inbox_;  // guarded by inbox_mutex_
  bool closed_ = false;                        // guarded by inbox_mutex_
  std::atomic<bool> stop_{false};

  // The thread's own.
  std::unordered_map<Batch*, std::unique_ptr<Batch>> batches_;
  std::deque<Batch*> turns_;  // those with cells that had no turn
  std::vector<std::unique_ptr<Read>> free_reads_;
  std::vector<std::unique_ptr<Read>> under_way_;
  std::vector<std::unique_ptr<Read>> ended_reads_;  // their answers are not delivered yet
  std::vector<IoRequest*> starting_;
  std::unordered_map<std::uint64_t, Read*> by_place_;  // records that are being read
  std::vector<Delivery> deliveries_;
  std::vector<ReadResult> group_;
  std::size_t memory_bytes_ = 0;  // of all reads' buffers
  RecentLatencies latencies_;
  ServiceTime service_;
  std::uint64_t next_late_check_ns_ = 0;

  std::thread thread_;  // last: it uses the rest
};

}  // namespace fc::nvm
