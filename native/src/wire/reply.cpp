#include "wire/reply.hpp"

#include <bit>
#include <utility>

namespace fc::wire {
namespace {

// Field keys: number and wire type of the proto's messages.
constexpr std::uint8_t kRequestIdKey = 1 << 3;        // varint
constexpr std::uint8_t kColumnsKey = 2 << 3 | 2;      // ValueColumn
constexpr std::uint8_t kMapVersionKey = 3 << 3;       // varint
constexpr std::uint8_t kWriteMapVersionKey = 2 << 3;  // varint
constexpr std::uint8_t kValuesKey = 1 << 3 | 2;
constexpr std::uint8_t kValueLengthsKey = 2 << 3 | 2;
constexpr std::uint8_t kStatusesKey = 3 << 3 | 2;
constexpr std::uint8_t kWriteColumnsKey = 1 << 3 | 2;  // WriteColumn
constexpr std::uint8_t kWriteStatusesKey = 1 << 3 | 2;

static_assert(std::endian::native == std::endian::little,
              "packed fixed32 is written as it lies in memory");

std::size_t varint_bytes(std::uint64_t value) noexcept {
  return value == 0 ? 1 : (static_cast<std::size_t>(std::bit_width(value)) + 6) / 7;
}

void put_varint(Buffer& to, std::uint64_t value) {
  std::uint8_t* at = to.reserve(10);
  std::size_t size = 0;
  while (value >= 0x80) {
    at[size++] = static_cast<std::uint8_t>(value | 0x80);
    value >>= 7;
  }
  at[size++] = static_cast<std::uint8_t>(value);
  to.commit(size);
}

void put_key(Buffer& to, std::uint8_t key) {
  *to.reserve(1) = key;
  to.commit(1);
}

std::size_t field_bytes(std::size_t payload) noexcept {
  return payload == 0 ? 0 : 1 + varint_bytes(payload) + payload;
}

void put_field(Buffer& to, std::uint8_t key, const void* payload, std::size_t bytes) {
  if (bytes == 0) return;
  put_key(to, key);
  put_varint(to, bytes);
  to.append(payload, bytes);
}

}  // namespace

GetReplyEncoder::GetReplyEncoder(std::uint64_t request_id) {
  if (request_id == 0) return;
  Buffer head(16);
  put_key(head, kRequestIdKey);
  put_varint(head, request_id);
  pieces_.push_back(std::move(head));
}

void GetReplyEncoder::add_column(std::span<const CellStatus> statuses,
                                 std::span<const std::uint32_t> lengths, Buffer values) {
  const std::size_t bytes =
      field_bytes(lengths.size_bytes()) + field_bytes(statuses.size()) + field_bytes(values.size());
  // The values come last, so that they can follow in a piece of their own.
  Buffer head(bytes - values.size() + 32);
  put_key(head, kColumnsKey);
  put_varint(head, bytes);
  put_field(head, kValueLengthsKey, lengths.data(), lengths.size_bytes());
  put_field(head, kStatusesKey, statuses.data(), statuses.size());
  if (values.empty()) {
    pieces_.push_back(std::move(head));
    return;
  }
  put_key(head, kValuesKey);
  put_varint(head, values.size());
  pieces_.push_back(std::move(head));
  pieces_.push_back(std::move(values));
}

Pieces GetReplyEncoder::finish(std::uint64_t map_version) && {
  if (map_version != 0) {
    Buffer tail(16);
    put_key(tail, kMapVersionKey);
    put_varint(tail, map_version);
    pieces_.push_back(std::move(tail));
  }
  return std::move(pieces_);
}

Pieces encode_write_reply(std::span<const std::vector<WriteStatus>> columns,
                          std::uint64_t map_version) {
  Buffer out(64);
  for (const std::vector<WriteStatus>& statuses : columns) {
    put_key(out, kWriteColumnsKey);
    put_varint(out, field_bytes(statuses.size()));
    put_field(out, kWriteStatusesKey, statuses.data(), statuses.size());
  }
  if (map_version != 0) {
    put_key(out, kWriteMapVersionKey);
    put_varint(out, map_version);
  }
  Pieces pieces;
  pieces.push_back(std::move(out));
  return pieces;
}

}  // namespace fc::wire
