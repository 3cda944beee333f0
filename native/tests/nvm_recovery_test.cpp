// What a start makes of an NVM tier that was damaged while nobody had it. Items may be missing
// then. Nothing may be wrong, and what was deleted, overwritten or flushed must not come back.
#include "nvm/format.hpp"
#include "nvm/heartbeat.hpp"
#include "nvm/journal_format.hpp"
#include "nvm/region.hpp"
#include "nvm_recovery_support.hpp"

namespace fc::testing {
namespace {

constexpr std::size_t kRowsAt = 4096;

// One byte that changed; mask 0: it became zero.
struct Flip {
  std::string file;
  std::uint64_t offset;
  std::uint8_t mask;
};

class NvmRecoveryFlips : public NvmRecovery {
 protected:
  // Starts on what a flip left, goes on, ends in order, and starts after a reboot.
  std::string outcome(const Files& files, const Flip& flip, bool once_more, bool may_refuse) const {
    restore(files);
    std::string bytes = files.at(flip.file);
    char& byte = bytes[flip.offset];
    byte = flip.mask == 0 ? '\0' : static_cast<char>(byte ^ flip.mask);
    write(flip.file, bytes);
    try {
      {
        const auto engine = start();
        const std::string found = all_wrong(*engine);
        if (!found.empty()) return found + " after the start (" + engine->start_report().nvm + ")";
        const NamespaceIndex pin = engine->find_namespace("pin");
        put(*engine, pin, "last", "value");
        if (get(*engine, pin, "last").value != "value") return "nothing is taken";
        if (!once_more) return {};
        for (std::size_t key = 1; key < kKeys; key += 5) {
          erase(*engine, pin, Ledger::name_of(key));
        }
        // With a journal it need not end in order.
        const bool journal = config_.persist.durability == DurabilityKind::Sync;
        if (!journal && !engine->shutdown()) return {};
      }
      lose_memory();
      const auto engine = start();
      const std::string found = all_wrong(*engine);
      if (!found.empty()) return found + " after a reboot (" + engine->start_report().nvm + ")";
      for (std::size_t key = 1; key < kKeys; key += 5) {
        const Got got = get(*engine, engine->find_namespace("pin"), Ledger::name_of(key));
        if (!carries_value(got.status)) continue;
        return Ledger::name_of(key) + ", deleted, has come back after a reboot (" +
               engine->start_report().nvm + ")";
      }
    } catch (const std::system_error& error) {
      if (!may_refuse) return std::string("the start fails: ") + error.what();
    }
    return {};
  }

