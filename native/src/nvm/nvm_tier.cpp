#include "nvm/nvm_tier.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "core/sequence_point.hpp"

namespace fc::nvm {
namespace {

std::uint64_t random_id() {
  std::random_device source;
  return (std::uint64_t{source()} << 32) | source();
}

std::vector<LateRule> late_rules(const EngineConfig& config) {
  std::vector<LateRule> rules;
  for (const NamespaceConfig& ns : config.namespaces) {
    rules.push_back(
        {ns.speculative.enabled, ns.speculative.after_us * 1000, ns.speculative.after_quantile});
  }
  return rules;
}

// File systems and disk arrays sign a device in its first bytes, not all of them in the first
// block.
constexpr std::size_t kLookedAtBytes = std::size_t{128} << 10;

bool is_blank(std::span<const std::byte> head) {
  return std::all_of(head.begin(), head.end(), [](std::byte b) { return b == std::byte{0}; });
}

// Throws where a device's first bytes are somebody else's: a cache file may be started anew,
// another file may not be written over.
void refuse_foreign(std::span<const std::byte> head, const std::string& path) {
  std::uint64_t magic = 0;
  std::memcpy(&magic, head.data(), sizeof(magic));
  // The magic's first byte on disk counts formats that share nothing else.
  if ((magic | 0xff) == (kSuperblockMagic | 0xff) || is_blank(head)) return;
  throw std::system_error(
      std::make_error_code(std::errc::file_exists),
      "nvm device " + path +
          ": it holds data that is not this cache's, and is left alone; choose another path, or "
          "remove the file (of a block device: wipe its first 128 KiB)");
}

StateShape shape_of(const Regions& regions, const EngineConfig& config, std::uint64_t memory_id) {
  StateShape shape;
  shape.memory_id = memory_id;
  shape.region_bytes = regions.region_bytes();
  shape.regions = regions.count();
  shape.buffers = buffers_of(config);
  std::string names;
  for (const auto& part : regions.devices()) {
    names += part->device->path() + '\0' + std::to_string(part->device->bytes()) + '\0';
  }
  shape.devices = XXH3_64bits(names.data(), names.size());
  return shape;
}

std::string journal_path_of(const EngineConfig& config) {
  if (!config.persist.journal.empty()) return config.persist.journal;
  return config.nvm.devices.empty() ? "" : config.nvm.devices.front().path + ".journal";
}

// Asked before a file is opened as a device, which brings it to its size.
void refuse_foreign_file(const std::string& path) {
  std::error_code error;  // what cannot be looked at is for open_device() to explain
  if (!std::filesystem::is_regular_file(path, error)) return;
  std::vector<std::byte> head(kLookedAtBytes);
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(head.data()), kLookedAtBytes);
  refuse_foreign(head, path);
}

// What a device's first bytes say of it. Throws where they are somebody else's.
std::string content_of(std::span<const std::byte> head, const Superblock& ours,
                       const std::string& path) {
  refuse_foreign(head, path);
  Superblock found{};
  std::memcpy(&found, head.data(), sizeof(found));
  if (found.magic == 0) return "new";
  if (found.magic != ours.magic || found.version != ours.version) {
    return "set aside: format version " + std::to_string(found.version) + ", this is version " +
           std::to_string(ours.version);
  }
  if (found.checksum != found.sum()) return "set aside: its superblock is damaged";
  if (found.region_bytes != ours.region_bytes || found.device_bytes != ours.device_bytes) {
    return "set aside: made with another size";
  }
  if (found.device != ours.device || found.devices != ours.devices) {
    return "set aside: it was another one of several devices";
  }
  return "started anew";
}

}  // namespace

std::vector<std::shared_ptr<NvmDevice>> open_devices(NvmConfig& config) {
  std::vector<std::shared_ptr<NvmDevice>> devices;
  for (NvmDeviceConfig& device : config.devices) {
    refuse_foreign_file(device.path);
    devices.push_back(
        open_device(device.path, device.bytes, {config.io, config.direct, config.io_threads}));
    device.bytes = devices.back()->bytes();
  }
  return devices;
}

