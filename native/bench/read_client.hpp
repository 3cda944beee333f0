// A client that keeps several batches of NVM keys under way, as requests of a server are: it looks
// a batch up, hands its cells to the engine, and goes on with the next one.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "load.hpp"

namespace fc::bench {

// Threads: one; the engine's answer.
class ReadClient {
 public:
  struct Total {
    std::uint64_t keys = 0;  // answered within the time measured
    std::uint64_t elapsed_ns = 0;
    std::uint64_t all_keys = 0;  // with those of the end, when the device runs dry
    std::uint64_t hits = 0;      // of all

    double keys_per_second() const {
      return elapsed_ns == 0 ? 0
                             : static_cast<double>(keys) * 1e9 / static_cast<double>(elapsed_ns);
    }
    void operator+=(const Total& more) {
      keys += more.keys;
      elapsed_ns += more.elapsed_ns;
      all_keys += more.all_keys;
      hits += more.hits;
    }
  };

  // Batches of kBatch keys out of `stream`, which outlives it.
  ReadClient(Engine& engine, const std::vector<Key>& stream, std::size_t batches)
      : engine_(engine), stream_(stream) {
    for (std::size_t i = 0; i < batches; ++i) requests_.push_back(std::make_shared<Request>(*this));
  }
  ReadClient(const ReadClient&) = delete;
  ReadClient& operator=(const ReadClient&) = delete;

  // Until `ends(elapsed_ns)`, asked after each batch; then waits for what is under way.
  template <class Ends>
  Total run_until(Ends&& ends) {
    const std::uint64_t start = monotonic_ns();
    std::vector<std::shared_ptr<Request>> ready = requests_;
    Total total;
    std::size_t out = 0;
    bool going = true;
    while (going || out != 0) {
      for (const auto& request : ready) {
        if (going && send(request)) ++out;
      }
      if (out == 0) break;
      ready = take_ended();
      out -= ready.size();
      for (const auto& request : ready) total.hits += request->hits;
      total.all_keys += ready.size() * kBatch;
      if (!going) continue;
      total.keys = total.all_keys;
      total.elapsed_ns = monotonic_ns() - start;
      going = !ends(total.elapsed_ns);
    }
    return total;
  }
  Total run(double seconds) {
    const auto limit = static_cast<std::uint64_t>(seconds * 1e9);
    return run_until([=](std::uint64_t elapsed_ns) { return elapsed_ns >= limit; });
  }

 private:
  // One batch: who hears of its cells.
  struct Request final : NvmReader, std::enable_shared_from_this<Request> {
    explicit Request(ReadClient& of) : client(of), batch(kBatch) {}

    void answer(std::span<const NvmAnswer> answers) override {
      for (const NvmAnswer& answer : answers) {
        batch.statuses[answer.cell.position] = answer.status;
        batch.lengths[answer.cell.position] = static_cast<std::uint32_t>(answer.value.size());
        batch.values.append(answer.value.data(), answer.value.size());
        hits += answer.status == CellStatus::HitNvm;
      }
      left -= answers.size();
      if (left == 0) client.end(shared_from_this());
    }
    void late(std::span<const NvmCell>) override {}
    bool wanted() const noexcept override { return true; }

    ReadClient& client;
    Batch batch;
    std::size_t left = 0;
    std::size_t hits = 0;
  };

  // False: nothing of it had to be read.
  bool send(const std::shared_ptr<Request>& request) {
    for (std::size_t i = 0; i < kBatch; ++i) request->batch.keys[i] = stream_[at_ + i].view();
    at_ = at_ + 2 * kBatch > stream_.size() ? 0 : at_ + kBatch;
    std::vector<NvmCell> cells;
    cells.reserve(kBatch);
    GetColumn column = request->batch.column();
    column.nvm = &cells;
    engine_.get(column);
    request->hits = request->batch.count(CellStatus::HitNvm);
    request->left = cells.size();
    if (cells.empty()) return false;
    engine_.read(std::move(cells), request);
    return true;
  }
  void end(std::shared_ptr<Request> request) {
    const std::lock_guard lock(mutex_);
    ended_.push_back(std::move(request));
    if (ended_.size() == 1) changed_.notify_one();
  }
  std::vector<std::shared_ptr<Request>> take_ended() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !ended_.empty(); });
    return std::exchange(ended_, {});
  }

  Engine& engine_;
  const std::vector<Key>& stream_;
  std::size_t at_ = 0;
  std::vector<std::shared_ptr<Request>> requests_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Request>> ended_;  // guarded by mutex_
};

}  // namespace fc::bench
