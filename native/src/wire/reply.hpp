// Replies of the data service as pieces that a transport sends one after the other.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "feature_cache/buffer.hpp"
#include "feature_cache/types.hpp"

namespace fc::wire {

using Pieces = std::vector<Buffer>;

// Appends the fields of a BatchGetResponse to pieces; values move in, they are not copied.
class GetReplyEncoder {
 public:
  explicit GetReplyEncoder(std::uint64_t request_id);
  void add_column(std::span<const CellStatus> statuses, std::span<const std::uint32_t> lengths,
                  Buffer values);
  // `map_version` 0: the node is no leaf.
  Pieces finish(std::uint64_t map_version = 0) &&;

 private:
  Pieces pieces_;
};

// A BatchWriteResponse; one span of statuses a column.
Pieces encode_write_reply(std::span<const std::vector<WriteStatus>> columns,
                          std::uint64_t map_version = 0);

}  // namespace fc::wire
