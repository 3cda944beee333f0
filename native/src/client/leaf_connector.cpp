// Links of a root to its leaves, over gRPC: many connections whose calls a few threads complete.

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "client/transport.hpp"
#include "feature_cache/leaf_link.hpp"

namespace fc::client {
namespace {

class Connector;

struct Pending {
  virtual ~Pending() = default;
  virtual void complete() = 0;
  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
  grpc::ByteBuffer reply;
  grpc::Status status;
};

template <class Answer, class Done>
struct PendingCall final : Pending {
  explicit PendingCall(Done then) : done(std::move(then)) {}
  void complete() override {
    if (!status.ok()) {
      return done(CallStatus{static_cast<int>(status.error_code()), status.error_message()}, {});
    }
    Outcome<Answer> outcome = parse<Answer>(reply);
    if (auto* answer = std::get_if<Answer>(&outcome)) return done({}, std::move(*answer));
    const RpcFailure& failure = std::get<RpcFailure>(outcome);
    done(CallStatus{failure.code, failure.details}, {});
  }
  const Done done;
};

// The bytes are not copied: the message owns them.
grpc::ByteBuffer to_message(Buffer bytes) {
  auto* const owned = new Buffer(std::move(bytes));
  const grpc::Slice slice(
      owned->data(), owned->size(), [](void* buffer) { delete static_cast<Buffer*>(buffer); },
      owned);
  return grpc::ByteBuffer(&slice, 1);
}

// The queue of completions and its threads. A queue may be shut down only when nothing will be
// started on it any more: so calls are counted in.
class Completions {
 public:
  explicit Completions(std::uint32_t threads) {
    for (std::uint32_t i = 0; i < std::max(threads, 1u); ++i) {
      threads_.emplace_back([this] { run(); });
    }
  }
  ~Completions() { close(); }

  // False once closed.
  bool enter(Pending& call) {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    under_way_.insert(&call);
    return true;
  }
  void close() {
    std::unique_lock lock(mutex_);
    closed_ = true;
    for (Pending* const call : under_way_) call->context.TryCancel();
    idle_.wait(lock, [this] { return under_way_.empty(); });
    if (threads_.empty()) return;
    queue_.Shutdown();
    std::vector<std::thread> threads = std::move(threads_);
    threads_.clear();
    lock.unlock();
    for (std::thread& thread : threads) thread.join();
  }
  grpc::CompletionQueue& queue() noexcept { return queue_; }

 private:
  void run() {
    void* tag = nullptr;
    bool ok = false;  // of unary calls always true: the status says how they ended
    while (queue_.Next(&tag, &ok)) {
      const std::unique_ptr<Pending> call(static_cast<Pending*>(tag));
      call->complete();
      const std::lock_guard lock(mutex_);
      under_way_.erase(call.get());
      if (under_way_.empty()) idle_.notify_all();
    }
  }

  grpc::CompletionQueue queue_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable idle_;
  std::unordered_set<Pending*> under_way_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

class Link final : public LeafLink {
 public:
  Link(const std::string& address, const ChannelOptions& options, std::uint32_t connections,
       std::shared_ptr<Completions> completions)
      : completions_(std::move(completions)) {
    for (std::uint32_t i = 0; i < std::max(connections, 1u); ++i) {
      stubs_.push_back(std::make_unique<grpc::GenericStub>(make_channel(address, options)));
    }
  }

  void get(Buffer request, std::uint64_t timeout_ns, GetDone done) override {
    call<Reply>(kBatchGet, std::move(request), timeout_ns, std::move(done));
  }
  void put(Buffer request, std::uint64_t timeout_ns, WriteDone done) override {
    call<WriteReply>(kBatchPut, std::move(request), timeout_ns, std::move(done));
  }
  void erase(Buffer request, std::uint64_t timeout_ns, WriteDone done) override {
    call<WriteReply>(kBatchDelete, std::move(request), timeout_ns, std::move(done));
  }

 private:
  template <class Answer, class Done>
  void call(const char* method, Buffer request, std::uint64_t timeout_ns, Done done) {
    auto pending = std::make_unique<PendingCall<Answer, Done>>(std::move(done));
    pending->context.set_deadline(std::chrono::system_clock::now() +
                                  std::chrono::nanoseconds(timeout_ns));
    if (!completions_->enter(*pending)) {
      return pending->done(CallStatus{grpc::StatusCode::CANCELLED, "the node is stopping"}, {});
    }
    grpc::GenericStub& stub =
        *stubs_[next_.fetch_add(1, std::memory_order_relaxed) % stubs_.size()];
    pending->reader = stub.PrepareUnaryCall(&pending->context, method,
                                            to_message(std::move(request)), &completions_->queue());
    pending->reader->StartCall();
    Pending* const tag = pending.release();  // run() takes it back
    tag->reader->Finish(&tag->reply, &tag->status, tag);
  }

  const std::shared_ptr<Completions> completions_;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs_;  // one a connection
  std::atomic<std::size_t> next_{0};
};

class Connector final : public LeafConnector {
 public:
  explicit Connector(const LeafConnectorConfig& config)
      : completions_(std::make_shared<Completions>(config.threads)),
        connections_(config.connections) {
    options_.max_message_bytes = config.max_message_bytes;
  }
  ~Connector() override { close(); }

  std::shared_ptr<LeafLink> connect(const std::string& address) override {
    return std::make_shared<Link>(address, options_, connections_, completions_);
  }
  void close() override { completions_->close(); }

 private:
  const std::shared_ptr<Completions> completions_;
  const std::uint32_t connections_;
  ChannelOptions options_;
};

}  // namespace
}  // namespace fc::client

namespace fc {

std::shared_ptr<LeafConnector> make_leaf_connector(const LeafConnectorConfig& config) {
  return std::make_shared<client::Connector>(config);
}

}  // namespace fc
