// The log's I/O side: one thread that writes full regions, empties old ones, and sees to devices
// that are out of service.
//
// Emptying. The region's own list says which records it has. Those that the index still points at
// are dropped, or, when they were hit since they were written, appended again (at most half a
// region, so that emptying always gains room). Their entries swing from the old place to the new
// one by a single store. A list that cannot be read costs a walk over the index instead.
//
// Races, each forced by a test (tests/nvm_race_test.cpp):
//   - put or delete against a reinsertion: whoever holds the key's pair of buckets last decides; a
//     copy whose entry is gone by then is dead from the start.
//   - put or delete against a demotion: likewise; the region's list leaves out what is not indexed.
//   - read against emptying: the read's pin keeps the region from being used again.
//   - read against the hand-over from buffer to device: the buffer goes when no epoch sees it.
//   - flush against an append: the region is of one incarnation and doomed as a whole.
//   - promotion against put, delete, reinsertion: the entry must still be the one that was read.
//   - drop of a shard against a demotion, reinsertion or promotion: whoever has the room for the
//   copy
//     asks again (core/moved_keys.hpp, tests/drop_shards_test.cpp).
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "core/ticks.hpp"
#include "index/index.hpp"
#include "nvm/heartbeat.hpp"
#include "nvm/region_log.hpp"
#include "persist/shared_file.hpp"

namespace fc::nvm {

// What makes a device the given set's.
Superblock make_superblock(const Regions& regions, std::uint64_t set_id, std::size_t device);
// Writes the superblock that says whose the device is, and reads it back; false when that failed.
bool write_superblock(IoQueue& queue, const Superblock& superblock);

struct WriterOptions {
  std::uint64_t set_id = 0;
  std::uint32_t gap_bytes = 64u << 10;  // records so near are read together when they are kept
  std::uint64_t probe_interval_ms = 5000;
};

// Threads: its own does all the work; the others only start and stop it.
class RegionWriter {
 public:
  RegionWriter(RegionLog& log, Regions& regions, Index& index, const Ticks& ticks,
               const WriterOptions& options);
  ~RegionWriter();
  RegionWriter(const RegionWriter&) = delete;
  RegionWriter& operator=(const RegionWriter&) = delete;

  void start();
  // Ends the thread; what is not written yet stays as it is.
  void stop();
  // Before start(), or after stop(): writes of which state the devices are, and has them keep it.
  // False: one of them did not. While the thread runs, it says so again now and then.
  bool beat(SetState state);
  void beats_from(std::uint64_t sequence) noexcept {
    beat_sequence_ = sequence;
    beats_ = true;
  }
  void serves_as(SetState state) noexcept { set_state_.store(state); }
  // The journal has ended: the thread says so, and this waits until it has. For callers that may
  // wait for a device; while the thread runs.
  void no_journal() noexcept;
  // Before start(), or after stop(): makes the regions' lists say exactly what the index holds, and
  // whatever else is on the devices not be found. False: not all, by the deadline or an error.
  bool make_exact(std::uint64_t deadline_ns);
  Superblock superblock_of(std::size_t device) const {
    return make_superblock(regions_, options_.set_id, device);
  }
  bool idle() const noexcept { return idle_.load(std::memory_order_acquire); }

 private:
  struct Kept {
    std::uint64_t hash;
    std::uint32_t offset;
    std::uint32_t bytes_most;
  };

  void run();
  void beat_when_due();
  std::size_t beat_all(SetState state);  // how many devices keep it
  void write(WriteJob& job);
  bool write_to_device(std::uint32_t region, const WriteJob& job);
  std::size_t write_list(std::uint32_t region, std::byte* data,
                         const std::vector<std::uint64_t>& hashes,
                         const std::vector<std::uint32_t>& offsets);
  bool trim(std::uint32_t region);
  void leave_out_unindexed(WriteJob& job);
  void drop_unwritten(const WriteJob& job);
  void empty(std::uint32_t region, bool keep_hits);
  bool read_listed(std::uint32_t region, std::vector<ListedRecord>& list);
  void drop_listed(std::uint32_t region, const std::vector<ListedRecord>& list, bool keep_hits,
                   std::vector<Kept>& kept);
  void keep(std::uint32_t region, const std::vector<Kept>& kept);
  void keep_record(std::uint32_t region, const Kept& record, bool readable);
  void walk_index(std::uint32_t region);
  void see_to_devices();
  void lose_device(std::size_t device);
  bool probe(std::size_t device);
  // Runs the requests, a few at a time; false when one failed. Counts them for the device's health.
  bool transfer(std::size_t device, std::span<IoRequest> requests, bool counts = true);
  // Has the device keep what was written.
  bool sync(std::size_t device);
  std::vector<IoRequest> chunks(IoRequest::Kind kind, std::uint64_t device_offset, std::byte* data,
                                std::size_t bytes) const;

  RegionLog& log_;
  Regions& regions_;
  Index& index_;
  const Ticks& ticks_;
  const WriterOptions options_;
  struct Free {
    void operator()(std::byte* data) const noexcept { std::free(data); }
  };
  const std::unique_ptr<std::byte[], Free> scratch_;      // one region
  const std::unique_ptr<std::byte[], Free> first_block_;  // a region's header, alone in its block
  std::vector<std::unique_ptr<IoQueue>> queues_;          // one a device
  std::vector<bool> lost_;                                // by device: its entries are gone
  std::vector<std::uint64_t> probed_ns_;                  // by device
  bool beats_ = false;                                    // fixed before the thread starts
  std::uint64_t beat_sequence_ = 0;
  std::uint64_t beaten_ns_ = 0;
  bool said_once_ = false;
  std::atomic<SetState> set_state_{SetState::Serving};
  std::atomic<bool> beat_now_{false};
  std::atomic<bool> said_{false};  // that no journal is kept; or there is nobody to say it to
  std::atomic<bool> stop_{false};
  std::atomic<bool> idle_{false};
  std::thread thread_;  // last: it uses the rest
};

}  // namespace fc::nvm
