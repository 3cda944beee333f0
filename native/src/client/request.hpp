// Requests of the data service: from columns of keys to protobuf bytes, in two passes and one
// allocation. The caller makes room for size() bytes wherever it wants them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "feature_cache/buffer.hpp"

namespace fc::client {

// Several byte strings. Either `parts` (one each), or `blob` with `lengths`, which the caller has
// checked to add up.
struct Strings {
  std::vector<std::string_view> parts;
  std::string_view blob;
  std::span<const std::uint32_t> lengths;

  std::size_t count() const { return parts.empty() ? lengths.size() : parts.size(); }
};

// Views into what the caller keeps alive until write() has returned.
struct KeyColumn {
  std::string_view name_space;
  std::string_view domain;
  std::span<const std::uint64_t> ids;  // when not empty, `keys` is
  Strings keys;

  std::size_t count() const { return ids.empty() ? keys.count() : ids.size(); }
};

struct PutColumn {
  KeyColumn keys;
  Strings values;
  std::vector<std::uint32_t> ttl_ms;  // none, one for all, or one a key
};

class GetRequest {
 public:
  std::uint64_t request_id = 0;
  bool cache_only = false;
  std::vector<KeyColumn> columns;

  std::size_t size() const;
  void write(std::uint8_t* to) const;  // size() bytes
};

class PutRequest {
 public:
  std::vector<PutColumn> columns;
  std::uint64_t map_version = 0;  // of a root

  std::size_t size() const;
  void write(std::uint8_t* to) const;
};

class DeleteRequest {
 public:
  std::vector<KeyColumn> columns;
  std::uint64_t map_version = 0;  // of a root

  std::size_t size() const;
  void write(std::uint8_t* to) const;
};

// A request's bytes.
template <class Request>
Buffer encode(const Request& request) {
  const std::size_t size = request.size();
  Buffer bytes(size);
  request.write(bytes.reserve(size));
  bytes.commit(size);
  return bytes;
}

}  // namespace fc::client
