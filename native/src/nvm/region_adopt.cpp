// What the log makes of the rows and buffers that another process left.
//
// The index is the truth: a record counts when an entry points at it. So the counts, and the lists
// of the regions that were not written yet (they died with the process), are made up from one walk
// over the index; entries into regions that cannot be trusted go.

#include <algorithm>

#include "core/parallel.hpp"
#include "core/sequence_point.hpp"
#include "nvm/region_log.hpp"

namespace fc::nvm {
namespace {

constexpr std::uint64_t kBucketsPerThreadLeast = 1u << 14;

}  // namespace

// A record of a region that is in memory, as its entry and its header say.
struct RegionLog::Buffered {
  std::uint64_t hash = 0;
  std::uint32_t offset = 0;
  std::uint32_t bytes = 0;
  Tick expiry = kNever;
};

void RegionLog::start_anew() {
  for (std::uint32_t b = state_.buffers(); b-- > 0;) free_buffers_.push_back(b);
  for (std::uint32_t r = 0; r < regions_.count(); ++r) free_[regions_.device_of(r)].push_back(r);
}

RegionLog::Use RegionLog::use_of(const Region& row, std::vector<bool>& buffers) const noexcept {
  const RegionState state = row.state.load(std::memory_order_relaxed);
  if (state == RegionState::Free || state > RegionState::Emptying) return Use::None;
  const auto ns = std::find_if(namespaces_.begin(), namespaces_.end(), [&](const auto& of) {
    return of->seed == row.namespace_seed && of->budget_regions != 0;
  });
  if (ns != namespaces_.end() && row.incarnation.load(std::memory_order_relaxed) !=
                                     (*ns)->incarnation->load(std::memory_order_relaxed)) {
    return Use::Flushed;
  }
  const std::uint64_t generation = row.generation.load(std::memory_order_relaxed);
  if (ns == namespaces_.end() || generation - 1 >= JournalEntry::kGenerationMask ||
      row.used < sizeof(RegionHeader) || row.used > regions_.region_bytes()) {
    return Use::None;
  }
  if (state == RegionState::Sealed || state == RegionState::Emptying) {
    return row.on_device != 0 && row.sealed_sum == row.sum_of_sealed() ? Use::Device : Use::None;
  }
  if (row.buffer_number >= state_.buffers() || buffers[row.buffer_number]) return Use::None;
  buffers[row.buffer_number] = true;
  return Use::Buffer;
}

std::vector<RegionLog::Use> RegionLog::classify() {
  std::vector<bool> buffers(state_.buffers());
  std::vector<Use> uses(regions_.count());
  for (std::uint32_t r = 0; r < regions_.count(); ++r) {
    Region& row = regions_.at(r);
    uses[r] = use_of(row, buffers);
    row.pins.store(0, std::memory_order_relaxed);
    row.writers.store(0, std::memory_order_relaxed);
    row.items.store(0, std::memory_order_relaxed);
    row.buffer.store(nullptr, std::memory_order_relaxed);
    if (!row.stamp_is_whole()) row.set_stamp(kUnknownStamp);
    if (row.device_sum != row.sum_of_device()) {
      row.set_device_generation(kUnknownGeneration);
      row.set_listed(kUnknownRecords);
    }
    if (uses[r] == Use::Buffer) {
      row.buffer.store(state_.buffer(row.buffer_number), std::memory_order_relaxed);
    }
  }
  for (std::uint32_t b = state_.buffers(); b-- > 0;) {
    if (!buffers[b]) free_buffers_.push_back(b);
  }
  return uses;
}

bool RegionLog::points_well(Entry entry, const std::vector<Use>& uses) const noexcept {
  const std::uint32_t region = regions_.region_of(entry);
  if (entry.lines() == 0 || region >= uses.size() || uses[region] < Use::Buffer) return false;
  const std::uint32_t offset = regions_.offset_in_region(entry);
  return offset >= sizeof(RegionHeader) && offset + sizeof(RecordHeader) < regions_.at(region).used;
}

// A record that is still in memory can be looked at: it must be whole, and its key's entry here.
bool RegionLog::is_in_buffer(Index& index, Entry entry, std::uint64_t bucket,
                             Buffered& record) const {
  const std::uint32_t region = regions_.region_of(entry);
  const Region& row = regions_.at(region);
  const std::uint32_t offset = regions_.offset_in_region(entry);
  RecordView view;
  if (!read_record(row.buffer.load(std::memory_order_relaxed) + offset, row.used - offset,
                   row.generation.load(std::memory_order_relaxed),
                   regions_.location(region, offset), view) ||
      view.header.incarnation != row.incarnation.load(std::memory_order_relaxed)) {
    return false;
  }
  record.hash = hash_key(row.namespace_seed, view.key).low;
  record.offset = offset;
  record.bytes = static_cast<std::uint32_t>(view.header.bytes());
  record.expiry = view.header.expiry;
  const Place place = index.place_of(record.hash);
  return entry.may_be_nvm_of(record.hash) && (place.home == bucket || place.partner == bucket);
}

// What is to be written of a region, and a row that says no more than its records do: nothing but
// these vouches for it.
WriteJob RegionLog::job_of(std::uint32_t region, std::vector<Buffered>& records) {
  std::sort(records.begin(), records.end(),
            [](const Buffered& a, const Buffered& b) { return a.offset < b.offset; });
  Region& row = regions_.at(region);
  row.used = sizeof(RegionHeader);
  row.last_expiry = 0;
  row.first_expiry = kNever;
  WriteJob job;
  job.region = region;
  for (const Buffered& record : records) {
    if (record.offset < row.used) continue;  // two entries point at it
    row.used = record.offset + record.bytes;
    row.count_expiry(record.expiry);
    job.hashes.push_back(record.hash);
    job.offsets.push_back(static_cast<std::uint32_t>(record.offset / layout::kNvmRecordAlignment));
  }
  return job;
}

RegionLog::Adopted RegionLog::adopt(Index& index) {
  const std::vector<Use> uses = classify();
  FC_SEQUENCE_POINT("nvm:adopting");
  std::mutex mutex;
  std::vector<std::vector<Buffered>> buffered(regions_.count());
  Adopted adopted;
  in_parallel(
      index.bucket_count(), kBucketsPerThreadLeast, [&](std::uint64_t begin, std::uint64_t end) {
        Adopted mine;
        for (std::uint64_t number = begin; number < end; ++number) {
          for (Slot& slot : index.bucket(number).slots) {
            const Entry entry(slot.load(std::memory_order_relaxed));
            if (!entry.on_nvm()) continue;
            const std::uint32_t region = regions_.region_of(entry);
            if (region < uses.size() && uses[region] == Use::Flushed) {
              slot.store(0, std::memory_order_relaxed);
              continue;
            }
            Buffered record;
            if (!points_well(entry, uses) ||
                (uses[region] == Use::Buffer && !is_in_buffer(index, entry, number, record))) {
              slot.store(0, std::memory_order_relaxed);
              ++mine.dropped;
              continue;
            }
            regions_.at(region).items.fetch_add(1, std::memory_order_relaxed);
            ++mine.items;
            if (uses[region] == Use::Device) continue;
            const std::lock_guard lock(mutex);
            buffered[region].push_back(record);
          }
        }
        const std::lock_guard lock(mutex);
        adopted.items += mine.items;
        adopted.dropped += mine.dropped;
      });
  std::vector<WriteJob> jobs;
  for (std::uint32_t r = 0; r < regions_.count(); ++r) {
    if (uses[r] != Use::Buffer || buffered[r].empty()) continue;
    jobs.push_back(job_of(r, buffered[r]));
  }
  queue_up(uses, jobs);
  return adopted;
}

// Every region to where it belongs: on the device, on its way there, or free.
void RegionLog::queue_up(const std::vector<Use>& uses, std::vector<WriteJob>& jobs) {
  const auto generation = [&](std::uint32_t region) {
    return regions_.at(region).generation.load(std::memory_order_relaxed);
  };
  for (std::uint32_t r = 0; r < regions_.count(); ++r) {
    Region& row = regions_.at(r);
    for (const std::uint64_t seen : {generation(r), row.device_generation.load()}) {
      // Beyond that it is none, and unknown.
      if (seen < JournalEntry::kGenerationMask) {
        next_generation_ = std::max(next_generation_, seen + 1);
      }
    }
    if (uses[r] < Use::Buffer || row.items.load(std::memory_order_relaxed) == 0) {
      if (row.buffer.exchange(nullptr, std::memory_order_relaxed) != nullptr) {
        free_buffers_.push_back(row.buffer_number);
      }
      row.buffer_number = kNoBuffer;
      row.on_device = 0;
      row.incarnation.store(0, std::memory_order_relaxed);
      row.state.store(RegionState::Free, std::memory_order_release);
      free_[regions_.device_of(r)].push_back(r);
      continue;
    }
    moved_.found(row.stamp());
    for (std::size_t n = 0; n < namespaces_.size(); ++n) {
      LogNamespace& ns = *namespaces_[n];
      if (ns.seed != row.namespace_seed) continue;
      row.ns.store(static_cast<NamespaceIndex>(n), std::memory_order_relaxed);
      ns.used_regions.fetch_add(1, std::memory_order_relaxed);
      ns.items.fetch_add(row.items.load(std::memory_order_relaxed), std::memory_order_relaxed);
      if (uses[r] == Use::Device) ns.sealed.push_back(r);
    }
    row.state.store(uses[r] == Use::Device ? RegionState::Sealed : RegionState::Writing,
                    std::memory_order_release);
  }
  for (const auto& ns : namespaces_) {
    std::sort(ns->sealed.begin(), ns->sealed.end(),
              [&](std::uint32_t a, std::uint32_t b) { return generation(a) < generation(b); });
  }
  std::sort(jobs.begin(), jobs.end(), [&](const WriteJob& a, const WriteJob& b) {
    return generation(a.region) < generation(b.region);
  });
  writing_.store(jobs.size(), std::memory_order_relaxed);
  for (WriteJob& job : jobs) to_write_.push_back(std::move(job));
}

}  // namespace fc::nvm
