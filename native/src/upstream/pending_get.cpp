#include "upstream/pending_get.hpp"

#include <algorithm>
#include <utility>

namespace fc {
namespace {

constexpr std::uint8_t kNoBytes = 0;  // where an empty value lies

}  // namespace

void PendingGet::refuse(CallStatus status) {
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
  }
  const ReplyDone done = std::move(done_);
  done(std::move(status), {});
}

void PendingGet::expect_reads(std::span<const NvmCell> cells) {
  for (const NvmCell& cell : cells) {
    Column& in = columns[cell.column];
    if (in.waiting.empty()) in.waiting.resize(in.statuses.size());
    in.waiting[cell.position] = kReading;
    in.statuses[cell.position] = CellStatus::Unspecified;
  }
  for (const Column& column : columns) cached_bytes_ += column.values.size();
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
    if (!in.waiting.empty() && !settle_flight_locked(in, position, status)) return;
    in.statuses[position] = status;
    if (carries_value(status) && !statuses_done_) keep_locked(in, position, value);
    if (!ends_locked(1)) return;
  }
  finish();
}

void PendingGet::answer(std::span<const CellAnswer> answers, std::shared_ptr<const void> owner) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    for (const CellAnswer& answer : answers) {
      Column& in = columns[answer.column];
      in.statuses[answer.position] = answer.status;
      if (!carries_value(answer.status)) continue;
      if (in.late.empty()) in.late.resize(in.statuses.size());
      in.late[answer.position] = answer.size != 0 ? answer.data : &kNoBytes;
      in.lengths[answer.position] = answer.size;
    }
    owners_.push_back(std::move(owner));
    if (!ends_locked(answers.size())) return;
  }
  finish();
}

void PendingGet::keep_locked(Column& in, std::uint32_t position, const SharedValue& value) {
  if (in.late.empty()) in.late.resize(in.statuses.size());
  in.late[position] = value.size != 0 ? value.bytes->data() + value.offset : &kNoBytes;
  in.lengths[position] = value.size;
  if (owners_.empty() || owners_.back() != value.bytes) owners_.push_back(value.bytes);
}

// Whether a flight's answer becomes that of the cell.
bool PendingGet::settle_flight_locked(Column& in, std::uint32_t position, CellStatus& status) {
  std::uint8_t& waits = in.waiting[position];
  if (waits == 0) return true;
  waits &= static_cast<std::uint8_t>(~kAsking);
  if (in.statuses[position] != CellStatus::Unspecified) return false;  // the read was first
  if ((waits & kReading) == 0) return true;
  if (status == CellStatus::Fetched) {
    status = CellStatus::Speculative;
    ++in.won_by_store;
  } else if (status == CellStatus::NotFound) {
    ++in.won_by_store;
  } else {
    // Found in DRAM meanwhile; or a failure, and the read may still bring the value.
    return carries_value(status);
  }
  return true;
}

PendingGet::NotRead PendingGet::answer(std::span<const NvmAnswer> answers) {
  NotRead not_read;
  if (ended()) return not_read;
  std::uint64_t total = 0;
  for (const NvmAnswer& answer : answers) total += answer.value.size();
  // No more is kept than a reply can carry, however much the reads bring.
  const std::uint64_t room = max_reply_bytes_ - std::min(max_reply_bytes_, cached_bytes_);
  std::shared_ptr<Buffer> bytes;
  if (total != 0) bytes = std::make_shared<Buffer>(std::min(total, room) + 1);
  struct Arrived {
    CellStatus status;
    SharedValue value;
  };
  std::vector<Arrived> arrived(answers.size());
  for (std::size_t i = 0; i < answers.size(); ++i) {
    const std::span<const std::uint8_t> value = answers[i].value;
    arrived[i].status = answers[i].status;
    if (value.empty()) continue;
    if (bytes->size() + value.size() > room) {
      arrived[i].status = CellStatus::Throttled;
      continue;
    }
    arrived[i].value = {bytes, bytes->size(), static_cast<std::uint32_t>(value.size())};
    bytes->append(value.data(), value.size());
  }
  if (bytes != nullptr) cached_bytes_ += bytes->size();
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return not_read;
    std::size_t answered = 0;
    for (std::size_t i = 0; i < answers.size(); ++i) {
      answered += settle_read_locked(answers[i], arrived[i].status, arrived[i].value, not_read);
    }
    if (answered == 0 || !ends_locked(answered)) return not_read;
  }
  finish();
  return {};
}

