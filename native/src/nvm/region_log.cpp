#include "nvm/region_log.hpp"

#include <algorithm>

#include "core/sequence_point.hpp"
#include "nvm/heartbeat.hpp"

namespace fc::nvm {
namespace {

// Generations of a life begin where no earlier one came to, whatever became of the headers that had
// its: else a header alone, and the trailer that an earlier life left, would pass for one region.
constexpr unsigned kGenerationsPerMsShift = 16;

// An item with less time to live is not worth a write: it would hardly be read from there.
constexpr Tick kLeastTicksLeft = 2000 >> kTickShift;

void write_record(std::byte* to, const DemotedRecord& record, std::uint64_t generation,
                  std::uint64_t location) noexcept {
  RecordHeader header{};
  header.size_and_domain = record.value_bytes | (record.domain << RecordHeader::kSizeBits);
  header.expiry = record.expiry;
  header.key_bytes = static_cast<std::uint16_t>(record.key.size());
  header.incarnation = record.incarnation;
  std::memcpy(to, &header, sizeof(header));
  std::byte* at = to + sizeof(header);
  std::memcpy(at, record.key.data(), record.key.size());
  at += record.key.size();
  for (const std::span<const std::uint8_t> piece : record.value) {
    if (piece.empty()) continue;
    std::memcpy(at, piece.data(), piece.size());
    at += piece.size();
  }
  const std::size_t payload = record.key.size() + record.value_bytes;
  const std::size_t padding =
      RecordHeader::bytes_for(record.key.size(), record.value_bytes) - sizeof(header) - payload;
  std::memset(at, 0, padding);
  const std::uint32_t checksum = record_checksum(to, payload, generation, location);
  std::memcpy(to, &checksum, sizeof(checksum));
}

std::uint64_t item_budget_of(std::uint64_t slots, std::uint32_t regions,
                             std::uint64_t all_regions) noexcept {
  if (all_regions == 0) return 0;
  return static_cast<std::uint64_t>(static_cast<double>(slots) * layout::kIndexLoadLimit *
                                    static_cast<double>(regions) /
                                    static_cast<double>(all_regions));
}

}  // namespace

const char* refusal_name(Refusal refusal) noexcept {
  switch (refusal) {
    case Refusal::None:
      break;
    case Refusal::Frequency:
      return "frequency";
    case Refusal::RejectFirst:
      return "reject_first";
    case Refusal::WriteRate:
      return "write_rate";
    case Refusal::Buffers:
      return "buffers";
    case Refusal::Expiring:
      return "expiring";
    case Refusal::TooLarge:
      return "too_large";
    case Refusal::OutOfService:
      return "out_of_service";
    case Refusal::IndexFull:
      return "index_full";
  }
  return "none";
}

LogNamespace::LogNamespace(const NamespaceConfig& of, std::uint32_t regions, std::uint64_t slots)
    : name(of.name),
      seed(namespace_seed(of.name)),
      config(of.nvm),
      budget_regions(regions),
      item_budget(slots),
      admission(of.nvm, slots) {}

std::uint32_t buffers_of(const EngineConfig& config) noexcept {
  const auto open =
      std::count_if(config.namespaces.begin(), config.namespaces.end(),
                    [](const NamespaceConfig& ns) { return ns.nvm.budget_bytes != 0; });
  return config.nvm.write_buffers + static_cast<std::uint32_t>(open);
}

RegionLog::RegionLog(const EngineConfig& config, const Geometry& geometry, Regions& regions,
                     State& state, EpochManager& epochs, MovedKeys& moved)
    : regions_(regions),
      state_(state),
      epochs_(epochs),
      moved_(moved),
      spare_buffers_(config.nvm.write_buffers),
      free_(regions.devices().size()),
      next_generation_(wall_now_ms() << kGenerationsPerMsShift),
      write_budget_(config.nvm.write_bytes_per_second) {
  std::uint64_t all = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    all += ns.nvm.budget_bytes / regions.region_bytes();
  }
  for (const NamespaceConfig& ns : config.namespaces) {
    const auto budget = static_cast<std::uint32_t>(ns.nvm.budget_bytes / regions.region_bytes());
    namespaces_.push_back(std::make_unique<LogNamespace>(
        ns, budget, item_budget_of(geometry.nvm_slots, budget, all)));
  }
}

