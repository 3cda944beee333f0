// What a leaf knows of its shards beyond its process: up to which stamp the copies of each are void
// (core/moved_keys.hpp), whether it holds it, and when it was alive last.
//
//   [header 4 KiB][a word a shard]
//
// Every word carries its own check, so that a kill or damage costs what is kept of its shard and
// nothing else. docs/storage_format.md is the same in words; both change together.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/moved_keys.hpp"
#include "feature_cache/recovery.hpp"
#include "persist/shared_file.hpp"

namespace fc {

inline constexpr std::uint64_t kShardFileMagic = 0x3130445241485346ull;  // "FSHARD01"
inline constexpr std::uint32_t kShardFileVersion = 1;

struct ShardFileHeader {
  std::uint64_t magic;  // written last: a file without it was never finished
  std::uint32_t version;
  std::uint32_t shard_count;
  std::uint64_t memory_id;  // of the arena whose segments' stamps these are
  std::uint64_t checksum;   // of the bytes before
  std::atomic<std::uint64_t> alive;

  std::uint64_t sum() const noexcept {
    return XXH3_64bits(this, offsetof(ShardFileHeader, checksum));
  }
};
static_assert(sizeof(ShardFileHeader) == 40);

// Threads: one at a time, but for say_alive().
class ShardFile {
 public:
  struct Shard {
    Stamp since = 0;  // copies up to this stamp are void
    bool held = false;
  };

  // `path` empty: memory of the process. What is there is kept when it is of this memory and of as
  // many shards, else removed, or set aside and counted where its format is unknown. Throws
  // std::system_error.
  ShardFile(const std::string& path, std::uint32_t shard_count, std::uint64_t memory_id,
            StartReport& report);

  bool kept() const noexcept { return kept_; }
  // None: damaged.
  std::optional<Shard> at(std::uint32_t shard) const noexcept;
  void set(std::uint32_t shard, const Shard& to) noexcept;
  // All shards are set: the next process may find them.
  void finish() noexcept;
  std::uint64_t memory_bytes() const noexcept {
    return file_ != nullptr ? 0 : bytes_of(shard_count_);
  }
  // CLOCK_BOOTTIME.
  void say_alive(std::uint64_t now_ms) noexcept;
  // 0: it is not known.
  std::uint64_t last_alive_ms() const noexcept;

 private:
  static constexpr std::size_t kHeaderBytes = 4096;
  static constexpr std::size_t bytes_of(std::uint32_t shards) noexcept {
    return kHeaderBytes + std::size_t{shards} * sizeof(std::uint64_t);
  }

  ShardFileHeader& header() const noexcept { return *reinterpret_cast<ShardFileHeader*>(base_); }
  std::atomic<std::uint64_t>& word(std::uint32_t shard) const noexcept {
    return reinterpret_cast<std::atomic<std::uint64_t>*>(base_ + kHeaderBytes)[shard];
  }
  enum class Found : std::uint8_t { Fits, Other, Unknown };
  Found look_at(const SharedFile& file) const noexcept;

  const std::uint32_t shard_count_;
  const std::uint64_t memory_id_;
  std::unique_ptr<SharedFile> file_;
  std::unique_ptr<std::uint64_t[]> own_;  // of the process
  std::byte* base_ = nullptr;
  bool kept_ = false;
};

}  // namespace fc
