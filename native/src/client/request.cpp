#include "client/request.hpp"

#include <bit>
#include <cstring>

namespace fc::client {
namespace {

static_assert(std::endian::native == std::endian::little,
              "packed fixed fields are written as they lie in memory");

constexpr std::uint32_t kVarint = 0;
constexpr std::uint32_t kLengthDelimited = 2;

constexpr std::uint8_t tag(std::uint32_t field, std::uint32_t wire_type) {
  return static_cast<std::uint8_t>(field << 3U | wire_type);
}

constexpr std::size_t varint_size(std::uint64_t value) {
  return (static_cast<std::size_t>(std::bit_width(value | 1U)) + 6) / 7;
}

// A length-delimited field with its tag; proto3 leaves empty ones out.
constexpr std::size_t field_size(std::size_t payload) {
  return payload == 0 ? 0 : 1 + varint_size(payload) + payload;
}
// The same for an element of a repeated field, which stays even when it is empty.
constexpr std::size_t element_size(std::size_t payload) {
  return 1 + varint_size(payload) + payload;
}

std::size_t payload_size(const Strings& strings) {
  if (strings.parts.empty()) return strings.blob.size();
  std::size_t size = 0;
  for (const std::string_view part : strings.parts) size += part.size();
  return size;
}

std::size_t payload_size(const KeyColumn& column) {
  return field_size(column.name_space.size()) + field_size(column.ids.size_bytes()) +
         field_size(payload_size(column.keys)) +
         field_size(column.keys.count() * sizeof(std::uint32_t)) + field_size(column.domain.size());
}

std::size_t ttl_payload_size(const PutColumn& column) {
  std::size_t size = 0;
  for (const std::uint32_t ttl : column.ttl_ms) size += varint_size(ttl);
  return size;
}

std::size_t payload_size(const PutColumn& column) {
  return field_size(payload_size(column.keys)) + field_size(payload_size(column.values)) +
         field_size(column.values.count() * sizeof(std::uint32_t)) +
         field_size(ttl_payload_size(column));
}

class Writer {
 public:
  explicit Writer(std::uint8_t* to) : to_(to) {}

  void varint(std::uint64_t value) {
    while (value >= 0x80) {
      *to_++ = static_cast<std::uint8_t>(value | 0x80U);
      value >>= 7U;
    }
    *to_++ = static_cast<std::uint8_t>(value);
  }

  void header(std::uint32_t field, std::size_t payload) {
    *to_++ = tag(field, kLengthDelimited);
    varint(payload);
  }

  void varint_field(std::uint32_t field, std::uint64_t value) {
    *to_++ = tag(field, kVarint);
    varint(value);
  }

  void raw(const void* from, std::size_t size) {
    if (size == 0) return;  // memcpy forbids a null pointer even then
    std::memcpy(to_, from, size);
    to_ += size;
  }

  void bytes_field(std::uint32_t field, const void* from, std::size_t size) {
    if (size == 0) return;
    header(field, size);
    raw(from, size);
  }

  void strings(std::uint32_t bytes_number, std::uint32_t lengths_number, const Strings& strings) {
    const std::size_t size = payload_size(strings);
    if (size > 0) {
      header(bytes_number, size);
      raw(strings.blob.data(), strings.blob.size());
      for (const std::string_view part : strings.parts) raw(part.data(), part.size());
    }
    if (strings.parts.empty()) {
      bytes_field(lengths_number, strings.lengths.data(), strings.lengths.size_bytes());
      return;
    }
    header(lengths_number, strings.parts.size() * sizeof(std::uint32_t));
    for (const std::string_view part : strings.parts) {
      const auto length = static_cast<std::uint32_t>(part.size());
      raw(&length, sizeof length);
    }
  }

  void key_column(const KeyColumn& column) {
    bytes_field(1, column.name_space.data(), column.name_space.size());
    bytes_field(2, column.ids.data(), column.ids.size_bytes());
    strings(3, 4, column.keys);
    bytes_field(5, column.domain.data(), column.domain.size());
  }

 private:
  std::uint8_t* to_;
};

}  // namespace

std::size_t GetRequest::size() const {
  std::size_t size = request_id == 0 ? 0 : 1 + varint_size(request_id);
  for (const KeyColumn& column : columns) size += element_size(payload_size(column));
  return size + (cache_only ? 2 : 0);
}

void GetRequest::write(std::uint8_t* to) const {
  Writer writer(to);
  if (request_id != 0) writer.varint_field(1, request_id);
  for (const KeyColumn& column : columns) {
    writer.header(2, payload_size(column));
    writer.key_column(column);
  }
  if (cache_only) writer.varint_field(3, 1);
}

std::size_t PutRequest::size() const {
  std::size_t size = map_version == 0 ? 0 : 1 + varint_size(map_version);
  for (const PutColumn& column : columns) size += element_size(payload_size(column));
  return size;
}

void PutRequest::write(std::uint8_t* to) const {
  Writer writer(to);
  for (const PutColumn& column : columns) {
    writer.header(1, payload_size(column));
    if (const std::size_t keys = payload_size(column.keys); keys > 0) {
      writer.header(1, keys);
      writer.key_column(column.keys);
    }
    writer.strings(2, 3, column.values);
    if (!column.ttl_ms.empty()) {
      writer.header(4, ttl_payload_size(column));
      for (const std::uint32_t ttl : column.ttl_ms) writer.varint(ttl);
    }
  }
  if (map_version != 0) writer.varint_field(2, map_version);
}

std::size_t DeleteRequest::size() const {
  std::size_t size = map_version == 0 ? 0 : 1 + varint_size(map_version);
  for (const KeyColumn& column : columns) size += element_size(payload_size(column));
  return size;
}

void DeleteRequest::write(std::uint8_t* to) const {
  Writer writer(to);
  for (const KeyColumn& column : columns) {
    writer.header(1, payload_size(column));
    writer.key_column(column);
  }
  if (map_version != 0) writer.varint_field(2, map_version);
}

}  // namespace fc::client
