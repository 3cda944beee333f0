// BatchGetStream: one reactor a stream, requests answered in any order.
#pragma once

#include <grpcpp/grpcpp.h>

#include "feature_cache/node.hpp"

namespace fc::server {

// Owns itself until gRPC is done with it and its last request is answered.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_get_stream(
    Node& node, grpc::CallbackServerContext* context);

}  // namespace fc::server
