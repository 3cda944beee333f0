#include "nvm/region_writer.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "core/sequence_point.hpp"

namespace fc::nvm {
namespace {

constexpr std::size_t kChunkBytes = std::size_t{512} << 10;  // small enough that reads get between
constexpr std::size_t kChunksAtOnce = 4;
constexpr std::uint64_t kIdleWaitMs = 50;
constexpr std::uint32_t kKeptShare = 2;  // of a region's bytes that may be kept: a half

constexpr std::size_t round_up(std::size_t bytes) noexcept {
  return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}
constexpr std::size_t round_down(std::size_t bytes) noexcept {
  return bytes / kBlockBytes * kBlockBytes;
}

std::byte* aligned(std::size_t bytes) {
  auto* data = static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes));
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, bytes);
  return data;
}

}  // namespace

bool write_superblock(IoQueue& queue, const Superblock& superblock) {
  std::byte* block = aligned(2 * kBlockBytes);
  std::memcpy(block, &superblock, sizeof(superblock));
  IoRequest request;
  request.kind = IoRequest::Kind::Write;
  request.data = block;
  request.bytes = kBlockBytes;
  bool good = run_request(queue, request) == static_cast<std::int64_t>(kBlockBytes);
  request.kind = IoRequest::Kind::Read;
  request.data = block + kBlockBytes;
  good = good && run_request(queue, request) == static_cast<std::int64_t>(kBlockBytes) &&
         std::memcmp(block, block + kBlockBytes, kBlockBytes) == 0;
  std::free(block);
  return good;
}

RegionWriter::RegionWriter(RegionLog& log, Regions& regions, Index& index, const Ticks& ticks,
                           const WriterOptions& options)
    : log_(log),
      regions_(regions),
      index_(index),
      ticks_(ticks),
      options_(options),
      scratch_(aligned(regions.region_bytes())),
      first_block_(aligned(kBlockBytes)),
      lost_(regions.devices().size()),
      probed_ns_(regions.devices().size()) {
  for (const auto& part : regions.devices()) {
    queues_.push_back(part->device->make_queue(kChunksAtOnce));
  }
}

Superblock make_superblock(const Regions& regions, std::uint64_t set_id, std::size_t device) {
  Superblock superblock{};
  superblock.magic = kSuperblockMagic;
  superblock.version = kFormatVersion;
  superblock.region_bytes = regions.region_bytes();
  superblock.device_bytes = regions.devices()[device]->device->bytes();
  superblock.set_id = set_id;
  superblock.device = static_cast<std::uint32_t>(device);
  superblock.devices = static_cast<std::uint32_t>(regions.devices().size());
  superblock.checksum = superblock.sum();
  return superblock;
}

RegionWriter::~RegionWriter() {
  stop();
}

void RegionWriter::stop() {
  stop_.store(true, std::memory_order_release);
  log_.wake();
  if (thread_.joinable()) thread_.join();
}

void RegionWriter::start() {
  thread_ = std::thread([this] { run(); });
}

void RegionWriter::run() {
  while (!stop_.load(std::memory_order_acquire)) {
    see_to_devices();
    if (beats_) beat_when_due();
    RegionLog::Work work = log_.next_work(ticks_.now(), 0);
    if (!work.write && !work.empty) {
      idle_.store(true, std::memory_order_release);
      work = log_.next_work(ticks_.now(), kIdleWaitMs);
    }
    idle_.store(false, std::memory_order_release);
    if (work.write) write(*work.write);
    if (work.empty) empty(*work.empty, work.keep_hits);
  }
}

// ---- writing
// -------------------------------------------------------------------------------------