// Whether what a read brought answers its cell.
bool PendingGet::settle_read_locked(const NvmAnswer& answer, CellStatus status,
                                    const SharedValue& value, NotRead& not_read) {
  Column& in = columns[answer.cell.column];
  const std::uint32_t position = answer.cell.position;
  std::uint8_t& waits = in.waiting[position];
  waits &= static_cast<std::uint8_t>(~kReading);
  if (in.statuses[position] != CellStatus::Unspecified) return false;  // the lookup was first
  const bool asked = (waits & kAsking) != 0;
  const bool has_answer = carries_value(status) || status == CellStatus::NotFound;
  if (!has_answer && asked) {
    not_read.asked.push_back(&answer);
    return false;
  }
  if (status == CellStatus::Miss && in.fetchable) {
    not_read.absent.push_back(&answer);
    return false;
  }
  if (carries_value(status)) keep_locked(in, position, value);
  if (asked) ++in.won_by_nvm;
  in.statuses[position] = status;
  return true;
}

std::vector<NvmCell> PendingGet::begin_asking(std::span<const NvmCell> cells) {
  std::vector<NvmCell> begun;
  begun.reserve(cells.size());
  const std::lock_guard lock(mutex_);
  if (ended_) return begun;
  for (const NvmCell& cell : cells) {
    Column& in = columns[cell.column];
    std::uint8_t& waits = in.waiting[cell.position];
    if (!in.fetchable || waits != kReading ||
        in.statuses[cell.position] != CellStatus::Unspecified) {
      continue;
    }
    waits |= kAsking;
    begun.push_back(cell);
  }
  return begun;
}

void PendingGet::give_up_asking(std::span<const NvmCell> cells) {
  if (cells.empty()) return;
  const std::lock_guard lock(mutex_);
  for (const NvmCell& cell : cells) {
    columns[cell.column].waiting[cell.position] &= static_cast<std::uint8_t>(~kAsking);
  }
}

// Whether these answers were the last ones; then the caller finishes.
bool PendingGet::ends_locked(std::size_t answered) {
  waiting_ -= answered;  // below zero (wrapped) until start() has added what was asked
  if (!started_ || waiting_ != 0) return false;
  ended_ = true;
  return true;
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
  for (Column& column : columns) {
    // What was still waiting is marked Unspecified.
    for (CellStatus& status : column.statuses) {
      if (status == CellStatus::Unspecified) status = CellStatus::TimedOut;
    }
  }
  if (statuses_done_) {
    const StatusesDone done = std::move(statuses_done_);
    return done(*this);
  }
  wire::GetReplyEncoder encoder(request.request_id);
  std::uint64_t reply_bytes = 0;
  for (Column& column : columns) {
    Buffer values =
        column.late.empty() ? std::move(column.values) : merged_values(column, reply_bytes);
    if (column.late.empty()) reply_bytes += values.size();
    column.late.clear();
    encoder.add_column(column.statuses, column.lengths, std::move(values));
  }
  owners_.clear();  // reads that are still out may keep this object for long
  tally_(*this);
  const ReplyDone done = std::move(done_);
  done(CallStatus{}, std::move(encoder).finish(map_version));
}

// Cached and fetched values in key order; what exceeds the reply's limit is THROTTLED.
Buffer PendingGet::merged_values(Column& column, std::uint64_t& reply_bytes) const {
  std::uint64_t total = 0;
  for (const std::uint32_t length : column.lengths) total += length;
  Buffer merged(static_cast<std::size_t>(std::min(total, max_reply_bytes_)) + 1);
  std::size_t cached_at = 0;
  for (std::size_t i = 0; i < column.statuses.size(); ++i) {
    if (!carries_value(column.statuses[i])) continue;
    const std::uint32_t size = column.lengths[i];
    const std::uint8_t* from = column.late[i];
    if (from == nullptr) {
      from = column.values.data() + cached_at;
      cached_at += size;
    }
    if (reply_bytes + size > max_reply_bytes_) {
      column.statuses[i] = CellStatus::Throttled;
      column.lengths[i] = 0;
      continue;
    }
    reply_bytes += size;
    merged.append(from, size);
  }
  return merged;
}

}  // namespace fc
