// Index entries that are on their way from one bucket to the other. A mover copies, announces,
// clears; should its process end in between, the entry stands in both buckets, and a later delete
// would take only one of them. So it says first what it moves, where the next process finds it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <thread>

namespace fc {

struct MoveRow {
  static constexpr std::uint64_t kClaimed = 1;  // no entry's word: its size class would be 0

  std::atomic<std::uint64_t> word;  // 0: the row is free; kClaimed: being filled
  std::atomic<std::uint64_t> from;  // bucket
};
static_assert(sizeof(MoveRow) == 16);

// Threads: any.
class MoveJournal {
 public:
  // More movers at one time wait for a row. `rows` may be empty: nothing outlives the process then.
  explicit MoveJournal(std::span<MoveRow> rows) noexcept : rows_(rows) {}

  MoveRow* begin(std::uint64_t word, std::uint64_t from) noexcept {
    if (rows_.empty()) return nullptr;
    thread_local std::size_t hint = next_hint_.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t tries = 1;; ++tries) {
      MoveRow& row = rows_[hint % rows_.size()];
      std::uint64_t free = 0;
      if (row.word.compare_exchange_strong(free, MoveRow::kClaimed, std::memory_order_acquire)) {
        row.from.store(from, std::memory_order_relaxed);
        row.word.store(word, std::memory_order_release);
        return &row;
      }
      ++hint;
      if (tries % rows_.size() == 0) std::this_thread::yield();
    }
  }
  static void end(MoveRow* row) noexcept {
    if (row != nullptr) row->word.store(0, std::memory_order_release);
  }
  std::span<MoveRow> rows() const noexcept { return rows_; }

 private:
  static inline std::atomic<std::size_t> next_hint_{0};
  const std::span<MoveRow> rows_;
};

}  // namespace fc
