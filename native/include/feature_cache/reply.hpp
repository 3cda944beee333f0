// Replies of the data service as a client reads them: columns of one contiguous buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "feature_cache/buffer.hpp"
#include "feature_cache/types.hpp"

namespace fc {

// What is wrong with the bytes of a reply. Anything but None leaves the output untouched.
enum class ReplyFault : std::uint8_t {
  None,
  Truncated,        // a field reaches past the end of its message
  BadField,         // a wire type or a repetition that the format does not know
  LengthsMismatch,  // lengths, values and statuses of a column do not add up
  TooManyColumns,
};
const char* describe(ReplyFault fault);

// More namespaces than any request may ask for; bounds what a hostile server makes us allocate.
inline constexpr std::size_t kReplyColumnsMax = 4096;

// A BatchGetResponse. Immutable after parsing, so any number of threads may read it; the views stay
// valid while the Reply lives, also when it is moved.
//
// Every column is checked once, when parsed: lengths and statuses are one a key, the lengths add up
// to the values. Accessors therefore check nothing but the column number (by assertion).
class Reply {
 public:
  struct Column {
    std::span<const std::uint8_t> values;
    std::span<const std::uint32_t> value_lengths;
    std::span<const std::uint8_t> statuses;
  };
  using Piece = std::span<const std::uint8_t>;

  // Reads a reply that is one buffer already, as in embedded use. The values are not copied, so
  // they are as aligned as the caller wrote them; lengths are copied to where they are aligned.
  [[nodiscard]] static ReplyFault parse(Buffer bytes, Reply& out);

  // Reads a reply that a transport delivered in pieces. Copies every part once, to a cache line of
  // its own, so that a row of floats is aligned for whoever computes on it.
  [[nodiscard]] static ReplyFault gather(std::span<const Piece> pieces, Reply& out);

  std::uint64_t request_id() const { return request_id_; }
  // Of a leaf: the newest shard map that it knows; else 0.
  std::uint64_t map_version() const { return map_version_; }
  std::size_t columns() const { return columns_.size(); }
  const Column& column(std::size_t index) const;

 private:
  std::uint64_t request_id_ = 0;
  std::uint64_t map_version_ = 0;
  std::vector<Column> columns_;
  Buffer bytes_;
  Buffer lengths_;  // aligned copies, of a reply that `parse` read
};

// A BatchWriteResponse: one WriteStatus a key. The same rules as for Reply.
class WriteReply {
 public:
  [[nodiscard]] static ReplyFault parse(Buffer bytes, WriteReply& out);
  [[nodiscard]] static ReplyFault gather(std::span<const Reply::Piece> pieces, WriteReply& out);

  std::size_t columns() const { return columns_.size(); }
  std::span<const std::uint8_t> statuses(std::size_t index) const;
  std::uint64_t map_version() const { return map_version_; }

 private:
  std::uint64_t map_version_ = 0;
  std::vector<std::span<const std::uint8_t>> columns_;
  Buffer bytes_;
};

}  // namespace fc
