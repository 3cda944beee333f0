// The request log: what is recorded is read again, whatever becomes of files, disks and clocks.

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <thread>

#include "feature_cache/request_log.hpp"
#include "request_log/recorder.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

using request_log::Block;
using request_log::Description;
using request_log::Encoder;
using request_log::FileHeader;
using request_log::Reader;
using request_log::Recorder;
namespace fs = std::filesystem;

constexpr std::uint64_t kStart = 1'700'000'000'000;
constexpr std::uint64_t kWindow = 600'000;

using Bytes = std::vector<std::uint8_t>;

// One column as it was logged.
struct Logged {
  std::string ns;
  std::string domain;
  bool begins = false;
  std::vector<std::string> keys;
  friend bool operator==(const Logged&, const Logged&) = default;
};

Bytes slurp(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string id_key(std::uint64_t id) {
  return {reinterpret_cast<const char*>(&id), sizeof(id)};
}

// Reads all; runs of one column that were split over blocks are put together by `keys` alone.
LogFault read(const Bytes& bytes, std::vector<Logged>& columns, bool* complete = nullptr) {
  Reader reader;
  if (const LogFault fault = reader.open(bytes); fault != LogFault::None) return fault;
  std::vector<std::string> dictionary;
  Block block;
  for (;;) {
    bool more = false;
    if (const LogFault fault = reader.next(block, more); fault != LogFault::None) return fault;
    if (!more) break;
    if (block.new_dictionary) dictionary.clear();
    std::size_t next = 0;
    std::size_t at = 0;
    for (const Block::Run& run : block.runs) {
      const auto& kind = reader.description().kinds.at(run.kind);
      Logged column{
          reader.description().namespaces.at(kind.ns).name, kind.domain, run.begins_request, {}};
      for (std::uint32_t i = 0; i < run.keys; ++i, ++at) {
        const std::uint32_t place = block.places.at(at);
        if (place == dictionary.size()) dictionary.emplace_back(block.new_keys.at(next++));
        column.keys.push_back(dictionary.at(place));
      }
      columns.push_back(std::move(column));
    }
    EXPECT_EQ(next, block.new_keys.size());
  }
  if (complete != nullptr) *complete = reader.is_complete();
  return LogFault::None;
}

class RequestLog : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("feature_cache_log_" + std::to_string(::getpid()));
    fs::remove_all(dir_);
    config_.dir = dir_.string();
    config_.sample = 1.0;
    config_.window_ms = kWindow;
    config_.host = "host-1";
    namespaces_ = {name_space("pin", {domain("lasting", kMiB), domain("brief", kMiB)}),
                   name_space("user", {domain("all", kMiB)}),
                   name_space("secret", {domain("all", kMiB)})};
  }
  void TearDown() override {
    recorder_.reset();
    fs::remove_all(dir_);
  }
  Recorder& recorder() {
    if (recorder_ == nullptr) {
      recorder_ =
          std::make_unique<Recorder>(config_, namespaces_, [this] { return now_.load(); }, false);
    }
    return *recorder_;
  }
  void restart() { recorder_.reset(); }
  // The process dies: nothing is finished.
  void crash() { recorder_.release(); }

  void offer(NamespaceIndex ns, const std::vector<std::string>& keys,
             DomainIndex domain = kNoDomain) {
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    const Recorder::Column column{ns, domain, views};
    if (recorder().samples_request()) recorder().offer({&column, 1});
  }
  std::vector<fs::path> files(const std::string& suffix = ".fcrl") const {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(dir_)) {
      if (entry.path().filename().string().ends_with(suffix)) found.push_back(entry.path());
    }
    std::sort(found.begin(), found.end());
    return found;
  }
  std::vector<Logged> logged(const fs::path& path, bool* complete = nullptr) const {
    std::vector<Logged> columns;
    EXPECT_EQ(read(slurp(path), columns, complete), LogFault::None);
    return columns;
  }
  std::vector<std::string> keys_of(const fs::path& path) const {
    std::vector<std::string> keys;
    for (const Logged& column : logged(path)) {
      keys.insert(keys.end(), column.keys.begin(), column.keys.end());
    }
    return keys;
  }
  double counter(const std::string& name) { return Counters::of(recorder()).sum(name); }

  RecordConfig config_;
  std::vector<NamespaceConfig> namespaces_;
  std::atomic<std::uint64_t> now_{kStart - kStart % kWindow + 1000};
  fs::path dir_;
  std::unique_ptr<Recorder> recorder_;
};

