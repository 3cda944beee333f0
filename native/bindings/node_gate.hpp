// Who is inside a node, so that nobody is when it is shut down.
#pragma once

#include <mutex>
#include <shared_mutex>

namespace fc::bindings {

// An engine that was shut down must not be called any more, but Python objects that could do so
// live on. Thread-safe; never wait for it with the interpreter's lock held.
class NodeGate {
 public:
  // Held while inside; owns nothing once the gate is closed.
  std::shared_lock<std::shared_mutex> enter() {
    std::shared_lock lock(mutex_);
    if (closed_) lock.unlock();
    return lock;
  }
  // Lets nobody in any more, and waits for those inside.
  void close() {
    const std::unique_lock lock(mutex_);
    closed_ = true;
  }

 private:
  std::shared_mutex mutex_;
  bool closed_ = false;  // guarded by mutex_
};

}  // namespace fc::bindings
