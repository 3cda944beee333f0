// The memory of the DRAM tier: one mapping that holds the segment table, the index buckets and the
// segments, addressed by numbers only, so that it can lie in shared memory and be adopted
// (arena_memory.hpp says where it lies, adoption.hpp what a new process makes of it).
//
// Free segments are handed out last-in first-out (warm in the processor's caches). A segment that
// was emptied waits in limbo until no reader can see it any more.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "core/epoch.hpp"
#include "core/moved_keys.hpp"
#include "feature_cache/config.hpp"
#include "index/index.hpp"
#include "memory/arena_memory.hpp"
#include "memory/record.hpp"

namespace fc {

enum class SegmentState : std::uint8_t { Free = 0, Open, Sealed, Continuation, Limbo };

// One segment's row of the table. The owner's lock guards what is not atomic.
struct alignas(64) SegmentMeta {
  static constexpr std::uint32_t kNoSegment = ~0u;
  static constexpr Tick kForever = ~Tick{0};

  std::atomic<SegmentState> state{SegmentState::Free};
  std::uint8_t queue = 0;
  std::uint8_t ttl_class = 0;
  std::uint8_t large = 0;        // one record that goes on in `next`
  std::uint16_t domain_row = 0;  // of the arena's head
  std::uint16_t reserved = 0;
  std::atomic<std::uint32_t> used{0};        // bytes appended; what is below is headed
  std::atomic<std::uint32_t> live_bytes{0};  // of records not superseded or deleted
  std::atomic<std::uint32_t> writers{0};     // reserved but not yet published
  std::uint32_t next = kNoSegment;           // of a large record
  Tick opened = 0;
  Tick due = kForever;           // when the memory of the first item to expire is to be back
  Tick last_expiry = 0;          // kForever when an item does not expire
  std::uint64_t sequence = 0;    // order in its queue; 0 when free
  std::uint64_t stamp_word = 0;  // its stamp, and above that a check over it

  static std::uint64_t stamp_word_of(Stamp stamp, std::uint32_t segment,
                                     std::uint64_t memory_id) noexcept {
    const std::array<std::uint64_t, 2> both{memory_id, std::uint64_t{segment} << 32 | stamp};
    return XXH3_64bits(both.data(), sizeof(both)) << 32 | stamp;
  }
};
static_assert(sizeof(SegmentMeta) == 64);

// Where the records are and whose, for those who look at many: what a hit needs to know, near.
struct ArenaView {
  std::byte* segments;
  const std::atomic<DomainIndex>* domains;  // of each segment
  std::uint32_t segment_shift;

  RecordHeader* record(std::uint64_t location) const noexcept {
    return reinterpret_cast<RecordHeader*>(segments + location * layout::kRecordAlignment);
  }
  DomainIndex domain_of(std::uint64_t location) const noexcept {
    return domains[(location * layout::kRecordAlignment) >> segment_shift].load(
        std::memory_order_relaxed);
  }
  // Whether a record that does not go on in further segments ends where it must.
  bool ends_in_segment(const RecordHeader& rec, std::uint64_t location) const noexcept {
    const std::uint64_t segment_bytes = std::uint64_t{1} << segment_shift;
    const std::uint64_t offset = (location * layout::kRecordAlignment) & (segment_bytes - 1);
    return offset + sizeof(RecordHeader) + rec.payload_bytes() <= segment_bytes;
  }
};

class Arena {
 public:
  // All segments are free, until adopt_free() says otherwise.
  explicit Arena(const ArenaMemory& memory);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  SegmentMeta& meta(std::uint32_t segment) noexcept { return table_[segment]; }
  const SegmentMeta& meta(std::uint32_t segment) const noexcept { return table_[segment]; }
  const ArenaMemory& memory() const noexcept { return memory_; }
  std::byte* data(std::uint32_t segment) noexcept {
    return segments_ + (std::uint64_t{segment} << segment_shift_);
  }
  Bucket* buckets() noexcept { return buckets_; }
  std::uint32_t segment_bytes() const noexcept { return 1u << segment_shift_; }
  std::uint32_t segment_count() const noexcept { return segment_count_; }