NvmTier::NvmTier(const EngineConfig& config, const Geometry& geometry,
                 const std::vector<std::shared_ptr<NvmDevice>>& devices, Index& index,
                 EpochManager& epochs, MovedKeys& moved, const Ticks& ticks, const NvmStart& start)
    : regions_(devices, geometry.region_bytes, config.nvm.errors_max),
      ticks_(ticks),
      index_(index),
      report_(start.report != nullptr ? *start.report : no_report_),
      persist_(config.persist),
      journal_path_(journal_path_of(config)),
      start_(start),
      state_(start.state_path, shape_of(regions_, config, start.memory_id), report_, not_kept_),
      index_slots_(geometry.nvm_slots),
      set_id_(settle_set()),
      log_(config, geometry, regions_, state_, epochs, moved),
      writer_(log_, regions_, index, ticks,
              {.set_id = set_id_, .probe_interval_ms = config.nvm.probe_interval_ms}) {
  write_superblocks();
  for (std::size_t d = 0; d < devices.size(); ++d) {
    queues_.push_back(
        std::make_unique<ReadQueue>(regions_, d, config.nvm, late_rules(config), reads_));
  }
}

// Which set the devices are from now on: the one that the state is of, where all agree; else a new
// one. Before anything is written.
std::uint64_t NvmTier::settle_set() {
  regions_.use(state_.rows());
  const std::vector<Superblock> found = look_at_devices();
  if (state_.kept()) {
    for (std::size_t d = 0; d < found.size(); ++d) {
      const Superblock ours = make_superblock(regions_, state_.set_id(), d);
      if (std::memcmp(&found[d], &ours, sizeof(ours)) != 0) {
        not_kept_ = "device " + regions_.devices()[d]->device->path() + " was " + contents_[d];
        state_.start_anew(random_id());
        return state_.set_id();
      }
      contents_[d] = "kept";
    }
    return state_.set_id();
  }
  rebuilds_ = can_rebuild();
  state_.start_anew(rebuilds_ ? start_.found->set_id : random_id(), rebuilds_);
  return state_.set_id();
}

// Whether the devices say exactly what is valid; else why not goes to not_kept_.
bool NvmTier::can_rebuild() {
  if (!persist_.enabled()) return false;
  // Memory went on without them; but for the start that was cut off while it rebuilt them.
  if (start_.memory_kept && (!start_.found || state_.unfinished_set() != start_.found->set_id)) {
    const auto used = std::find(contents_.begin(), contents_.end(), "started anew");
    if (not_kept_.empty() && used != contents_.end()) {
      not_kept_ = "the memory went on without its state";
    }
    return false;
  }
  if (!start_.found) {
    not_kept_ = start_.not_found;
    return false;
  }
  for (std::size_t d = 0; d < regions_.devices().size(); ++d) {
    if (contents_[d] != "started anew") {
      not_kept_ = "device " + regions_.devices()[d]->device->path() + " was " + contents_[d];
      return false;
    }
  }
  switch (start_.found->state) {
    case SetState::Clean:
      break;
    case SetState::Serving:
      not_kept_ = "the stop before was not an orderly one, and no journal was kept (durability)";
      return false;
    case SetState::Journaled: {
      std::string why;
      auto entries = Journal::read(journal_path_, start_.found->set_id, &why);
      if (!entries) {
        not_kept_ = "the journal " + journal_path_ + " cannot be used: " + why;
        return false;
      }
      journal_entries_ = std::move(*entries);
      break;
    }
    default:
      not_kept_ = "its heartbeat is of an unknown kind";
      return false;
  }
  for (std::string& content : contents_) content = "rebuilt";
  return true;
}

