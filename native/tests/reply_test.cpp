// The reply parser and the request encoder: what was written is read, in whatever pieces it comes,
// and no bytes make the parser do more than refuse them.
#include "feature_cache/reply.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "client/request.hpp"

namespace fc {
namespace {

using Bytes = std::vector<std::uint8_t>;

void put_varint(Bytes& to, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7U) to.push_back(static_cast<std::uint8_t>(value | 0x80U));
  to.push_back(static_cast<std::uint8_t>(value));
}

void put_field(Bytes& to, std::uint8_t number, const Bytes& payload) {
  to.push_back(static_cast<std::uint8_t>(number << 3U | 2U));
  put_varint(to, payload.size());
  to.insert(to.end(), payload.begin(), payload.end());
}

struct Expected {
  std::vector<std::string> values;
  Bytes statuses;
};

Bytes encode_column(const Expected& column) {
  Bytes values;
  Bytes lengths;
  for (const std::string& value : column.values) {
    values.insert(values.end(), value.begin(), value.end());
    for (unsigned shift = 0; shift < 32; shift += 8) {
      lengths.push_back(static_cast<std::uint8_t>(value.size() >> shift));
    }
  }
  Bytes encoded;
  put_field(encoded, 1, values);
  put_field(encoded, 2, lengths);
  put_field(encoded, 3, column.statuses);
  return encoded;
}

Bytes encode_reply(std::uint64_t request_id, const std::vector<Expected>& columns) {
  Bytes encoded{0x08};
  put_varint(encoded, request_id);
  for (const Expected& column : columns) put_field(encoded, 2, encode_column(column));
  return encoded;
}

Buffer buffer_of(const Bytes& bytes) {
  Buffer buffer;
  buffer.append(bytes.data(), bytes.size());
  return buffer;
}

// Cuts `bytes` into pieces of their own allocations, empty ones among them, so that a sanitizer
// sees any read past the end of one.
std::vector<Bytes> cut(const Bytes& bytes, std::mt19937_64& random) {
  std::vector<Bytes> pieces;
  std::size_t at = 0;
  while (at < bytes.size()) {
    const std::size_t size = std::min<std::size_t>(random() % 40, bytes.size() - at);
    const auto from = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    pieces.emplace_back(from, from + static_cast<std::ptrdiff_t>(size));
    at += size;
  }
  return pieces;
}

std::vector<Reply::Piece> views_of(const std::vector<Bytes>& pieces) {
  return {pieces.begin(), pieces.end()};
}

void expect_column(const Reply::Column& column, const Expected& expected) {
  ASSERT_EQ(column.statuses.size(), expected.statuses.size());
  ASSERT_EQ(column.value_lengths.size(), expected.values.size());
  EXPECT_EQ(Bytes(column.statuses.begin(), column.statuses.end()), expected.statuses);
  const auto* at = reinterpret_cast<const char*>(column.values.data());
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    ASSERT_EQ(std::string_view(at, column.value_lengths[i]), expected.values[i]);
    at += column.value_lengths[i];
  }
}

Expected random_column(std::mt19937_64& random) {
  Expected column;
  for (std::size_t keys = random() % 30; keys > 0; --keys) {
    column.values.emplace_back(random() % 50, static_cast<char>('a' + random() % 26));
    column.statuses.push_back(static_cast<std::uint8_t>(random() % 11));
  }
  return column;
}

TEST(Reply, ReadsWhatWasWrittenInWhateverPieces) {
  constexpr std::uint64_t kSeed = 1;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 500; ++round) {
    std::vector<Expected> columns;
    for (std::size_t count = random() % 5; count > 0; --count) {
      columns.push_back(random_column(random));
    }
    const std::uint64_t request_id = random() >> (random() % 64);
    const Bytes encoded = encode_reply(request_id, columns);
    const std::vector<Bytes> pieces = cut(encoded, random);
    Reply whole;
    Reply gathered;
    ASSERT_EQ(Reply::parse(buffer_of(encoded), whole), ReplyFault::None);
    ASSERT_EQ(Reply::gather(views_of(pieces), gathered), ReplyFault::None);
    for (Reply* reply : {&whole, &gathered}) {
      const Reply moved = std::move(*reply);  // views must survive a move
      ASSERT_EQ(moved.request_id(), request_id);
      ASSERT_EQ(moved.columns(), columns.size());
      for (std::size_t i = 0; i < columns.size(); ++i) expect_column(moved.column(i), columns[i]);
    }
  }
}

TEST(Reply, GatherAlignsEveryPartToACacheLine) {
  std::mt19937_64 random(2);
  const Bytes encoded = encode_reply(7, {random_column(random), random_column(random)});
  Reply reply;
  ASSERT_EQ(Reply::gather(views_of(cut(encoded, random)), reply), ReplyFault::None);
  for (std::size_t i = 0; i < reply.columns(); ++i) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(reply.column(i).values.data()) % 64, 0U);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(reply.column(i).value_lengths.data()) % 64, 0U);
  }
}

