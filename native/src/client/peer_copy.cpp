// The receiving end of a copy, over gRPC.

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <optional>

#include "client/transport.hpp"
#include "feature_cache/engine.hpp"
#include "feature_cache/peer_copy.hpp"
#include "feature_cache/v1/feature_cache.grpc.pb.h"

namespace fc {
namespace {

namespace v1 = feature_cache::v1;
using Clock = std::chrono::steady_clock;

constexpr int kMessageBytesMax = 64 << 20;

CallStatus to_call_status(const grpc::Status& status) {
  return {static_cast<int>(status.error_code()), status.error_message()};
}

std::shared_ptr<grpc::Channel> channel_to(const std::string& address) {
  client::ChannelOptions options;
  options.max_message_bytes = kMessageBytesMax;
  return client::make_channel(address, options);
}

class GrpcPeerCopy final : public PeerCopy {
 public:
  GrpcPeerCopy(Engine& engine, PeerCopyConfig config)
      : engine_(engine),
        config_(std::move(config)),
        stub_(v1::FeatureCache::NewStub(channel_to(config_.address))) {
    counts_.cursor = config_.cursor;
    for (const CopyWanted::Domain& named : config_.wanted.domains) {
      CopiedDomain& to = domains_.emplace_back();
      to.ns = engine_.find_namespace(named.ns);
      if (to.ns != kNoNamespace) to.domain = engine_.find_domain(to.ns, named.name);
    }
  }
  ~GrpcPeerCopy() override { end_stream(); }

  CallStatus run(double seconds, bool& done) override {
    done = counts().cursor == kScanEnd;
    const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                          std::chrono::duration<double>(std::max(seconds, 0.0)));
    while (!done) {
      if (stopped()) return {};
      if (stream_ == nullptr) begin_stream();
      bool arrived = false;
      if (!wait(until, arrived)) return {};  // the time is over; the read stays under way
      if (!arrived) {
        const grpc::Status status = end_stream();
        if (stopped()) return {};
        if (status.ok()) {
          return {CallStatus::Unavailable, "the peer ended the copy before its end"};
        }
        return to_call_status(status);
      }
      // The next one arrives while this one is installed.
      arrived_.Swap(&chunk_);
      if (!arrived_.done()) read_next();
      if (const CallStatus status = take(arrived_); !status.ok()) {
        context_->TryCancel();
        end_stream();
        return status;
      }
      done = arrived_.done();
    }
    end_stream();
    return {};
  }

