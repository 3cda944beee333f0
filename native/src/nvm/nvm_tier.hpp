// The NVM tier: a log of regions on files or block devices, below DRAM.
//
// Opens the devices' format, owns the log, its writer and a queue of reads for each device. What
// the process before left is adopted with the memory whose index points here; when that is gone,
// the tier starts empty.
//
// Threads: any. The index and the epochs are the DRAM tier's and outlive this.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/ticks.hpp"
#include "feature_cache/counters.hpp"
#include "nvm/heartbeat.hpp"
#include "nvm/journal.hpp"
#include "nvm/read_queue.hpp"
#include "nvm/region_writer.hpp"

namespace fc::nvm {

// Opens all devices of the config, filling in sizes that it leaves to the device. Throws
// std::system_error.
std::vector<std::shared_ptr<NvmDevice>> open_devices(NvmConfig& config);

// What a start knows of the one before.
struct NvmStart {
  std::string state_path;         // of the shared file; empty: nothing outlives the process
  std::uint64_t memory_id = 0;    // of the arena
  bool memory_kept = false;       // the index is an earlier one's
  std::optional<FoundSet> found;  // what the devices say of themselves
  std::string not_found;          // why they say nothing
  StartReport* report = nullptr;
  RecoveryProgress* progress = nullptr;
};

class NvmTier final : public LowerTier {
 public:
  // Throws std::invalid_argument for budgets that the devices do not hold, std::system_error for a
  // device whose content is somebody else's or that fails.
  NvmTier(const EngineConfig& config, const Geometry& geometry,
          const std::vector<std::shared_ptr<NvmDevice>>& devices, Index& index,
          EpochManager& epochs, MovedKeys& moved, const Ticks& ticks, const NvmStart& start);
  ~NvmTier() override;

  // Where a namespace's incarnation is kept; of all, before recover().
  void follow_incarnation(NamespaceIndex ns, std::atomic<std::uint16_t>& incarnation) {
    log_.ns(ns).incarnation = &incarnation;
  }
  // Takes over what there is.
  void recover();
  // Has the devices say that they are in use, when it is known which keys moved, and starts to
  // write. Throws std::system_error when they cannot, or for a journal that cannot be kept.
  void start();
  // The orderly end, after all reads and writes: all that is in memory goes to the devices, and
  // they say exactly what is valid. False: not all of it, by the deadline or an error.
  bool shutdown(std::uint64_t deadline_ns);
  // Ends what waits and waits for what is under way; no read may be asked for from here on but by
  // those that end.
  void stop_reads();

  Demotion demote(const DemotedRecord& record) override;
  void published(const Demotion& demotion, bool indexed) noexcept override {
    log_.published(demotion, indexed);
  }
  void forget(Entry entry, bool by_tag) noexcept override {
    if (by_tag) {
      const Region& row = regions_.at(regions_.region_of(entry));
      log_.ns(row.ns.load(std::memory_order_relaxed)).dropped_by_tag.add();
    }
    log_.forget(entry);
    log_.invalidated(entry);
  }
  void settle_writes() override;
  Where locate(Entry entry, std::uint16_t incarnation, LowerRecord& record) noexcept override;
  void unpin(Entry entry) noexcept override;
  std::uint64_t generation(Entry entry) const noexcept override {
    return regions_.at(regions_.region_of(entry)).generation.load(std::memory_order_relaxed);
  }
  Stamp stamp(Entry entry) const noexcept override {
    return regions_.at(regions_.region_of(entry)).stamp();
  }
  bool yields(Entry entry, NamespaceIndex ns) const noexcept override;
  std::uint64_t flush(NamespaceIndex ns) override;
  bool uses_incarnation(std::uint16_t incarnation) const noexcept override {
    return log_.uses_incarnation(incarnation);
  }

  // Reads pinned cells; their pins are given back as they end.
  void read(std::vector<NvmCell> cells, const std::shared_ptr<ReadWaiter>& waiter);
  LogNamespace& ns(NamespaceIndex index) noexcept { return log_.ns(index); }
  bool pressed() const noexcept { return log_.pressed(); }
  // Nothing waits to be written, emptied or used again; for tests and orderly ends.
  bool settled() { return writer_.idle() && log_.settled(); }
  void visit(CounterVisitor& visitor) const;

 private:
  std::vector<Superblock> look_at_devices();
  std::uint64_t settle_set();
  void write_superblocks();
  bool can_rebuild();
  void keep_journal();

  Regions regions_;
  const Ticks& ticks_;
  Index& index_;
  StartReport& report_;
  StartReport no_report_;
  const PersistConfig persist_;
  const std::string journal_path_;
  const NvmStart start_;
  std::string not_kept_;  // why
  bool rebuilds_ = false;
  std::vector<JournalEntry> journal_entries_;  // of the life before
  State state_;
  const std::uint64_t index_slots_;
  std::vector<std::string> contents_;  // by device: what was found there
  std::uint64_t set_id_ = 0;
  RegionLog log_;
  ReadCounters reads_;
  std::unique_ptr<Journal> journal_;  // null: none is kept
  RegionWriter writer_;
  std::vector<std::unique_ptr<ReadQueue>> queues_;  // one a device
};

}  // namespace fc::nvm
