// The data service on libgrpc++'s callback API. The batch methods are raw: they see the bytes of a
// message and send ours, so that nothing is parsed or copied twice.

#include <absl/synchronization/mutex.h>
#include <arpa/inet.h>
#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <malloc.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <system_error>

#include "feature_cache/node.hpp"
#include "feature_cache/server.hpp"
#include "feature_cache/v1/feature_cache.grpc.pb.h"
#include "server/call_gate.hpp"
#include "server/copy_streams.hpp"
#include "server/get_stream.hpp"
#include "server/grpc_bytes.hpp"
#include "server/node_slot.hpp"

namespace fc::server {
namespace {

namespace v1 = feature_cache::v1;
constexpr const char* kServiceName = "feature_cache.v1.FeatureCache";
constexpr const char* kUnixPrefix = "unix:";
constexpr std::chrono::milliseconds kGoodbye{100};

using RawService = v1::FeatureCache::WithRawCallbackMethod_BatchGet<
    v1::FeatureCache::WithRawCallbackMethod_BatchPut<
        v1::FeatureCache::WithRawCallbackMethod_BatchDelete<
            v1::FeatureCache::WithRawCallbackMethod_BatchGetStream<
                v1::FeatureCache::WithRawCallbackMethod_CopyItems<
                    v1::FeatureCache::WithCallbackMethod_DescribeItems<
                        v1::FeatureCache::WithCallbackMethod_RecentWrites<
                            v1::FeatureCache::WithCallbackMethod_Get<
                                v1::FeatureCache::Service>>>>>>>>;

class Service final : public RawService {
 public:
  Service(NodeSlot& node, CallGate& gate, const ServerConfig& config)
      : node_(node), gate_(gate), copies_(node, gate, config) {}