  void stop() override {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    if (context_ != nullptr) context_->TryCancel();
  }
  PeerCopyCounts counts() const override {
    const std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  bool stopped() const {
    const std::lock_guard lock(mutex_);
    return stopped_;
  }

  void begin_stream() {
    // Before the peer is asked: whatever it reads from now on is no older than these.
    tokens_ = engine_.tokens();
    v1::CopyItemsRequest request;
    for (const CopyWanted::Domain& named : config_.wanted.domains) {
      v1::DomainName* const to = request.add_domains();
      to->set_namespace_(named.ns);
      to->set_domain(named.name);
    }
    request.set_shard_count(config_.wanted.shard_count);
    request.mutable_shards()->Add(config_.wanted.shards.begin(), config_.wanted.shards.end());
    request.set_map_version(config_.wanted.map_version);
    request.set_bytes_per_second(config_.bytes_per_second);
    {
      const std::lock_guard lock(mutex_);
      request.set_cursor(counts_.cursor);
      context_ = std::make_unique<grpc::ClientContext>();
      if (stopped_) context_->TryCancel();
    }
    queue_ = std::make_unique<grpc::CompletionQueue>();
    stream_ = stub_->AsyncCopyItems(context_.get(), request, queue_.get(), kTag);
    // The first event says that the call began, or that it has failed.
    began_ = false;
    pending_ = true;
    arrived_.Clear();
  }
  void read_next() {
    stream_->Read(&chunk_, kTag);
    pending_ = true;
  }

  // False when nothing came in time; else `arrived` says whether it was a chunk.
  bool wait(Clock::time_point until, bool& arrived) {
    for (;;) {
      void* tag = nullptr;
      bool ok = false;
      const auto left = std::max(until - Clock::now(), Clock::duration::zero());
      const auto deadline = std::chrono::system_clock::now() +
                            std::chrono::duration_cast<std::chrono::microseconds>(left);
      if (queue_->AsyncNext(&tag, &ok, deadline) != grpc::CompletionQueue::GOT_EVENT) return false;
      pending_ = false;
      if (!began_ && ok) {
        began_ = true;
        read_next();
        continue;
      }
      arrived = ok;
      return true;
    }
  }

  CallStatus take(const v1::CopyItemsChunk& chunk) {
    const CopiedItems copied{
        {chunk.domains().data(), static_cast<std::size_t>(chunk.domains_size())},
        {chunk.key_lengths().data(), static_cast<std::size_t>(chunk.key_lengths_size())},
        {chunk.value_lengths().data(), static_cast<std::size_t>(chunk.value_lengths_size())},
        {chunk.ttl_ms().data(), static_cast<std::size_t>(chunk.ttl_ms_size())},
        chunk.items()};
    PeerCopyCounts counts = this->counts();
    if (!install_copied(engine_, *tokens_, domains_, copied, counts)) {
      return {kDataLoss, "the peer sent items that contradict themselves"};
    }
    counts.cursor = chunk.done() ? kScanEnd : chunk.cursor();
    const std::lock_guard lock(mutex_);
    counts_ = counts;
    return {};
  }

  // Ends the call, which has ended by itself unless something is still under way.
  grpc::Status end_stream() {
    if (stream_ == nullptr) return grpc::Status::OK;
    void* tag = nullptr;
    bool ok = false;
    if (pending_) {
      context_->TryCancel();
      queue_->Next(&tag, &ok);
      pending_ = false;
    } else if (arrived_.done()) {
      context_->TryCancel();  // all is here; the status says no more
    }
    grpc::Status status;
    stream_->Finish(&status, kTag);
    queue_->Next(&tag, &ok);
    stream_.reset();
    queue_->Shutdown();
    while (queue_->Next(&tag, &ok)) {
    }
    queue_.reset();
    const std::lock_guard lock(mutex_);
    context_.reset();
    return status;
  }

  static constexpr int kDataLoss = 15;
  static inline char tag_;
  static inline void* const kTag = &tag_;

  Engine& engine_;
  const PeerCopyConfig config_;
  const std::unique_ptr<v1::FeatureCache::Stub> stub_;
  std::vector<CopiedDomain> domains_;  // fixed
  // Of the one that runs.
  std::shared_ptr<const TokenSnapshot> tokens_;
  std::unique_ptr<grpc::CompletionQueue> queue_;
  std::unique_ptr<grpc::ClientAsyncReader<v1::CopyItemsChunk>> stream_;
  v1::CopyItemsChunk chunk_;    // being read
  v1::CopyItemsChunk arrived_;  // the last one that was
  bool began_ = false;
  bool pending_ = false;  // an event is still to come

  mutable std::mutex mutex_;
  std::unique_ptr<grpc::ClientContext> context_;  // changed under mutex_
  PeerCopyCounts counts_;                         // guarded by mutex_
  bool stopped_ = false;                          // guarded by mutex_
};

}  // namespace

std::unique_ptr<PeerCopy> make_peer_copy(Engine& engine, PeerCopyConfig config) {
  return std::make_unique<GrpcPeerCopy>(engine, std::move(config));
}

CallStatus describe_peer(const std::string& address, double timeout_seconds,
                         std::vector<ItemTotals>& totals) {
  const auto stub = v1::FeatureCache::NewStub(channel_to(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::microseconds>(
                           std::chrono::duration<double>(timeout_seconds)));
  v1::DescribeItemsResponse response;
  if (const grpc::Status status = stub->DescribeItems(&context, {}, &response); !status.ok()) {
    return to_call_status(status);
  }
  for (const v1::DomainItems& each : response.domains()) {
    totals.push_back({each.namespace_(), each.domain(), each.items(), each.bytes(), each.ttl_ms(),
                      each.mean_ttl_left_ms()});
  }
  return {};
}

}  // namespace fc
