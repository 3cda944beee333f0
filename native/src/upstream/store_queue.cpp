#include "upstream/store_queue.hpp"

#include <algorithm>
#include <atomic>

namespace fc {

// One call's worth of flights. Owned by the fetch loop that took it.
class StoreQueue::Batch final : public FetchBatch {
 public:
  Batch(std::shared_ptr<StoreQueue> queue, std::vector<FlightRef> flights, FetchPriority priority)
      : taken_ns(monotonic_ns()),
        queue_(std::move(queue)),
        flights_(std::move(flights)),
        priority_(priority) {
    // Groups by namespace, order kept; a batch spans few namespaces.
    std::stable_sort(flights_.begin(), flights_.end(),
                     [](const FlightRef& a, const FlightRef& b) { return a->ns < b->ns; });
    NamespaceIndex last = kNoNamespace;
    for (const FlightRef& flight : flights_) {
      if (groups_.empty() || flight->ns != last) {
        groups_.push_back({queue_->name_of_(flight->ns), {}});
        last = flight->ns;
      }
      groups_.back().keys.push_back(flight->key);
    }
  }
  ~Batch() override { fail(CellStatus::Error); }

  const std::vector<Group>& groups() const noexcept override { return groups_; }
  std::size_t key_count() const noexcept override { return flights_.size(); }
  FetchPriority priority() const noexcept override { return priority_; }
  double seconds_left() const noexcept override {
    const double spent = static_cast<double>(monotonic_ns() - taken_ns) * 1e-9;
    return std::max(0.0, static_cast<double>(queue_->config_.timeout_ms) * 1e-3 - spent);
  }
  void complete(FetchAnswer answer) override {
    // The store is done with this call, whoever keeps the batch.
    give_slot_back();
    if (!claim()) {
      queue_->late_.add();
      return;
    }
    queue_->call_seconds_.record_ns(monotonic_ns() - taken_ns);
    answer.values.resize(flights_.size());
    for (FetchedValue& value : answer.values) {
      if (value.kind == FetchedValue::Kind::Found &&
          (value.size > answer.bytes.size() || value.offset > answer.bytes.size() - value.size)) {
        value.kind = FetchedValue::Kind::Garbled;
      }
    }
    queue_->deliver_(flights_, &answer, CellStatus::Error);
  }
  void fail(CellStatus status) override {
    give_slot_back();
    if (!claim()) return;
    queue_->call_seconds_.record_ns(monotonic_ns() - taken_ns);
    queue_->deliver_(flights_, nullptr, status);
  }
  // The timeout's way to end it: the flights only, the batch itself may be in use by its loop.
  bool abandon(std::vector<FlightRef>& flights) {
    if (!claim()) return false;
    flights = flights_;
    return true;
  }

  const std::uint64_t taken_ns;

 private:
  bool claim() noexcept { return !ended_.exchange(true, std::memory_order_acq_rel); }

  void give_slot_back() {
    if (!slot_given_back_.exchange(true, std::memory_order_acq_rel)) queue_->returned(*this);
  }