void NvmTier::recover() {
  const std::uint64_t begun_ns = monotonic_ns();
  RegionLog::Adopted found;
  // What these entries point at is not known any more.
  if (!state_.kept() && start_.memory_kept) {
    index_.clear_all([](Entry entry) { return entry.on_nvm(); }, [](Entry) {});
  }
  if (state_.kept()) {
    found = log_.adopt(index_);
    report_.nvm = "kept";
  } else if (rebuilds_) {
    RebuildPlan plan;
    plan.set_id = set_id_;
    plan.now = ticks_.now();
    plan.drop_expiring = start_.found->clock_doubt && !persist_.keep_on_clock_doubt;
    plan.journal = journal_entries_;
    plan.progress = start_.progress;
    found = log_.rebuild(plan, index_);
    report_.nvm = "rebuilt";
    if (plan.drop_expiring) report_.nvm_reason = "the time of day is before the last heartbeat's";
  } else {
    log_.start_anew();
    report_.nvm = not_kept_.empty() ? "new" : "empty";
    report_.nvm_reason = not_kept_;
  }
  state_.finish();
  report_.nvm_items = found.items;
  report_.nvm_dropped = found.dropped;
  journal_entries_ = {};
  report_.nvm_ms = static_cast<double>(monotonic_ns() - begun_ns) * 1e-6;
}

void NvmTier::start() {
  if (persist_.enabled()) {
    writer_.beats_from(start_.found ? start_.found->sequence : 0);
    keep_journal();
    const SetState state = journal_ != nullptr ? SetState::Journaled : SetState::Serving;
    writer_.serves_as(state);
    // Twice: into both places, whatever an earlier life left in the other one.
    if (!writer_.beat(state) || !writer_.beat(state)) {
      throw std::system_error(EIO, std::system_category(),
                              "an nvm device does not take what says that it is in use");
    }
  }
  writer_.start();
}

// A journal begins with nothing, so the regions' lists are made exact first.
void NvmTier::keep_journal() {
  if (persist_.durability == DurabilityKind::DropNvm) return;
  if (!writer_.make_exact(~std::uint64_t{0})) {
    throw std::system_error(EIO, std::system_category(),
                            "an nvm device does not take its regions' lists");
  }
  JournalOptions options;
  options.mode = persist_.durability;
  options.window_ms = persist_.durability_window_ms;
  journal_ = Journal::start(journal_path_, set_id_, options, [this](const JournalEntry& entry) {
    return log_.still_matters(entry);
  });
  log_.keep_journal(journal_.get());
}

void NvmTier::settle_writes() {
  if (journal_ == nullptr) return;
  const bool kept = !journal_->failed() && (persist_.durability != DurabilityKind::Sync ||
                                            journal_->wait_durable(journal_->tail()));
  if (!kept) writer_.no_journal();
}

bool NvmTier::shutdown(std::uint64_t deadline_ns) {
  log_.seal_all();
  while (!log_.all_written() && monotonic_ns() < deadline_ns) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const bool written = log_.all_written();
  writer_.stop();
  if (!written || !writer_.make_exact(deadline_ns)) return false;
  FC_SEQUENCE_POINT("nvm:clean_mark");
  return writer_.beat(SetState::Clean);
}

NvmTier::~NvmTier() {
  stop_reads();
}

void NvmTier::stop_reads() {
  for (const auto& queue : queues_) queue->stop();
}

// All devices are looked at before the first is written to.
std::vector<Superblock> NvmTier::look_at_devices() {
  const std::unique_ptr<std::byte, decltype(&std::free)> head(
      static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, kLookedAtBytes)), &std::free);
  if (head == nullptr) throw std::bad_alloc();
  std::vector<Superblock> found;
  for (std::size_t d = 0; d < regions_.devices().size(); ++d) {
    NvmDevice& device = *regions_.devices()[d]->device;
    IoRequest request;
    request.data = head.get();
    request.bytes =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(kLookedAtBytes, device.bytes()));
    const std::int64_t result = run_request(*device.make_queue(1), request);
    if (result != static_cast<std::int64_t>(request.bytes)) {
      throw std::system_error(result < 0 ? static_cast<int>(-result) : EIO, std::system_category(),
                              "nvm device " + device.path() + ": its first blocks cannot be read");
    }
    contents_.push_back(
        content_of({head.get(), request.bytes}, make_superblock(regions_, 0, d), device.path()));
    std::memcpy(&found.emplace_back(), head.get(), sizeof(Superblock));
  }
  return found;
}

