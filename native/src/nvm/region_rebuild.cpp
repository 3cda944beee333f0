// The log made up from what the devices say of themselves, after shared memory is gone: each
// region's header and trailer say whether it counts, its list what it holds. No record is read.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <unordered_set>

#include "core/sequence_point.hpp"
#include "nvm/region_log.hpp"

namespace fc::nvm {
namespace {

constexpr unsigned kThreadsMost = 8;
constexpr std::size_t kChunkBytes = std::size_t{512} << 10;
constexpr std::size_t kReadsAtOnce = 8;
constexpr std::size_t kRecordsAhead = 16;

constexpr std::size_t round_down(std::size_t bytes) noexcept {
  return bytes / kBlockBytes * kBlockBytes;
}

std::uint64_t mixed(std::uint64_t a, std::uint64_t b) noexcept {
  return XXH3_64bits_withSeed(&a, sizeof(a), b);
}

// What a journal calls invalid, to be asked by place.
class Invalid {
 public:
  explicit Invalid(std::span<const JournalEntry> journal) {
    for (const JournalEntry& entry : journal) {
      switch (entry.kind()) {
        case JournalEntry::Kind::Record:
          records_.insert(place(entry.region(), entry.generation(), entry.offset()));
          break;
        case JournalEntry::Kind::Region:
          regions_.insert(mixed(entry.region(), entry.generation()));
          break;
        case JournalEntry::Kind::Flush:
          flushes_.push_back(entry);
          break;
      }
    }
  }
  bool region(std::uint32_t region, std::uint64_t generation, std::uint64_t seed) const {
    return regions_.contains(mixed(region, generation)) ||
           std::any_of(flushes_.begin(), flushes_.end(), [&](const JournalEntry& flush) {
             return flush.namespace_seed() == seed && generation < flush.generation();
           });
  }
  bool record(std::uint32_t region, std::uint64_t generation, std::uint64_t offset) const {
    return !records_.empty() && records_.contains(place(region, generation, offset));
  }

 private:
  // Two that fall together cost a record, and are unheard of.
  static std::uint64_t place(std::uint32_t region, std::uint64_t generation,
                             std::uint64_t offset) noexcept {
    return mixed(std::uint64_t{region} << 32 | offset, generation);
  }
  std::unordered_set<std::uint64_t> records_;
  std::unordered_set<std::uint64_t> regions_;
  std::vector<JournalEntry> flushes_;
};

}  // namespace

class RegionLog::Rebuild {
 public:
  Rebuild(RegionLog& log, const RebuildPlan& plan, Index& index)
      : log_(log), regions_(log.regions_), plan_(plan), index_(index), invalid_(plan.journal) {}

  Adopted run() {
    if (plan_.progress != nullptr) plan_.progress->begin("nvm", 2 * regions_.count());
    for_each_region([this](Reader& reader, std::uint32_t region) { look(reader, region); });
    choose();
    FC_SEQUENCE_POINT("nvm:rebuilding");
    for_each_region([this](Reader& reader, std::uint32_t region) { fill(reader, region); });
    Adopted adopted;
    for (std::uint32_t r = 0; r < regions_.count(); ++r) {
      adopted.items += regions_.at(r).items.load(std::memory_order_relaxed);
    }
    adopted.dropped = dropped_.load(std::memory_order_relaxed);
    return adopted;
  }

