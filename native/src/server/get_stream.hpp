// BatchGetStream: one reactor a stream, requests answered in any order.
#pragma once

#include <grpcpp/grpcpp.h>

#include "server/call_gate.hpp"
#include "server/node_slot.hpp"

namespace fc::server {

// Owns itself until gRPC is done with it and its last request is answered. When the gate closes, it
// answers what it has read, reads no more and ends with a refusal.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* start_get_stream(
    NodeSlot& node, CallGate& gate, grpc::CallbackServerContext* context);

}  // namespace fc::server
