// A bounded reader of protobuf wire format over bytes that lie in several pieces.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

namespace fc::client {

using Piece = std::span<const std::uint8_t>;

// A range of the logical byte string that the pieces form.
struct Extent {
  std::uint64_t offset = 0;
  std::uint64_t size = 0;
};

struct Field {
  std::uint32_t number = 0;
  std::uint32_t wire_type = 0;
  std::uint64_t varint = 0;  // value of a varint
  Extent payload;            // of a length-delimited field
};

// Reads fields one after the other between the current position and a limit. A failed read leaves
// the cursor somewhere inside its bytes; the caller gives the message up. Cheap to copy, so that
// payloads are read by a copy that was moved to them. Positions only grow: every reader ends.
class PieceCursor {
 public:
  explicit PieceCursor(std::span<const Piece> pieces) : pieces_(pieces) {
    for (const Piece& piece : pieces) limit_ += piece.size();
  }

  bool at_end() const { return position_ == limit_; }
  std::uint64_t position() const { return position_; }

  // A reader of `extent`, which must lie at or after the current position.
  PieceCursor within(Extent extent) const {
    PieceCursor inner = *this;
    inner.advance(extent.offset - position_);
    inner.limit_ = extent.offset + extent.size;
    return inner;
  }

  // Reads one tag and its value, and moves behind it. False: truncated or a group, which proto3 has
  // not. Fixed-width values are skipped: the replies have none outside of packed fields.
  bool next(Field& field) {
    std::uint64_t tag = 0;
    if (!read_varint(tag) || tag > UINT32_MAX) return false;
    field.number = static_cast<std::uint32_t>(tag >> 3U);
    field.wire_type = static_cast<std::uint32_t>(tag & 7U);
    if (field.number == 0) return false;
    switch (field.wire_type) {
      case 0:
        return read_varint(field.varint);
      case 1:
        return skip(8);
      case 2: {
        std::uint64_t size = 0;
        if (!read_varint(size)) return false;
        field.payload = {position_, size};
        return skip(size);
      }
      case 5:
        return skip(4);
      default:
        return false;
    }
  }

  // Copies what is left before the limit to `out`.
  void copy_rest(std::uint8_t* out) {
    while (position_ < limit_) {
      const Piece piece = pieces_[piece_];
      if (in_piece_ == piece.size()) {
        step();
        continue;
      }
      const std::uint64_t size =
          std::min<std::uint64_t>(piece.size() - in_piece_, limit_ - position_);
      std::memcpy(out, piece.data() + in_piece_, size);
      out += size;
      advance(size);
    }
  }

 private:
  bool read_varint(std::uint64_t& value) {
    value = 0;
    for (unsigned shift = 0; shift < 70; shift += 7) {
      if (position_ == limit_) return false;
      while (in_piece_ == pieces_[piece_].size()) step();
      const std::uint8_t byte = pieces_[piece_][in_piece_];
      ++in_piece_;
      ++position_;
      if (shift < 63 || byte <= 1) value |= static_cast<std::uint64_t>(byte & 0x7FU) << shift;
      if (shift == 63 && byte > 1) return false;  // more than 64 bits
      if (byte < 0x80) return true;
    }
    return false;
  }

  bool skip(std::uint64_t size) {
    if (size > limit_ - position_) return false;
    advance(size);
    return true;
  }

  // Requires `size` bytes before the end of the pieces.
  void advance(std::uint64_t size) {
    position_ += size;
    while (size > 0) {
      const std::uint64_t left = pieces_[piece_].size() - in_piece_;
      if (size < left) {
        in_piece_ += size;
        return;
      }
      size -= left;
      step();
    }
  }

  void step() {
    ++piece_;
    in_piece_ = 0;
  }

  std::span<const Piece> pieces_;
  std::size_t piece_ = 0;
  std::size_t in_piece_ = 0;
  std::uint64_t position_ = 0;
  std::uint64_t limit_ = 0;
};

}  // namespace fc::client
