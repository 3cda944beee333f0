#include "server/copy_streams.hpp"

#include <google/protobuf/io/coded_stream.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "feature_cache/engine.hpp"
#include "feature_cache/v1/feature_cache.pb.h"
#include "server/grpc_bytes.hpp"

namespace fc::server {
namespace {

namespace v1 = feature_cache::v1;

constexpr std::size_t kChunkBytes = 1u << 20;
constexpr std::size_t kDomainsMax = 4096;

// Appends a packed field of 32-bit numbers, as the generated code would write it.
void put_packed(Buffer& to, std::uint8_t field, const std::vector<std::uint32_t>& numbers) {
  if (numbers.empty()) return;
  const auto bytes = static_cast<std::uint32_t>(numbers.size() * sizeof(std::uint32_t));
  std::uint8_t* const begin = to.reserve(16);
  *begin = static_cast<std::uint8_t>(field << 3 | 2);
  std::uint8_t* const end =
      google::protobuf::io::CodedOutputStream::WriteVarint32ToArray(bytes, begin + 1);
  to.commit(static_cast<std::size_t>(end - begin));
  to.append(numbers.data(), bytes);
}

// The chunk's bytes; the items are not copied.
std::vector<Buffer> encode(ScanBatch batch, std::uint64_t cursor, bool done) {
  std::vector<Buffer> pieces(3);
  put_packed(pieces[0], v1::CopyItemsChunk::kDomainsFieldNumber, batch.domains);
  put_packed(pieces[0], v1::CopyItemsChunk::kKeyLengthsFieldNumber, batch.key_lengths);
  put_packed(pieces[0], v1::CopyItemsChunk::kValueLengthsFieldNumber, batch.value_lengths);
  put_packed(pieces[0], v1::CopyItemsChunk::kTtlMsFieldNumber, batch.ttl_ms);
  if (!batch.bytes.empty()) {
    std::uint8_t* const begin = pieces[0].reserve(16);
    *begin = v1::CopyItemsChunk::kItemsFieldNumber << 3 | 2;
    std::uint8_t* const end = google::protobuf::io::CodedOutputStream::WriteVarint32ToArray(
        static_cast<std::uint32_t>(batch.bytes.size()), begin + 1);
    pieces[0].commit(static_cast<std::size_t>(end - begin));
    pieces[1] = std::move(batch.bytes);
  }
  v1::CopyItemsChunk rest;
  rest.set_cursor(cursor);
  rest.set_done(done);
  const std::string tail = rest.SerializeAsString();
  pieces[2].append(tail.data(), tail.size());
  return pieces;
}

}  // namespace

std::chrono::nanoseconds CopyPace::take(std::uint64_t bytes) {
  const auto cost = std::chrono::nanoseconds(static_cast<std::int64_t>(
      static_cast<double>(bytes) * 1e9 / static_cast<double>(bytes_per_second_)));
  const std::lock_guard lock(mutex_);
  const auto now = std::chrono::steady_clock::now();
  // What was not used is not made up for.
  const auto begin = std::max(free_at_, now);
  free_at_ = begin + cost;
  return begin - now;
}

// Deleted by gRPC's OnDone or by its thread, whichever is last.
class CopyStreams::Stream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  // Told of a drain.
  class Ending final : public Closable {
   public:
    explicit Ending(Stream& stream) : stream_(&stream) {}
    void close() override {
      const std::lock_guard lock(mutex_);
      if (stream_ != nullptr) stream_->end();
    }
    void forget() {
      const std::lock_guard lock(mutex_);
      stream_ = nullptr;
    }

   private:
    std::mutex mutex_;
    Stream* stream_;  // guarded by mutex_
  };

  explicit Stream(CopyStreams& owner) : owner_(owner), pace_(nullptr) {}

