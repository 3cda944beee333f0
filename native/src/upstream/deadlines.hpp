// Ends requests at their deadlines and wakes up what happens by time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <vector>

#include "core/clock.hpp"

namespace fc {

// Something that wants to be told when a time has come.
class Timed {
 public:
  virtual ~Timed() = default;
  virtual void due() = 0;
};

// One thread; `tick` runs about every kPeriod. Requests that were answered in time cost nothing
// but their place in the heap until their deadline.
class Deadlines {
 public:
  explicit Deadlines(std::function<void()> tick)
      : tick_(std::move(tick)), thread_([this] { run(); }) {}
  ~Deadlines() { stop(); }

  void add(std::uint64_t at_ns, std::weak_ptr<Timed> what) {
    const std::lock_guard lock(mutex_);
    const bool first = heap_.empty() || at_ns < heap_.top().at_ns;
    heap_.push({at_ns, std::move(what)});
    if (first) wake_.notify_one();
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

 private:
  static constexpr std::uint64_t kPeriodNs = 20'000'000;

  struct Due {
    std::uint64_t at_ns;
    std::weak_ptr<Timed> what;
    friend bool operator<(const Due& a, const Due& b) noexcept { return a.at_ns > b.at_ns; }
  };

  void run() {
    std::uint64_t next_tick = 0;
    std::unique_lock lock(mutex_);
    while (!stop_) {
      const std::uint64_t now = monotonic_ns();
      std::vector<std::weak_ptr<Timed>> due;
      while (!heap_.empty() && heap_.top().at_ns <= now) {
        due.push_back(heap_.top().what);
        heap_.pop();
      }
      const bool tick = now >= next_tick;
      if (tick) next_tick = now + kPeriodNs;
      if (!due.empty() || tick) {
        lock.unlock();
        for (const std::weak_ptr<Timed>& weak : due) {
          if (const std::shared_ptr<Timed> what = weak.lock()) what->due();
        }
        due.clear();
        if (tick) tick_();
        lock.lock();
        continue;
      }
      std::uint64_t until = next_tick;
      if (!heap_.empty() && heap_.top().at_ns < until) until = heap_.top().at_ns;
      wake_.wait_for(lock, std::chrono::nanoseconds(until - now));
    }
  }

  const std::function<void()> tick_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::priority_queue<Due> heap_;  // guarded by mutex_
  bool stop_ = false;              // guarded by mutex_
  std::thread thread_;             // last: it uses the rest
};

}  // namespace fc