void NvmTier::write_superblocks() {
  for (std::size_t d = 0; d < regions_.devices().size(); ++d) {
    NvmDevice& device = *regions_.devices()[d]->device;
    if (!write_superblock(*device.make_queue(1), writer_.superblock_of(d))) {
      throw std::system_error(
          EIO, std::system_category(),
          "nvm device " + device.path() + ": what is written there does not come back as it was");
    }
  }
}

Demotion NvmTier::demote(const DemotedRecord& record) {
  return log_.append(record, false, ticks_.now(), monotonic_ns());
}

LowerTier::Where NvmTier::locate(Entry entry, std::uint16_t incarnation,
                                 LowerRecord& record) noexcept {
  const std::uint32_t region = regions_.region_of(entry);
  Region& row = regions_.at(region);
  if (row.incarnation.load(std::memory_order_relaxed) != incarnation) return Where::Gone;
  const std::byte* buffer = row.buffer.load(std::memory_order_acquire);
  if (buffer != nullptr) {
    const std::byte* at = buffer + regions_.offset_in_region(entry);
    RecordHeader header;
    std::memcpy(&header, at, sizeof(header));
    const auto* key = reinterpret_cast<const char*>(at) + sizeof(header);
    record.key = {key, header.key_bytes};
    record.value = reinterpret_cast<const std::uint8_t*>(key) + header.key_bytes;
    record.value_bytes = header.value_bytes();
    record.expiry = header.expiry;
    return Where::Memory;
  }
  if (!regions_.devices()[regions_.device_of(region)]->health.in_service()) {
    log_.ns(row.ns.load(std::memory_order_relaxed)).lost_out_of_service.add();
    return Where::Gone;
  }
  row.pins.fetch_add(1, std::memory_order_seq_cst);
  return Where::Device;
}

void NvmTier::unpin(Entry entry) noexcept {
  regions_.at(regions_.region_of(entry)).pins.fetch_sub(1, std::memory_order_release);
}

bool NvmTier::yields(Entry entry, NamespaceIndex ns) const noexcept {
  const NamespaceIndex owner =
      regions_.at(regions_.region_of(entry)).ns.load(std::memory_order_relaxed);
  if (owner == ns || owner == kNoNamespace) return true;
  const LogNamespace& of = *log_.namespaces()[owner];
  return of.items.load(std::memory_order_relaxed) > of.item_budget;
}

std::uint64_t NvmTier::flush(NamespaceIndex ns) {
  const std::uint64_t items = log_.ns(ns).items.load(std::memory_order_relaxed);
  log_.flush(ns);
  return items;
}

void NvmTier::read(std::vector<NvmCell> cells, const std::shared_ptr<ReadWaiter>& waiter) {
  if (queues_.size() == 1) {
    queues_.front()->read(std::move(cells), waiter);
    return;
  }
  std::vector<std::vector<NvmCell>> by_device(queues_.size());
  for (const NvmCell& cell : cells) {
    by_device[regions_.device_of(regions_.region_of(Entry(cell.entry)))].push_back(cell);
  }
  for (std::size_t d = 0; d < queues_.size(); ++d) {
    if (!by_device[d].empty()) queues_[d]->read(std::move(by_device[d]), waiter);
  }
}

// ---- counters
// ------------------------------------------------------------------------------------

