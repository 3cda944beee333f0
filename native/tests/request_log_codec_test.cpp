// The encoder and the reader of the request log: what is written is read, and what is damaged told.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "request_log/encoder.hpp"
#include "request_log_support.hpp"

namespace fc::testing {
namespace {

using request_log::Block;
using request_log::Description;
using request_log::Encoder;
using request_log::FileHeader;

constexpr std::uint64_t kStart = 1'700'000'000'000;
constexpr std::uint64_t kWindow = 600'000;

using Bytes = std::vector<std::uint8_t>;

Bytes file_of(Encoder& encoder, std::uint64_t id, const std::vector<Bytes>& blocks,
              const Description& description) {
  const Bytes text = request_log::encode(description);
  FileHeader header{};
  header.magic = request_log::kMagic;
  header.version = request_log::kVersion;
  header.description_bytes = static_cast<std::uint32_t>(text.size());
  header.window_start_ms = kStart;
  header.window_ms = kWindow;
  header.file_id = id;
  header.checksum = header.sum(text.data());
  Bytes file(sizeof(header));
  std::memcpy(file.data(), &header, sizeof(header));
  file.insert(file.end(), text.begin(), text.end());
  for (const Bytes& block : blocks) file.insert(file.end(), block.begin(), block.end());
  const auto last = encoder.finish(0);
  file.insert(file.end(), last.begin(), last.end());
  return file;
}

Description usual_description() {
  Description description;
  description.host = "h";
  description.sample = 0.5;
  description.namespaces = {{"pin", KeyPrivacy::Plain}, {"user", KeyPrivacy::Plain}};
  description.kinds = {{0, ""}, {0, "brief"}, {1, ""}};
  return description;
}

// Random requests of ids and texts, over small dictionaries, so that those begin anew often.
TEST(RequestLogModel, WhatIsEncodedIsDecoded) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    Encoder encoder(seed, 1024);
    const Description description = usual_description();
    const char* const names[] = {"pin", "pin", "user"};
    const char* const domains[] = {"", "brief", ""};
    std::vector<Logged> expected;
    std::vector<Bytes> blocks;
    const auto take = [&] {
      const auto block = encoder.take(seed);
      blocks.emplace_back(block.begin(), block.end());
    };
    for (int request = 0; request < 300; ++request) {
      const auto kind = static_cast<std::uint32_t>(random() % 3);
      std::vector<std::string> keys(1 + random() % Encoder::kAddKeysMax);
      for (std::string& key : keys) {
        const std::uint64_t id = random() % (1u << (4 + random() % 12));
        key = random() % 4 == 0 ? "text " + std::to_string(id) + std::string(random() % 40, 'x')
                                : id_key(id * 0x9E3779B97F4A7C15ull);
      }
      const std::vector<std::string_view> views(keys.begin(), keys.end());
      const bool begins = random() % 3 != 0;
      encoder.add(kind, begins, views, [](std::string_view key) { return key; });
      expected.push_back({names[kind], domains[kind], begins, std::move(keys)});
      if (encoder.full() || random() % 20 == 0) take();
    }
    if (!encoder.empty()) take();
    std::vector<Logged> columns;
    bool complete = false;
    ASSERT_EQ(read(file_of(encoder, seed, blocks, description), columns, &complete),
              LogFault::None);
    EXPECT_TRUE(complete);
    EXPECT_EQ(columns, expected);
  }
}

TEST(RequestLogModel, ALostBlockTakesNothingWithIt) {
  Encoder encoder(7, 1024);
  const auto add = [&](const std::vector<std::string>& keys) {
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    encoder.add(0, true, views, [](std::string_view key) { return key; });
    const auto block = encoder.take(0);
    return Bytes(block.begin(), block.end());
  };
  std::vector<Bytes> blocks{add({"a", "b"})};
  add({"b", "c"});
  encoder.lost();
  blocks.push_back(add({"c", "a", "d"}));
  EXPECT_EQ(encoder.total_keys(), 5U);
  std::vector<Logged> columns;
  ASSERT_EQ(read(file_of(encoder, 7, blocks, usual_description()), columns), LogFault::None);
  ASSERT_EQ(columns.size(), 2U);
  EXPECT_EQ(columns[1].keys, (std::vector<std::string>{"c", "a", "d"}));
}

