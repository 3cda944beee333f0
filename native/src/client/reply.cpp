#include "feature_cache/reply.hpp"

#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "client/piece_cursor.hpp"
#include "core/check.hpp"

namespace fc {
namespace {

using client::Extent;
using client::Field;
using client::Piece;
using client::PieceCursor;

static_assert(std::endian::native == std::endian::little,
              "packed fixed32 fields are read as they lie in memory");

constexpr std::size_t kLineBytes = 64;
constexpr std::size_t round_up(std::size_t size) {
  return (size + kLineBytes - 1) / kLineBytes * kLineBytes;
}

constexpr std::uint32_t kVarint = 0;
constexpr std::uint32_t kLengthDelimited = 2;

// Where the parts of one column lie in the bytes. `present` has one bit a part: a field that comes
// twice would have to be merged, which no server of this protocol writes.
struct Parts {
  Extent values;
  Extent value_lengths;
  Extent statuses;
  unsigned present = 0;
};

ReplyFault take_once(Parts& parts, unsigned bit, Extent& part, const Field& field) {
  if (field.wire_type != kLengthDelimited || (parts.present & bit) != 0) {
    return ReplyFault::BadField;
  }
  parts.present |= bit;
  part = field.payload;
  return ReplyFault::None;
}

ReplyFault read_value_column(PieceCursor cursor, Parts& parts) {
  while (!cursor.at_end()) {
    Field field;
    if (!cursor.next(field)) return ReplyFault::Truncated;
    ReplyFault fault = ReplyFault::None;
    if (field.number == 1) fault = take_once(parts, 1U, parts.values, field);
    if (field.number == 2) fault = take_once(parts, 2U, parts.value_lengths, field);
    if (field.number == 3) fault = take_once(parts, 4U, parts.statuses, field);
    if (fault != ReplyFault::None) return fault;
  }
  const bool adds_up = parts.value_lengths.size % sizeof(std::uint32_t) == 0 &&
                       parts.value_lengths.size / sizeof(std::uint32_t) == parts.statuses.size;
  return adds_up ? ReplyFault::None : ReplyFault::LengthsMismatch;
}

ReplyFault read_write_column(PieceCursor cursor, Parts& parts) {
  while (!cursor.at_end()) {
    Field field;
    if (!cursor.next(field)) return ReplyFault::Truncated;
    if (field.number != 1) continue;
    if (const auto fault = take_once(parts, 1U, parts.statuses, field); fault != ReplyFault::None) {
      return fault;
    }
  }
  return ReplyFault::None;
}

// The numbers that the two responses have beside their columns.
struct Head {
  std::uint64_t request_id = 0;
  std::uint64_t map_version = 0;
};

// The fields of either response. `columns_field` is 2 for reads and 1 for writes, which have no
// request id; the map version follows the columns in both.
template <typename ReadColumn>
ReplyFault read_message(PieceCursor cursor, std::uint32_t columns_field, ReadColumn read_column,
                        Head& head, std::vector<Parts>& columns) {
  while (!cursor.at_end()) {
    const PieceCursor before = cursor;
    Field field;
    if (!cursor.next(field)) return ReplyFault::Truncated;
    if (field.number == columns_field) {
      if (field.wire_type != kLengthDelimited) return ReplyFault::BadField;
      if (columns.size() == kReplyColumnsMax) return ReplyFault::TooManyColumns;
      Parts& parts = columns.emplace_back();
      const auto fault = read_column(before.within(field.payload), parts);
      if (fault != ReplyFault::None) return fault;
    } else if (field.number == 1 || field.number == columns_field + 1) {
      if (field.wire_type != kVarint) return ReplyFault::BadField;
      (field.number == 1 ? head.request_id : head.map_version) = field.varint;
    }
  }
  return ReplyFault::None;
}

bool lengths_add_up(const Reply::Column& column) {
  const std::uint64_t sum =
      std::accumulate(column.value_lengths.begin(), column.value_lengths.end(), std::uint64_t{0});
  return sum == column.values.size();
}

// Makes `buffer` hold `size` bytes after its first cache line boundary, and returns that address.
std::uint8_t* aligned_storage(Buffer& buffer, std::size_t size) {
  std::uint8_t* const start = buffer.reserve(size + kLineBytes);
  buffer.commit(size + kLineBytes);
  return start + (kLineBytes - reinterpret_cast<std::uintptr_t>(start) % kLineBytes) % kLineBytes;
}

std::uint8_t* copy_part(PieceCursor from, Extent extent, std::uint8_t* to) {
  from.within(extent).copy_rest(to);
  return to + round_up(extent.size);
}

}  // namespace

const char* describe(ReplyFault fault) {
  switch (fault) {
    case ReplyFault::None:
      return "no fault";
    case ReplyFault::Truncated:
      return "the reply is truncated or not protobuf";
    case ReplyFault::BadField:
      return "the reply has a field of the wrong type or more than once";
    case ReplyFault::LengthsMismatch:
      return "lengths, values and statuses of a reply column do not add up";
    case ReplyFault::TooManyColumns:
      return "the reply has too many columns";
  }
  return "unknown fault";
}

ReplyFault Reply::parse(Buffer bytes, Reply& out) {
  const Piece piece(bytes.data(), bytes.size());
  Reply reply;
  std::vector<Parts> columns;
  Head head;
  const auto fault = read_message(PieceCursor({&piece, 1}), 2, read_value_column, head, columns);
  if (fault != ReplyFault::None) return fault;
  reply.request_id_ = head.request_id;
  reply.map_version_ = head.map_version;
  std::size_t lengths_bytes = 0;
  for (const Parts& parts : columns) lengths_bytes += round_up(parts.value_lengths.size);
  std::uint8_t* lengths = aligned_storage(reply.lengths_, lengths_bytes);
  for (const Parts& parts : columns) {
    if (parts.value_lengths.size > 0) {
      std::memcpy(lengths, bytes.data() + parts.value_lengths.offset, parts.value_lengths.size);
    }
    const Column& column = reply.columns_.emplace_back(Column{
        .values = {bytes.data() + parts.values.offset, parts.values.size},
        .value_lengths = {reinterpret_cast<const std::uint32_t*>(lengths), parts.statuses.size},
        .statuses = {bytes.data() + parts.statuses.offset, parts.statuses.size}});
    if (!lengths_add_up(column)) return ReplyFault::LengthsMismatch;
    lengths += round_up(parts.value_lengths.size);
  }
  reply.bytes_ = std::move(bytes);
  out = std::move(reply);
  return ReplyFault::None;
}

ReplyFault Reply::gather(std::span<const Piece> pieces, Reply& out) {
  Reply reply;
  std::vector<Parts> columns;
  const PieceCursor start(pieces);
  Head head;
  const auto fault = read_message(start, 2, read_value_column, head, columns);
  if (fault != ReplyFault::None) return fault;
  reply.request_id_ = head.request_id;
  reply.map_version_ = head.map_version;
  std::size_t size = 0;
  for (const Parts& parts : columns) {
    size += round_up(parts.values.size) + round_up(parts.value_lengths.size) +
            round_up(parts.statuses.size);
  }
  std::uint8_t* to = aligned_storage(reply.bytes_, size);
  for (const Parts& parts : columns) {
    std::uint8_t* const values = to;
    std::uint8_t* const lengths = copy_part(start, parts.values, values);
    std::uint8_t* const statuses = copy_part(start, parts.value_lengths, lengths);
    to = copy_part(start, parts.statuses, statuses);
    const Column& column = reply.columns_.emplace_back(Column{
        .values = {values, parts.values.size},
        .value_lengths = {reinterpret_cast<const std::uint32_t*>(lengths), parts.statuses.size},
        .statuses = {statuses, parts.statuses.size}});
    if (!lengths_add_up(column)) return ReplyFault::LengthsMismatch;
  }
  out = std::move(reply);
  return ReplyFault::None;
}

const Reply::Column& Reply::column(std::size_t index) const {
  FC_DCHECK(index < columns_.size());
  return columns_[index];
}

ReplyFault WriteReply::parse(Buffer bytes, WriteReply& out) {
  const Piece piece(bytes.data(), bytes.size());
  WriteReply reply;
  Head head;
  std::vector<Parts> columns;
  const auto fault = read_message(PieceCursor({&piece, 1}), 1, read_write_column, head, columns);
  if (fault != ReplyFault::None) return fault;
  reply.map_version_ = head.map_version;
  for (const Parts& parts : columns) {
    reply.columns_.emplace_back(bytes.data() + parts.statuses.offset, parts.statuses.size);
  }
  reply.bytes_ = std::move(bytes);
  out = std::move(reply);
  return ReplyFault::None;
}

ReplyFault WriteReply::gather(std::span<const Piece> pieces, WriteReply& out) {
  PieceCursor all(pieces);
  std::size_t size = 0;
  for (const Piece& piece : pieces) size += piece.size();
  Buffer bytes(size);
  all.copy_rest(bytes.reserve(size));
  bytes.commit(size);
  return parse(std::move(bytes), out);
}

std::span<const std::uint8_t> WriteReply::statuses(std::size_t index) const {
  FC_DCHECK(index < columns_.size());
  return columns_[index];
}

}  // namespace fc
