// Runs Python's callbacks on a thread of their own.
//
// A call may end on a thread that reads from a device or watches deadlines. A callback takes the
// interpreter's lock; had that thread to wait for it, a busy interpreter would stall reads of
// everybody else.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace fc::bindings {

// Threads: any may post(). Nobody who waits for it (drain(), the end) may hold the interpreter's
// lock.
class CallbackThread {
 public:
  CallbackThread() = default;
  ~CallbackThread() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }
  CallbackThread(const CallbackThread&) = delete;
  CallbackThread& operator=(const CallbackThread&) = delete;

  void post(std::function<void()> callback) {
    const std::lock_guard lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });  // most nodes need none
    waiting_.push_back(std::move(callback));
    changed_.notify_all();
  }
  // Waits until all that was posted has run; a callback that asks for it does not wait for itself.
  void drain() {
    std::unique_lock lock(mutex_);
    if (std::this_thread::get_id() == thread_.get_id()) return;
    changed_.wait(lock, [this] { return waiting_.empty() && !running_; });
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      std::function<void()> callback = std::move(waiting_.front());
      waiting_.pop_front();
      running_ = true;
      lock.unlock();
      callback();
      callback = nullptr;
      lock.lock();
      running_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;  // guarded by mutex_
  bool running_ = false;                       // guarded by mutex_
  bool stop_ = false;                          // guarded by mutex_
  std::thread thread_;                         // guarded by mutex_ until the end
};

}  // namespace fc::bindings
