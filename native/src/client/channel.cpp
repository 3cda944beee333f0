#include "client/channel.hpp"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/client_unary_call.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "client/transport.hpp"

namespace fc::client {
namespace {

constexpr double kTimeoutSecondsMax = 86400.0 * 365;  // beyond: no deadline

// The frame size that we allow the server: a reply of a thousand values is then one frame, not
// thirteen. A stream window that holds whole replies spares round trips of window updates.
constexpr int kFrameBytesMax = 1 << 20;
constexpr int kStreamWindowBytes = 4 << 20;
// A restarted daemon is back within a second; gRPC's default backs off for up to two minutes.
constexpr int kReconnectMsFirst = 50;
constexpr int kReconnectMsMax = 1000;
// How long a blocking call that found no server drives the connection before it says so.
constexpr std::chrono::milliseconds kReconnectDrive{20};

// The size of which one freed block teaches glibc to keep memory instead of giving it back.
constexpr std::size_t kKeptBytes = std::size_t{8} << 20;

// gRPC allocates and frees the pieces of every reply. With its thresholds as they start, glibc
// gives that memory back to the system each time and faults it in again for the next reply, which
// was a fifth of the whole call. Freeing one large block raises the thresholds to its size, as the
// host process's own large blocks would; mallopt() would instead fix them for the host for good.
void keep_freed_memory() {
  static const bool done = [] {
    void* volatile block = std::malloc(kKeptBytes);
    std::free(block);
    return true;
  }();
  static_cast<void>(done);
}

RpcFailure closed_failure() {
  return {grpc::StatusCode::CANCELLED, "the channel is closed"};
}

grpc::ByteBuffer to_byte_buffer(std::string_view request) {
  // Copied: the transport may hold the bytes longer than a call that ends at its deadline.
  const grpc::Slice slice(request.data(), request.size());
  return grpc::ByteBuffer(&slice, 1);
}

void set_deadline(grpc::ClientContext& context, Seconds timeout) {
  if (!(timeout.count() < kTimeoutSecondsMax)) return;
  const auto ticks = std::chrono::duration_cast<std::chrono::system_clock::duration>(
      std::max(timeout, Seconds::zero()));
  context.set_deadline(std::chrono::system_clock::now() + ticks);
}

}  // namespace

RpcFailure failure_of(const grpc::Status& status) {
  return {static_cast<int>(status.error_code()), status.error_message()};
}

std::shared_ptr<grpc::Channel> make_channel(const std::string& target,
                                            const ChannelOptions& options) {
  keep_freed_memory();
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(options.max_message_bytes);
  arguments.SetMaxSendMessageSize(options.max_message_bytes);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kFrameBytesMax);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kStreamWindowBytes);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMsFirst);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMsMax);
  // Retries, compression and proxies are not for a data plane: the client above retries what it
  // may, values are compressed by their owners, and a cache is never behind a web proxy.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_CHANNELZ, 0);
  arguments.SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
  // Two channels are two connections, as their user asked for.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  if (options.root_certificates) {
    grpc::SslCredentialsOptions tls;
    tls.pem_root_certs = *options.root_certificates;
    tls.pem_private_key = options.private_key.value_or("");
    tls.pem_cert_chain = options.certificate_chain.value_or("");
    credentials = grpc::SslCredentials(tls);
    if (!options.server_name.empty()) arguments.SetSslTargetNameOverride(options.server_name);
  } else {
    credentials = grpc::InsecureChannelCredentials();
  }
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

class Channel::State : public std::enable_shared_from_this<State> {
 public:
  State(const std::string& target, const ChannelOptions& options)
      : channel_(make_channel(target, options)),
        stub_(channel_),
        get_(kBatchGet, grpc::internal::RpcMethod::NORMAL_RPC, channel_),
        put_(kBatchPut, grpc::internal::RpcMethod::NORMAL_RPC, channel_),
        delete_(kBatchDelete, grpc::internal::RpcMethod::NORMAL_RPC, channel_) {}

  const grpc::internal::RpcMethod& get_method() const { return get_; }
  const grpc::internal::RpcMethod& put_method() const { return put_; }
  const grpc::internal::RpcMethod& delete_method() const { return delete_; }

