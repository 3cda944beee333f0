// The recorder: what is recorded is read again, whatever becomes of files, disks and clocks.

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <thread>

#include "request_log/recorder.hpp"
#include "request_log_support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {
namespace {

using request_log::Recorder;
namespace fs = std::filesystem;

constexpr std::uint64_t kStart = 1'700'000'000'000;
constexpr std::uint64_t kWindow = 600'000;

using Bytes = std::vector<std::uint8_t>;

Bytes slurp(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
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
  void crash() {
    [[maybe_unused]] static Recorder* volatile gone;  // what is still known to somebody is no leak
    gone = recorder_.release();
  }

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
  config_.max_bytes = 2u << 20;
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

TEST_F(RequestLog, AWindowMayTakeAllOfTheDirectoryAndNoMore) {
  config_.max_bytes = 1u << 20;
  std::mt19937_64 random(1);
  std::vector<std::string> keys(1000);
  for (int i = 0; i < 400; ++i) {
    for (std::string& key : keys) key = id_key(random());
    offer(0, keys);
    recorder().write_out();
  }
  const double dropped = counter("feature_cache_record_dropped_keys_total");
  EXPECT_GT(dropped, 200'000);
  restart();
  ASSERT_EQ(files().size(), 1U);
  const std::uintmax_t bytes = fs::file_size(files()[0]);
  EXPECT_LE(bytes, config_.max_bytes);
  EXPECT_GT(bytes, config_.max_bytes / 3);
  LogInfo info;
  ASSERT_EQ(inspect_log(slurp(files()[0]), info), LogFault::None);
  EXPECT_TRUE(info.complete);
  EXPECT_EQ(static_cast<double>(info.keys) + dropped, 400'000);
  EXPECT_EQ(static_cast<double>(info.dropped_keys), dropped);
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
  const double dropped = counter("feature_cache_record_dropped_keys_total");
  EXPECT_GT(dropped, 30'000);
  recorder().write_out();
  offer(0, {"room again"});
  recorder().write_out();
  restart();
  EXPECT_EQ(keys_of(files().at(0)).back(), "room again");
  LogInfo info;
  ASSERT_EQ(inspect_log(slurp(files()[0]), info), LogFault::None);
  EXPECT_EQ(static_cast<double>(info.dropped_keys), dropped);
}

TEST_F(RequestLog, WithoutMemoryLogIsLostAndNothingElse) {
  offer(0, {"before"});
  recorder().write_out();  // a block of its own
  offer(0, {"waits for its block"});
  recorder().write_out();
  {
    SequencePoints points;
    points.exhaust("request_log:encoded");
    offer(0, {"meanwhile", "before"});
    recorder().write_out();
    EXPECT_EQ(points.reached("request_log:encoded"), 1U);
  }
  EXPECT_EQ(counter("feature_cache_record_dropped_keys_total"), 3);
  offer(0, {"after", "before"});
  recorder().write_out();
  restart();
  std::vector<std::string> found;
  for (const fs::path& file : files()) {
    for (const std::string& key : keys_of(file)) found.push_back(key);
  }
  std::sort(found.begin(), found.end());  // files of one window come in any order
  EXPECT_EQ(found, (std::vector<std::string>{"after", "before", "before"}));
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