void RegionWriter::write(WriteJob& job) {
  Region& row = regions_.at(job.region);
  // Who reserved room here is about to publish and needs nothing of ours for it.
  while (row.writers.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  FC_SEQUENCE_POINT("nvm:region_full");
  leave_out_unindexed(job);
  const LogNamespace& ns = log_.ns(row.ns.load(std::memory_order_relaxed));
  const bool flushed = row.incarnation.load(std::memory_order_relaxed) !=
                       ns.incarnation->load(std::memory_order_acquire);
  if (flushed || job.hashes.empty() || row.last_expiry <= ticks_.now() ||
      (!write_to_device(job.region, job) && !write_to_device(job.region, job))) {
    drop_unwritten(job);
    return;
  }
  FC_SEQUENCE_POINT("nvm:region_written");
  log_.written(job.region);
}

// The list names what is indexed and nothing else; what was overwritten or deleted while the region
// filled must not be found again by whoever reads it.
void RegionWriter::leave_out_unindexed(WriteJob& job) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < job.hashes.size(); ++i) {
    const Place place = index_.place_of(job.hashes[i]);
    const std::uint64_t location =
        regions_.location(job.region, job.offsets[i] * layout::kNvmRecordAlignment);
    const PairLock pair(index_, place);
    if (index_.find_nvm_locked(place, location) == nullptr) continue;
    job.hashes[kept] = job.hashes[i];
    job.offsets[kept++] = job.offsets[i];
  }
  job.hashes.resize(kept);
  job.offsets.resize(kept);
}

bool RegionWriter::write_to_device(std::uint32_t region, const WriteJob& job) {
  Region& row = regions_.at(region);
  const std::size_t device = regions_.device_of(region);
  if (!regions_.devices()[device]->health.in_service()) return false;
  std::byte* data = row.buffer.load(std::memory_order_relaxed);
  const std::size_t size = regions_.region_bytes();

  RegionHeader header{};
  header.magic = kHeaderMagic;
  header.generation = row.generation.load(std::memory_order_relaxed);
  header.set_id = options_.set_id;
  header.region = region;
  header.incarnation = row.incarnation.load(std::memory_order_relaxed);
  header.namespace_seed = log_.ns(row.ns.load(std::memory_order_relaxed)).seed;
  header.stamp = row.stamp();
  header.checksum = header.sum();
  std::memcpy(data, &header, sizeof(header));

  const std::size_t list_begin = write_list(region, data, job.hashes, job.offsets);
  row.set_listed(static_cast<std::uint32_t>(job.hashes.size()));
  if (row.device_generation.load(std::memory_order_relaxed) == 0) {
    row.set_device_generation(header.generation);
  }
  const std::uint64_t offset = regions_.offset_of(region);
  // The header goes first, alone: from here on the region's earlier life is over.
  std::memcpy(first_block_.get(), &header, sizeof(header));
  auto first = chunks(IoRequest::Kind::Write, offset, first_block_.get(), kBlockBytes);
  if (!transfer(device, first)) return false;
  // A journal may now forget what it said of that life: so this header is to stay.
  if (log_.keeps_journal() && !sync(device)) return false;
  row.set_device_generation(header.generation);
  FC_SEQUENCE_POINT("nvm:header_written");
  const std::size_t used_end = round_up(row.used);
  const std::size_t tail_begin = round_down(list_begin);
  if (used_end >= tail_begin) {
    auto whole = chunks(IoRequest::Kind::Write, offset, data, size);
    return transfer(device, whole);
  }
  auto parts = chunks(IoRequest::Kind::Write, offset, data, used_end);
  const auto tail =
      chunks(IoRequest::Kind::Write, offset + tail_begin, data + tail_begin, size - tail_begin);
  parts.insert(parts.end(), tail.begin(), tail.end());
  return transfer(device, parts);
}

// Writes list and trailer to the end of the region at `data`; returns where the list begins.
std::size_t RegionWriter::write_list(std::uint32_t region, std::byte* data,
                                     const std::vector<std::uint64_t>& hashes,
                                     const std::vector<std::uint32_t>& offsets) {
  const Region& row = regions_.at(region);
  const std::size_t size = regions_.region_bytes();
  RegionTrailer trailer{};
  trailer.magic = kTrailerMagic;
  trailer.generation = row.generation.load(std::memory_order_relaxed);
  trailer.records = static_cast<std::uint32_t>(hashes.size());
  trailer.used_bytes = row.used;
  trailer.last_expiry = row.last_expiry;
  trailer.first_expiry = row.first_expiry;
  const std::size_t list = list_bytes(hashes.size());
  const std::size_t list_begin = size - sizeof(trailer) - list;
  FC_CHECK(row.used <= list_begin);
  std::byte* at = data + list_begin;
  std::memset(at, 0, list);
  std::memcpy(at, hashes.data(), hashes.size() * sizeof(std::uint64_t));
  std::memcpy(at + hashes.size() * sizeof(std::uint64_t), offsets.data(),
              offsets.size() * sizeof(std::uint32_t));
  trailer.list_checksum = XXH3_64bits_withSeed(at, list, trailer.generation);
  trailer.checksum = trailer.sum();
  std::memcpy(data + size - sizeof(trailer), &trailer, sizeof(trailer));
  return list_begin;
}