  const std::shared_ptr<StoreQueue> queue_;
  std::vector<FlightRef> flights_;
  std::vector<Group> groups_;
  const FetchPriority priority_;
  std::atomic<bool> ended_{false};
  std::atomic<bool> slot_given_back_{false};
};

StoreQueue::StoreQueue(const StoreConfig& config, NamespaceName name_of, Deliver deliver)
    : config_(config), name_of_(std::move(name_of)), deliver_(std::move(deliver)) {}

void StoreQueue::push(std::vector<FlightRef>& flights) {
  {
    const std::lock_guard lock(mutex_);
    const std::size_t room =
        stopped_ ? 0
                 : config_.queue_keys - std::min<std::size_t>(config_.queue_keys, waiting_keys_);
    const std::size_t taken = std::min(room, flights.size());
    const auto end = flights.begin() + static_cast<std::ptrdiff_t>(taken);
    for (auto at = flights.begin(); at != end; ++at) {
      Flight& flight = **at;
      flight.queued = true;
      if (flight.line == FetchPriority::Replay) ++replay_keys_;
      lines_[static_cast<std::size_t>(flight.line)].flights.push_back(std::move(*at));
    }
    flights.erase(flights.begin(), end);
    waiting_keys_ += taken;
  }
  throttled_.add(flights.size());
  filled_.notify_one();
}

void StoreQueue::raise(const FlightRef& flight, FetchPriority priority) {
  const std::lock_guard lock(mutex_);
  if (priority >= flight->line) return;
  Line& old = lines_[static_cast<std::size_t>(flight->line)];
  const bool was_replay = flight->line == FetchPriority::Replay;
  flight->line = priority;
  if (!flight->queued) return;
  if (was_replay) --replay_keys_;
  lines_[static_cast<std::size_t>(priority)].flights.push_back(flight);
  if (++old.stale > std::max(kStaleMax, old.flights.size() / 2)) {
    std::erase_if(old.flights, [&](const FlightRef& entry) {
      return &lines_[static_cast<std::size_t>(entry->line)] != &old;
    });
    old.stale = 0;
  }
  // Its old line may have had no turn.
  if (was_replay) filled_.notify_one();
}

bool StoreQueue::may_replay_locked() const noexcept {
  return replay_out_ < std::max(1u, config_.concurrency / 2);
}

bool StoreQueue::has_turn_locked() const noexcept {
  if (out_.size() >= config_.concurrency) return false;
  return waiting_keys_ != replay_keys_ || (replay_keys_ != 0 && may_replay_locked());
}

std::shared_ptr<FetchBatch> StoreQueue::take(std::uint64_t wait_ms) {
  std::vector<FlightRef> flights;
  FetchPriority priority = FetchPriority::Live;
  std::unique_lock lock(mutex_);
  filled_.wait_for(lock, std::chrono::milliseconds(wait_ms),
                   [this] { return stopped_ || has_turn_locked(); });
  if (stopped_ || !has_turn_locked()) return nullptr;
  // One batch has one priority: a background call must not make a live key wait for its kind.
  for (std::size_t p = 0; p < kFetchPriorities && flights.empty(); ++p) {
    Line& line = lines_[p];
    priority = static_cast<FetchPriority>(p);
    flights.reserve(std::min<std::size_t>(line.flights.size(), config_.max_batch_keys));
    while (!line.flights.empty() && flights.size() < config_.max_batch_keys) {
      FlightRef flight = std::move(line.flights.front());
      line.flights.pop_front();
      if (flight->line != priority) {
        --line.stale;
        continue;
      }
      flight->queued = false;
      flights.push_back(std::move(flight));
    }
  }
  waiting_keys_ -= flights.size();
  if (priority == FetchPriority::Replay) {
    replay_keys_ -= flights.size();
    ++replay_out_;
  }
  batches_.add();
  keys_.add(flights.size());
  auto batch = std::make_shared<Batch>(shared_from_this(), std::move(flights), priority);
  out_.push_back(batch.get());
  const bool more = has_turn_locked();
  lock.unlock();
  if (more) filled_.notify_one();
  return batch;
}

void StoreQueue::returned(Batch& batch) {
  {
    const std::lock_guard lock(mutex_);
    if (std::erase(out_, &batch) != 0 && batch.priority() == FetchPriority::Replay) --replay_out_;
  }
  filled_.notify_one();
}

void StoreQueue::expire(std::uint64_t now_ns) {
  std::vector<std::vector<FlightRef>> late;
  {
    const std::lock_guard lock(mutex_);
    for (Batch* batch : out_) {
      if (now_ns < batch->taken_ns + config_.timeout_ms * 1'000'000) continue;
      std::vector<FlightRef> flights;
      if (batch->abandon(flights)) late.push_back(std::move(flights));
    }
  }
  for (std::vector<FlightRef>& flights : late) {
    abandoned_.add();
    deliver_(flights, nullptr, CellStatus::TimedOut);
  }
}

void StoreQueue::stop() {
  std::vector<FlightRef> flights;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    for (Line& line : lines_) {
      // A stale entry's flight is in another line too; to end it twice does no harm.
      for (FlightRef& flight : line.flights) {
        flight->queued = false;
        flights.push_back(std::move(flight));
      }
      line = {};
    }
    waiting_keys_ = 0;
    replay_keys_ = 0;
    for (Batch* batch : out_) {
      std::vector<FlightRef> taken;
      if (batch->abandon(taken)) flights.insert(flights.end(), taken.begin(), taken.end());
    }
  }
  filled_.notify_all();
  if (!flights.empty()) deliver_(flights, nullptr, CellStatus::TimedOut);
}

void StoreQueue::visit(CounterVisitor& visitor) const {
  const Label labels[] = {{"store", config_.name}};
  std::size_t waiting = 0;
  std::size_t out = 0;
  {
    const std::lock_guard lock(mutex_);
    waiting = waiting_keys_;
    out = out_.size();
  }
  visitor.counter("feature_cache_fetch_batches_total", "Batches handed to the store.", labels,
                  batches_.get());
  visitor.counter("feature_cache_fetch_keys_total", "Keys handed to the store.", labels,
                  keys_.get());
  visitor.counter("feature_cache_fetch_throttled_total",
                  "Misses refused because the store's queue was full.", labels, throttled_.get());
  visitor.counter("feature_cache_fetch_abandoned_total", "Batches given up at the store's timeout.",
                  labels, abandoned_.get());
  visitor.counter("feature_cache_fetch_late_total",
                  "Answers that came after their batch was given up.", labels, late_.get());
  visitor.gauge("feature_cache_fetch_waiting_keys", "Misses that wait for the store.", labels,
                static_cast<double>(waiting));
  visitor.gauge("feature_cache_fetch_out_batches", "Batches that the store is working on.", labels,
                static_cast<double>(out));
  call_seconds_.visit(visitor, "feature_cache_fetch_seconds",
                      "From taking a batch of misses to its answer.", labels);
}

}  // namespace fc