  // All of them, in children; one that crashes or hangs costs no more than its flip.
  void sweep(const Files& files, const std::vector<Flip>& flips, bool once_more) {
    std::atomic<std::uint64_t>& at = ledger_.note();
    at = 0;
    std::size_t failed = 0;
    while (at < flips.size() && failed < 12) {
      const End end = end_of([&] {
        for (; at < flips.size(); ++at) {
          alarm(30);
          const Flip& flip = flips[at];
          // With another magic number the file is somebody else's, and is refused.
          const bool foreign = flip.file == "nvm" && flip.offset < sizeof(std::uint64_t);
          const std::string why = outcome(files, flip, once_more, foreign);
          if (why.empty() && !HasFailure()) continue;
          std::fprintf(stderr, "%s\n", why.c_str());
          _exit(2);
        }
        kill(getpid(), SIGKILL);
      });
      if (end == End::Killed) break;
      ++failed;
      const Flip& flip = flips[at];
      ADD_FAILURE() << flip.file << ", offset " << flip.offset << ", mask " << int{flip.mask};
      ++at;
    }
    std::printf("%zu flips\n", flips.size());
  }
  // Every byte; a few of them where a sanitizer makes each start cost many times as much.
#if defined(FC_TSAN)
  static constexpr std::size_t kEvery = 41;
#elif defined(FC_ASAN)
  static constexpr std::size_t kEvery = 7;
#else
  static constexpr std::size_t kEvery = 1;
#endif
  void add(std::vector<Flip>& flips, const std::string& file, std::uint64_t begin,
           std::uint64_t bytes, std::uint64_t every = 1, bool zero = false) const {
    const std::uint64_t step = every * kEvery;
    for (std::uint64_t i = 0; i < bytes; i += step) {
      flips.push_back({file, begin + i, static_cast<std::uint8_t>(1u << (i / step % 8))});
      if (every == 1) flips.push_back({file, begin + i, 0xff});
      if (zero && files_.at(file)[begin + i] != 0) flips.push_back({file, begin + i, 0});
    }
  }
  // Regions whose header says that they are in use, of those that have a whole trailer.
  std::vector<std::size_t> valid_regions() const {
    std::vector<std::size_t> regions;
    for (std::size_t r = 0; r < kRegions; ++r) {
      const auto header = at<nvm::RegionHeader>("nvm", region_at(r));
      if (header.magic == nvm::kHeaderMagic && header.checksum == header.sum()) {
        regions.push_back(r);
      }
    }
    return regions;
  }
  // A row of every state that there is, header, buffers.
  void flip_memory(bool rows) {
    std::vector<Flip> flips;
    std::map<nvm::RegionState, unsigned> seen;
    for (std::size_t r = 0; rows && r < kRegions; ++r) {
      const std::uint64_t row = kRowsAt + r * sizeof(nvm::Region);
      const auto state =
          static_cast<nvm::RegionState>(files_.at("crash.nvm")[row + offsetof(nvm::Region, state)]);
      if (++seen[state] <= 1) add(flips, "crash.nvm", row, sizeof(nvm::Region), 1, true);
    }
    if (!rows) {
      add(flips, "crash.nvm", 0, 64, 1, true);
      const std::uint64_t buffers = kRowsAt + 4096;
      add(flips, "crash.nvm", buffers, files_.at("crash.nvm").size() - buffers, 1021);
    }
    for (const auto& [state, count] : seen) {
      std::printf("%u rows of state %d\n", count, static_cast<int>(state));
    }
    sweep(files_, flips, rows);
  }
};

// ---- damage

TEST_F(NvmRecoveryFlips, OnTheDeviceIsNoWrongValueAfterAReboot) {
  leave(true);
  if (HasFatalFailure()) return;
  Files files = files_;
  files.erase("crash.arena");
  files.erase("crash.nvm");
  {
    restore(files);
    const auto engine = start();
    ASSERT_EQ(engine->start_report().nvm, "rebuilt") << engine->start_report().nvm_reason;
    std::size_t hits = 0;
    EXPECT_EQ(all_wrong(*engine, &hits), "");
    EXPECT_GT(hits, 500U);
  }
  std::vector<Flip> flips;
  add(flips, "nvm", 0, sizeof(nvm::Superblock));
  for (std::uint64_t beat = 0; beat < 2; ++beat) {
    add(flips, "nvm", nvm::kHeartbeatOffset + beat * 4096, sizeof(nvm::Heartbeat));
  }
  const std::vector<std::size_t> regions = valid_regions();
  ASSERT_GT(regions.size(), 8U);
  for (const std::size_t r : {regions.front(), regions[regions.size() / 2], regions.back()}) {
    const std::uint64_t end = region_at(r) + kRegionBytes - sizeof(nvm::RegionTrailer);
    const auto trailer = at<nvm::RegionTrailer>("nvm", end);
    const std::size_t list = nvm::list_bytes(trailer.records);
    add(flips, "nvm", region_at(r), sizeof(nvm::RegionHeader));
    add(flips, "nvm", end, sizeof(nvm::RegionTrailer));
    add(flips, "nvm", end - list, list, 41);
    add(flips, "nvm", region_at(r) + sizeof(nvm::RegionHeader), trailer.used_bytes, 509);
  }
  sweep(files, flips, false);
}

TEST_F(NvmRecoveryFlips, OfRowsAfterAnOrderlyStop) {
  leave(true);
  if (!HasFatalFailure()) flip_memory(true);
}
TEST_F(NvmRecoveryFlips, OfRowsAfterNone) {
  leave_at("nvm:header_written");
  if (!HasFatalFailure()) flip_memory(true);
}
TEST_F(NvmRecoveryFlips, OfRowsBesideAJournal) {
  config_.persist.durability = DurabilityKind::Sync;
  leave_at("nvm:header_written");
  if (!HasFatalFailure()) flip_memory(true);
}
TEST_F(NvmRecoveryFlips, OfHeaderAndBuffersAfterAnOrderlyStop) {
  leave(true);
  if (!HasFatalFailure()) flip_memory(false);
}
TEST_F(NvmRecoveryFlips, OfHeaderAndBuffersAfterNone) {
  leave_at("nvm:header_written");
  if (!HasFatalFailure()) flip_memory(false);
}

// ---- the journal

class NvmRecoveryJournal : public NvmRecovery {
 protected:
  NvmRecoveryJournal() { config_.persist.durability = DurabilityKind::Sync; }