// ---- appending
// -----------------------------------------------------------------------------------

Refusal RegionLog::judge_locked(LogNamespace& ns, const DemotedRecord& record, std::size_t bytes,
                                bool reinsertion, std::uint64_t now_ns) {
  if (!reinsertion && !ns.admission.admits(record.hash, record.frequency)) {
    return ns.config.admission == AdmissionKind::Frequency ? Refusal::Frequency
                                                           : Refusal::RejectFirst;
  }
  if (!write_budget_.limited()) return Refusal::None;
  const std::lock_guard pool(pool_mutex_);
  return write_budget_.take(bytes + layout::kNvmListedBytes, now_ns) ? Refusal::None
                                                                     : Refusal::WriteRate;
}

Demotion RegionLog::append(const DemotedRecord& record, bool reinsertion, Tick now,
                           std::uint64_t now_ns) {
  LogNamespace& ns = *namespaces_[record.ns];
  if (ns.budget_regions == 0) return {};
  const auto refuse = [&ns](Refusal refusal) {
    ns.refused[static_cast<std::size_t>(refusal)].add();
    return Demotion{.entry = {}, .region = 0, .busy = refusal == Refusal::Buffers};
  };
  const std::size_t bytes = RecordHeader::bytes_for(record.key.size(), record.value_bytes);
  if (bytes > layout::kMaxNvmRecordBytes ||
      sizeof(RegionHeader) + bytes + list_bytes(1) + sizeof(RegionTrailer) >
          regions_.region_bytes()) {
    return refuse(Refusal::TooLarge);
  }
  if (record.expiry != kNever && record.expiry < now + kLeastTicksLeft) {
    return refuse(Refusal::Expiring);
  }
  if (!reinsertion && ns.items.load(std::memory_order_relaxed) >= ns.item_budget) {
    wake();
    return refuse(Refusal::IndexFull);
  }
  std::uint32_t region = 0;
  std::uint32_t offset = 0;
  std::byte* buffer = nullptr;
  {
    const std::lock_guard lock(ns.mutex);
    // A flush comes after the incarnation's change and takes this lock, so it dooms the region.
    if (record.incarnation != ns.incarnation->load(std::memory_order_acquire)) return {};
    const Refusal judged = judge_locked(ns, record, bytes, reinsertion, now_ns);
    if (judged != Refusal::None) return refuse(judged);
    if (ns.open != kNoRegion &&
        (!has_room_locked(ns, bytes) ||
         moved_.wants_new(regions_.at(ns.open).stamp(), record.high) ||
         regions_.at(ns.open).incarnation.load(std::memory_order_relaxed) != record.incarnation)) {
      seal_locked(ns);
    }
    if (ns.open == kNoRegion) {
      const Refusal opened = open_locked(ns, record.ns, record.incarnation, reinsertion);
      if (opened != Refusal::None) return refuse(opened);
    }
    region = ns.open;
    Region& row = regions_.at(region);
    offset = row.used;
    row.used += static_cast<std::uint32_t>(bytes);
    row.count_expiry(record.expiry);
    row.writers.fetch_add(1, std::memory_order_relaxed);
    buffer = row.buffer.load(std::memory_order_relaxed);
    ns.hashes.push_back(record.hash);
    ns.offsets.push_back(offset / layout::kNvmRecordAlignment);
  }
  const std::uint64_t location = regions_.location(region, offset);
  write_record(buffer + offset, record,
               regions_.at(region).generation.load(std::memory_order_relaxed), location);
  FC_SEQUENCE_POINT("nvm:appended");
  if (reinsertion) {
    ns.reinserted.add();
    ns.reinserted_bytes.add(record.key.size() + record.value_bytes);
  } else {
    ns.demoted.add();
    ns.demoted_bytes.add(record.key.size() + record.value_bytes);
  }
  return {.entry = Entry::nvm(record.hash, location, bytes, 0), .region = region, .busy = false};
}

