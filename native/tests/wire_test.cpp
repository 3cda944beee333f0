// The request decoder and the reply encoder: what clients may send is read, what they may not is
// refused by a message that says where, and no bytes make them do more.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "client/request.hpp"
#include "feature_cache/reply.hpp"
#include "support.hpp"
#include "wire/reply.hpp"
#include "wire/request.hpp"

namespace fc::testing {
namespace {

using Raw = std::vector<std::uint8_t>;

// ---- encoding by hand: independent of our own encoder
// ----------------------------------------------

Raw varint(std::uint64_t value) {
  Raw bytes;
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<std::uint8_t>(value | 0x80));
  bytes.push_back(static_cast<std::uint8_t>(value));
  return bytes;
}
Raw operator+(Raw a, const Raw& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
Raw of_text(std::string_view text) {
  return {text.begin(), text.end()};
}
Raw fixed(std::uint64_t value, std::size_t bytes) {
  Raw raw;
  for (std::size_t i = 0; i < bytes; ++i)
    raw.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
  return raw;
}
Raw key_of(std::uint32_t number, unsigned type) {
  return varint(number << 3 | type);
}
Raw length_field(std::uint32_t number, const Raw& payload) {
  return key_of(number, 2) + varint(payload.size()) + payload;
}
Raw varint_field(std::uint32_t number, std::uint64_t value) {
  return key_of(number, 0) + varint(value);
}
Raw text_field(std::uint32_t number, std::string_view text) {
  return length_field(number, of_text(text));
}
Raw packed(std::uint32_t number, const std::vector<std::uint64_t>& values, std::size_t bytes) {
  Raw payload;
  for (const std::uint64_t value : values) payload = payload + fixed(value, bytes);
  return length_field(number, payload);
}
Raw keys_column(std::string_view ns, const std::vector<std::string>& keys,
                std::string_view domain = {}) {
  Raw blob;
  std::vector<std::uint64_t> lengths;
  for (const std::string& key : keys) {
    blob = blob + of_text(key);
    lengths.push_back(key.size());
  }
  Raw column = text_field(1, ns) + length_field(3, blob) + packed(4, lengths, 4);
  return domain.empty() ? column : column + text_field(5, domain);
}
Raw get_request(const std::vector<Raw>& columns) {
  Raw request;
  for (const Raw& column : columns) request = request + length_field(2, column);
  return request;
}

constexpr wire::Limits kLimits{.keys = 100, .value_bytes = 1'000, .columns = 4};

template <class Request>
std::string refusal(const Raw& bytes, wire::Limits limits = kLimits) {
  Request request;
  return wire::decode(bytes, limits, request);
}
std::string get_refusal(const Raw& bytes) {
  return refusal<wire::GetRequest>(bytes);
}
std::string put_refusal(const Raw& column) {
  return refusal<wire::PutRequest>(length_field(1, column));
}
void expect_says(const std::string& refusal, std::string_view what) {
  EXPECT_NE(refusal.find(what), std::string::npos) << "'" << refusal << "' should say: " << what;
}

// ---- what is read
// ---------------------------------------------------------------------------------

TEST(DecodeGet, KeysIdsAndFlags) {
  const Raw bytes = varint_field(1, 1ull << 60) +
                    get_request({keys_column("pin", {"a", std::string("b\0c", 3), "ddd"}, "hot"),
                                 text_field(1, "user") + packed(2, {7, ~0ull}, 8)}) +
                    varint_field(3, 1);
  wire::GetRequest request;
  ASSERT_EQ(wire::decode(bytes, kLimits, request), "");
  EXPECT_EQ(request.request_id, 1ull << 60);
  EXPECT_TRUE(request.cache_only);
  ASSERT_EQ(request.columns.size(), 2U);
  EXPECT_EQ(request.columns[0].ns, "pin");
  EXPECT_EQ(request.columns[0].domain, "hot");
  EXPECT_EQ(request.columns[0].keys,
            (std::vector<std::string_view>{"a", std::string_view("b\0c", 3), "ddd"}));
  EXPECT_EQ(request.columns[1].keys,
            (std::vector<std::string_view>{std::string_view("\x07\0\0\0\0\0\0\0", 8),
                                           "\xff\xff\xff\xff\xff\xff\xff\xff"}));
}

TEST(DecodeGet, AnythingProtobufMayDo) {
  wire::GetRequest request;
  ASSERT_EQ(wire::decode({}, kLimits, request), "") << "an empty message";
  EXPECT_TRUE(request.columns.empty());
  // Fields out of order, unpacked and split repeated ones, unknown ones of every type.
  const Raw column = key_of(4, 5) + fixed(1, 4) + length_field(3, of_text("abc")) +
                     packed(4, {2}, 4) + text_field(1, "old") + text_field(1, "pin") +
                     varint_field(9, 5) + key_of(14, 1) + fixed(1, 8) + key_of(15, 5) +
                     fixed(1, 4) + length_field(2000, of_text("later"));
  const Raw bytes = length_field(2, column);
  ASSERT_EQ(wire::decode(bytes, kLimits, request), "");
  EXPECT_EQ(request.columns[0].ns, "pin") << "the last one counts";
  EXPECT_EQ(request.columns[0].keys, (std::vector<std::string_view>{"a", "bc"}));
  wire::GetRequest ids;
  const Raw unpacked =
      length_field(2, text_field(1, "pin") + key_of(2, 1) + fixed(5, 8) + packed(2, {6, 7}, 8));
  ASSERT_EQ(wire::decode(unpacked, kLimits, ids), "");
  EXPECT_EQ(ids.columns[0].keys.size(), 3U);
}

TEST(DecodePut, ValuesAndTimesToLive) {
  const Raw keys = length_field(1, keys_column("pin", {"a", "b"}, "hot"));
  const Raw values = text_field(2, "xyyy") + packed(3, {1, 3}, 4);
  const auto ttls = [&](const Raw& ttl) {
    wire::PutRequest request;
    const Raw bytes = length_field(1, keys + values + ttl);
    EXPECT_EQ(wire::decode(bytes, kLimits, request), "");
    EXPECT_EQ(request.columns[0].values, (std::vector<std::string_view>{"x", "yyy"}));
    EXPECT_EQ(request.columns[0].keys.domain, "hot");
    return request.columns[0].ttl_ms;
  };
  EXPECT_EQ(ttls({}), (std::vector<std::uint32_t>{}));
  EXPECT_EQ(ttls(varint_field(4, 300)), (std::vector<std::uint32_t>{300}));
  EXPECT_EQ(ttls(length_field(4, varint(300) + varint(0))), (std::vector<std::uint32_t>{300, 0}));
  EXPECT_EQ(ttls(varint_field(4, 1) + varint_field(4, 0xffffffff)),
            (std::vector<std::uint32_t>{1, 0xffffffff}));
}

TEST(DecodeDelete, Keys) {
  wire::DeleteRequest request;
  const Raw bytes = length_field(1, keys_column("pin", {"a"}));
  ASSERT_EQ(wire::decode(bytes, kLimits, request), "");
  EXPECT_EQ(request.columns[0].keys, (std::vector<std::string_view>{"a"}));
}

// Whatever our own client writes is read back as it was.
TEST(Decode, ReadsWhatTheClientWrites) {
  std::mt19937_64 random(seed_of(21));
  for (int round = 0; round < 300; ++round) {
    std::vector<std::string> owned;
    for (int i = 0; i < 20; ++i) owned.push_back(patterned("k", random(), 1 + random() % 40));
    std::vector<std::uint64_t> ids{random(), random()};
    client::GetRequest written;
    written.request_id = random() >> (random() % 64);
    written.cache_only = random() % 2 == 0;
    client::KeyColumn keys{.name_space = "pin", .domain = "hot", .ids = {}, .keys = {}};
    keys.keys.parts.assign(owned.begin(), owned.end());
    written.columns.push_back(keys);
    written.columns.push_back({.name_space = "user", .domain = "", .ids = ids, .keys = {}});
    Raw bytes(written.size());
    written.write(bytes.data());
    wire::GetRequest read;
    ASSERT_EQ(wire::decode(bytes, kLimits, read), "");
    ASSERT_EQ(read.request_id, written.request_id);
    ASSERT_EQ(read.cache_only, written.cache_only);
    ASSERT_EQ(read.columns.size(), 2U);
    ASSERT_EQ(read.columns[0].keys, keys.keys.parts);
    ASSERT_EQ(read.columns[1].keys.size(), 2U);

    client::PutRequest put;
    client::PutColumn column{.keys = keys, .values = {}, .ttl_ms = {5}};
    column.values.parts.assign(owned.rbegin(), owned.rend());
    put.columns.push_back(column);
    Raw put_bytes(put.size());
    put.write(put_bytes.data());
    wire::PutRequest read_put;
    ASSERT_EQ(wire::decode(put_bytes, kLimits, read_put), "");
    ASSERT_EQ(read_put.columns[0].keys.keys, keys.keys.parts);
    ASSERT_EQ(read_put.columns[0].values, column.values.parts);
    ASSERT_EQ(read_put.columns[0].ttl_ms, column.ttl_ms);
  }
}

// ---- what is refused
// ------------------------------------------------------------------------------

TEST(DecodeGet, RefusesWhatIsNoMessage) {
  for (const Raw& bytes : std::vector<Raw>{
           {0x80},                                       // a varint that is cut
           Raw(11, 0xff),                                // longer than 64 bits
           {0x00},                                       // field number zero
           {0x0b},                                       // a group
           {0x16},                                       // wire type 6
           key_of(2, 2) + varint(5) + of_text("abcd"),   // a length past the end
           key_of(2, 2) + varint(~0ull),                 // a huge one
           text_field(1, "x"),                           // request_id as bytes
           varint_field(2, 1),                           // a column as a number
           length_field(3, {}),                          // cache_only as bytes
           length_field(2, {0x80}),                      // a column that is cut
           length_field(2, varint_field(1, 1)),          // a namespace as a number
           length_field(2, varint_field(3, 1)),          // keys as a number
           length_field(2, varint_field(5, 1)),          // a domain as a number
           length_field(2, key_of(4, 5) + fixed(1, 3)),  // a fixed32 that is cut
           length_field(2, length_field(2, Raw(7))),     // ids of seven bytes
           length_field(2, length_field(4, Raw(6))),     // lengths of six bytes
           length_field(2, varint_field(2, 1)),          // an id as a varint
           length_field(2, varint_field(4, 1)),          // a length as a varint
       }) {
    expect_says(get_refusal(bytes), "not a valid protobuf message");
  }
}

TEST(DecodeGet, RefusesLengthsThatDoNotAddUp) {
  const auto column = [](const Raw& blob, const std::vector<std::uint64_t>& lengths) {
    return get_request({text_field(1, "pin") + length_field(3, blob) + packed(4, lengths, 4)});
  };
  for (const Raw& bytes :
       {column(of_text("abc"), {1, 1}), column(of_text("abc"), {1, 3}), column(of_text("abc"), {}),
        column({}, {1}), column(of_text("abc"), {0xffffffff, 4}),
        column(of_text("abc"), {4, 0xffffffff})}) {
    expect_says(get_refusal(bytes), "namespace 'pin': key_lengths do not add up");
  }
}

TEST(DecodeGet, RefusesKeysOutsideTheLimits) {
  expect_says(get_refusal(get_request({keys_column("pin", {"a", "", "b"})})),
              "key 1 has 0 bytes; keys have 1 to 1024");
  expect_says(get_refusal(get_request({keys_column("pin", {std::string(1025, 'k')})})),
              "key 0 has 1025 bytes");
  EXPECT_EQ(get_refusal(get_request({keys_column("pin", {std::string(1024, 'k')})})), "");
  expect_says(get_refusal(get_request({keys_column("pin", {"a"}) + packed(2, {1}, 8)})),
              "both ids and bytes keys");
}

TEST(DecodeGet, RefusesMoreKeysOrColumnsThanTheLimit) {
  const std::vector<std::string> hundred(100, "k");
  EXPECT_EQ(get_refusal(get_request({keys_column("pin", hundred)})), "");
  const std::string says = "more than 100 keys (limits.max_batch_keys)";
  expect_says(get_refusal(get_request({keys_column("pin", hundred), keys_column("pin", {"k"})})),
              says);
  expect_says(get_refusal(get_request(
                  {text_field(1, "pin") + packed(2, std::vector<std::uint64_t>(101, 5), 8)})),
              says);
  Raw unpacked = text_field(1, "pin");
  for (int i = 0; i < 101; ++i) unpacked = unpacked + key_of(2, 1) + fixed(5, 8);
  expect_says(get_refusal(get_request({unpacked})), says);
  expect_says(get_refusal(get_request(std::vector<Raw>(5, keys_column("pin", {"k"})))),
              "more than 4 columns");
}

TEST(DecodePut, RefusesWhatDoesNotAddUp) {
  const Raw keys = length_field(1, keys_column("pin", {"a", "b"}));
  const Raw lengths = packed(3, {1, 1}, 4);
  EXPECT_EQ(put_refusal(keys + text_field(2, "xy") + lengths), "");
  expect_says(put_refusal(keys + text_field(2, "xyz") + lengths), "value_lengths do not add up");
  expect_says(put_refusal(keys + text_field(2, "x") + lengths), "value_lengths do not add up");
  expect_says(put_refusal(keys + text_field(2, "x") + packed(3, {1}, 4)),
              "2 keys and 1 value_lengths");
  expect_says(put_refusal(keys), "2 keys and 0 value_lengths");
  expect_says(put_refusal(keys + text_field(2, std::string(1002, 'v')) + packed(3, {1, 1001}, 4)),
              "value 1 has 1001 bytes; the limit is 1000 (limits.max_value_size)");
  expect_says(put_refusal(keys + text_field(2, "xy") + lengths +
                          length_field(4, varint(1) + varint(2) + varint(3))),
              "ttl_ms has 3 entries");
  expect_says(put_refusal(keys + keys + text_field(2, "xy") + lengths), "keys twice");
  expect_says(put_refusal(keys + text_field(2, "xy") + lengths + length_field(4, {0x80})),
              "not a valid");
  expect_says(put_refusal(keys + text_field(2, "xy") + lengths + varint_field(4, 1ull << 32)),
              "not a valid");
}

TEST(Decode, LongNamesAreCutInMessages) {
  const std::string refused = get_refusal(
      get_request({text_field(1, std::string(100'000, 'n')) + length_field(3, of_text("a"))}));
  EXPECT_LT(refused.size(), 200U);
}

// ---- fuzz
// -----------------------------------------------------------------------------------------

// What the decoder accepted must be whole: views inside the bytes, counts within the limits.
template <class Check>
bool read_all(const Raw& given, Check check) {
  // An allocation of the exact size: a sanitizer sees any read past its end.
  const std::unique_ptr<std::uint8_t[]> bytes(new std::uint8_t[given.size()]);
  std::copy(given.begin(), given.end(), bytes.get());
  return check(wire::Bytes(bytes.get(), given.size()));
}
void expect_inside(wire::Bytes bytes, std::string_view view) {
  if (view.empty()) return;
  const auto* begin = reinterpret_cast<const char*>(bytes.data());
  ASSERT_GE(view.data(), begin);
  ASSERT_LE(view.data() + view.size(), begin + bytes.size());
}
void expect_whole(wire::Bytes bytes, const wire::KeyColumn& column) {
  expect_inside(bytes, column.ns);
  expect_inside(bytes, column.domain);
  for (const std::string_view key : column.keys) {
    ASSERT_GE(key.size(), 1U);
    ASSERT_LE(key.size(), kMaxKeyBytes);
    expect_inside(bytes, key);
  }
}
bool fuzz_get(wire::Bytes bytes) {
  wire::GetRequest request;
  if (!wire::decode(bytes, kLimits, request).empty()) return false;
  std::size_t keys = 0;
  for (const wire::KeyColumn& column : request.columns) {
    expect_whole(bytes, column);
    keys += column.keys.size();
  }
  EXPECT_LE(keys, kLimits.keys);
  return true;
}
bool fuzz_put(wire::Bytes bytes) {
  wire::PutRequest request;
  if (!wire::decode(bytes, kLimits, request).empty()) return false;
  for (const wire::PutColumn& column : request.columns) {
    expect_whole(bytes, column.keys);
    EXPECT_EQ(column.values.size(), column.keys.keys.size());
    EXPECT_TRUE(column.ttl_ms.size() <= 1 || column.ttl_ms.size() == column.values.size());
    for (const std::string_view value : column.values) {
      EXPECT_LE(value.size(), kLimits.value_bytes);
      expect_inside(bytes, value);
    }
  }
  return true;
}
bool fuzz_delete(wire::Bytes bytes) {
  wire::DeleteRequest request;
  if (!wire::decode(bytes, kLimits, request).empty()) return false;
  for (const wire::KeyColumn& column : request.columns) expect_whole(bytes, column);
  return true;
}

Raw random_request(std::mt19937_64& random) {
  std::vector<std::string> keys;
  std::vector<std::uint64_t> lengths;
  Raw values;
  for (std::size_t i = random() % 6; i > 0; --i) {
    keys.push_back(patterned("k", random(), 1 + random() % 12));
    lengths.push_back(random() % 9);
    values = values + of_text(patterned("v", random(), lengths.back()));
  }
  const Raw column = random() % 3 == 0 ? text_field(1, "pin") + packed(2, {random(), random()}, 8)
                                       : keys_column("pin", keys, random() % 2 == 0 ? "hot" : "");
  switch (random() % 3) {
    case 0:
      return varint_field(1, random() % 1'000) + get_request({column, column});
    case 1:
      return length_field(1, length_field(1, column) + length_field(2, values) +
                                 packed(3, lengths, 4) + varint_field(4, random() % 100'000));
    default:
      return length_field(1, column);
  }
}

TEST(Fuzz, MutatedCutAndRandomRequestsAreReadOrRefused) {
  std::mt19937_64 random(seed_of(22));
  std::size_t read = 0;
  std::size_t refused = 0;
  for (std::size_t round = 0; round < scaled(60'000); ++round) {
    Raw bytes;
    if (random() % 8 == 0) {
      bytes.resize(random() % 80);
      for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    } else {
      bytes = random_request(random);
      for (std::size_t hits = random() % 4; hits > 0 && !bytes.empty(); --hits) {
        std::uint8_t& byte = bytes[random() % bytes.size()];
        switch (random() % 4) {
          case 0:
            byte = static_cast<std::uint8_t>(random());
            break;
          case 1:
            byte ^= static_cast<std::uint8_t>(1u << (random() % 8));
            break;
          case 2:
            byte = 0xff;
            break;
          default: {
            const auto at = bytes.begin() + static_cast<std::ptrdiff_t>(random() % bytes.size());
            bytes.insert(at, static_cast<std::uint8_t>(random()));
          }
        }
      }
      if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 1));
    }
    for (const auto fuzz : {fuzz_get, fuzz_put, fuzz_delete}) {
      ++(read_all(bytes, fuzz) ? read : refused);
      ASSERT_FALSE(::testing::Test::HasFatalFailure()) << "round " << round;
    }
  }
  EXPECT_GT(read, scaled(10'000));
  EXPECT_GT(refused, scaled(10'000));
}

TEST(Fuzz, EveryPrefixOfAValidRequestIsReadOrRefused) {
  std::mt19937_64 random(seed_of(23));
  for (int round = 0; round < 50; ++round) {
    const Raw whole = random_request(random);
    for (std::size_t size = 0; size <= whole.size(); ++size) {
      const Raw prefix(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
      for (const auto fuzz : {fuzz_get, fuzz_put, fuzz_delete}) read_all(prefix, fuzz);
    }
  }
}

// ---- replies
// --------------------------------------------------------------------------------------

TEST(EncodeReply, TheClientReadsWhatWasEncoded) {
  std::mt19937_64 random(seed_of(24));
  for (int round = 0; round < 300; ++round) {
    const std::uint64_t request_id = random() % 2 == 0 ? 0 : random() >> (random() % 64);
    wire::GetReplyEncoder encoder(request_id);
    std::vector<std::vector<CellStatus>> statuses(random() % 4);
    std::vector<std::vector<std::uint32_t>> lengths(statuses.size());
    std::vector<std::string> values(statuses.size());
    for (std::size_t c = 0; c < statuses.size(); ++c) {
      for (std::size_t i = random() % 300; i > 0; --i) {
        statuses[c].push_back(static_cast<CellStatus>(1 + random() % 10));
        lengths[c].push_back(
            carries_value(statuses[c].back()) ? static_cast<std::uint32_t>(random() % 30) : 0);
        values[c] += patterned("v", random(), lengths[c].back());
      }
      Buffer buffer;
      buffer.append(values[c].data(), values[c].size());
      encoder.add_column(statuses[c], lengths[c], std::move(buffer));
    }
    const wire::Pieces pieces = std::move(encoder).finish();
    std::vector<Reply::Piece> views;
    for (const Buffer& piece : pieces) views.emplace_back(piece.data(), piece.size());
    Reply reply;
    ASSERT_EQ(Reply::gather(views, reply), ReplyFault::None);
    ASSERT_EQ(reply.request_id(), request_id);
    ASSERT_EQ(reply.columns(), statuses.size());
    for (std::size_t c = 0; c < statuses.size(); ++c) {
      const Reply::Column& column = reply.column(c);
      ASSERT_TRUE(std::equal(
          column.statuses.begin(), column.statuses.end(), statuses[c].begin(), statuses[c].end(),
          [](std::uint8_t a, CellStatus b) { return a == static_cast<std::uint8_t>(b); }));
      ASSERT_TRUE(std::equal(column.value_lengths.begin(), column.value_lengths.end(),
                             lengths[c].begin(), lengths[c].end()));
      ASSERT_EQ(std::string_view(reinterpret_cast<const char*>(column.values.data()),
                                 column.values.size()),
                values[c]);
    }
  }
}

TEST(EncodeReply, WriteStatuses) {
  const std::vector<std::vector<WriteStatus>> columns{
      {WriteStatus::Stored, WriteStatus::Rejected}, {}, {WriteStatus::Error}};
  const wire::Pieces pieces = wire::encode_write_reply(columns);
  std::vector<Reply::Piece> views;
  for (const Buffer& piece : pieces) views.emplace_back(piece.data(), piece.size());
  WriteReply reply;
  ASSERT_EQ(WriteReply::gather(views, reply), ReplyFault::None);
  ASSERT_EQ(reply.columns(), 3U);
  EXPECT_EQ(reply.statuses(0).size(), 2U);
  EXPECT_EQ(reply.statuses(0)[1], static_cast<std::uint8_t>(WriteStatus::Rejected));
  EXPECT_TRUE(reply.statuses(1).empty());
  EXPECT_EQ(reply.statuses(2)[0], static_cast<std::uint8_t>(WriteStatus::Error));
}

}  // namespace
}  // namespace fc::testing