 private:
  // A thread's own queues, and room for what it reads of a region.
  struct Reader {
    explicit Reader(const Regions& regions)
        : data(static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, regions.region_bytes())),
               &std::free) {
      if (data == nullptr) throw std::bad_alloc();
      for (const auto& part : regions.devices()) {
        queues.push_back(part->device->make_queue(kReadsAtOnce));
      }
    }
    std::vector<std::unique_ptr<IoQueue>> queues;
    std::unique_ptr<std::byte, decltype(&std::free)> data;
    std::vector<ListedRecord> list;
  };

  template <class Body>
  void for_each_region(Body&& body) {
    std::atomic<std::uint32_t> next{0};
    const auto work = [&](Reader& reader) {
      for (std::uint32_t r = next.fetch_add(1); r < regions_.count(); r = next.fetch_add(1)) {
        body(reader, r);
        if (plan_.progress != nullptr) plan_.progress->add(1);
      }
    };
    const unsigned threads = std::clamp(std::thread::hardware_concurrency(), 1u, kThreadsMost);
    std::vector<std::unique_ptr<Reader>> readers;
    for (unsigned t = 0; t < threads; ++t) readers.push_back(std::make_unique<Reader>(regions_));
    std::vector<std::thread> others;
    for (unsigned t = 1; t < threads; ++t) others.emplace_back([&, t] { work(*readers[t]); });
    work(*readers[0]);
    for (std::thread& other : others) other.join();
  }

  // Reads [from, to) of a region to its place in the reader's data.
  bool read(Reader& reader, std::uint32_t region, std::size_t from, std::size_t to) {
    std::vector<IoRequest> requests;
    for (std::size_t at = from; at < to; at += kChunkBytes) {
      IoRequest& request = requests.emplace_back();
      request.offset = regions_.offset_of(region) + at;
      request.data = reader.data.get() + at;
      request.bytes = static_cast<std::uint32_t>(std::min(kChunkBytes, to - at));
    }
    IoQueue& queue = *reader.queues[regions_.device_of(region)];
    bool good = true;
    for (std::size_t next = 0, out = 0; next < requests.size() || out != 0;) {
      std::array<IoRequest*, kReadsAtOnce> batch{};
      std::size_t starting = 0;
      while (next < requests.size() && out + starting < kReadsAtOnce) {
        batch[starting++] = &requests[next++];
      }
      if (starting != 0) queue.submit({batch.data(), starting});
      out += starting;
      const std::size_t ended = queue.wait(batch, ~0ull);
      out -= ended;
      for (std::size_t i = 0; i < ended; ++i) good = good && batch[i]->ok();
    }
    return good;
  }

  // Fills in the row of a region that says the same at both ends; the others stay free.
  void look(Reader& reader, std::uint32_t region) {
    const std::size_t size = regions_.region_bytes();
    Region& row = regions_.at(region);
    // A header that cannot be read now may be readable some day; it goes before that.
    row.set_device_generation(kUnknownGeneration);
    if (!read(reader, region, 0, kBlockBytes)) return;
    RegionHeader header;
    std::memcpy(&header, reader.data.get(), sizeof(header));
    const bool whole = header.magic == kHeaderMagic && header.checksum == header.sum();
    const RegionHeader blank{};
    if (!whole && std::memcmp(&header, &blank, sizeof(header)) != 0) return;
    if (!whole || header.set_id != plan_.set_id || header.region != region) {
      row.set_device_generation(0);
      return;
    }
    // Whatever becomes of it: what is on the device is of this generation.
    row.generation.store(header.generation, std::memory_order_relaxed);
    row.set_device_generation(header.generation);
    if (!read(reader, region, size - kBlockBytes, size)) return;
    RegionTrailer trailer;
    if (!read_trailer(reader.data.get() + size - sizeof(trailer), size, header.generation,
                      trailer)) {
      return;
    }
    const bool expired = trailer.last_expiry <= plan_.now;
    const bool doubtful = plan_.drop_expiring && trailer.first_expiry != kNever;
    if (expired || doubtful || invalid_.region(region, header.generation, header.namespace_seed)) {
      dropped_.fetch_add(expired ? 0 : trailer.records, std::memory_order_relaxed);
      return;
    }
    row.incarnation.store(header.incarnation, std::memory_order_relaxed);
    row.namespace_seed = header.namespace_seed;
    row.set_stamp(header.stamp);
    row.used = trailer.used_bytes;
    row.last_expiry = trailer.last_expiry;
    row.first_expiry = trailer.first_expiry;
    row.set_listed(trailer.records);
    row.sealed_sum = row.sum_of_sealed();
    row.on_device = 1;
  }

  // Which regions count: of namespaces that are there, of their latest incarnation, the newest
  // first as long as the budget lasts.
  void choose() {
    std::vector<std::uint32_t> found;
    for (std::uint32_t r = 0; r < regions_.count(); ++r) {
      if (regions_.at(r).on_device != 0) found.push_back(r);
    }
    std::sort(found.begin(), found.end(),
              [&](std::uint32_t a, std::uint32_t b) { return generation(a) > generation(b); });
    std::vector<std::uint32_t> left;
    for (const auto& ns : log_.namespaces_) left.push_back(ns->budget_regions);
    std::vector<bool> known(left.size());
    for (const std::uint32_t region : found) {
      Region& row = regions_.at(region);
      std::size_t n = 0;
      while (n < left.size() && log_.namespaces_[n]->seed != row.namespace_seed) ++n;
      const std::uint16_t incarnation = row.incarnation.load(std::memory_order_relaxed);
      if (n < left.size() && !known[n]) {
        known[n] = true;
        log_.namespaces_[n]->incarnation->store(incarnation, std::memory_order_relaxed);
      }
      if (n == left.size() || left[n] == 0 ||
          log_.namespaces_[n]->incarnation->load(std::memory_order_relaxed) != incarnation) {
        row.on_device = 0;
        dropped_.fetch_add(row.listed, std::memory_order_relaxed);
        continue;
      }
      --left[n];
      row.state.store(RegionState::Sealed, std::memory_order_relaxed);
    }
    // Two namespaces never have one incarnation.
    for (std::size_t n = 0; n < left.size(); ++n) {
      for (std::size_t m = 0; known[n] && m < left.size(); ++m) {
        auto& other = *log_.namespaces_[m]->incarnation;
        if (m == n || known[m] || other != *log_.namespaces_[n]->incarnation) continue;
        other.store(unused_incarnation(), std::memory_order_relaxed);
      }
    }
  }

  std::uint16_t unused_incarnation() const {
    for (std::uint16_t candidate = 1;; ++candidate) {
      const bool taken =
          std::any_of(log_.namespaces_.begin(), log_.namespaces_.end(), [&](const auto& ns) {
            return ns->incarnation->load(std::memory_order_relaxed) == candidate;
          });
      if (!taken) return candidate;
    }
  }

  void fill(Reader& reader, std::uint32_t region) {
    Region& row = regions_.at(region);
    if (row.state.load(std::memory_order_relaxed) != RegionState::Sealed) return;
    const std::size_t size = regions_.region_bytes();
    const std::size_t begin = size - sizeof(RegionTrailer) - list_bytes(row.listed);
    RegionTrailer trailer;
    if (!read(reader, region, round_down(begin), size) ||
        !read_trailer(reader.data.get() + size - sizeof(trailer), size, generation(region),
                      trailer) ||
        trailer.records != row.listed ||
        !read_list(reader.data.get() + begin, trailer, reader.list)) {
      dropped_.fetch_add(row.listed, std::memory_order_relaxed);
      row.on_device = 0;
      row.state.store(RegionState::Free, std::memory_order_relaxed);
      return;
    }
    const std::vector<ListedRecord>& list = reader.list;
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (i + kRecordsAhead < list.size()) {
        const Place place = index_.place_of(list[i + kRecordsAhead].hash);
        index_.prefetch(place.home);
        index_.prefetch(place.partner);
      }
      if (invalid_.record(region, generation(region), list[i].offset)) continue;
      const std::uint32_t end = i + 1 < list.size() ? list[i + 1].offset : row.used;
      insert(region, list[i], end - list[i].offset);
    }
  }

  void insert(std::uint32_t region, const ListedRecord& record, std::uint32_t bytes) {
    // What was left out of the list may lie in between: no record is that large.
    const std::size_t size = std::min<std::size_t>(bytes, layout::kMaxNvmRecordBytes);
    const Entry entry = Entry::nvm(record.hash, regions_.location(region, record.offset), size, 0);
    const Place place = index_.place_of(record.hash);
    const PairLock pair(index_, place);
    Slot* slot = same_key(place, record.hash);
    if (slot != nullptr) {
      // The later one is the key's, should they be of one.
      dropped_.fetch_add(1, std::memory_order_relaxed);
      const Entry other(slot->load(std::memory_order_relaxed));
      const std::uint32_t of = regions_.region_of(other);
      if (std::pair(generation(of), regions_.offset_in_region(other)) >
          std::pair(generation(region), record.offset)) {
        return;
      }
      regions_.at(of).items.fetch_sub(1, std::memory_order_relaxed);
    } else {
      slot = index_.free_slot_locked(place);
      if (slot == nullptr) {
        dropped_.fetch_add(1, std::memory_order_relaxed);
        return;
      }
    }
    slot->store(entry.word(), std::memory_order_relaxed);
    regions_.at(region).items.fetch_add(1, std::memory_order_relaxed);
  }

  Slot* same_key(const Place& place, std::uint64_t hash) noexcept {
    Slot* found = nullptr;
    const auto match = [&](Entry entry, Slot& slot) {
      if (!entry.may_be_nvm_of(hash)) return false;
      found = &slot;
      return true;
    };
    if (!index_.find_in(place.home, place.tag, match) && place.partner != place.home) {
      index_.find_in(place.partner, place.tag, match);
    }
    return found;
  }

  std::uint64_t generation(std::uint32_t region) const noexcept {
    return regions_.at(region).generation.load(std::memory_order_relaxed);
  }

  RegionLog& log_;
  Regions& regions_;
  const RebuildPlan& plan_;
  Index& index_;
  const Invalid invalid_;
  std::atomic<std::uint64_t> dropped_{0};
};

RegionLog::Adopted RegionLog::rebuild(const RebuildPlan& plan, Index& index) {
  const Adopted adopted = Rebuild(*this, plan, index).run();
  std::vector<Use> uses(regions_.count());
  for (std::uint32_t r = 0; r < regions_.count(); ++r) {
    if (regions_.at(r).state.load(std::memory_order_relaxed) == RegionState::Sealed) {
      uses[r] = Use::Device;
    }
  }
  for (std::uint32_t b = state_.buffers(); b-- > 0;) free_buffers_.push_back(b);
  std::vector<WriteJob> none;
  queue_up(uses, none);
  return adopted;
}

}  // namespace fc::nvm