// A region that does not get to the device: flushed, expired, or the device fails.
void RegionWriter::drop_unwritten(const WriteJob& job) {
  LogNamespace& ns = log_.ns(regions_.at(job.region).ns.load(std::memory_order_relaxed));
  log_.region_gone(job.region);
  for (std::size_t i = 0; i < job.hashes.size(); ++i) {
    const Place place = index_.place_of(job.hashes[i]);
    const std::uint64_t location =
        regions_.location(job.region, job.offsets[i] * layout::kNvmRecordAlignment);
    const PairLock pair(index_, place);
    if (Slot* slot = index_.find_nvm_locked(place, location)) {
      const Entry entry(slot->load(std::memory_order_relaxed));
      slot->store(0, std::memory_order_release);
      log_.forget(entry);
      ns.evicted.add();
    }
  }
  log_.retire(job.region);
}

// ---- emptying
// ------------------------------------------------------------------------------------

void RegionWriter::empty(std::uint32_t region, bool keep_hits) {
  Region& row = regions_.at(region);
  row.state.store(RegionState::Emptying, std::memory_order_release);
  // Before anything of it is appended again: a later delete of that copy must not bring this one
  // back.
  log_.region_gone(region);
  std::vector<ListedRecord> list;
  std::vector<Kept> kept;
  if (row.items.load(std::memory_order_relaxed) != 0) {
    if (read_listed(region, list)) {
      drop_listed(region, list, keep_hits, kept);
      keep(region, kept);
    } else {
      walk_index(region);
    }
  }
  FC_SEQUENCE_POINT("nvm:region_emptied");
  log_.retire(region);
}

bool RegionWriter::read_listed(std::uint32_t region, std::vector<ListedRecord>& list) {
  const std::size_t device = regions_.device_of(region);
  const std::size_t size = regions_.region_bytes();
  const std::uint64_t offset = regions_.offset_of(region);
  std::byte* data = scratch_.get();
  auto last = chunks(IoRequest::Kind::Read, offset + size - kBlockBytes, data + size - kBlockBytes,
                     kBlockBytes);
  if (!transfer(device, last)) return false;
  RegionTrailer trailer{};
  if (!read_trailer(data + size - sizeof(trailer), size,
                    regions_.at(region).generation.load(std::memory_order_relaxed), trailer)) {
    return false;
  }
  const std::size_t begin = size - sizeof(trailer) - list_bytes(trailer.records);
  if (const std::size_t from = round_down(begin); from < size - kBlockBytes) {
    auto rest =
        chunks(IoRequest::Kind::Read, offset + from, data + from, size - kBlockBytes - from);
    if (!transfer(device, rest)) return false;
  }
  return read_list(data + begin, trailer, list);
}

void RegionWriter::drop_listed(std::uint32_t region, const std::vector<ListedRecord>& list,
                               bool keep_hits, std::vector<Kept>& kept) {
  LogNamespace& ns = log_.ns(regions_.at(region).ns.load(std::memory_order_relaxed));
  constexpr std::size_t kAhead = 16;
  std::size_t kept_bytes = 0;
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (i + kAhead < list.size()) index_.prefetch(index_.home_of(list[i + kAhead].hash));
    const Place place = index_.place_of(list[i].hash);
    const PairLock pair(index_, place);
    Slot* slot = index_.find_nvm_locked(place, regions_.location(region, list[i].offset));
    if (slot == nullptr) continue;
    const Entry entry(slot->load(std::memory_order_relaxed));
    const std::size_t end = i + 1 < list.size() ? list[i + 1].offset : regions_.region_bytes();
    const std::size_t bytes = std::min<std::size_t>(entry.nvm_bytes(), end - list[i].offset);
    if (keep_hits && entry.frequency() > 0 &&
        kept_bytes + bytes <= regions_.region_bytes() / kKeptShare) {
      kept_bytes += bytes;
      kept.push_back({list[i].hash, list[i].offset, static_cast<std::uint32_t>(bytes)});
      continue;
    }
    slot->store(0, std::memory_order_release);
    log_.forget(entry);
    ns.evicted.add();
  }
}