  void refuse(const grpc::Status& status) {
    {
      const std::lock_guard lock(mutex_);
      runs_ = false;
    }
    Finish(status);
  }
  // In the stream's thread.
  void run(const v1::CopyItemsRequest& request) {
    const auto ending = std::make_shared<Ending>(*this);
    owner_.gate_.watch(ending);
    const grpc::Status status = copy(request);
    ending->forget();
    Finish(status);
    bool last = false;
    {
      const std::lock_guard lock(mutex_);
      runs_ = false;
      last = done_;
    }
    if (last) delete this;
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    failed_ |= !ok;
    changed_.notify_all();
  }
  void OnCancel() override { end(); }
  void OnDone() override {
    bool last = false;
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
      last = !runs_;
    }
    if (last) delete this;
  }

 private:
  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }
  bool sleep(std::chrono::nanoseconds time) {
    std::unique_lock lock(mutex_);
    return !changed_.wait_for(lock, time, [this] { return ended_ || failed_; });
  }

  grpc::Status copy(const v1::CopyItemsRequest& request) {
    Node* const node = owner_.node_.node();
    if (node == nullptr) {
      return {grpc::StatusCode::UNAVAILABLE, "the daemon is recovering; ask another or later"};
    }
    CopyWanted wanted;
    for (const v1::DomainName& domain : request.domains()) {
      wanted.domains.push_back({domain.namespace_(), domain.domain()});
    }
    wanted.shard_count = request.shard_count();
    wanted.shards.assign(request.shards().begin(), request.shards().end());
    wanted.map_version = request.map_version();
    ScanFilter filter;
    if (const CallStatus status = node->begin_copy(wanted, filter); !status.ok()) {
      return to_status(status);
    }
    if (request.bytes_per_second() != 0) {
      pace_ = std::make_unique<CopyPace>(request.bytes_per_second());
    }
    std::uint64_t cursor = request.cursor();
    while (cursor != kScanEnd) {
      ScanBatch batch;
      if (const CallStatus status = node->copy_items(wanted, filter, cursor, kChunkBytes, batch);
          !status.ok()) {
        return to_status(status);
      }
      const std::uint64_t bytes = batch.bytes.size() + batch.items() * 4 * sizeof(std::uint32_t);
      auto wait = owner_.pace_.take(bytes);
      if (pace_ != nullptr) wait = std::max(wait, pace_->take(bytes));
      if (wait.count() > 0 && !sleep(wait)) break;
      if (!write(to_message(encode(std::move(batch), cursor, cursor == kScanEnd)))) break;
    }
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !writing_; });
    if (failed_) return {grpc::StatusCode::CANCELLED, "the receiver is gone"};
    return ended_ ? CallGate::refusal() : grpc::Status::OK;
  }
  // Returns when the one before it is out: the next part is scanned while this one is sent.
  bool write(grpc::ByteBuffer message) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !writing_; });
    if (ended_ || failed_) return false;
    message_ = std::move(message);
    writing_ = true;
    StartWrite(&message_);
    return true;
  }

  CopyStreams& owner_;
  std::unique_ptr<CopyPace> pace_;  // as the receiver asks
  grpc::ByteBuffer message_;        // while it is written
  std::mutex mutex_;
  std::condition_variable changed_;
  bool writing_ = false;  // guarded by mutex_, as what follows
  bool failed_ = false;
  bool ended_ = false;  // by a drain, or by the receiver
  bool done_ = false;   // gRPC has let go of it
  bool runs_ = true;    // its thread has not
};

grpc::ServerWriteReactor<grpc::ByteBuffer>* CopyStreams::start(const grpc::ByteBuffer& message) {
  auto* const stream = new Stream(*this);
  const auto refuse = [&](grpc::StatusCode code, const char* why) {
    stream->refuse({code, why});
    return stream;
  };
  const RequestBytes bytes = to_request(message);
  v1::CopyItemsRequest request;
  if (!request.ParseFromArray(bytes.bytes.data(), static_cast<int>(bytes.bytes.size())) ||
      request.domains_size() == 0 ||
      static_cast<std::size_t>(request.domains_size()) > kDomainsMax) {
    return refuse(grpc::StatusCode::INVALID_ARGUMENT, "a copy names 1 to 4,096 eviction domains");
  }
  if (refuses_) {
    return refuse(grpc::StatusCode::FAILED_PRECONDITION,
                  "this node gives no copies (warmup.peer_copy.serve_rate is 0)");
  }
  if (!gate_.enter()) {
    stream->refuse(CallGate::refusal());
    return stream;
  }
  gate_.leave();  // a drain does not wait for it
  const std::lock_guard lock(mutex_);
  for (const std::thread::id ended : ended_) {
    const auto found = std::find_if(threads_.begin(), threads_.end(),
                                    [&](const std::thread& t) { return t.get_id() == ended; });
    if (found == threads_.end()) continue;
    found->join();
    threads_.erase(found);
  }
  ended_.clear();
  if (running_ >= at_once_) {
    return refuse(grpc::StatusCode::RESOURCE_EXHAUSTED,
                  "this node gives as many copies as it may (warmup.peer_copy.at_once)");
  }
  ++running_;
  threads_.emplace_back([this, stream, request = std::move(request)] {
    stream->run(request);
    const std::lock_guard ended(mutex_);
    --running_;
    ended_.push_back(std::this_thread::get_id());
  });
  return stream;
}

CopyStreams::~CopyStreams() {
  std::list<std::thread> threads;
  {
    const std::lock_guard lock(mutex_);
    threads.swap(threads_);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace fc::server
