// How a root talks to its leaves.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "feature_cache/buffer.hpp"
#include "feature_cache/node.hpp"
#include "feature_cache/reply.hpp"

namespace fc {

// A persistent connection to one leaf. Thread-safe.
class LeafLink {
 public:
  using GetDone = std::function<void(CallStatus, Reply)>;
  using WriteDone = std::function<void(CallStatus, WriteReply)>;

  virtual ~LeafLink() = default;
  // An encoded BatchGetRequest, BatchPutRequest or BatchDeleteRequest. `done` is called once, by
  // the timeout at the latest, from any thread, perhaps within the call.
  virtual void get(Buffer request, std::uint64_t timeout_ns, GetDone done) = 0;
  virtual void put(Buffer request, std::uint64_t timeout_ns, WriteDone done) = 0;
  virtual void erase(Buffer request, std::uint64_t timeout_ns, WriteDone done) = 0;
};

// Where links come from. Thread-safe.
class LeafConnector {
 public:
  virtual ~LeafConnector() = default;
  // Does not wait for the connection; calls over it wait or fail.
  virtual std::shared_ptr<LeafLink> connect(const std::string& address) = 0;
  // Ends all calls under way and waits until each `done` has returned; those that come later fail
  // at once. Not from within a `done`.
  virtual void close() = 0;
};

struct LeafConnectorConfig {
  std::uint32_t threads = 2;      // that complete calls
  std::uint32_t connections = 1;  // to each leaf
  int max_message_bytes = 64 << 20;
};

// Links over gRPC, in plain text.
std::shared_ptr<LeafConnector> make_leaf_connector(const LeafConnectorConfig& config);

}  // namespace fc
