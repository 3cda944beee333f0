#include "server/grpc_bytes.hpp"

#include <chrono>
#include <memory>

namespace fc::server {

RequestBytes to_request(const grpc::ByteBuffer& message) {
  auto slice = std::make_shared<grpc::Slice>();
  if (!message.TrySingleSlice(slice.get()).ok() && !message.DumpToSingleSlice(slice.get()).ok()) {
    return {};
  }
  RequestBytes request;
  request.bytes = {slice->begin(), slice->size()};
  request.owner = slice;
  return request;
}

grpc::ByteBuffer to_message(std::vector<Buffer> pieces) {
  std::vector<grpc::Slice> slices;
  slices.reserve(pieces.size());
  for (Buffer& piece : pieces) {
    if (piece.empty()) continue;
    auto owned = std::make_unique<Buffer>(std::move(piece));
    Buffer* raw = owned.release();
    slices.emplace_back(
        raw->data(), raw->size(), [](void* buffer) { delete static_cast<Buffer*>(buffer); }, raw);
  }
  return {slices.data(), slices.size()};
}

grpc::Status to_status(const CallStatus& status) {
  if (status.ok()) return grpc::Status::OK;
  return {static_cast<grpc::StatusCode>(status.code), status.message};
}

std::uint64_t timeout_ms(const grpc::ServerContextBase& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return 0;
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::system_clock::now());
  return left.count() > 1 ? static_cast<std::uint64_t>(left.count()) : 1;
}

}  // namespace fc::server
