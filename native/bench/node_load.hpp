// A node under an open load: BatchGets at times that do not depend on how it answers, and a store
// that answers after a fixed time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "feature_cache/node.hpp"
#include "load.hpp"
#include "nvm_bench.hpp"

namespace fc::bench {

// Plays the fetch loop of one store: takes misses as they come, and answers each call `delay_ns`
// later, however many are out. Threads: two of its own.
class SlowStore {
 public:
  struct Taken {
    std::uint64_t at_ns;
    std::size_t keys;
    FetchPriority priority;
  };

  SlowStore(Node& node, std::uint64_t delay_ns, std::size_t value_bytes);
  ~SlowStore();
  SlowStore(const SlowStore&) = delete;
  SlowStore& operator=(const SlowStore&) = delete;

  // What it was asked since the last call.
  std::vector<Taken> take_log();

 private:
  struct Out {
    std::uint64_t due_ns;
    std::shared_ptr<FetchBatch> batch;
  };

  void take();
  void answer();

  Node& node_;
  const std::uint64_t delay_ns_;
  const std::string value_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Out> out_;     // guarded by mutex_; by due time
  std::vector<Taken> log_;  // guarded by mutex_
  bool stop_ = false;       // guarded by mutex_
  std::thread taker_;
  std::thread answerer_;
};

// BatchGets of kKeys keys, all of which are on NVM.
class NodeLoad {
 public:
  static constexpr std::size_t kKeys = 100;

  struct Sample {
    double latency_ms;         // from the time at which it should have been sent
    double after_deadline_ms;  // beyond the timeout, from the call; below 0: in time
    std::uint64_t sent_ns;
    bool refused;
  };

  // Draws from `keys`, which outlive it.
  NodeLoad(Node& node, const std::vector<Key>& keys, std::uint64_t timeout_ms)
      : node_(node), keys_(keys), timeout_ms_(timeout_ms) {}

  // `per_second` BatchGets for that long, none kept back by those before it; waits for the replies.
  std::vector<Sample> run(double per_second, double seconds);
  // BatchGets a second of `clients` that each send the next one when the last was answered.
  double capacity(unsigned clients, double seconds);

 private:
  void send(std::function<void(bool refused)> done);

  Node& node_;
  const std::vector<Key>& keys_;
  const std::uint64_t timeout_ms_;
  std::mt19937_64 random_{7};
};

}  // namespace fc::bench