void NvmTier::visit(CounterVisitor& visitor) const {
  constexpr const char* kStates[kRegionStates] = {"free", "open", "writing", "sealed", "emptying"};
  for (std::size_t d = 0; d < regions_.devices().size(); ++d) {
    const DevicePart& part = *regions_.devices()[d];
    const NvmDevice& device = *part.device;
    const Label info[] = {{"device", device.path()},
                          {"io", device.io()},
                          {"direct", device.direct() ? "true" : "false"},
                          {"fallback", device.fallback()},
                          {"content", contents_[d]}};
    visitor.gauge("feature_cache_nvm_device_info",
                  "How a device is used, why not as asked for, what it held at the start; 1.", info,
                  1);
    const Label labels[] = {{"device", device.path()}};
    const auto counter = [&](const char* name, const char* help, const Counter& value) {
      visitor.counter(name, help, labels, value.get());
    };
    visitor.gauge("feature_cache_nvm_device_in_service", "1, or 0 after repeated errors.", labels,
                  part.health.in_service() ? 1 : 0);
    visitor.gauge("feature_cache_nvm_device_bytes", "Size of the device.", labels,
                  static_cast<double>(device.bytes()));
    const auto states = log_.count_states(d);
    for (std::size_t s = 0; s < kRegionStates; ++s) {
      const Label by_state[] = {{"device", device.path()}, {"state", kStates[s]}};
      visitor.gauge("feature_cache_nvm_device_regions", "Regions, by what they are good for.",
                    by_state, states[s]);
    }
    counter("feature_cache_nvm_device_reads_total", "Reads that ended.", part.health.reads);
    counter("feature_cache_nvm_device_read_bytes_total", "Bytes read.", part.health.read_bytes);
    counter("feature_cache_nvm_device_writes_total", "Writes that ended.", part.health.writes);
    counter("feature_cache_nvm_device_written_bytes_total", "Bytes written.",
            part.health.written_bytes);
    counter("feature_cache_nvm_device_read_errors_total", "Reads that failed or were short.",
            part.health.read_errors);
    counter("feature_cache_nvm_device_write_errors_total", "Writes that failed or were short.",
            part.health.write_errors);
    counter("feature_cache_nvm_device_outages_total", "Times it was taken out of service.",
            part.health.outages);
    counter("feature_cache_nvm_device_probes_total", "Times it was tried while out of service.",
            part.health.probes);
  }
  for (const auto& ns : log_.namespaces()) {
    if (ns->budget_regions == 0) continue;
    const Label labels[] = {{"namespace", ns->name}};
    const auto counter = [&](const char* name, const char* help, const Counter& value) {
      visitor.counter(name, help, labels, value.get());
    };
    const auto gauge = [&](const char* name, const char* help, std::uint64_t value) {
      visitor.gauge(name, help, labels, static_cast<double>(value));
    };
    gauge("feature_cache_namespace_nvm_items", "Items on NVM.",
          ns->items.load(std::memory_order_relaxed));
    gauge(
        "feature_cache_namespace_nvm_used_bytes", "Bytes of the regions in use.",
        std::uint64_t{ns->used_regions.load(std::memory_order_relaxed)} * regions_.region_bytes());
    gauge("feature_cache_namespace_nvm_budget_bytes", "Byte budget on NVM.",
          std::uint64_t{ns->budget_regions} * regions_.region_bytes());
    counter("feature_cache_namespace_nvm_hits_total", "Keys answered from NVM.", ns->hits);
    counter("feature_cache_namespace_nvm_demoted_total", "Items that left DRAM for NVM.",
            ns->demoted);
    counter("feature_cache_namespace_nvm_demoted_bytes_total", "Their keys and values.",
            ns->demoted_bytes);
    counter("feature_cache_namespace_nvm_reinserted_total",
            "Items that were kept when their region was emptied, since they were hit.",
            ns->reinserted);
    counter("feature_cache_namespace_nvm_reinserted_bytes_total", "Their keys and values.",
            ns->reinserted_bytes);
    counter("feature_cache_namespace_nvm_evicted_total", "Items that went with their region.",
            ns->evicted);
    counter("feature_cache_namespace_nvm_hidden_total",
            "Items of keys that had moved away since, dropped when they were come upon.",
            ns->hidden);
    counter("feature_cache_namespace_nvm_promoted_total", "Items that came back to DRAM.",
            ns->promoted);
    counter("feature_cache_namespace_nvm_dropped_by_tag_total",
            "Items dropped unread, since a written key has their tag: mostly that key's own.",
            ns->dropped_by_tag);
    for (std::size_t r = 1; r < kRefusals; ++r) {
      const Label by_reason[] = {{"namespace", ns->name},
                                 {"reason", refusal_name(static_cast<Refusal>(r))}};
      visitor.counter("feature_cache_namespace_nvm_not_admitted_total",
                      "Evicted items that did not enter, by why.", by_reason, ns->refused[r].get());
    }
    const auto lost = [&](const char* reason, const Counter& value) {
      const Label by_reason[] = {{"namespace", ns->name}, {"reason", reason}};
      visitor.counter("feature_cache_namespace_nvm_lost_reads_total",
                      "Items that could not be read, by why.", by_reason, value.get());
    };
    lost("checksum", ns->lost_damaged);
    lost("device", ns->lost_device);
    lost("out_of_service", ns->lost_out_of_service);
  }
  visitor.gauge("feature_cache_nvm_region_bytes", "Size of a region.", {}, regions_.region_bytes());
  visitor.gauge("feature_cache_nvm_memory_bytes", "Write buffers, region table and sketches.", {},
                static_cast<double>(log_.memory_bytes()));
  visitor.gauge("feature_cache_nvm_index_slots", "Index slots for items on NVM.", {},
                static_cast<double>(index_slots_));
  visitor.gauge("feature_cache_nvm_reads_in_flight", "Reads that the devices work on.", {},
                static_cast<double>(reads_.in_flight.load(std::memory_order_relaxed)));
  visitor.gauge("feature_cache_nvm_cells_queued", "Cells that wait for their turn.", {},
                static_cast<double>(reads_.queued.load(std::memory_order_relaxed)));
  visitor.counter("feature_cache_nvm_reads_shared_total",
                  "Cells that waited for a read that another had started.", {},
                  reads_.shared.get());
  visitor.counter("feature_cache_nvm_reads_coalesced_total",
                  "Cells whose read was part of a neighbour's.", {}, reads_.coalesced.get());
  visitor.counter("feature_cache_nvm_reads_refused_total", "Cells refused because too many waited.",
                  {}, reads_.refused.get());
  visitor.counter("feature_cache_nvm_reads_abandoned_total",
                  "Cells dropped because their request had ended before their turn.", {},
                  reads_.abandoned.get());
  visitor.counter("feature_cache_nvm_checksum_errors_total",
                  "Records that were not what had been written.", {}, reads_.checksum_errors.get());
  if (persist_.enabled()) {
    const Label durability[] = {{"durability", durability_name(persist_.durability)}};
    visitor.gauge("feature_cache_nvm_durability_info",
                  "What of NVM outlives a machine that goes down without an orderly stop; 1.",
                  durability, 1);
  }
  if (journal_ != nullptr) {
    visitor.gauge("feature_cache_nvm_journal_bytes",
                  "Size of the journal of what became invalid on NVM.", {},
                  static_cast<double>(journal_->bytes()));
    visitor.counter("feature_cache_nvm_journal_syncs_total",
                    "Times the journal was written and synced.", {}, journal_->syncs());
    visitor.counter("feature_cache_nvm_journal_rewrites_total",
                    "Times the journal was made anew of what still matters.", {},
                    journal_->rewrites());
  }
  // Without a journal, too: an alert must have something to look at.
  const bool failed = journal_ != nullptr && journal_->failed();
  const std::string why = failed ? journal_->reason() : std::string();
  const Label reason[] = {{"reason", why}};
  visitor.gauge("feature_cache_nvm_journal_failed",
                "1 after an error of the journal's file, until the next start; why.", reason,
                failed ? 1 : 0);
  reads_.read_seconds.visit(visitor, "feature_cache_nvm_read_seconds",
                            "From handing a read to the device to its end.", {});
  reads_.queue_seconds.visit(visitor, "feature_cache_nvm_queue_seconds",
                             "From asking for a read to handing it to the device.", {});
}

}  // namespace fc::nvm
