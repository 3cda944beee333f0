// Which calls may come in, and which are still inside: what a drain closes and waits for.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace fc::server {

// A call that does not end by itself, such as a stream: it is told when the gate closes.
class Closable {
 public:
  virtual ~Closable() = default;
  // Accept nothing more and end when what was accepted is answered. From any thread.
  virtual void close() = 0;
};

// Thread-safe. A call is inside from `enter` until its last byte was handed to the kernel.
class CallGate {
 public:
  // False once closed: the call is to be refused with `refusal`.
  bool enter() {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    ++inside_;
    return true;
  }

  void leave() {
    const std::lock_guard lock(mutex_);
    // Notified under the lock: who waits may destroy the gate as soon as it is empty.
    if (--inside_ == 0) empty_.notify_all();
  }

  // To be told of `close`, for as long as it lives.
  void watch(std::weak_ptr<Closable> call) {
    {
      const std::lock_guard lock(mutex_);
      if (!closed_) {
        std::erase_if(watched_, [](const auto& other) { return other.expired(); });
        watched_.push_back(std::move(call));
        return;
      }
    }
    if (const auto living = call.lock()) living->close();
  }

  void close() {
    std::vector<std::weak_ptr<Closable>> watched;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      watched.swap(watched_);
    }
    // Not under the lock: closing a call may end it, and it then leaves.
    for (const auto& call : watched) {
      if (const auto living = call.lock()) living->close();
    }
  }

  // Waits for the calls inside; false when some are still there after `timeout`.
  bool wait_until_empty(std::chrono::microseconds timeout) {
    std::unique_lock lock(mutex_);
    return empty_.wait_for(lock, timeout, [this] { return inside_ == 0; });
  }

  static grpc::Status refusal() {
    return {grpc::StatusCode::UNAVAILABLE, "the daemon is draining; ask another or later"};
  }

 private:
  std::mutex mutex_;
  std::condition_variable empty_;
  std::vector<std::weak_ptr<Closable>> watched_;  // guarded by mutex_
  std::uint64_t inside_ = 0;                      // guarded by mutex_
  bool closed_ = false;                           // guarded by mutex_
};

// Answers one unary call, which is inside the gate until gRPC has sent the reply.
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  // Owns itself until OnDone. Finished with a refusal already where `accepted` is false.
  explicit UnaryCall(CallGate& gate) : gate_(gate), accepted_(gate.enter()) {
    if (!accepted_) Finish(CallGate::refusal());
  }
  bool accepted() const noexcept { return accepted_; }

  void OnDone() override {
    CallGate& gate = gate_;
    const bool accepted = accepted_;
    delete this;
    if (accepted) gate.leave();
  }

 private:
  // OnDone does next to nothing, so gRPC need not hand it to another thread.
  bool InternalInlineable() override { return true; }

  CallGate& gate_;
  const bool accepted_;
};

}  // namespace fc::server
