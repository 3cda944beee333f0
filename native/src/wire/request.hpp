// Requests of the data service as views into their bytes.
//
// Hand-written against proto/feature_cache/v1/feature_cache.proto: a BatchGetRequest of a thousand
// keys becomes a thousand views and no copy. The parser accepts what a protobuf parser accepts for
// these messages (split and unpacked repeated fields, unknown fields) and refuses the rest with a
// message that says where. Nothing it returns outlives the bytes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/types.hpp"

namespace fc::wire {

using Bytes = std::span<const std::uint8_t>;

struct Limits {
  std::size_t keys = 16384;  // of one request, all columns together
  std::size_t value_bytes = kMaxValueBytes;
  std::size_t columns = 256;
};

struct KeyColumn {
  std::string_view ns;
  std::string_view domain;
  std::vector<std::string_view> keys;
};

struct GetRequest {
  std::uint64_t request_id = 0;
  bool cache_only = false;
  std::vector<KeyColumn> columns;
};

struct PutColumn {
  KeyColumn keys;
  std::vector<std::string_view> values;
  std::vector<std::uint32_t> ttl_ms;  // empty, one, or one a key
};

struct PutRequest {
  std::vector<PutColumn> columns;
  std::uint64_t map_version = 0;
};

struct DeleteRequest {
  std::vector<KeyColumn> columns;
  std::uint64_t map_version = 0;
};

// Each returns an empty string, or what is wrong with the request.
[[nodiscard]] std::string decode(Bytes bytes, const Limits& limits, GetRequest& out);
[[nodiscard]] std::string decode(Bytes bytes, const Limits& limits, PutRequest& out);
[[nodiscard]] std::string decode(Bytes bytes, const Limits& limits, DeleteRequest& out);

}  // namespace fc::wire