void RegionLog::published(const Demotion& demotion, bool indexed) noexcept {
  Region& row = regions_.at(demotion.region);
  if (indexed) {
    row.items.fetch_add(1, std::memory_order_relaxed);
    namespaces_[row.ns.load(std::memory_order_relaxed)]->items.fetch_add(1,
                                                                         std::memory_order_relaxed);
  }
  row.writers.fetch_sub(1, std::memory_order_release);
}

void RegionLog::forget(Entry entry) noexcept {
  Region& row = regions_.at(regions_.region_of(entry));
  // A sweep may leave an entry of an earlier life behind, which no count knows any more.
  std::uint32_t items = row.items.load(std::memory_order_relaxed);
  while (items != 0 && !row.items.compare_exchange_weak(items, items - 1)) {
  }
  if (items == 0) return;
  namespaces_[row.ns.load(std::memory_order_relaxed)]->items.fetch_sub(1,
                                                                       std::memory_order_relaxed);
}

void RegionLog::invalidated(Entry entry) noexcept {
  if (journal_ == nullptr) return;
  const std::uint32_t region = regions_.region_of(entry);
  journal_->append(
      JournalEntry::record(region, regions_.at(region).generation.load(std::memory_order_relaxed),
                           regions_.offset_in_region(entry)));
}

void RegionLog::region_gone(std::uint32_t region) noexcept {
  if (journal_ == nullptr) return;
  journal_->append(JournalEntry::region_gone(
      region, regions_.at(region).generation.load(std::memory_order_relaxed)));
}

// While the region is what the entry speaks of, in memory or on the device.
bool RegionLog::still_matters(const JournalEntry& entry) const noexcept {
  if (entry.kind() == JournalEntry::Kind::Flush) return true;
  if (entry.region() >= regions_.count()) return false;
  const Region& row = regions_.at(entry.region());
  return row.generation.load(std::memory_order_acquire) == entry.generation() ||
         row.device_generation.load(std::memory_order_acquire) == entry.generation();
}

void RegionLog::seal_all() {
  for (const auto& ns : namespaces_) {
    const std::lock_guard lock(ns->mutex);
    if (ns->open != kNoRegion) seal_locked(*ns);
  }
}

bool RegionLog::all_written() {
  const std::lock_guard pool(pool_mutex_);
  return to_write_.empty() && writing_.load(std::memory_order_relaxed) == 0;
}

bool RegionLog::has_room_locked(const LogNamespace& ns, std::size_t bytes) const noexcept {
  return regions_.at(ns.open).used + bytes + list_bytes(ns.hashes.size() + 1) +
             sizeof(RegionTrailer) <=
         regions_.region_bytes();
}

