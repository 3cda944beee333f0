#include "wire/request.hpp"

#include "wire/field_reader.hpp"

namespace fc::wire {
namespace {

// Field numbers of the proto.
enum KeyColumnField : std::uint32_t {
  kNamespace = 1,
  kIds = 2,
  kKeys = 3,
  kKeyLengths = 4,
  kDomain = 5
};
enum GetField : std::uint32_t { kRequestId = 1, kGetColumns = 2, kCacheOnly = 3 };
enum PutColumnField : std::uint32_t {
  kPutKeys = 1,
  kPutValues = 2,
  kPutValueLengths = 3,
  kPutTtl = 4
};
// Of BatchPutRequest and BatchDeleteRequest.
constexpr std::uint32_t kColumnsOfWrite = 1;
constexpr std::uint32_t kMapVersionOfWrite = 2;

constexpr std::size_t kIdBytes = 8;
constexpr std::size_t kLengthBytes = 4;
const char* const kMalformed = "malformed request: not a valid protobuf message";

std::string_view text(Bytes bytes) noexcept {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string column_name(std::string_view ns) {
  return "column of namespace '" + std::string(ns.substr(0, 64)) + "'";
}

std::string too_many_keys(const Limits& limits) {
  return "the batch has more than " + std::to_string(limits.keys) +
         " keys (limits.max_batch_keys): split it";
}

// Whether the field carries elements of `bytes` each: packed, or one by itself.
bool is_repeated_fixed(const Field& field, WireType single, std::size_t bytes) {
  return field.type == single ||
         (field.type == WireType::Length && field.bytes.size() % bytes == 0);
}

// Adds the elements of a fixed-width repeated field; false when they are too many.
bool add_fixed32(const Field& field, std::size_t most, std::vector<std::uint32_t>& out) {
  if (field.type == WireType::Fixed32) {
    out.push_back(static_cast<std::uint32_t>(field.value));
    return out.size() <= most;
  }
  const std::size_t before = out.size();
  const std::size_t count = field.bytes.size() / kLengthBytes;
  if (before + count > most) return false;
  out.resize(before + count);
  if (count != 0) std::memcpy(out.data() + before, field.bytes.data(), field.bytes.size());
  return true;
}

bool add_ids(const Field& field, std::size_t most, std::vector<std::string_view>& out) {
  if (out.size() + field.bytes.size() / kIdBytes > most) return false;
  for (std::size_t at = 0; at < field.bytes.size(); at += kIdBytes) {
    out.push_back(text(field.bytes.subspan(at, kIdBytes)));
  }
  return true;
}

// Cuts a blob by its lengths; false when they do not add up.
bool cut(std::string_view blob, std::span<const std::uint32_t> lengths,
         std::vector<std::string_view>& out) {
  out.reserve(lengths.size());
  std::size_t at = 0;
  for (const std::uint32_t length : lengths) {
    if (length > blob.size() - at) return false;
    out.push_back(blob.substr(at, length));
    at += length;
  }
  return at == blob.size();
}

std::string decode_keys(Bytes bytes, const Limits& limits, std::size_t keys_left, KeyColumn& out) {
  std::string_view blob;
  std::vector<std::uint32_t> lengths;
  FieldReader reader(bytes);
  for (Field field; !reader.at_end();) {
    if (!reader.next(field)) return kMalformed;
    const bool is_bytes = field.type == WireType::Length;
    switch (field.number) {
      case kNamespace:
        if (!is_bytes) return kMalformed;
        out.ns = text(field.bytes);
        break;
      case kDomain:
        if (!is_bytes) return kMalformed;
        out.domain = text(field.bytes);
        break;
      case kIds:
        if (!is_repeated_fixed(field, WireType::Fixed64, kIdBytes)) return kMalformed;
        if (!add_ids(field, keys_left, out.keys)) return too_many_keys(limits);
        break;
      case kKeys:
        if (!is_bytes) return kMalformed;
        blob = text(field.bytes);
        break;
      case kKeyLengths:
        if (!is_repeated_fixed(field, WireType::Fixed32, kLengthBytes)) return kMalformed;
        if (!add_fixed32(field, keys_left, lengths)) return too_many_keys(limits);
        break;
      default:
        break;
    }
  }
  if (!out.keys.empty() && (!lengths.empty() || !blob.empty())) {
    return column_name(out.ns) + " has both ids and bytes keys: use two columns";
  }
  if (out.keys.empty()) {
    if (!cut(blob, lengths, out.keys)) {
      return column_name(out.ns) + ": key_lengths do not add up to the size of keys";
    }
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] == 0 || lengths[i] > kMaxKeyBytes) {
        return column_name(out.ns) + ": key " + std::to_string(i) + " has " +
               std::to_string(lengths[i]) + " bytes; keys have 1 to " +
               std::to_string(kMaxKeyBytes);
      }
    }
  }
  return {};
}

bool add_ttl(const Field& field, std::size_t most, std::vector<std::uint32_t>& out) {
  const auto add = [&](std::uint64_t value) {
    if (value > 0xffffffffu || out.size() >= most) return false;
    out.push_back(static_cast<std::uint32_t>(value));
    return true;
  };
  if (field.type == WireType::Varint) return add(field.value);
  if (field.type != WireType::Length) return false;
  for (Bytes rest = field.bytes; !rest.empty();) {
    std::uint64_t value = 0;
    if (!FieldReader::take_varint(rest, value) || !add(value)) return false;
  }
  return true;
}