  grpc::ServerUnaryReactor* BatchGet(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    return serve(&NodeSlot::batch_get, *context, *request, response);
  }
  grpc::ServerUnaryReactor* BatchPut(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    return serve(&NodeSlot::batch_put, *context, *request, response);
  }
  grpc::ServerUnaryReactor* BatchDelete(grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override {
    return serve(&NodeSlot::batch_delete, *context, *request, response);
  }

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* BatchGetStream(
      grpc::CallbackServerContext* context) override {
    return start_get_stream(node_, gate_, context);
  }

  grpc::ServerWriteReactor<grpc::ByteBuffer>* CopyItems(grpc::CallbackServerContext* /*context*/,
                                                        const grpc::ByteBuffer* request) override {
    return copies_.start(*request);
  }

  grpc::ServerUnaryReactor* DescribeItems(grpc::CallbackServerContext* /*context*/,
                                          const v1::DescribeItemsRequest* /*request*/,
                                          v1::DescribeItemsResponse* response) override {
    auto* reactor = new UnaryCall(gate_);
    if (!reactor->accepted()) return reactor;
    Node* const node = node_.node();
    for (const ItemTotals& totals :
         node != nullptr ? node->item_totals() : std::vector<ItemTotals>{}) {
      v1::DomainItems* const to = response->add_domains();
      to->set_namespace_(totals.ns);
      to->set_domain(totals.domain);
      to->set_items(totals.items);
      to->set_bytes(totals.bytes);
      to->set_ttl_ms(totals.ttl_ms);
      to->set_mean_ttl_left_ms(totals.mean_ttl_left_ms);
    }
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  grpc::ServerUnaryReactor* RecentWrites(grpc::CallbackServerContext* /*context*/,
                                         const v1::RecentWritesRequest* request,
                                         v1::RecentWritesResponse* response) override {
    auto* reactor = new UnaryCall(gate_);
    if (!reactor->accepted()) return reactor;
    try {
      fill(node_.recent_writes(
               request->shard_count(),
               {request->shards().data(), static_cast<std::size_t>(request->shards_size())},
               request->age_ms()),
           response);
      reactor->Finish(grpc::Status::OK);
    } catch (const std::invalid_argument& error) {
      reactor->Finish({grpc::StatusCode::FAILED_PRECONDITION, error.what()});
    }
    return reactor;
  }

  // For people: one key through the same path, by the generated messages.
  grpc::ServerUnaryReactor* Get(grpc::CallbackServerContext* context, const v1::GetRequest* request,
                                v1::GetResponse* response) override {
    v1::BatchGetRequest batch;
    batch.set_cache_only(request->cache_only());
    v1::KeyColumn* column = batch.add_columns();
    column->set_namespace_(request->namespace_());
    switch (request->key_case()) {
      case v1::GetRequest::kKeyId:
        column->add_ids(request->key_id());
        break;
      case v1::GetRequest::kKeyText:
        column->set_keys(request->key_text());
        break;
      default:
        column->set_keys(request->key_bytes());
        break;
    }
    if (request->key_case() != v1::GetRequest::kKeyId) {
      column->add_key_lengths(static_cast<std::uint32_t>(column->keys().size()));
    }
    auto bytes = std::make_shared<std::string>(batch.SerializeAsString());
    RequestBytes raw;
    raw.bytes = {reinterpret_cast<const std::uint8_t*>(bytes->data()), bytes->size()};
    raw.owner = bytes;
    auto* reactor = new UnaryCall(gate_);
    if (!reactor->accepted()) return reactor;
    node_.batch_get(
        std::move(raw), timeout_ms(*context),
        [reactor, response](const CallStatus& status, const std::vector<Buffer>& pieces) {
          if (status.ok()) fill(pieces, response);
          reactor->Finish(to_status(status));
        });
    return reactor;
  }

 private:
  using Method = void (NodeSlot::*)(RequestBytes, std::uint64_t, ReplyDone);

  grpc::ServerUnaryReactor* serve(Method method, const grpc::CallbackServerContext& context,
                                  const grpc::ByteBuffer& request, grpc::ByteBuffer* response) {
    auto* reactor = new UnaryCall(gate_);
    if (!reactor->accepted()) return reactor;
    (node_.*method)(to_request(request), timeout_ms(context),
                    [reactor, response](const CallStatus& status, std::vector<Buffer> pieces) {
                      if (status.ok()) *response = to_message(std::move(pieces));
                      reactor->Finish(to_status(status));
                    });
    return reactor;
  }

  static void fill(const fc::RecentWrites& writes, v1::RecentWritesResponse* response) {
    response->set_complete(writes.complete);
    response->set_map_version(writes.map_version);
    for (const fc::RecentWrites::Column& column : writes.columns) {
      v1::KeyColumn* to = response->add_columns();
      to->set_namespace_(column.ns);
      for (const std::string& key : column.keys) {
        to->mutable_keys()->append(key);
        to->add_key_lengths(static_cast<std::uint32_t>(key.size()));
      }
    }
  }

  static void fill(const std::vector<Buffer>& pieces, v1::GetResponse* response) {
    std::string whole;
    for (const Buffer& piece : pieces) {
      whole.append(reinterpret_cast<const char*>(piece.data()), piece.size());
    }
    v1::BatchGetResponse batch;
    if (!batch.ParseFromString(whole) || batch.columns_size() != 1) return;
    const v1::ValueColumn& column = batch.columns(0);
    if (column.statuses().size() != 1) return;
    response->set_status(static_cast<v1::CellStatus>(column.statuses()[0]));
    response->set_value(column.values());
  }

  NodeSlot& node_;
  CallGate& gate_;
  CopyStreams copies_;
};

[[noreturn]] void cannot_bind(int error, const std::string& address, const std::string& why) {
  throw std::system_error(error, std::generic_category(),
                          "cannot listen on " + address + ": " + why);
}

// gRPC removes a socket file that is in its way, also one that another daemon still serves.
void refuse_served_socket(const std::string& address) {
  const std::string path = address.substr(std::strlen(kUnixPrefix));
  sockaddr_un where{};
  where.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(where.sun_path)) {
    cannot_bind(ENAMETOOLONG, address, "a socket's path has 1 to 107 bytes");
  }
  std::memcpy(where.sun_path, path.data(), path.size());
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool served =
      probe >= 0 && connect(probe, reinterpret_cast<sockaddr*>(&where), sizeof(where)) == 0;
  if (probe >= 0) close(probe);
  if (served) cannot_bind(EADDRINUSE, address, "another process serves there");
}

class GrpcDataServer final : public DataServer {
 public:
  GrpcDataServer(Node* node, const ServerConfig& config)
      : node_(config), service_(node_, gate_, config) {
    if (node != nullptr) node_.attach(*node);  // before a call can come
    tune_process();
    static std::once_flag plugins;
    std::call_once(plugins, [] { grpc::EnableDefaultHealthCheckService(true); });
    if (config.reflection) {
      static std::once_flag reflection;
      std::call_once(reflection,
                     [] { grpc::reflection::InitProtoReflectionServerBuilderPlugin(); });
    }
    grpc::ServerBuilder builder;
    // Two daemons must not share a port by accident.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20);
    const int limit =
        static_cast<int>(std::min<std::uint64_t>(config.max_message_bytes, std::uint64_t{1} << 30));
    builder.SetMaxReceiveMessageSize(limit);
    builder.SetMaxSendMessageSize(-1);  // replies are bounded by the node
    std::vector<int> ports(config.addresses.size());
    for (std::size_t i = 0; i < config.addresses.size(); ++i) {
      if (config.addresses[i].starts_with(kUnixPrefix)) refuse_served_socket(config.addresses[i]);
      builder.AddListeningPort(config.addresses[i], grpc::InsecureServerCredentials(), &ports[i]);
    }
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    for (std::size_t i = 0; i < config.addresses.size(); ++i) {
      const std::string& address = config.addresses[i];
      if (ports[i] == 0 || server_ == nullptr) {
        if (ports[i] != 0) continue;
        stop();
        cannot_bind(EADDRINUSE, address, "the address is in use or not one of this machine's");
      }
      if (address.starts_with(kUnixPrefix)) {
        // Who may use the socket is said by its group; others must not read features.
        (void)chmod(address.c_str() + std::strlen(kUnixPrefix), 0660);
        addresses_.push_back(address);
      } else {
        addresses_.push_back(address.substr(0, address.rfind(':') + 1) + std::to_string(ports[i]));
      }
    }
    if (server_ == nullptr) cannot_bind(EADDRINUSE, "any address", "the server did not start");
    set_serving(false);
  }
  ~GrpcDataServer() override { stop(); }