Refusal RegionLog::open_locked(LogNamespace& ns, NamespaceIndex index, std::uint16_t incarnation,
                               bool reinsertion) {
  // The last region and the last buffer are for what emptying keeps: demotions that come faster
  // than the device takes them must not cost the items that were hit.
  const std::uint32_t kept_back = reinsertion ? 0 : 1;
  const std::uint32_t budget = budget_now(ns);
  if (budget == 0) return Refusal::OutOfService;
  if (ns.used_regions.load(std::memory_order_relaxed) + kept_back >= budget) {
    wake();
    return Refusal::Buffers;
  }
  const std::lock_guard pool(pool_mutex_);
  collect_locked();
  if (free_buffers_.size() <= kept_back) return Refusal::Buffers;
  const std::optional<std::uint32_t> region = take_region_locked();
  if (!region) return Refusal::Buffers;
  const std::uint32_t buffer = free_buffers_.back();
  free_buffers_.pop_back();
  Region& row = regions_.at(*region);
  row.generation.store(next_generation_++, std::memory_order_relaxed);
  row.set_stamp(moved_.now());
  row.incarnation.store(incarnation, std::memory_order_relaxed);
  row.ns.store(index, std::memory_order_relaxed);
  row.namespace_seed = ns.seed;
  row.buffer_number = buffer;
  row.on_device = 0;
  row.items.store(0, std::memory_order_relaxed);
  row.used = sizeof(RegionHeader);
  row.last_expiry = 0;
  row.first_expiry = kNever;
  row.state.store(RegionState::Open, std::memory_order_release);
  row.buffer.store(state_.buffer(buffer), std::memory_order_release);
  ns.used_regions.fetch_add(1, std::memory_order_relaxed);
  ns.open = *region;
  if (wants_room(ns)) {
    woken_ = true;
    work_.notify_one();
  }
  return Refusal::None;
}

void RegionLog::seal_locked(LogNamespace& ns) {
  WriteJob job;
  job.region = ns.open;
  job.hashes = std::move(ns.hashes);
  job.offsets = std::move(ns.offsets);
  ns.hashes.clear();
  ns.offsets.clear();
  ns.hashes.reserve(job.hashes.size());
  ns.offsets.reserve(job.offsets.size());
  ns.open = kNoRegion;
  regions_.at(job.region).state.store(RegionState::Writing, std::memory_order_release);
  const std::lock_guard pool(pool_mutex_);
  to_write_.push_back(std::move(job));
  writing_.fetch_add(1, std::memory_order_relaxed);
  work_.notify_one();
}

void RegionLog::flush(NamespaceIndex index) {
  LogNamespace& ns = *namespaces_[index];
  const std::lock_guard lock(ns.mutex);
  if (ns.open != kNoRegion) seal_locked(ns);
  const std::uint16_t current = ns.incarnation->load(std::memory_order_acquire);
  const std::lock_guard pool(pool_mutex_);
  std::erase_if(ns.sealed, [&](std::uint32_t region) {
    if (regions_.at(region).incarnation.load(std::memory_order_relaxed) == current) return false;
    doomed_.push_back(region);
    return true;
  });
  if (journal_ != nullptr) journal_->append(JournalEntry::flush(ns.seed, next_generation_));
  woken_ = true;
  work_.notify_one();
}

// ---- the pool
// ------------------------------------------------------------------------------------

// Takes turns over the devices that are in service.
std::optional<std::uint32_t> RegionLog::take_region_locked() {
  for (std::size_t tries = 0; tries < free_.size(); ++tries) {
    const std::size_t device = next_device_;
    next_device_ = (next_device_ + 1) % free_.size();
    if (free_[device].empty() || !regions_.devices()[device]->health.in_service()) continue;
    const std::uint32_t region = free_[device].front();
    free_[device].pop_front();
    return region;
  }
  return std::nullopt;
}

void RegionLog::release_buffer_locked(std::uint32_t region) {
  Region& row = regions_.at(region);
  if (row.buffer.exchange(nullptr, std::memory_order_acq_rel) == nullptr) return;
  limbo_.push_back({kNoRegion, row.buffer_number, epochs_.retire(), false});
  row.buffer_number = kNoBuffer;
}

void RegionLog::collect_locked() {
  if (limbo_.empty()) return;
  const std::uint64_t safe = epochs_.safe_before();
  std::erase_if(limbo_, [&](Waiting& waiting) {
    if (waiting.epoch >= safe) return false;
    if (waiting.region == kNoRegion) {
      free_buffers_.push_back(waiting.buffer);
      return true;
    }
    Region& row = regions_.at(waiting.region);
    // Whoever pinned it did so within an epoch that is over by now.
    LogNamespace& ns = *namespaces_[row.ns.load(std::memory_order_relaxed)];
    // A region that a slow read holds is not as good as free: another one goes for it.
    if (!waiting.held) ns.leaving.fetch_sub(1, std::memory_order_relaxed);
    waiting.held = row.pins.load(std::memory_order_acquire) != 0;
    if (waiting.held) return false;
    ns.used_regions.fetch_sub(1, std::memory_order_relaxed);
    row.incarnation.store(0, std::memory_order_relaxed);
    row.state.store(RegionState::Free, std::memory_order_release);
    free_[regions_.device_of(waiting.region)].push_back(waiting.region);
    return true;
  });
}

