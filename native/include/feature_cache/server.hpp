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
};

class DataServer {
 public:
  virtual ~DataServer() = default;
  virtual const std::vector<std::string>& addresses() const noexcept = 0;  // with real ports
  virtual void set_serving(bool serving) = 0;  // what grpc.health.v1 answers
  // Refuses new calls and waits for accepted ones; false when some had to be cancelled.
  virtual bool drain(double timeout_seconds) = 0;
  virtual void stop() = 0;
};

// Throws std::system_error when an address cannot be bound. The node must outlive the server.
std::unique_ptr<DataServer> make_server(Node& node, const ServerConfig& config);

}  // namespace fc