// ---- encoder and reader

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
  Bytes file(reinterpret_cast<const std::uint8_t*>(&header),
             reinterpret_cast<const std::uint8_t*>(&header + 1));
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
    file.resize(file.size() - sizeof(request_log::BlockHeader));
    file.insert(file.end(), block.begin(), block.end());
    encoder.lost();
    if (inspect_log(file, info) == LogFault::None) {
      EXPECT_LE(info.distinct_keys, info.keys);
    }
  }
}

// ---- the recorder

TEST_F(RequestLog, HoldsWhatWasAsked) {
  offer(0, {"a", "b"});
  offer(1, {id_key(1), id_key(2), id_key(1)});
  offer(0, {"a"}, 1);
  recorder().write_out();
  restart();
  ASSERT_EQ(files().size(), 1U);
  bool complete = false;
  const std::vector<Logged> columns = logged(files()[0], &complete);
  EXPECT_TRUE(complete);
  EXPECT_EQ(columns, (std::vector<Logged>{{"pin", "", true, {"a", "b"}},
                                          {"user", "", true, {id_key(1), id_key(2), id_key(1)}},
                                          {"pin", "brief", true, {"a"}}}));
  LogInfo info;
  ASSERT_EQ(inspect_log(slurp(files()[0]), info), LogFault::None);
  EXPECT_EQ(info.host, "host-1");
  EXPECT_EQ(info.requests, 3U);
  EXPECT_EQ(info.window_start_ms, now_ - now_ % kWindow);
  EXPECT_EQ(fs::status(files()[0]).permissions() & fs::perms::all,
            fs::perms::owner_read | fs::perms::owner_write);
}

TEST_F(RequestLog, AWindowIsAFile) {
  offer(0, {"first"});
  recorder().write_out();
  EXPECT_EQ(files(".part").size(), 1U);
  now_ += kWindow;
  recorder().write_out();
  EXPECT_EQ(files(".part").size(), 0U) << "its time is over";
  now_ += 3 * kWindow;  // nothing is asked: no file
  recorder().write_out();
  offer(0, {"second"});
  recorder().write_out();
  restart();
  ASSERT_EQ(files().size(), 2U);
  EXPECT_EQ(keys_of(files()[0]), std::vector<std::string>{"first"});
  EXPECT_EQ(keys_of(files()[1]), std::vector<std::string>{"second"});
}

TEST_F(RequestLog, AClockThatGoesBackMakesAnotherFile) {
  offer(0, {"later"});
  recorder().write_out();
  now_ -= 5 * kWindow;
  offer(0, {"earlier"});
  recorder().write_out();
  EXPECT_EQ(files(".part").size(), 1U);
  now_ += 5 * kWindow;
  offer(0, {"again"});
  recorder().write_out();
  restart();
  ASSERT_EQ(files().size(), 3U);
  EXPECT_EQ(keys_of(files()[0]), std::vector<std::string>{"earlier"});
}

