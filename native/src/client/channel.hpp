// One gRPC connection to a FeatureCache service, moving bytes: no message objects on either way.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "feature_cache/reply.hpp"

namespace fc::client {

struct ChannelOptions {
  // Given: TLS. Otherwise plain text, for loopback, Unix sockets and meshes that encrypt.
  std::optional<std::string> root_certificates;
  std::optional<std::string> private_key;
  std::optional<std::string> certificate_chain;
  std::string server_name;  // what the server's certificate must say; empty: the target's host
  int max_message_bytes = 64 << 20;
};

// A call that ended without a usable reply.
struct RpcFailure {
  int code = 0;  // grpc::StatusCode
  std::string details;
};

template <typename Answer>
using Outcome = std::variant<Answer, RpcFailure>;

using Seconds = std::chrono::duration<double>;

// Thread-safe. Blocking calls drive the connection from their own thread, so that an answer costs
// no hand-over between threads; the async forms complete in one thread of the channel, which starts
// with the first of them. close() ends what is under way with CANCELLED and waits for it, except in
// the completion thread itself (a garbage collector may run there), where it only cancels.
class Channel {
 public:
  Channel(const std::string& target, const ChannelOptions& options);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // `timeout`: the deadline of the call, from now; infinity for none.
  Outcome<Reply> batch_get(std::string_view request, Seconds timeout);
  Outcome<WriteReply> batch_put(std::string_view request, Seconds timeout);
  Outcome<WriteReply> batch_delete(std::string_view request, Seconds timeout);

  // `done` runs once, in the channel's completion thread.
  template <typename Answer>
  using Done = std::function<void(Outcome<Answer>)>;
  void batch_get_async(std::string_view request, Seconds timeout, Done<Reply> done);
  void batch_put_async(std::string_view request, Seconds timeout, Done<WriteReply> done);
  void batch_delete_async(std::string_view request, Seconds timeout, Done<WriteReply> done);

  void close();

 private:
  class State;
  std::shared_ptr<State> state_;  // shared with the completion thread
};

}  // namespace fc::client
