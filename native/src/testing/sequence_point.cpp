#include "testing/sequence_point.hpp"

#include <atomic>
#include <new>
#include <shared_mutex>
#include <utility>

#include "core/check.hpp"

namespace fc::testing {
namespace {

// The watcher, and a lock that keeps it alive while a thread is about to enter it.
std::atomic<SequencePoints*> watcher{nullptr};
std::shared_mutex watcher_mutex;

}  // namespace

SequencePoints::SequencePoints() {
  const std::unique_lock lock(watcher_mutex);
  FC_CHECK(watcher.load() == nullptr);
  watcher.store(this);
}

SequencePoints::~SequencePoints() {
  {
    const std::unique_lock lock(watcher_mutex);
    watcher.store(nullptr);
  }
  std::unique_lock lock(mutex_);
  for (auto& [name, point] : points_) {
    point.to_stop = 0;
    ++point.released;
  }
  changed_.notify_all();
  changed_.wait(lock, [this] { return inside_ == 0; });
}

void SequencePoints::block(std::string_view name, std::uint32_t threads) {
  const std::lock_guard lock(mutex_);
  points_[std::string(name)].to_stop += threads;
}

bool SequencePoints::wait_blocked(std::string_view name, std::uint32_t threads) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience,
                           [&] { return points_.find(name)->second.stopped >= threads; });
}

void SequencePoints::release(std::string_view name) {
  const std::lock_guard lock(mutex_);
  Point& point = points_.find(name)->second;
  point.to_stop = 0;
  ++point.released;
  changed_.notify_all();
}

void SequencePoints::exhaust(std::string_view name) {
  const std::lock_guard lock(mutex_);
  points_[std::string(name)].exhausted = true;
}

std::uint64_t SequencePoints::reached(std::string_view name) {
  const std::lock_guard lock(mutex_);
  const auto found = points_.find(name);
  return found == points_.end() ? 0 : found->second.reached;
}

void SequencePoints::reach(const char* name) {
  std::unique_lock lock(mutex_, std::adopt_lock);
  bool exhausted = false;
  if (const auto found = points_.find(std::string_view(name)); found != points_.end()) {
    Point& point = found->second;
    ++point.reached;
    if (point.to_stop != 0) {
      --point.to_stop;
      ++point.stopped;
      const std::uint64_t generation = point.released;
      changed_.notify_all();
      changed_.wait(lock, [&] { return point.released != generation; });
      --point.stopped;
    }
    exhausted = std::exchange(point.exhausted, false);
  }
  --inside_;
  changed_.notify_all();
  if (exhausted) throw std::bad_alloc();
}

void reach_sequence_point(const char* name) {
  if (watcher.load(std::memory_order_relaxed) == nullptr) [[likely]]
    return;
  SequencePoints* points = nullptr;
  {
    const std::shared_lock alive(watcher_mutex);
    points = watcher.load();
    if (points == nullptr) return;
    points->mutex_.lock();
    ++points->inside_;
  }
  points->reach(name);  // takes the lock over
}

}  // namespace fc::testing