  // Notes for each key how long the journal was when its last write was acknowledged.
  void leave_journal() {
    const End end = end_of([&] {
      const auto engine = start();
      const Keeper pin(*engine, ledger_);
      pour(pin, 0, kKeys);
      // A busy machine is given the time to write what was demoted.
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      const auto note = [&](std::size_t key) {
        lengths_[key].acknowledged =
            static_cast<std::uint32_t>(std::filesystem::file_size(folder_.file("nvm.journal")));
      };
      for (std::size_t key = 0; key < 300; ++key) {
        key % 3 == 0 ? pin.put(key, key + 1) : pin.erase(key, key + 1);
        note(key);
      }
      kill(getpid(), SIGKILL);
    });
    ASSERT_EQ(end, End::Killed);
    take();
    files_.erase("crash.arena");
    files_.erase("crash.nvm");
    std::uint64_t at_byte = sizeof(nvm::JournalHeader);
    const std::string& journal = files_.at("nvm.journal");
    while (at_byte < journal.size()) {
      last_block_ = at_byte;
      at_byte += at<nvm::JournalBlockHeader>("nvm.journal", at_byte).bytes();
    }
    ASSERT_EQ(at_byte, journal.size());
    ASSERT_GT(journal.size(), 2000U);
  }
  // Whether all whose entries the first `bytes` have are right.
  void look(std::uint64_t bytes, const std::string& what) {
    const auto engine = start();
    std::size_t hits = 0;
    for (std::size_t key = 0; key < kKeys; ++key) {
      if (key < 300 && lengths_[key].acknowledged > bytes) continue;
      const Got got = get(*engine, engine->find_namespace("pin"), Ledger::name_of(key));
      if (!carries_value(got.status)) continue;
      ++hits;
      const std::uint32_t version = ledger_[key].acknowledged;
      EXPECT_EQ(version & Ledger::kGone, 0U) << Ledger::name_of(key) << " is back: " << what;
      EXPECT_TRUE(got.value == Ledger::value_of(key, version & ~Ledger::kGone)) << what;
    }
    nvm_ = engine->start_report().nvm;
    reason_ = engine->start_report().nvm_reason;
    if (nvm_ == "rebuilt") {
      EXPECT_GT(hits, 200U) << what << ", items " << engine->start_report().nvm_items
                            << ", dropped " << engine->start_report().nvm_dropped;
    }
  }