  const std::vector<std::string>& addresses() const noexcept override { return addresses_; }

  void attach(Node& node) override { node_.attach(node); }

  void set_serving(bool serving) override {
    grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
    if (health == nullptr) return;
    health->SetServingStatus(serving);
    health->SetServingStatus(kServiceName, serving);
  }

  bool drain(double timeout_seconds) override {
    const std::lock_guard lock(stop_mutex_);
    if (stopped_ || server_ == nullptr) return true;
    stopped_ = true;
    // First with the listeners open, so that new calls get an answer that says "elsewhere": a
    // server that gRPC shuts down cancels what comes in, which clients take for a failure of the
    // call.
    gate_.close();
    const bool complete =
        gate_.wait_until_empty(std::chrono::duration_cast<std::chrono::microseconds>(
            std::chrono::duration<double>(timeout_seconds)));
    // Then, shortly, with the connections told to go away. An idle client reads that only when it
    // polls, which may be seconds later, so what is left of connections is cut.
    server_->Shutdown(std::chrono::system_clock::now() +
                      (complete ? kGoodbye : std::chrono::milliseconds(0)));
    return complete;
  }

  void stop() override { drain(0); }

 private:
  // Replies of some hundred kilobytes come and go: glibc shall not give their memory back to the
  // kernel and fault it in anew for each (about 35 µs a call of a thousand keys).
  static void tune_process() {
    // Debian's Abseil looks for lock cycles at every lock of gRPC's: two to four hundredths of a
    // call.
    absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
  }

  CallGate gate_;
  NodeSlot node_;
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> addresses_;
  std::mutex stop_mutex_;
  bool stopped_ = false;  // guarded by stop_mutex_
};

}  // namespace
}  // namespace fc::server

namespace fc {

std::unique_ptr<DataServer> make_server(Node* node, const ServerConfig& config) {
  // Held for the life of the process: the last one to let go of gRPC waits for its threads, which
  // may sit in a poll of ten seconds.
  static const bool held = (grpc_init(), true);
  (void)held;
  return std::make_unique<server::GrpcDataServer>(node, config);
}

}  // namespace fc
