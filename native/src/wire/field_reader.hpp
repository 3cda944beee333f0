// Walks the fields of one protobuf message without copying.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

namespace fc::wire {

enum class WireType : std::uint8_t { Varint = 0, Fixed64 = 1, Length = 2, Fixed32 = 5 };

struct Field {
  std::uint32_t number = 0;
  WireType type = WireType::Varint;
  std::uint64_t value = 0;              // of Varint, Fixed32 and Fixed64
  std::span<const std::uint8_t> bytes;  // of Length; of Fixed32 and Fixed64 the raw bytes
};

class FieldReader {
 public:
  explicit FieldReader(std::span<const std::uint8_t> message) : rest_(message) {}

  bool at_end() const noexcept { return rest_.empty(); }
  // False when the bytes are no protobuf field; then the message is malformed.
  [[nodiscard]] bool next(Field& field) noexcept {
    std::uint64_t key = 0;
    if (!varint(key)) return false;
    if ((key >> 3) == 0 || (key >> 3) > kLargestFieldNumber) return false;
    field.number = static_cast<std::uint32_t>(key >> 3);
    field.type = static_cast<WireType>(key & 7);
    switch (field.type) {
      case WireType::Varint:
        return varint(field.value);
      case WireType::Fixed64:
        return fixed(8, field);
      case WireType::Fixed32:
        return fixed(4, field);
      case WireType::Length: {
        std::uint64_t length = 0;
        if (!varint(length) || length > rest_.size()) return false;
        field.bytes = rest_.first(static_cast<std::size_t>(length));
        rest_ = rest_.subspan(static_cast<std::size_t>(length));
        return true;
      }
    }
    return false;  // groups are not used
  }

  // Reads a varint off the front of `rest`; false when it is cut or longer than 64 bits.
  [[nodiscard]] static bool take_varint(std::span<const std::uint8_t>& rest,
                                        std::uint64_t& value) noexcept {
    value = 0;
    for (unsigned i = 0; i < 10 && i < rest.size(); ++i) {
      const std::uint8_t byte = rest[i];
      if (i == 9 && byte > 1) return false;
      value |= std::uint64_t{byte & 0x7fu} << (7 * i);
      if ((byte & 0x80) == 0) {
        rest = rest.subspan(i + 1);
        return true;
      }
    }
    return false;
  }

 private:
  static constexpr std::uint64_t kLargestFieldNumber = (1u << 29) - 1;

  bool varint(std::uint64_t& value) noexcept { return take_varint(rest_, value); }
  bool fixed(std::size_t size, Field& field) noexcept {
    if (rest_.size() < size) return false;
    field.value = 0;
    std::memcpy(&field.value, rest_.data(), size);
    field.bytes = rest_.first(size);
    rest_ = rest_.subspan(size);
    return true;
  }

  std::span<const std::uint8_t> rest_;
};

}  // namespace fc::wire