// Reads what is kept to its own place in the scratch region, neighbours together, and appends it.
void RegionWriter::keep(std::uint32_t region, const std::vector<Kept>& kept) {
  const std::size_t device = regions_.device_of(region);
  const std::uint64_t offset = regions_.offset_of(region);
  for (std::size_t begin = 0; begin < kept.size();) {
    const std::size_t from = round_down(kept[begin].offset);
    std::size_t to = round_up(kept[begin].offset + kept[begin].bytes_most);
    std::size_t end = begin + 1;
    while (end < kept.size() && kept[end].offset <= to + options_.gap_bytes) {
      to = std::max(to, round_up(kept[end].offset + kept[end].bytes_most));
      ++end;
    }
    to = std::min<std::size_t>(to, regions_.region_bytes());
    auto parts = chunks(IoRequest::Kind::Read, offset + from, scratch_.get() + from, to - from);
    const bool readable = transfer(device, parts);
    for (std::size_t i = begin; i < end; ++i) keep_record(region, kept[i], readable);
    begin = end;
  }
}

void RegionWriter::keep_record(std::uint32_t region, const Kept& record, bool readable) {
  Region& row = regions_.at(region);
  const NamespaceIndex ns_index = row.ns.load(std::memory_order_relaxed);
  LogNamespace& ns = log_.ns(ns_index);
  const std::uint64_t location = regions_.location(region, record.offset);
  const Tick now = ticks_.now();
  RecordView view;
  Demotion copy;
  std::uint64_t high = 0;
  if (!readable) {
    ns.lost_device.add();
  } else if (!read_record(scratch_.get() + record.offset, regions_.region_bytes() - record.offset,
                          row.generation.load(std::memory_order_relaxed), location, view)) {
    ns.lost_damaged.add();
    if (regions_.devices()[regions_.device_of(region)]->health.bad()) log_.wake();
  } else if (!view.header.expired(now)) {
    const std::span<const std::uint8_t> value(view.value, view.header.value_bytes());
    DemotedRecord again;
    again.ns = ns_index;
    again.incarnation = view.header.incarnation;
    again.domain = view.header.domain();
    again.hash = record.hash;
    again.high = high = hash_key(ns.seed, view.key).high;
    again.key = view.key;
    again.value = {&value, 1};
    again.value_bytes = view.header.value_bytes();
    again.expiry = view.header.expiry;
    copy = log_.append(again, true, now, monotonic_ns());
  }
  FC_SEQUENCE_POINT("nvm:reinserting");
  const Place place = index_.place_of(record.hash);
  const PairLock pair(index_, place);
  Slot* slot = index_.find_nvm_locked(place, location);
  if (slot == nullptr) {
    if (copy.taken()) log_.published(copy, false);
    return;
  }
  const Entry old(slot->load(std::memory_order_relaxed));
  // Asked now that the copy has its room (core/moved_keys.hpp).
  const bool moves = copy.taken() && !log_.moved().hides(row.stamp(), high);
  slot->store(moves ? copy.entry.word() : 0, std::memory_order_release);
  log_.forget(old);
  if (copy.taken()) log_.published(copy, moves);
  if (moves) return;
  (copy.taken() ? ns.hidden : ns.evicted).add();
}

// What the region's own list cannot tell any more, the index can, at the cost of a walk over it.
void RegionWriter::walk_index(std::uint32_t region) {
  LogNamespace& ns = log_.ns(regions_.at(region).ns.load(std::memory_order_relaxed));
  index_.clear_all(
      [&](Entry entry) { return entry.on_nvm() && regions_.region_of(entry) == region; },
      [&](Entry entry) {
        log_.forget(entry);
        ns.lost_device.add();
      });
}

// ---- devices
// -------------------------------------------------------------------------------------

void RegionWriter::see_to_devices() {
  for (std::size_t d = 0; d < queues_.size(); ++d) {
    DeviceHealth& health = regions_.devices()[d]->health;
    if (health.in_service()) continue;
    if (!lost_[d]) {
      lose_device(d);
      lost_[d] = true;
      probed_ns_[d] = monotonic_ns();
      continue;
    }
    const std::uint64_t now = monotonic_ns();
    if (now - probed_ns_[d] < options_.probe_interval_ms * 1'000'000) continue;
    probed_ns_[d] = now;
    health.probes.add();
    if (!probe(d)) continue;
    lost_[d] = false;
    health.back();
  }
}