TEST_F(RequestLog, SamplesRequestsByTheirShare) {
  config_.sample = 0.1;
  int sampled = 0;
  for (int i = 0; i < 20'000; ++i) sampled += recorder().samples_request() ? 1 : 0;
  EXPECT_NEAR(sampled, 2000, 200);
}

TEST_F(RequestLog, SamplesKeysAlwaysOrNever) {
  config_.sample = 0.25;
  config_.by = SampleBy::Keys;
  std::vector<std::string> keys;
  for (std::uint64_t i = 0; i < 4000; ++i) {
    keys.push_back(i % 2 == 0 ? id_key(i) : "text " + std::to_string(i));
  }
  offer(0, keys);
  offer(0, keys);
  recorder().write_out();
  restart();
  std::map<std::string, int> times;
  for (const std::string& key : keys_of(files().at(0))) ++times[key];
  EXPECT_NEAR(static_cast<double>(times.size()), 1000, 120);
  for (const auto& [key, count] : times) EXPECT_EQ(count, 2) << key;
}

TEST_F(RequestLog, KeepsPrivateKeysPrivate) {
  config_.privacy = {{"user", KeyPrivacy::Hashed}, {"secret", KeyPrivacy::Excluded}};
  config_.hash_key = "0123456789abcdef";
  offer(0, {"plain key"});
  offer(1, {"private key", "private key"});
  offer(2, {"excluded key"});
  recorder().write_out();
  restart();
  const Bytes bytes = slurp(files().at(0));
  const std::string text(bytes.begin(), bytes.end());
  EXPECT_NE(text.find("plain key"), std::string::npos);
  EXPECT_EQ(text.find("private key"), std::string::npos);
  EXPECT_EQ(text.find("excluded key"), std::string::npos);
  EXPECT_EQ(text.find(config_.hash_key), std::string::npos);
  const std::vector<Logged> columns = logged(files()[0]);
  ASSERT_EQ(columns.size(), 2U);
  ASSERT_EQ(columns[1].keys.size(), 2U);
  EXPECT_EQ(columns[1].keys[0], columns[1].keys[1]);
  EXPECT_EQ(columns[1].keys[0].size(), request_log::kHashedKeyBytes);
  // The same key of another secret is another.
  const request_log::KeyHasher other("another secret!!");
  EXPECT_NE(other.hash("user", "private key").view(), columns[1].keys[0]);
}

TEST_F(RequestLog, WhatAKilledWriterLeftIsCutAndKept) {
  std::vector<std::string> keys;
  for (int i = 0; i < 70'000; ++i) keys.push_back(id_key(static_cast<std::uint64_t>(i)));
  for (int i = 0; i < 70; ++i) {
    offer(0, {keys.begin() + i * 1000, keys.begin() + (i + 1) * 1000});
    recorder().write_out();
  }
  crash();  // a whole block is written, the rest was in memory
  const fs::path part = files(".part").at(0);
  {
    std::ofstream torn(part, std::ios::binary | std::ios::app);
    torn << "RLBK and no more";
  }
  // Locks are the process's: only the lock is told that it is gone.
  fs::remove(dir_ / "lock");
  recorder();
  EXPECT_TRUE(files(".part").empty());
  ASSERT_EQ(files().size(), 1U);
  bool complete = true;
  std::vector<Logged> columns;
  EXPECT_EQ(read(slurp(files()[0]), columns, &complete), LogFault::None);
  EXPECT_FALSE(complete);
  EXPECT_GT(columns.size(), 60U);
}

TEST_F(RequestLog, ALeftOverWithoutABlockGoes) {
  fs::create_directories(dir_);
  std::ofstream(dir_ / "1700000000000-0000000000000000.fcrl.part") << "half a header";
  recorder();
  EXPECT_TRUE(files(".part").empty());
  EXPECT_TRUE(files().empty());
}

TEST_F(RequestLog, TwoRecordersDoNotShareADirectory) {
  recorder();
  EXPECT_THROW(Recorder(config_, namespaces_), std::system_error);
}

TEST_F(RequestLog, TheOldestFilesGoWhenTheDirectoryIsFull) {
  config_.max_bytes = 3u << 20;  // one of it is kept for the block that comes
  std::mt19937_64 random(1);
  for (int window = 0; window < 12; ++window) {
    std::vector<std::string> keys(40'000);
    for (std::string& key : keys) key = id_key(random());
    for (int i = 0; i < 40; ++i) offer(0, {keys.begin() + i * 1000, keys.begin() + (i + 1) * 1000});
    recorder().write_out();
    now_ += kWindow;
    recorder().write_out();
    std::uintmax_t bytes = 0;
    for (const fs::path& file : files()) bytes += fs::file_size(file);
    EXPECT_LE(bytes, config_.max_bytes);
  }
  EXPECT_GT(counter("feature_cache_record_files_dropped_total"), 3);
  EXPECT_EQ(counter("feature_cache_record_dropped_keys_total"), 0);
}

TEST_F(RequestLog, AFullDiskCostsLogAndNothingElse) {
  offer(0, {"before"});
  recorder().write_out();
  // No file of this process may grow beyond this: writes fail as they do on a full disk.
  struct Limit {
    rlimit before{};
    Limit() {
      std::signal(SIGXFSZ, SIG_IGN);
      getrlimit(RLIMIT_FSIZE, &before);
      const rlimit none{1000, before.rlim_max};
      setrlimit(RLIMIT_FSIZE, &none);
    }
    ~Limit() { setrlimit(RLIMIT_FSIZE, &before); }
  };
  std::vector<std::string> keys;
  for (int i = 0; i < 1000; ++i) keys.push_back(id_key(static_cast<std::uint64_t>(i)));
  {
    const Limit limit;
    for (int i = 0; i < 70; ++i) {
      offer(0, keys);
      recorder().write_out();
    }
    EXPECT_GT(counter("feature_cache_record_dropped_keys_total"), 60'000);
  }
  offer(0, {"while it is left alone"});
  recorder().write_out();
  now_ += 6000;
  offer(0, {"after", keys[0]});
  recorder().write_out();
  restart();
  ASSERT_EQ(files().size(), 1U);
  const std::vector<std::string> found = keys_of(files()[0]);
  EXPECT_EQ(found.at(found.size() - 2), "after");
  EXPECT_EQ(found.back(), keys[0]);
  LogInfo info;
  ASSERT_EQ(inspect_log(slurp(files()[0]), info), LogFault::None);
  EXPECT_TRUE(info.complete);
  EXPECT_GT(info.dropped_keys, 60'000U);
}

TEST_F(RequestLog, RequestsDoNotWaitForAWriterThatHangs) {
  config_.buffer_bytes = 64u << 10;
  std::vector<std::string> keys;
  for (int i = 0; i < 500; ++i) keys.push_back(id_key(static_cast<std::uint64_t>(i)));
  for (int i = 0; i < 100; ++i) offer(0, keys);  // nobody takes it
  EXPECT_GT(counter("feature_cache_record_dropped_keys_total"), 30'000);
  recorder().write_out();
  offer(0, {"room again"});
  recorder().write_out();
  restart();
  EXPECT_EQ(keys_of(files().at(0)).back(), "room again");
}

TEST_F(RequestLog, ManyThreadsRecordAtOnce) {
  recorder_ = std::make_unique<Recorder>(config_, namespaces_);  // with its thread and clock
  constexpr int kThreads = 4;
  constexpr int kRequests = 500;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::string> keys;
      for (int i = 0; i < 100; ++i) keys.push_back(id_key(static_cast<std::uint64_t>(t * 100 + i)));
      for (int i = 0; i < kRequests; ++i) offer(0, keys);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double dropped = counter("feature_cache_record_dropped_keys_total");
  restart();
  double found = 0;
  for (const fs::path& file : files()) {
    for (const Logged& column : logged(file)) {
      ASSERT_EQ(column.keys.size(), 100U) << "a request is there as a whole, or not at all";
      found += 100;
    }
  }
  EXPECT_EQ(found + dropped, kThreads * kRequests * 100.0);
}

}  // namespace
}  // namespace fc::testing
