// A BatchGet that waits for cells: what it has, what it lacks, when it must answer.
//
// Threads: after start() any thread may answer cells or end it; the first of "last cell answered",
// "deadline" and "node stops" encodes the reply and calls `done`, outside the lock.
//
// A cell on NVM may wait for two at once, its read and a speculative lookup, and is answered once:
//   - by the first of them that has an answer: the read's value or not-found, the lookup's likewise
//   - a lookup that failed answers nothing while the read is out
//   - a read that found nothing leaves the answer to the lookup under way, or else the cell is an
//     absent one
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "feature_cache/engine.hpp"
#include "feature_cache/node.hpp"
#include "upstream/deadlines.hpp"
#include "wire/reply.hpp"
#include "wire/request.hpp"

namespace fc {

// A value that several cells may share, or several values of one buffer.
struct SharedValue {
  std::shared_ptr<const Buffer> bytes;
  std::uint64_t offset = 0;
  std::uint32_t size = 0;
};

class PendingGet final : public Timed, public std::enable_shared_from_this<PendingGet> {
 public:
  // What an upstream says of one cell; `data` is kept alive by what comes with it.
  struct CellAnswer {
    std::uint32_t column = 0;
    std::uint32_t position = 0;
    CellStatus status = CellStatus::Error;
    const std::uint8_t* data = nullptr;
    std::uint32_t size = 0;
  };
  struct Column {
    NamespaceIndex ns = kNoNamespace;
    bool fetchable = false;  // a cell that is nowhere in the cache may ask a store
    std::vector<CellStatus> statuses;
    std::vector<std::uint32_t> lengths;
    Buffer values;                          // of the cells that were in DRAM, in key order
    std::vector<const std::uint8_t*> late;  // by position: values read or fetched; empty: none
    std::vector<std::uint8_t> waiting;      // kReading, kAsking; empty: no cell was on NVM
    std::vector<std::uint8_t> asked;        // of a warm-up, by position; see WarmKey
    std::uint32_t won_by_store = 0;         // of the cells that were read and asked for at once
    std::uint32_t won_by_nvm = 0;
  };
  // Reads that found nothing.
  struct NotRead {
    std::vector<const NvmAnswer*> absent;  // the caller asks a store, which answers the cell
    std::vector<const NvmAnswer*> asked;   // a speculative lookup under way will answer
  };
  // Told once, with the final statuses, before `done`.
  using Tally = std::function<void(const PendingGet&)>;
  // Instead of a reply, of a get whose statuses alone are wanted.
  using StatusesDone = std::function<void(const PendingGet&)>;

  PendingGet(RequestBytes bytes, std::uint64_t max_reply_bytes, Tally tally, ReplyDone done)
      : bytes_(std::move(bytes)),
        max_reply_bytes_(max_reply_bytes),
        tally_(std::move(tally)),
        done_(std::move(done)) {}
  // No values are kept, and there is no reply; `owner` keeps the keys alive.
  PendingGet(std::shared_ptr<const void> owner, StatusesDone done)
      : bytes_{{}, std::move(owner)}, max_reply_bytes_(0), statuses_done_(std::move(done)) {}

  wire::GetRequest request;     // views into the bytes; fixed after decoding
  std::vector<Column> columns;  // guarded by mutex_ once a cell may be answered
  std::uint64_t started_ns = 0;
  bool counted_pending = false;
  std::uint64_t map_version = 0;  // of a leaf, for the reply
  bool asks_store = false;        // by what the lookup found

  const RequestBytes& bytes() const noexcept { return bytes_; }
  // Ends it with an error instead of a reply; only before start().
  void refuse(CallStatus status);
  // Cells that answer(answers) will hear of; only before the engine has them.
  void expect_reads(std::span<const NvmCell> cells);
  // Cells that will be answered by answer(), each once. Answers at once when there are none.
  void start(std::size_t waiting);
  // A flight's answer.
  void answer(std::uint32_t column, std::uint32_t position, CellStatus status, SharedValue value);
  // Answers of one leaf; `owner` holds their values.
  void answer(std::span<const CellAnswer> answers, std::shared_ptr<const void> owner);
  // What reads of NVM brought; calls do not overlap with one another. Pointers of the result are
  // into `answers`.
  NotRead answer(std::span<const NvmAnswer> answers);
  // Notes that a speculative lookup is about to be started for each of `cells` that still waits for
  // its read; returns those.
  std::vector<NvmCell> begin_asking(std::span<const NvmCell> cells);
  // Takes that back for cells that no flight will answer after all; not while a read of theirs is
  // being answered.
  void give_up_asking(std::span<const NvmCell> cells);
  // Ends it now: cells without an answer are TIMED_OUT.
  void expire();
  void due() override { expire(); }
  bool ended() const noexcept { return ended_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::uint8_t kReading = 1;
  static constexpr std::uint8_t kAsking = 2;

  void keep_locked(Column& in, std::uint32_t position, const SharedValue& value);
  bool settle_flight_locked(Column& in, std::uint32_t position, CellStatus& status);
  bool settle_read_locked(const NvmAnswer& answer, CellStatus status, const SharedValue& value,
                          NotRead& not_read);
  bool ends_locked(std::size_t answered);
  void finish();
  Buffer merged_values(Column& column, std::uint64_t& reply_bytes) const;

  const RequestBytes bytes_;
  const std::uint64_t max_reply_bytes_;
  const Tally tally_;
  ReplyDone done_;
  StatusesDone statuses_done_;  // null: done_ gets a reply
  // Values that were found in the cache. Touched before the reads start, then by their answers.
  std::uint64_t cached_bytes_ = 0;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const void>> owners_;  // of late values; guarded by mutex_
  std::size_t waiting_ = 0;                          // guarded by mutex_
  bool started_ = false;                             // guarded by mutex_
  bool expired_ = false;            // guarded by mutex_; before start(): it ends there
  std::atomic<bool> ended_{false};  // set under mutex_; read anywhere, as a hint
};

}  // namespace fc