// Writes go on without the device, so nothing that it holds may ever be found again.
void RegionWriter::lose_device(std::size_t device) {
  const std::vector<std::uint32_t> lost = log_.doom_device(device);
  if (lost.empty()) return;
  std::vector<bool> is_lost(regions_.count());
  for (const std::uint32_t region : lost) is_lost[region] = true;
  index_.clear_all(
      [&](Entry entry) { return entry.on_nvm() && is_lost[regions_.region_of(entry)]; },
      [&](Entry entry) {
        const std::uint32_t region = regions_.region_of(entry);
        log_.ns(regions_.at(region).ns.load(std::memory_order_relaxed)).evicted.add();
        log_.forget(entry);
      });
  for (const std::uint32_t region : lost) log_.retire(region);
}

// A device is well when it takes its superblock and a block of noise, gives both back as they were,
// and can read its last block.
bool RegionWriter::probe(std::size_t device) {
  const DevicePart& part = *regions_.devices()[device];
  if (!write_superblock(*queues_[device], superblock_of(device))) return false;
  std::byte* data = scratch_.get();
  std::uint64_t noise = monotonic_ns();
  for (std::size_t i = 0; i < kBlockBytes; i += sizeof(noise)) {
    noise = noise * 6364136223846793005ull + 1442695040888963407ull;
    std::memcpy(data + i, &noise, sizeof(noise));
  }
  auto out = chunks(IoRequest::Kind::Write, kProbeOffset, data, kBlockBytes);
  auto back = chunks(IoRequest::Kind::Read, kProbeOffset, data + kBlockBytes, kBlockBytes);
  auto end = chunks(IoRequest::Kind::Read, part.device->bytes() - kBlockBytes,
                    data + 2 * kBlockBytes, kBlockBytes);
  return transfer(device, out, false) && transfer(device, back, false) &&
         std::memcmp(data, data + kBlockBytes, kBlockBytes) == 0 && transfer(device, end, false);
}

std::vector<IoRequest> RegionWriter::chunks(IoRequest::Kind kind, std::uint64_t device_offset,
                                            std::byte* data, std::size_t bytes) const {
  std::vector<IoRequest> parts;
  for (std::size_t at = 0; at < bytes; at += kChunkBytes) {
    IoRequest request;
    request.kind = kind;
    request.offset = device_offset + at;
    request.data = data + at;
    request.bytes = static_cast<std::uint32_t>(std::min(kChunkBytes, bytes - at));
    parts.push_back(request);
  }
  return parts;
}

bool RegionWriter::transfer(std::size_t device, std::span<IoRequest> requests, bool counts) {
  DeviceHealth& health = regions_.devices()[device]->health;
  IoQueue& queue = *queues_[device];
  bool good = true;
  std::size_t next = 0;
  std::size_t out = 0;
  while (next < requests.size() || out != 0) {
    std::array<IoRequest*, kChunksAtOnce> batch{};
    std::size_t starting = 0;
    while (next < requests.size() && out + starting < kChunksAtOnce) {
      batch[starting++] = &requests[next++];
    }
    if (starting != 0) queue.submit({batch.data(), starting});
    out += starting;
    const std::size_t ended = queue.wait(batch, ~0ull);
    out -= ended;
    for (std::size_t i = 0; i < ended; ++i) {
      const IoRequest& request = *batch[i];
      const bool is_write = request.kind == IoRequest::Kind::Write;
      (is_write ? health.writes : health.reads).add();
      if (request.ok()) {
        (is_write ? health.written_bytes : health.read_bytes).add(request.bytes);
        if (counts) health.good();
        continue;
      }
      good = false;
      (is_write ? health.write_errors : health.read_errors).add();
      if (counts) (void)health.bad();
    }
  }
  return good;
}

bool RegionWriter::sync(std::size_t device) {
  IoRequest request;
  request.kind = IoRequest::Kind::Sync;
  return run_request(*queues_[device], request) == 0;
}

}  // namespace fc::nvm
