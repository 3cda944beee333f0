// Between gRPC's byte buffers and ours, without copying where that can be.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/byte_buffer.h>

#include <vector>

#include "feature_cache/buffer.hpp"
#include "feature_cache/node.hpp"

namespace fc::server {

// The message as one run of bytes that lives on its own.
RequestBytes to_request(const grpc::ByteBuffer& message);
// Our buffers become slices that give them back when gRPC has sent them.
grpc::ByteBuffer to_message(std::vector<Buffer> pieces);
grpc::Status to_status(const CallStatus& status);
// Milliseconds left until the call's deadline; 0: it has none. At least 1.
std::uint64_t timeout_ms(const grpc::ServerContextBase& context);

}  // namespace fc::server
