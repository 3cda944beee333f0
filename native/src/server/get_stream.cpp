#include "server/get_stream.hpp"

#include <deque>
#include <memory>
#include <mutex>

#include "server/grpc_bytes.hpp"

namespace fc::server {
namespace {

// Requests of one stream under way at most; beyond that the stream is not read, so that flow
// control reaches the client.
constexpr std::size_t kMaxUnderWay = 64;

class GetStream final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                        public Closable {
 public:
  GetStream(NodeSlot& node, CallGate& gate, grpc::CallbackServerContext* context)
      : node_(node), gate_(gate), context_(context), accepted_(gate.enter()) {}

  void start(std::shared_ptr<GetStream> self) {
    self_ = std::move(self);
    if (!accepted_) {
      finished_ = true;
      Finish(CallGate::refusal());
      return;
    }
    StartRead(&incoming_);
    gate_.watch(self_);
  }

  void close() override {
    std::unique_lock lock(mutex_);
    closing_ = true;
    finish_if_idle(lock);
  }

  void OnReadDone(bool ok) override {
    RequestBytes request;
    bool read_on = false;
    {
      std::unique_lock lock(mutex_);
      if (!ok || closing_) {
        // What is read after the gate closed was not accepted: no reply, and the stream says why.
        reading_ended_ = true;
        finish_if_idle(lock);
        return;
      }
      request = to_request(incoming_);
      incoming_.Clear();
      ++under_way_;
      read_on = under_way_ < kMaxUnderWay;
      read_paused_ = !read_on;
    }
    node_.batch_get(std::move(request), timeout_ms(*context_),
                    [self = self_](const CallStatus& status, std::vector<Buffer> pieces) {
                      self->answered(status, std::move(pieces));
                    });
    if (read_on) StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock lock(mutex_);
    writes_.pop_front();
    writing_ = false;
    if (!ok) failed_ = true;
    write_next(lock);
  }

  void OnDone() override {
    CallGate& gate = gate_;
    const bool accepted = accepted_;
    self_.reset();
    if (accepted) gate.leave();
  }

 private:
  void answered(const CallStatus& status, std::vector<Buffer> pieces) {
    std::unique_lock lock(mutex_);
    --under_way_;
    if (!status.ok()) {
      // One malformed request ends the stream: its replies could not be told apart any more.
      if (status_.ok()) status_ = to_status(status);
      failed_ = true;
    } else if (!failed_) {
      writes_.push_back(to_message(std::move(pieces)));
    }
    if (read_paused_ && !failed_ && !closing_) {
      read_paused_ = false;
      // Under the lock, or a close could finish the call between the decision and the read. gRPC
      // never runs OnReadDone from within.
      StartRead(&incoming_);
    }
    write_next(lock);
  }

  void write_next(std::unique_lock<std::mutex>& lock) {
    if (failed_) {
      finish_if_idle(lock);
      return;
    }
    if (!writing_ && !writes_.empty()) {
      writing_ = true;
      StartWrite(&writes_.front());
      return;
    }
    finish_if_idle(lock);
  }

  void finish_if_idle(std::unique_lock<std::mutex>& lock) {
    if (finished_ || writing_ || under_way_ != 0) return;
    if (!failed_ && ((!reading_ended_ && !closing_) || !writes_.empty())) return;
    finished_ = true;
    const bool refused = closing_ && status_.ok() && !failed_;
    const grpc::Status status = refused ? CallGate::refusal() : status_;
    lock.unlock();
    Finish(status);
  }

  NodeSlot& node_;
  CallGate& gate_;
  grpc::CallbackServerContext* const context_;
  const bool accepted_;
  std::shared_ptr<GetStream> self_;
  grpc::ByteBuffer incoming_;

  std::mutex mutex_;
  std::deque<grpc::ByteBuffer> writes_;  // guarded by mutex_; the front one is being written
  std::size_t under_way_ = 0;            // guarded by mutex_
  bool writing_ = false;                 // guarded by mutex_
  bool read_paused_ = false;             // guarded by mutex_
  bool reading_ended_ = false;           // guarded by mutex_
  bool failed_ = false;                  // guarded by mutex_
  bool closing_ = false;                 // guarded by mutex_; the gate is closed
  bool finished_ = false;                // guarded by mutex_
  grpc::Status status_;                  // guarded by mutex_
};

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_get_stream(
    NodeSlot& node, CallGate& gate, grpc::CallbackServerContext* context) {
  auto stream = std::make_shared<GetStream>(node, gate, context);
  GetStream* raw = stream.get();
  raw->start(std::move(stream));
  return raw;
}

}  // namespace fc::server