TEST(RequestLogModel, SizeIsNearTheEntropyOfTheStream) {
  constexpr std::size_t kItems = 100'000;
  constexpr std::size_t kKeys = 1'000'000;
  std::mt19937_64 random(5);
  std::vector<std::uint64_t> ids(kItems);
  for (std::uint64_t& id : ids) id = random();
  std::vector<double> steps(kItems);
  double sum = 0;
  for (std::size_t i = 0; i < kItems; ++i) steps[i] = sum += std::pow(double(i + 1), -0.9);
  Encoder encoder(1, 1u << 20);
  std::vector<std::uint32_t> counts(kItems);
  std::size_t bytes = 0;
  std::uniform_real_distribution<double> uniform(0, sum);
  std::vector<std::string> keys(1000);
  for (std::size_t done = 0; done < kKeys; done += keys.size()) {
    for (std::string& key : keys) {
      const auto rank = static_cast<std::size_t>(
          std::lower_bound(steps.begin(), steps.end(), uniform(random)) - steps.begin());
      ++counts[std::min(rank, kItems - 1)];
      key = id_key(ids[std::min(rank, kItems - 1)]);
    }
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    encoder.add(0, true, views, [](std::string_view key) { return key; });
    if (encoder.full()) bytes += encoder.take(0).size();
  }
  if (!encoder.empty()) bytes += encoder.take(0).size();
  double bits = 0;
  for (const std::uint32_t count : counts) {
    if (count != 0) bits += 64 - count * std::log2(double(count) / kKeys);
  }
  EXPECT_LT(static_cast<double>(bytes), 1.2 * bits / 8);
}

// ---- damage

TEST(RequestLogDamage, IsToldByItsKind) {
  Encoder encoder(3, 1024);
  std::vector<std::string> keys;
  for (int i = 0; i < 500; ++i) keys.push_back("key " + std::to_string(i % 300));
  const std::vector<std::string_view> views(keys.begin(), keys.end());
  encoder.add(0, true, views, [](std::string_view key) { return key; });
  const auto block = encoder.take(0);
  const Bytes file = file_of(encoder, 3, {Bytes(block.begin(), block.end())}, usual_description());
  LogInfo info;
  ASSERT_EQ(inspect_log(file, info), LogFault::None);
  EXPECT_TRUE(info.complete);
  EXPECT_EQ(info.keys, 500U);
  EXPECT_EQ(info.distinct_keys, 300U);
  EXPECT_EQ(info.namespaces.at(0).keys, 500U);

  const std::size_t last = file.size() - sizeof(request_log::BlockHeader);
  for (std::size_t size = 0; size < file.size(); ++size) {
    const LogFault fault = inspect_log({file.data(), size}, info);
    if (size == last || size == last - block.size()) {
      EXPECT_EQ(fault, LogFault::None) << size << ": between two blocks";
      EXPECT_FALSE(info.complete);
    } else {
      EXPECT_EQ(fault, LogFault::Truncated) << size;
    }
  }
  // Any bit.
  for (std::size_t bit = 0; bit < file.size() * 8; bit += 7) {
    Bytes flipped = file;
    flipped[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
    EXPECT_NE(inspect_log(flipped, info), LogFault::None) << bit;
  }
  Bytes newer = file;
  newer[offsetof(FileHeader, version)] = 2;
  EXPECT_EQ(inspect_log(newer, info), LogFault::NewerVersion);
  Bytes longer = file;
  longer.push_back(0);
  EXPECT_NE(inspect_log(longer, info), LogFault::None);
  EXPECT_EQ(inspect_log(Bytes(100, 'x'), info), LogFault::BadFormat);
  EXPECT_EQ(inspect_log(Bytes{}, info), LogFault::Truncated);
}

// Blocks that somebody made by intent: their checksums are right, what they say is not.
TEST(RequestLogDamage, NothingIsBelievedThatWasNotChecked) {
  std::mt19937_64 random(11);
  constexpr std::uint64_t id = 11;
  Encoder encoder(id, 1024);
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::string> keys(1 + random() % 200);
    for (std::string& key : keys) key = "k" + std::to_string(random() % 64);
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    encoder.add(static_cast<std::uint32_t>(random() % 3), true, views,
                [](std::string_view key) { return key; });
    const auto taken = encoder.take(0);
    Bytes block(taken.begin(), taken.end());
    encoder.lost();  // the next one is the first of its file, too
    for (std::uint64_t changes = 1 + random() % 3; changes != 0; --changes) {
      block[random() % block.size()] ^= static_cast<std::uint8_t>(1 + random() % 255);
    }
    request_log::BlockHeader header;
    std::memcpy(&header, block.data(), sizeof(header));
    if (header.stored_bytes() + sizeof(header) > block.size()) continue;
    header.checksum = header.sum(id, block.data() + sizeof(header));
    std::memcpy(block.data(), &header, sizeof(header));
    LogInfo info;
    // Either it is refused, or it says something that holds together; never out of bounds.
    Bytes file = file_of(encoder, id, {}, usual_description());
    file.erase(file.end() - sizeof(request_log::BlockHeader), file.end());
    file.insert(file.end(), block.begin(), block.end());
    encoder.lost();
    if (inspect_log(file, info) == LogFault::None) {
      EXPECT_LE(info.distinct_keys, info.keys);
    }
  }
}

}  // namespace
}  // namespace fc::testing
