// A copy of a warm peer's items over loopback, against a bare gRPC stream of the same bytes: both
// with their server in this process. One JSON object a round on stdout.
//
//   fc_copy_bench [rounds] [mebibytes] [value bytes]

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "client/transport.hpp"
#include "feature_cache/engine.hpp"
#include "feature_cache/peer_copy.hpp"
#include "feature_cache/server.hpp"
#include "feature_cache/v1/feature_cache.grpc.pb.h"

namespace {

namespace v1 = feature_cache::v1;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kChunkBytes = 1u << 20;

double seconds_since(Clock::time_point began) {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

// Sends one message again and again.
class BareStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  BareStream(const grpc::ByteBuffer& chunk, std::size_t chunks) : chunk_(chunk), left_(chunks) {
    OnWriteDone(true);
  }
  void OnWriteDone(bool ok) override {
    if (!ok || left_ == 0) return Finish(grpc::Status::OK);
    --left_;
    StartWrite(&chunk_);
  }
  void OnDone() override { delete this; }

 private:
  const grpc::ByteBuffer& chunk_;
  std::size_t left_;
};

class BareService final
    : public v1::FeatureCache::WithRawCallbackMethod_CopyItems<v1::FeatureCache::Service> {
 public:
  BareService(std::size_t bytes) : chunks_((bytes + kChunkBytes - 1) / kChunkBytes) {
    const grpc::Slice slice(std::string(kChunkBytes, 'x'));
    chunk_ = grpc::ByteBuffer(&slice, 1);
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* CopyItems(grpc::CallbackServerContext*,
                                                        const grpc::ByteBuffer*) override {
    return new BareStream(chunk_, chunks_);
  }

 private:
  grpc::ByteBuffer chunk_;
  const std::size_t chunks_;
};

// Seconds to receive `bytes` that nobody looks at.
double bare(std::size_t bytes) {
  BareService service(bytes);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20);
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  fc::client::ChannelOptions options;
  const auto channel = fc::client::make_channel("127.0.0.1:" + std::to_string(port), options);
  const grpc::internal::RpcMethod method("/feature_cache.v1.FeatureCache/CopyItems",
                                         grpc::internal::RpcMethod::SERVER_STREAMING);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const grpc::ByteBuffer request;
  const auto began = Clock::now();
  char tag = 0;
  const std::unique_ptr<grpc::ClientAsyncReader<grpc::ByteBuffer>> reader(
      grpc::internal::ClientAsyncReaderFactory<grpc::ByteBuffer>::Create(
          channel.get(), &queue, method, &context, request, true, &tag));
  void* got = nullptr;
  bool ok = false;
  queue.Next(&got, &ok);
  std::size_t received = 0;
  grpc::ByteBuffer chunk;
  for (;;) {
    reader->Read(&chunk, &tag);
    queue.Next(&got, &ok);
    if (!ok) break;
    received += chunk.Length();
  }
  const double seconds = seconds_since(began);
  grpc::Status status;
  reader->Finish(&status, &tag);
  queue.Next(&got, &ok);
  queue.Shutdown();
  while (queue.Next(&got, &ok)) {
  }
  server->Shutdown(std::chrono::system_clock::now());
  if (!status.ok() || received < bytes) fail("the bare stream ended early");
  return seconds;
}

fc::NodeConfig config_for(std::size_t items, std::size_t value_bytes) {
  fc::NodeConfig config;
  const std::size_t item = value_bytes + sizeof(std::uint64_t);
  config.engine.expected_item_bytes = static_cast<std::uint32_t>(item);
  config.engine.memory_bytes = items * (item + 40) * 13 / 10 + (std::size_t{64} << 20);
  fc::NamespaceConfig pin;
  pin.name = "pin";
  pin.domains = {{.name = "all", .budget_bytes = items * (item + 16) * 11 / 10}};
  pin.default_domain = "all";
  config.engine.namespaces = {pin};
  return config;
}

std::unique_ptr<fc::Node> filled(const fc::NodeConfig& config, std::size_t items,
                                 std::size_t value_bytes) {
  auto node = fc::make_node(config);
  std::vector<std::uint64_t> ids(1000);
  std::vector<fc::PutItem> puts(ids.size());
  std::vector<fc::WriteStatus> statuses(ids.size());
  const std::string value(value_bytes, 'v');
  for (std::size_t first = 0; first < items; first += ids.size()) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ids[i] = (first + i) * 0x9E3779B97F4A7C15ull;
      puts[i].key = {reinterpret_cast<const char*>(&ids[i]), sizeof(ids[i])};
      puts[i].value = value;
    }
    node->engine().put(0, puts, statuses);
  }
  return node;
}

// Seconds to copy all items of a peer into an empty node, whose memory the kernel has given
// already, as it has where memory persists.
double copied(fc::Node& warm, fc::Node& fresh, std::size_t items) {
  fresh.engine().flush(0);
  fc::ServerConfig server_config;
  server_config.addresses = {"127.0.0.1:0"};
  server_config.copy_bytes_per_second = std::uint64_t{1} << 40;
  const auto server = fc::make_server(&warm, server_config);
  fc::PeerCopyConfig wanted;
  wanted.address = server->addresses().front();
  wanted.wanted.domains = {{"pin", "all"}};
  const auto began = Clock::now();
  const auto copy = fc::make_peer_copy(fresh.engine(), wanted);
  bool done = false;
  const fc::CallStatus status = copy->run(600, done);
  const double seconds = seconds_since(began);
  server->stop();
  const fc::PeerCopyCounts counts = copy->counts();
  if (!status.ok() || !done || counts.installed < items * 99 / 100) {
    fail("the copy failed: " + status.message + ", " + std::to_string(counts.installed) +
         " items installed of " + std::to_string(items));
  }
  return seconds;
}

std::size_t number(int argc, char** argv, int which, std::size_t fallback) {
  return argc > which ? std::strtoull(argv[which], nullptr, 10) : fallback;
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t rounds = number(argc, argv, 1, 3);
  const std::size_t bytes = number(argc, argv, 2, 1024) << 20;
  const std::size_t value_bytes = number(argc, argv, 3, 1024);
  const std::size_t items = bytes / (value_bytes + sizeof(std::uint64_t)) / 1000 * 1000;
  const fc::NodeConfig config = config_for(items, value_bytes);
  const auto warm = filled(config, items, value_bytes);
  const auto fresh = filled(config, items, value_bytes);
  for (std::size_t round = 0; round < rounds; ++round) {
    const double ours = copied(*warm, *fresh, items);
    const double peer = bare(bytes);
    std::printf(
        "{\"metric\": \"peer_copy\", \"bytes_per_second\": %.0f, \"bare_bytes_per_second\": %.0f, "
        "\"value_bytes\": %zu, \"items\": %zu}\n",
        static_cast<double>(bytes) / ours, static_cast<double>(bytes) / peer, value_bytes, items);
    std::fflush(stdout);
  }
  return 0;
}
