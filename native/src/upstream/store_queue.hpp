// The bridge to one feature store: misses wait here until a fetch loop takes all of them.
//
// Live misses go before speculative ones, those before background ones, and those of a warm-up come
// last; a flight that a live miss joins goes with the live ones from then on. At most `concurrency`
// batches are out, and half of them may be a warm-up's, so that a live miss need not wait for one;
// a batch that is not answered by its timeout is abandoned: its keys are answered TIMED_OUT, what
// it brings later is discarded, and it goes on holding its slot until the call returns, so that a
// hung store cannot be piled up on.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/clock.hpp"
#include "core/counter.hpp"
#include "feature_cache/config.hpp"
#include "upstream/flight.hpp"

namespace fc {

class StoreQueue : public std::enable_shared_from_this<StoreQueue> {
 public:
  // What the node does with answers. `answer` null: every flight ends with `status`.
  using Deliver =
      std::function<void(std::vector<FlightRef>& flights, FetchAnswer* answer, CellStatus status)>;
  using NamespaceName = std::function<std::string_view(NamespaceIndex)>;

  StoreQueue(const StoreConfig& config, NamespaceName name_of, Deliver deliver);

  const StoreConfig& config() const noexcept { return config_; }
  // Takes the flights that fit; the rest stay in `flights` for the caller to answer THROTTLED.
  void push(std::vector<FlightRef>& flights);
  // Lets a flight go as early as `priority` does, if it still waits or is yet to be pushed.
  void raise(const FlightRef& flight, FetchPriority priority);
  std::shared_ptr<FetchBatch> take(std::uint64_t wait_ms);
  // Abandons batches that are out for longer than the timeout.
  void expire(std::uint64_t now_ns);
  // Ends everything that waits or is out with TIMED_OUT; take() returns null from now on.
  void stop();
  void visit(CounterVisitor& visitor) const;

 private:
  class Batch;
  friend class Batch;

  // Flights of one priority in the order of their coming. One that was raised leaves a stale entry
  // behind; before those are many, they are taken out.
  struct Line {
    std::deque<FlightRef> flights;
    std::size_t stale = 0;
  };
  static constexpr std::size_t kStaleMax = 256;  // or half of the line, if that is more

  void returned(Batch& batch);
  bool has_turn_locked() const noexcept;
  bool may_replay_locked() const noexcept;

  const StoreConfig config_;
  const NamespaceName name_of_;
  const Deliver deliver_;

  mutable std::mutex mutex_;
  std::condition_variable filled_;
  std::array<Line, kFetchPriorities> lines_;  // guarded by mutex_
  std::size_t waiting_keys_ = 0;              // guarded by mutex_; stale entries do not count
  std::size_t replay_keys_ = 0;               // guarded by mutex_; those of them in the last line
  std::size_t replay_out_ = 0;                // guarded by mutex_; those of out_ with such keys
  std::vector<Batch*> out_;                   // guarded by mutex_
  bool stopped_ = false;                      // guarded by mutex_

  Counter batches_;
  Counter keys_;
  Counter throttled_;
  Counter abandoned_;
  Counter late_;
  LatencyHistogram call_seconds_;
};

}  // namespace fc
