// A BatchGet that waits for fetched cells: what it has, what it lacks, when it must answer.
//
// Threads: after start() any thread may answer cells or end it; the first of "last cell answered",
// "deadline" and "node stops" encodes the reply and calls `done`, outside the lock.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "feature_cache/node.hpp"
#include "wire/reply.hpp"
#include "wire/request.hpp"

namespace fc {

// A fetched value that several cells may share.
struct SharedValue {
  std::shared_ptr<const Buffer> bytes;
  std::uint64_t offset = 0;
  std::uint32_t size = 0;
};

class PendingGet : public std::enable_shared_from_this<PendingGet> {
 public:
  struct LateCell {
    std::uint32_t position;
    SharedValue value;
  };
  struct Column {
    NamespaceIndex ns = kNoNamespace;
    std::vector<CellStatus> statuses;
    std::vector<std::uint32_t> lengths;
    Buffer values;               // of the cells that were cached, in key order
    std::vector<LateCell> late;  // fetched ones, in order of arrival
  };
  // Told once, with the final statuses, before `done`.
  using Tally = std::function<void(const PendingGet&)>;

  PendingGet(RequestBytes bytes, std::uint64_t max_reply_bytes, Tally tally, ReplyDone done)
      : bytes_(std::move(bytes)),
        max_reply_bytes_(max_reply_bytes),
        tally_(std::move(tally)),
        done_(std::move(done)) {}

  wire::GetRequest request;     // views into the bytes; fixed after decoding
  std::vector<Column> columns;  // guarded by mutex_ after start()
  std::uint64_t started_ns = 0;
  bool counted_pending = false;

  const RequestBytes& bytes() const noexcept { return bytes_; }
  // Ends it with an error instead of a reply; only before start().
  void refuse(CallStatus status);
  // Cells that will be answered by answer(), each once. Answers at once when there are none.
  void start(std::size_t waiting);
  void answer(std::uint32_t column, std::uint32_t position, CellStatus status, SharedValue value);
  // Ends it now: cells without an answer are TIMED_OUT.
  void expire();

 private:
  void finish();
  Buffer merged_values(Column& column, std::uint64_t& reply_bytes) const;

  const RequestBytes bytes_;
  const std::uint64_t max_reply_bytes_;
  const Tally tally_;
  ReplyDone done_;
  std::mutex mutex_;
  std::size_t waiting_ = 0;  // guarded by mutex_
  bool started_ = false;     // guarded by mutex_
  bool ended_ = false;       // guarded by mutex_
  bool expired_ = false;     // guarded by mutex_; before start(): it ends there
};

}  // namespace fc