  template <typename Answer>
  Outcome<Answer> call(const grpc::internal::RpcMethod& method, std::string_view request,
                       Seconds timeout) {
    grpc::ClientContext context;
    set_deadline(context, timeout);
    if (!enter(context, false)) return closed_failure();
    grpc::ByteBuffer reply;
    const grpc::Status status =
        grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer, grpc::ByteBuffer,
                                          grpc::ByteBuffer>(channel_.get(), method, &context,
                                                            to_byte_buffer(request), &reply);
    // Where nothing listened the call has failed at once. Nobody else polls this connection:
    // without this, a server that is back would be noticed by gRPC's own look every few seconds.
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE) {
      channel_->WaitForConnected(
          std::min(context.deadline(), std::chrono::system_clock::now() + kReconnectDrive));
    }
    leave(context);
    if (!status.ok()) return failure_of(status);
    return parse<Answer>(reply);
  }

  template <typename Answer>
  void call_async(const char* method, std::string_view request, Seconds timeout,
                  Done<Answer> done) {
    auto pending = std::make_unique<PendingCall<Answer>>();
    set_deadline(pending->context, timeout);
    pending->done = std::move(done);
    if (!enter(pending->context, true)) {
      pending->done(closed_failure());
      return;
    }
    pending->reader =
        stub_.PrepareUnaryCall(&pending->context, method, to_byte_buffer(request), &completions_);
    pending->reader->StartCall();
    auto* const tag = pending.release();  // complete_all() takes it back
    tag->reader->Finish(&tag->reply, &tag->status, static_cast<Pending*>(tag));
  }

  void close() {
    std::unique_lock lock(mutex_);
    closed_ = true;
    for (grpc::ClientContext* context : under_way_) context->TryCancel();
    shut_down_when_idle_locked();
    if (!completer_.joinable()) {
      idle_.wait(lock, [this] { return under_way_.empty(); });
      return;
    }
    if (completer_.get_id() == std::this_thread::get_id()) {
      completer_.detach();  // it holds this state, and ends when the last call has
      return;
    }
    std::thread completer = std::move(completer_);
    idle_.wait(lock, [this] { return under_way_.empty(); });
    lock.unlock();
    completer.join();
  }

 private:
  struct Pending {
    virtual ~Pending() = default;
    virtual void complete() = 0;
    grpc::ClientContext context;
  };

  template <typename Answer>
  struct PendingCall final : Pending {
    void complete() override {
      done(status.ok() ? parse<Answer>(reply) : Outcome<Answer>(failure_of(status)));
    }
    Done<Answer> done;
    std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
    grpc::ByteBuffer reply;
    grpc::Status status;
  };

  bool enter(grpc::ClientContext& context, bool async) {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    under_way_.insert(&context);
    if (async && !completer_.joinable()) {
      completer_ = std::thread([self = shared_from_this()] { self->complete_all(); });
    }
    return true;
  }

  void leave(grpc::ClientContext& context) {
    const std::lock_guard lock(mutex_);
    under_way_.erase(&context);
    shut_down_when_idle_locked();
    if (under_way_.empty()) idle_.notify_all();
  }

  // A queue may be shut down only when nothing will be started on it any more.
  void shut_down_when_idle_locked() {
    if (!closed_ || !under_way_.empty() || shut_down_) return;
    shut_down_ = true;
    completions_.Shutdown();
  }

  void complete_all() {
    void* tag = nullptr;
    bool ok = false;  // of unary calls always true: the status says how they ended
    while (completions_.Next(&tag, &ok)) {
      const std::unique_ptr<Pending> pending(static_cast<Pending*>(tag));
      pending->complete();
      leave(pending->context);
    }
  }

  const std::shared_ptr<grpc::Channel> channel_;
  grpc::GenericStub stub_;
  const grpc::internal::RpcMethod get_, put_, delete_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable idle_;
  std::unordered_set<grpc::ClientContext*> under_way_;
  bool closed_ = false;
  bool shut_down_ = false;
  std::thread completer_;

  grpc::CompletionQueue completions_;
};

Channel::Channel(const std::string& target, const ChannelOptions& options)
    : state_(std::make_shared<State>(target, options)) {}

Channel::~Channel() {
  close();
}

void Channel::close() {
  state_->close();
}

Outcome<Reply> Channel::batch_get(std::string_view request, Seconds timeout) {
  return state_->call<Reply>(state_->get_method(), request, timeout);
}

Outcome<WriteReply> Channel::batch_put(std::string_view request, Seconds timeout) {
  return state_->call<WriteReply>(state_->put_method(), request, timeout);
}

Outcome<WriteReply> Channel::batch_delete(std::string_view request, Seconds timeout) {
  return state_->call<WriteReply>(state_->delete_method(), request, timeout);
}

void Channel::batch_get_async(std::string_view request, Seconds timeout, Done<Reply> done) {
  state_->call_async<Reply>(kBatchGet, request, timeout, std::move(done));
}

void Channel::batch_put_async(std::string_view request, Seconds timeout, Done<WriteReply> done) {
  state_->call_async<WriteReply>(kBatchPut, request, timeout, std::move(done));
}

void Channel::batch_delete_async(std::string_view request, Seconds timeout, Done<WriteReply> done) {
  state_->call_async<WriteReply>(kBatchDelete, request, timeout, std::move(done));
}

}  // namespace fc::client