std::string decode_put_column(Bytes bytes, const Limits& limits, std::size_t keys_left,
                              PutColumn& out) {
  std::string_view blob;
  std::vector<std::uint32_t> lengths;
  FieldReader reader(bytes);
  for (Field field; !reader.at_end();) {
    if (!reader.next(field)) return kMalformed;
    switch (field.number) {
      case kPutKeys: {
        if (field.type != WireType::Length) return kMalformed;
        if (!out.keys.keys.empty()) return "malformed request: a put column has keys twice";
        if (std::string error = decode_keys(field.bytes, limits, keys_left, out.keys);
            !error.empty()) {
          return error;
        }
        break;
      }
      case kPutValues:
        if (field.type != WireType::Length) return kMalformed;
        blob = text(field.bytes);
        break;
      case kPutValueLengths:
        if (!is_repeated_fixed(field, WireType::Fixed32, kLengthBytes)) return kMalformed;
        if (!add_fixed32(field, limits.keys, lengths)) return too_many_keys(limits);
        break;
      case kPutTtl:
        if (!add_ttl(field, limits.keys, out.ttl_ms)) return kMalformed;
        break;
      default:
        break;
    }
  }
  const std::size_t keys = out.keys.keys.size();
  if (lengths.size() != keys) {
    return column_name(out.keys.ns) + " has " + std::to_string(keys) + " keys and " +
           std::to_string(lengths.size()) + " value_lengths";
  }
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] > limits.value_bytes) {
      return column_name(out.keys.ns) + ": value " + std::to_string(i) + " has " +
             std::to_string(lengths[i]) + " bytes; the limit is " +
             std::to_string(limits.value_bytes) + " (limits.max_value_size)";
    }
  }
  if (!cut(blob, lengths, out.values)) {
    return column_name(out.keys.ns) + ": value_lengths do not add up to the size of values";
  }
  if (out.ttl_ms.size() > 1 && out.ttl_ms.size() != keys) {
    return column_name(out.keys.ns) + ": ttl_ms has " + std::to_string(out.ttl_ms.size()) +
           " entries; none, one, or one a key are allowed";
  }
  return {};
}

// Decodes the repeated column field of a request by `column`, counting keys against the limit.
template <class Column, class Decode, class Keys>
std::string add_column(const Field& field, const Limits& limits, std::vector<Column>& columns,
                       std::size_t& keys, Decode&& decode_column, Keys&& keys_of) {
  if (field.type != WireType::Length) return kMalformed;
  if (columns.size() == limits.columns) {
    return "the request has more than " + std::to_string(limits.columns) + " columns";
  }
  std::string error =
      decode_column(field.bytes, limits, limits.keys - keys, columns.emplace_back());
  if (error.empty()) keys += keys_of(columns.back());
  return error;
}

std::size_t keys_in(const KeyColumn& column) {
  return column.keys.size();
}
std::size_t keys_in_put(const PutColumn& column) {
  return column.keys.keys.size();
}

}  // namespace

std::string decode(Bytes bytes, const Limits& limits, GetRequest& out) {
  std::size_t keys = 0;
  FieldReader reader(bytes);
  for (Field field; !reader.at_end();) {
    if (!reader.next(field)) return kMalformed;
    if (field.number == kRequestId || field.number == kCacheOnly) {
      if (field.type != WireType::Varint) return kMalformed;
      if (field.number == kRequestId) out.request_id = field.value;
      if (field.number == kCacheOnly) out.cache_only = field.value != 0;
    } else if (field.number == kGetColumns) {
      std::string error = add_column(field, limits, out.columns, keys, decode_keys, keys_in);
      if (!error.empty()) return error;
    }
  }
  return {};
}

std::string decode(Bytes bytes, const Limits& limits, PutRequest& out) {
  std::size_t keys = 0;
  FieldReader reader(bytes);
  for (Field field; !reader.at_end();) {
    if (!reader.next(field)) return kMalformed;
    if (field.number == kMapVersionOfWrite) {
      if (field.type != WireType::Varint) return kMalformed;
      out.map_version = field.value;
    }
    if (field.number != kColumnsOfWrite) continue;
    std::string error =
        add_column(field, limits, out.columns, keys, decode_put_column, keys_in_put);
    if (!error.empty()) return error;
  }
  return {};
}

std::string decode(Bytes bytes, const Limits& limits, DeleteRequest& out) {
  std::size_t keys = 0;
  FieldReader reader(bytes);
  for (Field field; !reader.at_end();) {
    if (!reader.next(field)) return kMalformed;
    if (field.number == kMapVersionOfWrite) {
      if (field.type != WireType::Varint) return kMalformed;
      out.map_version = field.value;
    }
    if (field.number != kColumnsOfWrite) continue;
    std::string error = add_column(field, limits, out.columns, keys, decode_keys, keys_in);
    if (!error.empty()) return error;
  }
  return {};
}

}  // namespace fc::wire
