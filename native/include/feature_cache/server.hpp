// The gRPC data service over a node.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fc {

class Node;

struct ServerConfig {
  std::vector<std::string> addresses;  // host:port (port 0: any) or unix:/path
  std::uint64_t max_message_bytes = std::uint64_t{64} << 20;
  bool reflection = true;
  // While there is no node yet: reads are answered MISS; else refused as writes are, UNAVAILABLE.
  bool misses_until_attached = false;
  std::uint32_t max_batch_keys = 16384;  // of a read that is answered so
  // What other nodes may copy: bytes a second for all of them together (0: nothing), and how many
  // at a time.
  std::uint64_t copy_bytes_per_second = std::uint64_t{256} << 20;
  std::uint32_t copies_at_once = 2;
};

class DataServer {
 public:
  virtual ~DataServer() = default;
  virtual const std::vector<std::string>& addresses() const noexcept = 0;  // with real ports
  virtual void set_serving(bool serving) = 0;  // what grpc.health.v1 answers
  // From now on calls go to `node`, which must outlive the server. Once, where there was none.
  virtual void attach(Node& node) = 0;
  // Refuses new calls and waits for accepted ones; false when some had to be cancelled.
  virtual bool drain(double timeout_seconds) = 0;
  virtual void stop() = 0;
};

// Listens from now on. `node` may be null and be attached later; it must outlive the server. Throws
// std::system_error when an address cannot be bound.
std::unique_ptr<DataServer> make_server(Node* node, const ServerConfig& config);

}  // namespace fc