  std::uint64_t location(std::uint32_t segment, std::uint32_t offset) const noexcept {
    return ((std::uint64_t{segment} << segment_shift_) + offset) / layout::kRecordAlignment;
  }
  std::uint32_t segment_of(std::uint64_t location) const noexcept {
    return static_cast<std::uint32_t>(location >> location_shift_);
  }
  ArenaView view() const noexcept { return {segments_, domains_.get(), segment_shift_}; }
  RecordHeader* record(std::uint64_t location) noexcept {
    return reinterpret_cast<RecordHeader*>(segments_ + location * layout::kRecordAlignment);
  }
  DomainIndex domain_of(std::uint32_t segment) const noexcept {
    return domains_[segment].load(std::memory_order_relaxed);
  }
  void set_domain(std::uint32_t segment, DomainIndex domain, std::uint16_t row) noexcept {
    table_[segment].domain_row = row;
    domains_[segment].store(domain, std::memory_order_relaxed);
  }

  // Under which the segment was opened.
  Stamp stamp_of(std::uint32_t segment) const noexcept {
    return stamps_[segment].load(std::memory_order_relaxed);
  }
  void set_stamp(std::uint32_t segment, Stamp stamp) noexcept {
    table_[segment].stamp_word =
        SegmentMeta::stamp_word_of(stamp, segment, memory_.head().header.memory_id);
    stamps_[segment].store(stamp, std::memory_order_relaxed);
  }

  // Whether a record's size agrees with its place, as that of all records does that another process
  // did not leave damaged.
  bool is_sound(const RecordHeader& record, std::uint64_t location) const noexcept {
    if (!record.large()) [[likely]]
      return view().ends_in_segment(record, location);
    // `next` stays what it was for as long as a reader may be on its way through a large value.
    const std::uint64_t offset =
        (location * layout::kRecordAlignment) & ((std::uint64_t{1} << segment_shift_) - 1);
    return offset == 0 && table_[segment_of(location)].next != SegmentMeta::kNoSegment;
  }

  // Fills the free list anew, by the rows; before there are other threads.
  void adopt_free();
  // Says under which stamps the segments in use were opened; likewise.
  void adopt_stamps(MovedKeys& moved) noexcept;
  // A free segment. Waits for readers when all others are in limbo; never while an epoch is held.
  std::uint32_t allocate(EpochManager& epochs);
  // Gives back a segment that no index entry points into any more.
  void retire(std::uint32_t segment, EpochManager& epochs);

  // Bytes beside segments and buckets.
  std::uint64_t side_bytes() const noexcept {
    return sizeof(ArenaHead) +
           std::uint64_t{segment_count_} * (sizeof(SegmentMeta) + sizeof(DomainIndex) +
                                            sizeof(Stamp) + 2 * sizeof(std::uint32_t));
  }
  std::uint64_t reader_waits() const noexcept {
    return reader_waits_.load(std::memory_order_relaxed);
  }

 private:
  void collect_locked(EpochManager& epochs);

  const ArenaMemory& memory_;
  const unsigned segment_shift_;
  const unsigned location_shift_;
  const std::uint32_t segment_count_;
  SegmentMeta* const table_;
  Bucket* const buckets_;
  std::byte* const segments_;
  // The domain of each segment's row, as this process counts domains. Dense: a lookup reads it for
  // each hit, and 64-byte rows would not stay in the near caches.
  std::unique_ptr<std::atomic<DomainIndex>[]> domains_;
  std::unique_ptr<std::atomic<Stamp>[]> stamps_;  // likewise

  struct Waiting {
    std::uint32_t segment;
    std::uint64_t epoch;
  };
  std::mutex mutex_;
  std::vector<std::uint32_t> free_;
  std::deque<Waiting> limbo_;
  std::atomic<std::uint64_t> reader_waits_{0};
};

}  // namespace fc