void RegionLog::collect() {
  const std::lock_guard pool(pool_mutex_);
  collect_locked();
}

// ---- for the region writer
// -----------------------------------------------------------------------

// While a device is out of service a namespace keeps to its share of the others: else it would
// wait for regions that are not there, and none of its own would be emptied for what comes.
std::uint32_t RegionLog::budget_now(const LogNamespace& ns) const noexcept {
  std::uint64_t serving = 0;
  for (const auto& part : regions_.devices()) {
    if (part->health.in_service()) serving += part->regions;
  }
  if (serving == regions_.count()) return ns.budget_regions;
  return static_cast<std::uint32_t>(ns.budget_regions * serving / regions_.count());
}

// Some clean regions ahead, so that demotions find one while the device is busy; and fewer items
// where the index is filled up by small ones.
bool RegionLog::wants_room(const LogNamespace& ns) const noexcept {
  const std::uint32_t budget = budget_now(ns);
  const std::uint32_t ahead = std::clamp<std::uint32_t>(budget / 32, 1, 8) + 1;
  const std::uint32_t used =
      ns.used_regions.load(std::memory_order_relaxed) - ns.leaving.load(std::memory_order_relaxed);
  return used + ahead > budget || ns.items.load(std::memory_order_relaxed) >= ns.item_budget;
}

RegionLog::Work RegionLog::next_work(Tick now, std::uint64_t wait_ms) {
  Work work;
  {
    std::unique_lock pool(pool_mutex_);
    collect_locked();
    if (!to_write_.empty()) {
      work.write = std::move(to_write_.front());
      to_write_.pop_front();
      return work;
    }
    if (!doomed_.empty()) {
      work.empty = doomed_.front();
      doomed_.pop_front();
      return work;
    }
  }
  // What has expired as a whole goes first, wherever it stands; looked for once a tick, since it
  // means a look at every region.
  for (std::size_t n = 0; now != looked_for_expired_ && n < namespaces_.size(); ++n) {
    LogNamespace& ns = *namespaces_[n];
    const std::lock_guard lock(ns.mutex);
    const auto expired = std::find_if(ns.sealed.begin(), ns.sealed.end(), [&](std::uint32_t r) {
      return regions_.at(r).last_expiry <= now;
    });
    if (expired == ns.sealed.end()) continue;
    work.empty = *expired;
    ns.sealed.erase(expired);
    return work;
  }
  looked_for_expired_ = now;
  for (const auto& ns : namespaces_) {
    if (ns->budget_regions == 0 || !wants_room(*ns)) continue;
    const std::lock_guard lock(ns->mutex);
    if (ns->sealed.empty()) continue;
    work.empty = ns->sealed.front();
    work.keep_hits = true;
    ns->sealed.pop_front();
    return work;
  }
  std::unique_lock pool(pool_mutex_);
  if (wait_ms != 0 && to_write_.empty() && doomed_.empty() && !woken_) {
    work_.wait_for(pool, std::chrono::milliseconds(wait_ms),
                   [this] { return woken_ || !to_write_.empty() || !doomed_.empty(); });
  }
  woken_ = false;
  return work;
}

void RegionLog::wake() noexcept {
  const std::lock_guard pool(pool_mutex_);
  woken_ = true;
  work_.notify_one();
}

