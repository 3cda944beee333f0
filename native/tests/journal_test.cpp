// The log of invalid NVM records: what was declared durable is there after every kind of end, and
// nothing is ever there that was not appended.
#include "nvm/journal.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "device_support.hpp"
#include "persist_support.hpp"
#include "support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::nvm {
namespace {

using testing::Child;
using testing::error_of;
using testing::Folder;
using testing::Mounted;
using testing::read_file;
using testing::SequencePoints;
using testing::write_file;
using Entries = std::vector<JournalEntry>;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kSet = 0x1234;
constexpr std::uint64_t kHour = 3'600'000;

JournalOptions sync_mode(std::uint64_t compact_bytes = std::uint64_t{64} << 20) {
  return {DurabilityKind::Sync, 0, compact_bytes};
}
JournalOptions bounded(std::uint64_t window_ms) {
  return {DurabilityKind::Bounded, window_ms, std::uint64_t{64} << 20};
}
bool all_matter(const JournalEntry&) {
  return true;
}
std::unique_ptr<Journal> started(const std::string& path, const JournalOptions& options,
                                 std::span<const JournalEntry> carried = {}) {
  return Journal::start(path, kSet, options, all_matter, carried);
}
// `thread` and `number` as a record.
JournalEntry entry(std::uint32_t thread, std::uint64_t number) {
  return JournalEntry::record(thread, number, static_cast<std::uint32_t>(number % 1000) * 8);
}
Entries entries_in(const std::string& path) {
  std::string why;
  auto read = Journal::read(path, kSet, &why);
  EXPECT_TRUE(read.has_value()) << why;
  return std::move(read).value_or(Entries{});
}
std::string why_not(const std::string& path, std::uint64_t set = kSet) {
  std::string why;
  return Journal::read(path, set, &why) ? "" : why;
}
std::string start_error(const std::string& path) {
  return error_of([&path] { (void)started(path, sync_mode()); });
}

TEST(JournalEntry, KeepsWhatItIsGiven) {
  constexpr std::uint64_t kGeneration = JournalEntry::kGenerationMask;
  const auto record = JournalEntry::record(0xffffffff, kGeneration, 0xfffffff8);
  EXPECT_EQ(JournalEntry::Kind::Record, record.kind());
  EXPECT_EQ(0xffffffffu, record.region());
  EXPECT_EQ(kGeneration, record.generation());
  EXPECT_EQ(0xfffffff8u, record.offset());
  const auto gone = JournalEntry::region_gone(7, 9);
  EXPECT_EQ(JournalEntry::Kind::Region, gone.kind());
  EXPECT_EQ(7u, gone.region());
  EXPECT_EQ(9u, gone.generation());
  const auto flush = JournalEntry::flush(~std::uint64_t{0}, 11);
  EXPECT_EQ(JournalEntry::Kind::Flush, flush.kind());
  EXPECT_EQ(~std::uint64_t{0}, flush.namespace_seed());
  EXPECT_EQ(11u, flush.generation());
}

TEST(Journal, KeepsEverythingInOrder) {
  const Folder folder;
  const Entries carried = {JournalEntry::flush(3, 4), JournalEntry::region_gone(5, 6)};
  Entries expected = carried;
  {
    const auto journal = started(folder.file(), sync_mode(), carried);
    EXPECT_EQ(0u, journal->tail());
    EXPECT_TRUE(journal->wait_durable(0));
    for (std::uint32_t i = 1; i <= 500; ++i) {
      expected.push_back(entry(1, i));
      EXPECT_EQ(i, journal->append(expected.back()));
      if (i % 50 == 0) {
        EXPECT_TRUE(journal->wait_durable(i));
        EXPECT_LE(i, journal->durable_position());
        EXPECT_EQ(expected, entries_in(folder.file()));
      }
    }
    expected.push_back(JournalEntry::region_gone(1, 2));
    (void)journal->append(expected.back());
    EXPECT_EQ(501u, journal->tail());
    EXPECT_FALSE(journal->failed());
    EXPECT_EQ("", journal->reason());
  }
  EXPECT_EQ(expected, entries_in(folder.file())) << "its end leaves nothing unwritten";
  struct stat status {};
  ASSERT_EQ(0, stat(folder.file().c_str(), &status));
  EXPECT_EQ(0600u, status.st_mode & 07777);
  // Another begins empty, and what a dead process left half-made is no obstacle.
  write_file(folder.file() + ".new", "half");
  (void)started(folder.file(), bounded(10));
  EXPECT_TRUE(entries_in(folder.file()).empty());
  EXPECT_FALSE(std::filesystem::exists(folder.file() + ".new"));
}

TEST(Journal, SyncsOnceForAllThatCameMeanwhile) {
  const Folder folder;
  const auto journal = started(folder.file(), sync_mode());
  SequencePoints points;
  points.block("journal:written");
  (void)journal->append(entry(0, 1));
  ASSERT_TRUE(points.wait_blocked("journal:written"));
  EXPECT_EQ(0u, journal->durable_position()) << "written is not synced";
  std::atomic<int> answered{0};
  std::vector<std::thread> threads;
  for (std::uint32_t t = 1; t <= 8; ++t) {
    threads.emplace_back([&, t] {
      std::uint64_t position = 0;
      for (std::uint64_t i = 0; i < 100; ++i) position = journal->append(entry(t, i));
      if (journal->wait_durable(position)) ++answered;
    });
  }
  while (journal->tail() < 801) std::this_thread::yield();
  EXPECT_EQ(0, answered.load());
  points.release("journal:written");
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(8, answered.load());
  EXPECT_EQ(801u, journal->durable_position());
  EXPECT_EQ(2u, journal->syncs());
  EXPECT_EQ(801u, entries_in(folder.file()).size());
}

TEST(Journal, WritesWithinTheWindowAndAtOnceWhenAsked) {
  const Folder folder;
  {
    const auto journal = started(folder.file(), bounded(1000));
    const auto from = Clock::now();
    for (std::uint64_t i = 0; i < 50; ++i) {
      (void)journal->append(entry(0, i));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    while (journal->durable_position() < 50 && !journal->failed()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_LT(Clock::now() - from, std::chrono::milliseconds(1000));
    EXPECT_EQ(1u, journal->syncs());
  }
  const auto journal = started(folder.file(), bounded(kHour));
  const auto position = journal->append(entry(0, 1));
  EXPECT_TRUE(journal->wait_durable(position));
  // And no more than a block waits for the window.
  for (std::uint64_t i = 0; i < JournalBlockHeader::kEntriesMax; ++i) {
    (void)journal->append(entry(0, i));
  }
  while (journal->durable_position() < position + JournalBlockHeader::kEntriesMax) {
    ASSERT_FALSE(journal->failed());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(Journal, FailsRatherThanGrows) {
  const Folder folder;
  SequencePoints points;
  const auto journal = started(folder.file(), bounded(kHour));
  points.block("journal:written");
  const auto first = journal->append(entry(0, 0));
  std::atomic<bool> first_durable{false};
  std::thread waiting([&] { first_durable = journal->wait_durable(first); });
  ASSERT_TRUE(points.wait_blocked("journal:written"));
  for (std::size_t i = 0; i < Journal::kPendingMax; ++i) (void)journal->append(entry(1, i));
  EXPECT_FALSE(journal->failed());
  const auto lost = journal->append(entry(2, 0));
  EXPECT_TRUE(journal->failed());
  EXPECT_FALSE(journal->wait_durable(lost));
  EXPECT_SAYS(journal->reason(), "wait to be written");
  points.release("journal:written");
  waiting.join();
  EXPECT_FALSE(journal->wait_durable(journal->append(entry(2, 1)))) << "it does not recover";
  EXPECT_LT(journal->durable_position(), lost);
}

// Children append in several threads and tell what they were told is durable.
TEST(Journal, HoldsWhatItPromisedWhenKilled) {
  for (const bool rewriting : {false, true}) {
    for (std::uint64_t round = 0; round < testing::scaled(10); ++round) {
      const Folder folder;
      Child child([&](int told) {
        // Never to the end of the child: it is killed. Nothing is dropped, only rewritten.
        auto* journal = started(folder.file(), sync_mode(rewriting ? 2000 : 1 << 20)).release();
        for (std::uint32_t t = 0; t < 3; ++t) {
          std::thread([=] {
            for (std::uint64_t i = 0;; ++i) {
              const auto position = journal->append(entry(t, i));
              if (i % 3 != 0 || !journal->wait_durable(position)) continue;
              const std::uint64_t acknowledged = t | i << 8;
              (void)!write(told, &acknowledged, sizeof(acknowledged));
            }
          }).detach();
        }
        for (;;) pause();
      });
      std::string told = child.first(8 * (1 + 150 * round));
      child.kill_hard();
      told += child.rest();
      std::map<std::uint64_t, std::uint64_t> seen;  // of a thread: how many, in order
      for (const JournalEntry& each : entries_in(folder.file())) {
        ASSERT_EQ(entry(each.region(), seen[each.region()]++), each);
      }
      for (std::size_t at = 0; at + 8 <= told.size(); at += 8) {
        std::uint64_t acknowledged = 0;
        std::memcpy(&acknowledged, told.data() + at, 8);
        ASSERT_LT(acknowledged >> 8, seen[acknowledged & 0xff]);
      }
      EXPECT_LE(8 * (1 + 150 * round), told.size());
    }
  }
}

TEST(Journal, LeavesOneWholeLogWhereverARewriteIsKilled) {
  for (const char* point : {"journal:install", "journal:renamed"}) {
    const Folder folder;
    Child child([&](int) {
      auto* journal =
          Journal::start(folder.file(), kSet, sync_mode(4000), [](const JournalEntry& each) {
            return each.region() == 1;
          }).release();
      auto* points = new SequencePoints;
      // All that follows the first is one batch: the rewrite begins when it is durable.
      points->block("journal:written");
      (void)journal->append(entry(1, 0));
      std::uint64_t position = 0;
      const bool blocked = points->wait_blocked("journal:written");
      for (std::uint64_t i = 0; i < 200; ++i) {
        if (i != 0) (void)journal->append(entry(1, i));
        position = journal->append(entry(2, i));
      }
      points->block(point);
      points->release("journal:written");
      if (!blocked || !journal->wait_durable(position) || !points->wait_blocked(point)) {
        throw std::runtime_error("no rewrite");
      }
    });
    child.expect_done();
    child.kill_hard();
    std::uint64_t next = 0;
    for (const JournalEntry& each : entries_in(folder.file())) {
      if (each.region() == 1) {
        ASSERT_EQ(entry(1, next++), each);
      }
    }
    EXPECT_EQ(200u, next) << point;
  }
}

TEST(Journal, LosesNothingThatComesWhileItIsRewritten) {
  const Folder folder;
  constexpr std::uint64_t kEach = 3000;
  const auto matters = [](const JournalEntry& each) { return each.generation() % 16 == 0; };
  std::uint64_t rewrites = 0;
  {
    const auto journal = Journal::start(folder.file(), kSet, sync_mode(8192), matters);
    std::vector<std::thread> threads;
    for (std::uint32_t t = 0; t < 4; ++t) {
      threads.emplace_back([&journal, t] {
        for (std::uint64_t i = 0; i < kEach; ++i) {
          const auto position = journal->append(entry(t, i));
          if (i % 100 == 0) {
            EXPECT_TRUE(journal->wait_durable(position));
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(journal->wait_durable(journal->tail()));
    rewrites = journal->rewrites();
    EXPECT_FALSE(journal->failed()) << journal->reason();
  }
  EXPECT_LT(0u, rewrites);
  std::map<std::uint64_t, std::uint64_t> next;
  const Entries all = entries_in(folder.file());
  for (const JournalEntry& each : all) {
    if (!matters(each)) continue;
    ASSERT_EQ(entry(each.region(), next[each.region()]), each);
    next[each.region()] += 16;
  }
  for (std::uint32_t t = 0; t < 4; ++t) EXPECT_EQ((kEach + 15) / 16 * 16, next[t]);
  EXPECT_LT(all.size(), 4 * kEach);
  EXPECT_FALSE(std::filesystem::exists(folder.file() + ".new"));
}

// Who waits while a long log is rewritten is answered before that has ended.
TEST(Journal, AnswersWhileItIsRewritten) {
  const Folder folder;
  constexpr std::uint64_t kMany = 3 * JournalBlockHeader::kEntriesMax;
  std::atomic<bool> asked{false};
  std::atomic<bool> appended{false};
  std::atomic<bool> answered{false};
  std::uint64_t calls = 0;
  const auto until = Clock::now() + std::chrono::minutes(1);
  const auto wait_for = [&until](const std::atomic<bool>& what) {
    while (!what && Clock::now() < until) std::this_thread::yield();
  };
  const auto matters = [&](const JournalEntry&) {
    ++calls;
    if (calls == 1) asked = true;
    if (calls == 1) wait_for(appended);
    if (calls == kMany) wait_for(answered);
    return calls % 2 == 0;
  };
  SequencePoints points;
  points.block("journal:written");
  const auto journal = Journal::start(folder.file(), kSet, sync_mode(kMany), matters);
  (void)journal->append(entry(0, 0));
  ASSERT_TRUE(points.wait_blocked("journal:written"));
  for (std::uint64_t i = 1; i < kMany; ++i) (void)journal->append(entry(0, i));
  points.release("journal:written");
  wait_for(asked);
  const auto position = journal->append(entry(1, 0));
  appended = true;
  EXPECT_TRUE(journal->wait_durable(position));
  EXPECT_EQ(0u, journal->rewrites()) << "it was answered only after the log was rewritten";
  answered = true;
  EXPECT_LT(Clock::now(), until);
  while (journal->rewrites() == 0 && !journal->failed()) std::this_thread::yield();
  const Entries left = entries_in(folder.file());
  EXPECT_LT(left.size(), kMany);
  EXPECT_LE(kMany / 2, left.size());
}

TEST(Journal, StopsInTheMidstOfARewrite) {
  const Folder folder;
  std::atomic<bool> asked{false};
  {
    const auto slow = [&asked](const JournalEntry&) {
      asked = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return false;
    };
    const auto journal = Journal::start(folder.file(), kSet, sync_mode(100), slow);
    for (std::uint64_t i = 0; i < 20; ++i) {
      EXPECT_TRUE(journal->wait_durable(journal->append(entry(0, i))) || journal->failed());
    }
    while (!asked) std::this_thread::yield();
    (void)journal->append(entry(1, 77));
  }
  const Entries all = entries_in(folder.file());
  ASSERT_FALSE(all.empty());
  EXPECT_EQ(entry(1, 77), all.back());
  EXPECT_FALSE(std::filesystem::exists(folder.file() + ".new"));
}

// A log of several blocks, as bytes, and where its last block begins.
class JournalDamage : public ::testing::Test {
 protected:
  void SetUp() override {
    {
      const auto journal = started(path_, bounded(kHour));
      for (const std::uint64_t block : {1u, 3u, 2u, 7u, 1u, 4u}) {
        last_at_ = journal->bytes();
        last_ = all_.size();
        for (std::uint64_t i = 0; i < block; ++i) {
          all_.push_back(i == 1 ? JournalEntry::region_gone(24, 1) : entry(3, i + block));
          (void)journal->append(all_.back());
        }
        ASSERT_TRUE(journal->wait_durable(journal->tail()));
        ends_.push_back(journal->bytes());
      }
    }
    bytes_ = read_file(path_);
    ASSERT_EQ(ends_.back(), bytes_.size());
    ASSERT_EQ(all_, entries_in(path_));
  }
  // Nothing, or as many as were appended first.
  std::optional<std::size_t> read_of(const std::string& bytes) {
    write_file(path_, bytes);
    const auto read = Journal::read(path_, kSet, nullptr);
    if (!read) return std::nullopt;
    EXPECT_LE(read->size(), all_.size());
    EXPECT_TRUE(std::equal(read->begin(), read->end(), all_.begin())) << "never appended";
    return read->size();
  }
  std::string block(std::size_t number) const {
    const std::size_t from = number == 0 ? sizeof(JournalHeader) : ends_[number - 1];
    return bytes_.substr(from, ends_[number] - from);
  }

  const Folder folder_;
  const std::string path_ = folder_.file();
  Entries all_;
  std::string bytes_;
  std::vector<std::size_t> ends_;
  std::size_t last_ = 0;  // entries before the last block
  std::size_t last_at_ = 0;
};

TEST_F(JournalDamage, IsSeenInEveryBit) {
  for (std::size_t at = 0; at < bytes_.size(); ++at) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      std::string flipped = bytes_;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
      const auto read = read_of(flipped);
      // In the last block it looks as if that had been torn when the machine died.
      if (at < last_at_) {
        ASSERT_FALSE(read.has_value()) << at;
      } else {
        ASSERT_EQ(last_, read) << at;
      }
    }
  }
}

TEST_F(JournalDamage, ATornEndCostsTheLastBlockAlone) {
  constexpr std::size_t kEntriesUpTo[] = {0, 1, 4, 6, 13, 14, 18};
  const auto whole_in = [&](const std::string& bytes) -> std::optional<std::size_t> {
    const auto same = [&](std::size_t end) { return bytes.compare(0, end, bytes_, 0, end) == 0; };
    if (!same(sizeof(JournalHeader))) return std::nullopt;
    return kEntriesUpTo[std::count_if(ends_.begin(), ends_.end(), same)];
  };
  for (std::size_t size = 0; size <= bytes_.size(); ++size) {
    std::string cut = bytes_.substr(0, size);
    ASSERT_EQ(whole_in(cut), read_of(cut)) << size;
    // The file's length was written and its bytes were not.
    cut.resize(bytes_.size() + 5000);
    ASSERT_EQ(whole_in(cut), read_of(cut)) << size;
  }
}

TEST_F(JournalDamage, BlocksThatAreMissingOrOfAnotherLogAreSeen) {
  const std::string header = bytes_.substr(0, sizeof(JournalHeader));
  EXPECT_EQ(all_.size(), read_of(bytes_));
  EXPECT_FALSE(read_of(header + block(1)));
  EXPECT_FALSE(read_of(header + block(0) + block(2)));
  EXPECT_FALSE(read_of(header + block(0) + block(0)));
  EXPECT_FALSE(read_of(header + block(0) + std::string(80, 'x') + block(3)));
  const std::string far(std::size_t{3} << 20, '\0');
  EXPECT_FALSE(read_of(header + block(0) + far + block(2)));
  EXPECT_EQ(1u, read_of(header + block(0) + far));
  // What another log left on the same disk blocks: as long, of the same devices, not ours.
  const std::string other = folder_.file("other");
  { (void)started(other, sync_mode(), all_); }
  const std::string foreign = read_file(other).substr(sizeof(JournalHeader));
  EXPECT_EQ(0u, read_of(header + foreign));
  EXPECT_EQ(all_.size(), read_of(bytes_ + foreign));
}

TEST_F(JournalDamage, NoBytesAtAllMakeItCrash) {
  std::mt19937_64 random(testing::seed_of(11));
  for (std::size_t round = 0; round < testing::scaled(4000); ++round) {
    std::string bytes = bytes_;
    for (std::uint64_t changes = 1 + random() % 4; changes > 0; --changes) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:  // any byte
          bytes[at] = static_cast<char>(random());
          break;
        case 1:  // a piece from elsewhere
          bytes.insert(at, bytes_, random() % bytes_.size(), random() % 200);
          break;
        case 2:
          bytes.erase(at, random() % 100);
          if (bytes.empty()) bytes = "x";
          break;
        default:  // numbers that are counts and lengths
          for (std::size_t i = at; i < std::min(at + 8, bytes.size()); ++i) {
            bytes[i] = static_cast<char>(random() % 3 == 0 ? 0xff : random() % 2);
          }
      }
    }
    (void)read_of(bytes);
  }
}

TEST_F(JournalDamage, TheFileIsOfTheseDevicesAndThisFormat) {
  EXPECT_SAYS(why_not(path_, kSet + 1), "other devices");
  EXPECT_SAYS(why_not(folder_.file("none")), "there is none");
  EXPECT_SAYS(why_not(folder_.path()), "no plain file");
  ASSERT_EQ(0, symlink(path_.c_str(), folder_.file("link").c_str()));
  EXPECT_SAYS(why_not(folder_.file("link")), "cannot be opened");
  JournalHeader header{};
  std::memcpy(&header, bytes_.data(), sizeof(header));
  header.version = 2;
  header.checksum = header.sum();
  std::string newer = bytes_;
  std::memcpy(newer.data(), &header, sizeof(header));
  EXPECT_FALSE(read_of(newer));
  EXPECT_SAYS(why_not(path_), "format version 2, this is version 1");
  EXPECT_FALSE(read_of(bytes_.substr(0, 20) + "x" + bytes_.substr(21)));
  EXPECT_SAYS(why_not(path_), "header is damaged");
  EXPECT_FALSE(read_of(bytes_.substr(0, last_at_ - 9) + "x" + bytes_.substr(last_at_ - 8)));
  EXPECT_SAYS(why_not(path_), "damaged at byte");
  ASSERT_EQ(0, chown(path_.c_str(), 4242, 0));
  EXPECT_SAYS(why_not(path_), "another user's");
}

TEST(JournalStart, ReplacesNothingButALog) {
  const Folder folder;
  EXPECT_SAYS(start_error(folder.file("none/x")), "directory does not exist");
  EXPECT_SAYS(start_error(folder.path()), "no plain file");
  write_file(folder.file("theirs"), "important and long enough");
  EXPECT_SAYS(start_error(folder.file("theirs")), "a file of something else");
  EXPECT_EQ("important and long enough", read_file(folder.file("theirs")));
  ASSERT_EQ(0, symlink(folder.file("theirs").c_str(), folder.file("link").c_str()));
  EXPECT_SAYS(start_error(folder.file("link")), "symbolic link");
  { (void)started(folder.file(), sync_mode()); }
  ASSERT_EQ(0, chown(folder.file().c_str(), 4242, 0));
  EXPECT_SAYS(start_error(folder.file()), "file of user 4242");
  write_file(folder.file("empty"), "");
  EXPECT_EQ("", start_error(folder.file("empty")));
}

TEST(JournalFull, FailsForGoodAndKeepsWhatItPromised) {
  const Mounted mount("tmpfs", "size=256k,mode=0700");
  std::uint64_t promised = 0;
  {
    const auto journal = started(mount.file(), sync_mode());
    for (std::uint64_t i = 0; i < 20'000 && !journal->failed(); ++i) {
      const auto position = journal->append(entry(0, i));
      if (i % 50 == 49 && journal->wait_durable(position)) promised = position;
    }
    EXPECT_TRUE(journal->failed());
    EXPECT_SAYS(journal->reason(), "No space left");
    EXPECT_FALSE(journal->wait_durable(journal->append(entry(0, 0))));
    EXPECT_LE(promised, journal->durable_position());
  }
  EXPECT_LT(0u, promised);
  const Entries all = entries_in(mount.file());
  ASSERT_LE(promised, all.size());
  for (std::uint64_t i = 0; i < all.size(); ++i) ASSERT_EQ(entry(0, i), all[i]);
  // No room for a new log beside it: the old one stays whole.
  EXPECT_SAYS(start_error(mount.file()), "no room left");
  EXPECT_EQ(all, entries_in(mount.file()));
}

TEST(JournalFull, GoesOnWhereThereIsNoRoomToRewriteIt) {
  const Mounted mount("tmpfs", "size=256k,mode=0700");
  const auto journal = started(mount.file(), sync_mode(140 * 1024));
  for (std::uint64_t i = 0; i < 10'000; ++i) {
    const auto position = journal->append(entry(0, i));
    if (i % 100 == 99) {
      ASSERT_TRUE(journal->wait_durable(position)) << journal->reason();
    }
  }
  EXPECT_EQ(0u, journal->rewrites());
  EXPECT_FALSE(journal->failed()) << journal->reason();
  EXPECT_EQ(10'000u, entries_in(mount.file()).size());
}

TEST(JournalErrors, ASyncThatFailsPromisesNothing) {
  const Folder folder;
  EXPECT_EQ("NVM journal " + folder.file() + ": it cannot be written: Input/output error",
            testing::in_child([&folder]() -> std::string {
              testing::refuse(SYS_fdatasync, EIO);
              const auto journal = started(folder.file(), sync_mode());
              if (journal->wait_durable(journal->append(entry(0, 1)))) return "promised";
              if (journal->durable_position() != 0) return "durable";
              return journal->reason();
            }));
}

}  // namespace
}  // namespace fc::nvm