  Ledger lengths_;
  std::uint64_t last_block_ = 0;
  std::string nvm_;
  std::string reason_;
};

TEST_F(NvmRecoveryJournal, ADamagedOneIsNotBelieved) {
  leave_journal();
  if (HasFatalFailure()) return;
  restore(files_);
  look(~0ull, "whole");
  EXPECT_EQ(nvm_, "rebuilt") << reason_;
  const std::string& journal = files_.at("nvm.journal");
  for (std::uint64_t at = 0; at < journal.size() && !HasFailure(); at += at < 160 ? 1 : 37) {
    const std::string what = "byte " + std::to_string(at);
    std::string damaged = journal;
    damaged[at] = static_cast<char>(damaged[at] ^ (1u << at % 8));
    restore(files_);
    write("nvm.journal", damaged);
    try {
      look(at < last_block_ ? ~0ull : last_block_, what);
    } catch (const std::system_error&) {
      // Another magic number: somebody else's file, which is not written over.
      EXPECT_LT(at, sizeof(std::uint64_t)) << what;
      continue;
    }
    if (at >= last_block_) continue;
    EXPECT_EQ(nvm_, "empty") << what;
    EXPECT_NE(reason_, "") << what;
  }
  restore(files_);
  std::filesystem::remove(folder_.file("nvm.journal"));
  look(~0ull, "none");
  EXPECT_EQ(nvm_, "empty");
}

TEST_F(NvmRecoveryJournal, WhatACutOneSaysHolds) {
  leave_journal();
  if (HasFatalFailure()) return;
  const std::string& journal = files_.at("nvm.journal");
  for (std::uint64_t bytes = 0; bytes < journal.size() && !HasFailure();
       bytes += bytes < 200 ? 7 : 131) {
    restore(files_);
    write("nvm.journal", journal.substr(0, bytes));
    try {
      look(bytes, "cut to " + std::to_string(bytes));
    } catch (const std::system_error&) {
      // Not even its magic number: it may be somebody else's.
      EXPECT_LT(bytes, sizeof(std::uint64_t));
    }
  }
}

// ---- the clock

TEST_F(NvmRecovery, InAnEarlierTimeOfDayNothingThatExpiresIsServed) {
  config_.persist.spill_on_shutdown = true;
  const End end = end_of([&] {
    const auto engine = start();
    pour(Keeper(*engine, ledger_), 0, 700);
    const Keeper user(*engine, others_, "user");
    for (std::size_t key = 0; key < 300; key += 20) {
      user.put(key, key + 20, 10'000'000);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    // A mixed region: one that expires among many that do not.
    Keeper(*engine, ledger_).put(700, 701, 10'000'000);
    if (!engine->shutdown()) _exit(2);
    kill(getpid(), SIGKILL);
  });
  ASSERT_EQ(end, End::Killed);
  take();
  files_.erase("crash.arena");
  files_.erase("crash.nvm");
  for (const std::int64_t ahead_ms : {0, 3'600'000}) {
    for (const bool keep : {false, true}) {
      restore(files_);
      std::string device = files_.at("nvm");
      for (std::uint64_t beat = 0; beat < 2; ++beat) {
        const std::uint64_t offset = nvm::kHeartbeatOffset + beat * 4096;
        auto heartbeat = at<nvm::Heartbeat>("nvm", offset);
        if (ahead_ms != 0) heartbeat.boot_id[0] ^= 1;
        heartbeat.wall_ms += static_cast<std::uint64_t>(ahead_ms);
        heartbeat.checksum = heartbeat.sum();
        std::memcpy(device.data() + offset, &heartbeat, sizeof(heartbeat));
      }
      write("nvm", device);
      config_.persist.keep_on_clock_doubt = keep;
      const bool doubted = ahead_ms != 0 && !keep;
      for (int life = 0; life < 2; ++life) {
        const auto engine = start();
        ASSERT_EQ(engine->start_report().nvm, "rebuilt") << engine->start_report().nvm_reason;
        std::size_t lasting = 0;
        std::size_t brief = 0;
        EXPECT_EQ(wrong(*engine, ledger_, "pin", 700, &lasting), "");
        EXPECT_EQ(wrong(*engine, others_, "user", 300, &brief), "");
        EXPECT_GT(lasting, 200U);
        if (doubted) {
          EXPECT_EQ(brief, 0U);
          EXPECT_EQ(get(*engine, engine->find_namespace("pin"), Ledger::name_of(700)).status,
                    CellStatus::Miss);
        } else {
          EXPECT_GT(brief, 200U);
        }
        // What was left out stays out: the clock is right again at the next start.
        EXPECT_TRUE(engine->shutdown());
        lose_memory();
      }
    }
  }
}

}  // namespace
}  // namespace fc::testing