void RegionLog::written(std::uint32_t region) {
  Region& row = regions_.at(region);
  LogNamespace& ns = *namespaces_[row.ns.load(std::memory_order_relaxed)];
  const std::lock_guard lock(ns.mutex);
  row.sealed_sum = row.sum_of_sealed();
  row.on_device = 1;
  row.state.store(RegionState::Sealed, std::memory_order_release);
  writing_.fetch_sub(1, std::memory_order_relaxed);
  const bool flushed = row.incarnation.load(std::memory_order_relaxed) !=
                       ns.incarnation->load(std::memory_order_acquire);
  if (!flushed) ns.sealed.push_back(region);
  const std::lock_guard pool(pool_mutex_);
  release_buffer_locked(region);
  if (flushed) doomed_.push_back(region);
}

void RegionLog::retire(std::uint32_t region) {
  const std::lock_guard pool(pool_mutex_);
  Region& row = regions_.at(region);
  row.on_device = 0;
  if (row.state.exchange(RegionState::Emptying, std::memory_order_acq_rel) ==
      RegionState::Writing) {
    writing_.fetch_sub(1, std::memory_order_relaxed);
  }
  namespaces_[row.ns.load(std::memory_order_relaxed)]->leaving.fetch_add(1,
                                                                         std::memory_order_relaxed);
  release_buffer_locked(region);
  limbo_.push_back({region, kNoBuffer, epochs_.retire(), false});
}

std::vector<std::uint32_t> RegionLog::doom_device(std::size_t device) {
  std::vector<std::uint32_t> lost;
  for (const auto& ns : namespaces_) {
    const std::lock_guard lock(ns->mutex);
    if (ns->open != kNoRegion && regions_.device_of(ns->open) == device) seal_locked(*ns);
    std::erase_if(ns->sealed, [&](std::uint32_t region) {
      if (regions_.device_of(region) != device) return false;
      lost.push_back(region);
      return true;
    });
  }
  const std::lock_guard pool(pool_mutex_);
  std::erase_if(doomed_, [&](std::uint32_t region) {
    if (regions_.device_of(region) != device) return false;
    lost.push_back(region);
    return true;
  });
  for (const std::uint32_t region : lost) {
    regions_.at(region).state.store(RegionState::Emptying, std::memory_order_release);
    region_gone(region);
  }
  return lost;
}

bool RegionLog::settled() {
  for (const auto& ns : namespaces_) {
    const std::lock_guard lock(ns->mutex);
    if (ns->budget_regions != 0 && !ns->sealed.empty() && wants_room(*ns)) return false;
  }
  const std::lock_guard pool(pool_mutex_);
  collect_locked();
  return to_write_.empty() && doomed_.empty() && limbo_.empty();
}

// ---- counters
// ------------------------------------------------------------------------------------

std::uint64_t RegionLog::memory_bytes() const noexcept {
  std::uint64_t bytes = std::uint64_t{regions_.count()} * sizeof(Region);
  for (const auto& ns : namespaces_) bytes += sizeof(*ns) + ns->admission.memory_bytes();
  return bytes + std::uint64_t{state_.buffers()} * regions_.region_bytes();
}

std::array<std::uint32_t, kRegionStates> RegionLog::count_states(
    std::size_t device) const noexcept {
  std::array<std::uint32_t, kRegionStates> counts{};
  const DevicePart& part = *regions_.devices()[device];
  for (std::uint32_t i = 0; i < part.regions; ++i) {
    const Region& row = regions_.at(part.first_region + i);
    ++counts[static_cast<std::size_t>(row.state.load(std::memory_order_relaxed))];
  }
  return counts;
}

bool RegionLog::uses_incarnation(std::uint16_t incarnation) const noexcept {
  for (std::uint32_t r = 0; r < regions_.count(); ++r) {
    const Region& row = regions_.at(r);
    if (row.state.load(std::memory_order_acquire) != RegionState::Free &&
        row.incarnation.load(std::memory_order_relaxed) == incarnation) {
      return true;
    }
  }
  return false;
}

}  // namespace fc::nvm
