// What every gRPC call of ours shares: how channels are set up, and bytes to and from messages.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "client/channel.hpp"

namespace fc::client {

inline constexpr const char* kBatchGet = "/feature_cache.v1.FeatureCache/BatchGet";
inline constexpr const char* kBatchPut = "/feature_cache.v1.FeatureCache/BatchPut";
inline constexpr const char* kBatchDelete = "/feature_cache.v1.FeatureCache/BatchDelete";

// A connection of its own, made when it is first used.
std::shared_ptr<grpc::Channel> make_channel(const std::string& target,
                                            const ChannelOptions& options);

RpcFailure failure_of(const grpc::Status& status);

// Reads a reply out of a message.
template <typename Answer>
Outcome<Answer> parse(const grpc::ByteBuffer& bytes) {
  std::vector<grpc::Slice> slices;
  if (!bytes.Valid() || !bytes.Dump(&slices).ok()) {
    return RpcFailure{grpc::StatusCode::INTERNAL, "the reply has no bytes"};
  }
  std::vector<Reply::Piece> pieces;
  pieces.reserve(slices.size());
  for (const grpc::Slice& slice : slices) pieces.emplace_back(slice.begin(), slice.size());
  Answer answer;
  const ReplyFault fault = Answer::gather(pieces, answer);
  if (fault != ReplyFault::None) {
    return RpcFailure{grpc::StatusCode::DATA_LOSS, describe(fault)};
  }
  return answer;
}

}  // namespace fc::client
