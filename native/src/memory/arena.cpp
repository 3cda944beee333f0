#include "memory/arena.hpp"

#include <bit>
#include <thread>

#include "core/check.hpp"

namespace fc {

Arena::Arena(const ArenaMemory& memory)
    : memory_(memory),
      segment_shift_(static_cast<unsigned>(std::countr_zero(memory.geometry().segment_bytes))),
      location_shift_(segment_shift_ -
                      static_cast<unsigned>(std::countr_zero(layout::kRecordAlignment))),
      segment_count_(memory.geometry().segment_count),
      table_(reinterpret_cast<SegmentMeta*>(memory.table())),
      buckets_(reinterpret_cast<Bucket*>(memory.buckets())),
      segments_(memory.segments()),
      domains_(std::make_unique<std::atomic<DomainIndex>[]>(segment_count_)),
      stamps_(std::make_unique<std::atomic<Stamp>[]>(segment_count_)) {
  free_.reserve(segment_count_);
  adopt_free();
}

void Arena::adopt_free() {
  free_.clear();
  for (std::uint32_t i = segment_count_; i-- > 0;) {
    if (table_[i].state.load(std::memory_order_relaxed) == SegmentState::Free) free_.push_back(i);
  }
}

void Arena::adopt_stamps(MovedKeys& moved) noexcept {
  for (std::uint32_t i = 0; i < segment_count_; ++i) {
    if (table_[i].state.load(std::memory_order_relaxed) == SegmentState::Free) continue;
    const auto stamp = static_cast<Stamp>(table_[i].stamp_word);
    const bool whole = table_[i].stamp_word ==
                       SegmentMeta::stamp_word_of(stamp, i, memory_.head().header.memory_id);
    stamps_[i].store(whole ? stamp : kUnknownStamp, std::memory_order_relaxed);
    moved.found(stamp_of(i));
  }
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
