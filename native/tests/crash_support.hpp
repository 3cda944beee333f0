// Processes that die at a chosen place of the code, and what they had acknowledged by then.
//
// A child opens an engine, works, and is killed by SIGKILL exactly when one of its threads reaches
// a sequence point. What it wrote, it noted before and after in memory that it shares with the
// test; the test then adopts what is left.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support.hpp"
#include "testing/sequence_point.hpp"

namespace fc::testing {

// A directory on tmpfs that goes away.
class CrashFolder {
 public:
  CrashFolder() {
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("mkdtemp " + path_);
  }
  ~CrashFolder() { std::filesystem::remove_all(path_); }
  CrashFolder(const CrashFolder&) = delete;
  CrashFolder& operator=(const CrashFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_ = "/dev/shm/fc-crash-XXXXXX";
};

// What became of each key: the version that was acknowledged last and the one that was begun last.
// A version counts the key's writes; a delete or flush has kGone. One writer at a time.
class Ledger {
 public:
  static constexpr std::size_t kKeys = 8192;
  static constexpr std::uint32_t kGone = 1u << 31;

  struct Key {
    std::atomic<std::uint32_t> begun;
    std::atomic<std::uint32_t> acknowledged;
  };

  Ledger() {
    void* memory =
        mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    shared_ = static_cast<Shared*>(memory);
    for (Key& key : shared_->keys) key.begun = key.acknowledged = kGone;
  }
  ~Ledger() { munmap(shared_, sizeof(Shared)); }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  Key& operator[](std::size_t key) const { return shared_->keys[key]; }
  // Of whatever a child wants to tell.
  std::atomic<std::uint64_t>& note() const { return shared_->note; }

  static std::string name_of(std::size_t key) {
    const std::string number = std::to_string(key);
    return "key " + std::string(6 - number.size(), '0') + number;
  }
  // Sizes differ by key and version; every 97th key is larger than a segment.
  static std::string value_of(std::size_t key, std::uint32_t version) {
    const std::size_t bytes =
        key % 97 == 96 ? 20'000 + version % 40'000 : 1 + (key * 31 + version * 17) % 400;
    return patterned(name_of(key), version, bytes);
  }

 private:
  struct Shared {
    std::array<Key, kKeys> keys;
    std::atomic<std::uint64_t> note;
  };
  Shared* shared_ = nullptr;
};

// Writes and reads through an engine, and keeps the ledger.
class Keeper {
 public:
  Keeper(Engine& engine, const Ledger& ledger, const char* ns = "pin")
      : engine_(engine), ledger_(ledger), ns_(engine.find_namespace(ns)) {}

  void put(std::size_t begin, std::size_t end, std::uint64_t ttl_ms = 0) const {
    for (std::size_t key = begin; key < end; ++key) {
      const std::uint32_t version = begin_write(key, 0);
      const WriteStatus status = testing::put(engine_, ns_, Ledger::name_of(key),
                                              Ledger::value_of(key, version), kNoDomain, ttl_ms);
      // Rejected: neither it nor an older value.
      ledger_[key].acknowledged =
          status == WriteStatus::Stored ? version : (version | Ledger::kGone);
      if (status != WriteStatus::Stored) ledger_[key].begun = version | Ledger::kGone;
    }
  }
  void erase(std::size_t begin, std::size_t end, std::size_t step = 1) const {
    for (std::size_t key = begin; key < end; key += step) {
      const std::uint32_t version = begin_write(key, Ledger::kGone);
      testing::erase(engine_, ns_, Ledger::name_of(key));
      ledger_[key].acknowledged = version;
    }
  }
  void flush() const {
    for (std::size_t key = 0; key < Ledger::kKeys; ++key) begin_write(key, Ledger::kGone);
    engine_.flush(ns_);
    for (std::size_t key = 0; key < Ledger::kKeys; ++key) {
      ledger_[key].acknowledged = ledger_[key].begun.load();
    }
  }
  void touch(std::size_t begin, std::size_t end, unsigned times) const {
    for (unsigned i = 0; i < times; ++i) {
      for (std::size_t key = begin; key < end; ++key) get(engine_, ns_, Ledger::name_of(key));
    }
  }

  // Compares every key, and takes what it saw for the truth from now on. Returns how many are
  // there. `may_lack`: the engine may have evicted.
  std::size_t compare(bool may_lack) const {
    std::size_t found = 0;
    for (std::size_t key = 0; key < Ledger::kKeys; ++key) {
      const std::uint32_t old = ledger_[key].acknowledged;
      const std::uint32_t begun = ledger_[key].begun;
      const Got got = get(engine_, ns_, Ledger::name_of(key));
      if (!carries_value(got.status)) {
        const bool gone = ((old | begun) & Ledger::kGone) != 0;
        if (!gone && !may_lack) ADD_FAILURE() << Ledger::name_of(key) << " is missing";
        // With a tier below a lost read is not for ever; what may be there stays so.
        if (gone && (begun & Ledger::kGone) != 0) ledger_[key].acknowledged = begun;
        continue;
      }
      ++found;
      const auto is = [&](std::uint32_t version) {
        return (version & Ledger::kGone) == 0 && got.value == Ledger::value_of(key, version);
      };
      if (!is(old) && !is(begun)) {
        std::uint32_t whose = 0;
        for (std::uint32_t version = 1; version < 64; ++version) {
          if (got.value == Ledger::value_of(key, version)) whose = version;
        }
        ADD_FAILURE() << Ledger::name_of(key) << " has a wrong value of " << got.value.size()
                      << " bytes: version " << whose << " (0: of none); acknowledged "
                      << (old & ~Ledger::kGone) << (old & Ledger::kGone ? " (gone)" : "")
                      << ", begun " << (begun & ~Ledger::kGone)
                      << (begun & Ledger::kGone ? " (gone)" : "");
        continue;
      }
      ledger_[key].acknowledged = is(begun) ? begun : old;
      ledger_[key].begun = ledger_[key].acknowledged.load();
    }
    return found;
  }

  Engine& engine() const { return engine_; }

 private:
  std::uint32_t begin_write(std::size_t key, std::uint32_t gone) const {
    const std::uint32_t version = ((ledger_[key].begun & ~Ledger::kGone) + 1) | gone;
    ledger_[key].begun = version;
    return version;
  }

  Engine& engine_;
  const Ledger& ledger_;
  const NamespaceIndex ns_;
};

// Kills this process when a thread of it reaches a point. Armed by constructing it; when it goes
// without that, the point was not reached.
class Assassin {
 public:
  explicit Assassin(const std::string& point) {
    points_.block(point);
    std::thread([this, point] {
      if (points_.wait_blocked(point)) kill(getpid(), SIGKILL);
    }).detach();
  }

 private:
  SequencePoints points_;
};

// How a child ended. Never reached: it did all its work.
enum class End : std::uint8_t { Killed, NotReached, Failed };

// Runs `work` in a child until it is killed. No engine may be open in this process.
inline End end_of(const std::function<void()>& work) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork");
  if (child == 0) {
    alarm(120);  // a hang ends as one
    try {
      work();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "the child fails: %s\n", error.what());
      _exit(2);
    }
    std::fflush(nullptr);
    _exit(::testing::Test::HasFailure() ? 2 : 3);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) {
    if (WTERMSIG(status) == SIGKILL) return End::Killed;
    std::fprintf(stderr, "the child ends by signal %d\n", WTERMSIG(status));
    return End::Failed;
  }
  return WEXITSTATUS(status) == 3 ? End::NotReached : End::Failed;
}

}  // namespace fc::testing
