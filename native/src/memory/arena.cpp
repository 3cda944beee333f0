#include "memory/arena.hpp"

#include <sys/mman.h>

#include <bit>
#include <new>
#include <thread>

#include "core/check.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t to) noexcept {
  return (value + to - 1) / to * to;
}

}  // namespace

Arena::Arena(const Geometry& geometry, bool huge_pages)
    : segment_shift_(static_cast<unsigned>(std::countr_zero(geometry.segment_bytes))),
      location_shift_(segment_shift_ -
                      static_cast<unsigned>(std::countr_zero(layout::kRecordAlignment))),
      segment_count_(geometry.segment_count) {
  const std::uint64_t table_bytes =
      round_up(std::uint64_t{segment_count_} * sizeof(SegmentMeta), 4096);
  const std::uint64_t bucket_bytes = round_up(geometry.bucket_count * sizeof(Bucket), 4096);
  const std::uint64_t data_bytes = std::uint64_t{segment_count_} << segment_shift_;
  // Room to start on a huge page's boundary; pages that are never touched cost nothing.
  mapped_bytes_ = round_up(table_bytes + bucket_bytes + data_bytes, 4096) + kHugePage;
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  auto* base =
      reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uint64_t>(mapping_), kHugePage));
  if (huge_pages) {
    // Advice only: without transparent huge pages the cache works, with more TLB misses.
    (void)madvise(base, mapped_bytes_ - kHugePage, MADV_HUGEPAGE);
  }
  table_ = reinterpret_cast<SegmentMeta*>(base);
  buckets_ = reinterpret_cast<Bucket*>(base + table_bytes);
  segments_ = base + table_bytes + bucket_bytes;
  domains_ = std::make_unique<std::atomic<DomainIndex>[]>(segment_count_);
  free_.reserve(segment_count_);
  for (std::uint32_t i = segment_count_; i-- > 0;) {
    new (&table_[i]) SegmentMeta();
    free_.push_back(i);
  }
}

Arena::~Arena() {
  munmap(mapping_, mapped_bytes_);
}

std::uint32_t Arena::allocate(EpochManager& epochs) {
  for (unsigned tries = 0;; ++tries) {
    {
      const std::lock_guard lock(mutex_);
      if (free_.empty()) collect_locked(epochs);
      if (!free_.empty()) {
        const std::uint32_t segment = free_.back();
        free_.pop_back();
        return segment;
      }
      // The reserve guarantees that somebody's segment is on its way back.
      FC_CHECK(!limbo_.empty());
    }
    if (tries == 0) reader_waits_.fetch_add(1, std::memory_order_relaxed);
    std::this_thread::yield();
  }
}

void Arena::retire(std::uint32_t segment, EpochManager& epochs) {
  SegmentMeta& row = table_[segment];
  row.state.store(SegmentState::Limbo, std::memory_order_relaxed);
  row.sequence = 0;
  row.large = 0;
  // `next` stays until the segment starts anew: a reader may be on its way through a large value.
  const std::lock_guard lock(mutex_);
  limbo_.push_back({segment, epochs.retire()});
  collect_locked(epochs);
}

void Arena::collect_locked(EpochManager& epochs) {
  const std::uint64_t safe = epochs.safe_before();
  while (!limbo_.empty() && limbo_.front().epoch < safe) {
    const std::uint32_t segment = limbo_.front().segment;
    limbo_.pop_front();
    table_[segment].state.store(SegmentState::Free, std::memory_order_relaxed);
    free_.push_back(segment);
  }
}

}  // namespace fc