TEST(Reply, RefusesWhatDoesNotAddUp) {
  const Expected good{{"a", "bc"}, {1, 1}};
  const auto fault_of = [](const Bytes& bytes) {
    Reply reply;
    return Reply::parse(buffer_of(bytes), reply);
  };
  EXPECT_EQ(fault_of(encode_reply(0, {good})), ReplyFault::None);
  EXPECT_EQ(fault_of(encode_reply(0, {{{"a", "bc"}, {1}}})), ReplyFault::LengthsMismatch);
  EXPECT_EQ(fault_of({0x12, 3, 0x0A, 1, 'a'}), ReplyFault::LengthsMismatch);
  EXPECT_EQ(fault_of({0x12, 6, 0x0A, 1, 'a', 0x0A, 1, 'a'}), ReplyFault::BadField);
  EXPECT_EQ(fault_of({0x12, 2, 0x08, 1}), ReplyFault::BadField);
  EXPECT_EQ(fault_of({0x12, 9, 0x0A}), ReplyFault::Truncated);
  EXPECT_EQ(fault_of({0x0B}), ReplyFault::Truncated);
  EXPECT_EQ(fault_of(Bytes(11, 0xFF)), ReplyFault::Truncated);
  Bytes many;
  for (std::size_t i = 0; i <= kReplyColumnsMax; ++i) put_field(many, 2, {});
  EXPECT_EQ(fault_of(many), ReplyFault::TooManyColumns);
}

TEST(Reply, DamagedBytesAreRefusedOrReadConsistently) {
  constexpr std::uint64_t kSeed = 3;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  int refused = 0;
  int read = 0;
  for (int round = 0; round < 20'000; ++round) {
    Bytes bytes = encode_reply(random() % 300, {random_column(random), random_column(random)});
    for (std::size_t hits = random() % 4; hits > 0; --hits) {
      bytes[random() % bytes.size()] = static_cast<std::uint8_t>(random());
    }
    if (random() % 3 == 0) bytes.resize(random() % (bytes.size() + 1));
    const std::vector<Bytes> pieces = cut(bytes, random);
    Reply whole;
    Reply gathered;
    WriteReply write;
    const ReplyFault fault = Reply::parse(buffer_of(bytes), whole);
    ASSERT_EQ(Reply::gather(views_of(pieces), gathered), fault);
    static_cast<void>(WriteReply::gather(views_of(pieces), write));
    ++(fault == ReplyFault::None ? read : refused);
    for (std::size_t i = 0; i < whole.columns(); ++i) {
      std::uint64_t sum = 0;
      for (const std::uint32_t length : whole.column(i).value_lengths) sum += length;
      ASSERT_EQ(sum, whole.column(i).values.size());
      ASSERT_EQ(whole.column(i).statuses.size(), whole.column(i).value_lengths.size());
      ASSERT_EQ(gathered.column(i).values.size(), whole.column(i).values.size());
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(read, 1000);
}

TEST(Reply, RandomBytesNeverDoMoreThanBeRefused) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 20'000; ++round) {
    Bytes bytes(random() % 64);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    Reply reply;
    WriteReply write;
    const ReplyFault fault = Reply::gather(views_of(cut(bytes, random)), reply);
    static_cast<void>(WriteReply::parse(buffer_of(bytes), write));
    ASSERT_TRUE(fault == ReplyFault::None || reply.columns() == 0);
  }
}

TEST(WriteReply, ReadsStatuses) {
  Bytes column;
  put_field(column, 1, {1, 3, 1});
  Bytes encoded;
  put_field(encoded, 1, column);
  put_field(encoded, 1, {});
  WriteReply reply;
  ASSERT_EQ(WriteReply::parse(buffer_of(encoded), reply), ReplyFault::None);
  ASSERT_EQ(reply.columns(), 2U);
  EXPECT_EQ(Bytes(reply.statuses(0).begin(), reply.statuses(0).end()), (Bytes{1, 3, 1}));
  EXPECT_TRUE(reply.statuses(1).empty());
}

// A write past size() bytes, or short of it, shows: the guard bytes stay and the rest does not.
TEST(Request, WritesExactlyItsSize) {
  client::GetRequest request;
  request.request_id = 300;
  request.cache_only = true;
  const std::vector<std::uint64_t> ids{1, 2, 3};
  request.columns.push_back({.name_space = "pin", .domain = "hot", .ids = ids, .keys = {}});
  request.columns.push_back({.name_space = "",
                             .domain = "",
                             .ids = {},
                             .keys = {{"a", std::string_view(), "bc"}, {}, {}}});
  Bytes bytes(request.size() + 8, 0xEE);
  request.write(bytes.data());
  const Bytes expected{0x08, 0xAC, 0x02, 0x12, 36,   0x0A, 3,    'p',  'i',  'n',  0x12, 24,
                       1,    0,    0,    0,    0,    0,    0,    0,    2,    0,    0,    0,
                       0,    0,    0,    0,    3,    0,    0,    0,    0,    0,    0,    0,
                       0x2A, 3,    'h',  'o',  't',  0x12, 19,   0x1A, 3,    'a',  'b',  'c',
                       0x22, 12,   1,    0,    0,    0,    0,    0,    0,    0,    2,    0,
                       0,    0,    0x18, 1,    0xEE, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE};
  EXPECT_EQ(bytes, expected);
}

}  // namespace
}  // namespace fc
