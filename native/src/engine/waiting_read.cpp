#include "engine/waiting_read.hpp"

#include <algorithm>
#include <condition_variable>
#include <mutex>

namespace fc {
namespace {

class WaitingReader final : public NvmReader {
 public:
  explicit WaitingReader(std::size_t cells) : left_(cells), answers_(cells) {}

  void answer(std::span<const NvmAnswer> answers) override {
    const std::lock_guard lock(mutex_);
    for (const NvmAnswer& answer : answers) {
      answers_[next_++] = {answer.cell, answer.status, values_.size(),
                           static_cast<std::uint32_t>(answer.value.size())};
      values_.append(answer.value.data(), answer.value.size());
    }
    left_ -= answers.size();
    // Under the lock: who waits may be gone as soon as it is released.
    if (left_ == 0) ended_.notify_one();
  }
  void late(std::span<const NvmCell>) override {}
  bool wanted() const noexcept override { return true; }

  struct Kept {
    NvmCell cell;
    CellStatus status = CellStatus::Miss;
    std::size_t offset = 0;  // of its value
    std::uint32_t bytes = 0;
  };
  // All answers, in the order of their positions.
  const std::vector<Kept>& wait() {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return left_ == 0; });
    std::sort(answers_.begin(), answers_.end(),
              [](const Kept& a, const Kept& b) { return a.cell.position < b.cell.position; });
    return answers_;
  }
  const std::uint8_t* value(const Kept& kept) const noexcept {
    return values_.data() + kept.offset;
  }
  std::size_t value_bytes() const noexcept { return values_.size(); }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::size_t left_;
  std::size_t next_ = 0;
  std::vector<Kept> answers_;
  Buffer values_;
};

// Puts the answers of NVM cells into a column, in key order with what is there.
void merge(GetColumn& column, WaitingReader& reader) {
  const std::vector<WaitingReader::Kept>& answers = reader.wait();
  Buffer merged(column.values->size() + reader.value_bytes() + 1);
  // What other columns had put there stays in front.
  std::size_t own = 0;
  for (std::size_t i = 0; i < column.keys.size(); ++i) own += column.lengths[i];
  std::size_t at = column.values->size() - own;
  merged.append(column.values->data(), at);
  const std::size_t first = merged.size();
  std::size_t next = 0;
  bool sorted = true;
  for (std::size_t i = 0; i < column.keys.size(); ++i) {
    if (next == answers.size() || answers[next].cell.position != i) {
      merged.append(column.values->data() + at, column.lengths[i]);
      at += column.lengths[i];
      continue;
    }
    const WaitingReader::Kept& kept = answers[next++];
    column.statuses[i] = kept.status;
    if (kept.status == CellStatus::Miss && column.absent != nullptr) {
      sorted = sorted && (column.absent->empty() || column.absent->back().position < i);
      column.absent->push_back({static_cast<std::uint32_t>(i), kept.cell.token});
    }
    if (!carries_value(kept.status)) continue;
    // The reply's limit, as for what was found in DRAM.
    if (merged.size() - first + kept.bytes > column.max_value_bytes) {
      column.statuses[i] = CellStatus::Throttled;
      continue;
    }
    column.lengths[i] = kept.bytes;
    merged.append(reader.value(kept), kept.bytes);
  }
  *column.values = std::move(merged);
  if (!sorted) {
    std::sort(column.absent->begin(), column.absent->end(),
              [](const Absent& a, const Absent& b) { return a.position < b.position; });
  }
}

}  // namespace

void read_and_wait(Engine& engine, GetColumn& column, std::vector<NvmCell> cells) {
  const auto reader = std::make_shared<WaitingReader>(cells.size());
  engine.read(std::move(cells), reader);
  merge(column, *reader);
}

}  // namespace fc
