// What the devices say of themselves to a start that finds nothing else: heartbeats while they are
// used, and lists that name what is valid and nothing else.

#include <algorithm>
#include <cstring>

#include "core/sequence_point.hpp"
#include "nvm/region_writer.hpp"

namespace fc::nvm {
namespace {

constexpr std::uint64_t kBeatNs = 5'000'000'000;
constexpr std::uint64_t kSaysAgainNs = 100'000'000;
// Who waits longer than that for a device to take a heartbeat waits for none that still works.
constexpr std::uint64_t kSaysMostNs = 2'000'000'000;

constexpr std::size_t round_down(std::size_t bytes) noexcept {
  return bytes / kBlockBytes * kBlockBytes;
}

}  // namespace

bool RegionWriter::beat(SetState state) {
  return beat_all(state) == queues_.size();
}

std::size_t RegionWriter::beat_all(SetState state) {
  Heartbeat heartbeat;
  heartbeat.set_id = options_.set_id;
  heartbeat.sequence = ++beat_sequence_;
  heartbeat.state = state;
  heartbeat.tick = ticks_.now();
  heartbeat.wall_ms = wall_now_ms();
  heartbeat.boot_ms = ticks_.clock_ms();
  heartbeat.counts = log_.moved().counts();
  const std::string boot = boot_id();
  std::copy_n(boot.begin(), std::min(boot.size(), heartbeat.boot_id.size()),
              heartbeat.boot_id.begin());
  heartbeat.checksum = heartbeat.sum();
  std::size_t good = 0;
  for (const auto& queue : queues_) good += write_heartbeat(*queue, heartbeat) ? 1 : 0;
  beaten_ns_ = monotonic_ns();
  return good;
}

void RegionWriter::beat_when_due() {
  const std::uint64_t since = monotonic_ns() - beaten_ns_;
  if (!beat_now_.load(std::memory_order_acquire)) {
    if (since > kBeatNs) (void)beat(set_state_.load());
    return;
  }
  // Into both places: no one flip makes the journal count again. One device that says so is enough,
  // since all must agree.
  if (said_once_ && since < kSaysAgainNs) return;
  said_once_ = true;
  if (beat_all(SetState::Serving) == 0 || beat_all(SetState::Serving) == 0) return;
  beat_now_.store(false, std::memory_order_relaxed);
  said_.store(true, std::memory_order_release);
}

void RegionWriter::no_journal() noexcept {
  if (set_state_.exchange(SetState::Serving) != SetState::Serving) {
    beat_now_.store(true, std::memory_order_release);
    log_.wake();
  }
  const std::uint64_t begun_ns = monotonic_ns();
  while (!said_.load(std::memory_order_acquire) && !stop_.load(std::memory_order_acquire)) {
    if (monotonic_ns() - begun_ns > kSaysMostNs) said_.store(true, std::memory_order_relaxed);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

bool RegionWriter::make_exact(std::uint64_t deadline_ns) {
  std::vector<bool> changed(queues_.size());
  for (std::uint32_t r = 0; r < regions_.count(); ++r) {
    Region& row = regions_.at(r);
    const NamespaceIndex ns = row.ns.load(std::memory_order_relaxed);
    const bool valid = row.state.load(std::memory_order_relaxed) == RegionState::Sealed &&
                       row.on_device != 0 &&
                       row.incarnation.load(std::memory_order_relaxed) ==
                           log_.ns(ns).incarnation->load(std::memory_order_acquire);
    const std::uint32_t items = row.items.load(std::memory_order_relaxed);
    if (valid && items != 0 && items == row.listed) continue;
    if (monotonic_ns() > deadline_ns) return false;
    FC_SEQUENCE_POINT("nvm:trimming");
    changed[regions_.device_of(r)] = true;
    if (valid && items != 0 && trim(r)) continue;
    if (row.device_generation.load(std::memory_order_relaxed) == 0) continue;
    std::memset(first_block_.get(), 0, kBlockBytes);
    auto header =
        chunks(IoRequest::Kind::Write, regions_.offset_of(r), first_block_.get(), kBlockBytes);
    if (!transfer(regions_.device_of(r), header)) return false;
    row.set_device_generation(0);
  }
  // A journal that begins after this knows nothing of what was there before.
  bool good = true;
  for (std::size_t d = 0; d < changed.size(); ++d) good = (!changed[d] || sync(d)) && good;
  return good;
}

// Writes a region's list anew, without what the index does not hold any more. A write that is cut
// off leaves a list that does not fit its checksum: nothing of the region is found then.
bool RegionWriter::trim(std::uint32_t region) {
  std::vector<ListedRecord> list;
  if (!read_listed(region, list)) return false;
  std::vector<std::uint64_t> hashes;
  std::vector<std::uint32_t> offsets;
  for (const ListedRecord& record : list) {
    const Place place = index_.place_of(record.hash);
    const PairLock pair(index_, place);
    if (index_.find_nvm_locked(place, regions_.location(region, record.offset)) == nullptr)
      continue;
    hashes.push_back(record.hash);
    offsets.push_back(static_cast<std::uint32_t>(record.offset / layout::kNvmRecordAlignment));
  }
  const std::size_t size = regions_.region_bytes();
  const std::size_t from = round_down(write_list(region, scratch_.get(), hashes, offsets));
  auto tail = chunks(IoRequest::Kind::Write, regions_.offset_of(region) + from,
                     scratch_.get() + from, size - from);
  if (!transfer(regions_.device_of(region), tail)) return false;
  Region& row = regions_.at(region);
  row.set_listed(static_cast<std::uint32_t>(hashes.size()));
  row.set_device_generation(row.generation.load(std::memory_order_relaxed));
  return true;
}

}  // namespace fc::nvm
