#include "upstream/pending_get.hpp"

#include <algorithm>
#include <utility>

namespace fc {

void PendingGet::refuse(CallStatus status) {
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
  }
  const ReplyDone done = std::move(done_);
  done(std::move(status), {});
}

void PendingGet::start(std::size_t waiting) {
  {
    const std::lock_guard lock(mutex_);
    started_ = true;
    // Cells may have been answered while the last ones were still being asked.
    waiting_ += waiting;
    if ((waiting_ != 0 && !expired_) || ended_) return;
    ended_ = true;
  }
  finish();
}

void PendingGet::answer(std::uint32_t column, std::uint32_t position, CellStatus status,
                        SharedValue value) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    Column& in = columns[column];
    in.statuses[position] = status;
    if (carries_value(status)) in.late.push_back({position, std::move(value)});
    --waiting_;  // below zero (wrapped) until start() has added what was asked
    if (!started_ || waiting_ != 0) return;
    ended_ = true;
  }
  finish();
}

void PendingGet::expire() {
  {
    const std::lock_guard lock(mutex_);
    expired_ = true;
    if (ended_ || !started_) return;
    ended_ = true;
  }
  finish();
}

// Only the thread that set ended_ gets here: nobody else touches the columns any more.
void PendingGet::finish() {
  wire::GetReplyEncoder encoder(request.request_id);
  std::uint64_t reply_bytes = 0;
  for (Column& column : columns) {
    // What was still waiting is marked Unspecified.
    for (CellStatus& status : column.statuses) {
      if (status == CellStatus::Unspecified) status = CellStatus::TimedOut;
    }
    Buffer values =
        column.late.empty() ? std::move(column.values) : merged_values(column, reply_bytes);
    if (column.late.empty()) reply_bytes += values.size();
    encoder.add_column(column.statuses, column.lengths, std::move(values));
  }
  tally_(*this);
  const ReplyDone done = std::move(done_);
  done(CallStatus{}, std::move(encoder).finish());
}

// Cached and fetched values in key order; what exceeds the reply's limit is THROTTLED.
Buffer PendingGet::merged_values(Column& column, std::uint64_t& reply_bytes) const {
  std::sort(column.late.begin(), column.late.end(),
            [](const LateCell& a, const LateCell& b) { return a.position < b.position; });
  std::uint64_t total = column.values.size();
  for (const LateCell& cell : column.late) total += cell.value.size;
  Buffer merged(static_cast<std::size_t>(std::min(total, max_reply_bytes_)) + 1);
  std::size_t cached_at = 0;
  std::size_t next_late = 0;
  for (std::size_t i = 0; i < column.statuses.size(); ++i) {
    const std::uint8_t* from = nullptr;
    std::uint32_t size = 0;
    if (next_late < column.late.size() && column.late[next_late].position == i) {
      const SharedValue& value = column.late[next_late++].value;
      size = value.size;
      if (size != 0) from = value.bytes->data() + value.offset;
    } else if (carries_value(column.statuses[i])) {
      size = column.lengths[i];
      from = column.values.data() + cached_at;
      cached_at += size;
    } else {
      continue;
    }
    if (reply_bytes + size > max_reply_bytes_) {
      column.statuses[i] = CellStatus::Throttled;
      column.lengths[i] = 0;
      continue;
    }
    reply_bytes += size;
    column.lengths[i] = size;
    merged.append(from, size);
  }
  return merged;
}

}  // namespace fc
