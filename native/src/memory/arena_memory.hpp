// Where the arena lies: in memory of the process, or in a shared-memory file that the next process
// adopts. Decides which of the two, and whether what is there can be adopted.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/clock.hpp"
#include "feature_cache/config.hpp"
#include "feature_cache/recovery.hpp"
#include "memory/arena_header.hpp"
#include "persist/shared_file.hpp"

namespace fc {

// Whether memory of the process is asked for as a whole or as its pages are touched.
enum class MemoryClaim : std::uint8_t {
  Whole,
  Lazy,  // for tests: maps more than the machine has, and dies where it is used
};

class ArenaMemory {
 public:
  enum class Kind : std::uint8_t {
    New,
    Clean,      // as an orderly stop left it
    Unchecked,  // as a kill left it, or for another config: every entry is to be checked
  };

  // `now_ms`: CLOCK_BOOTTIME. `tick`: what time it is for the NVM tier, when it holds something.
  // Throws std::bad_alloc, std::system_error (of the directory, or another owner).
  ArenaMemory(const EngineConfig& config, std::uint64_t now_ms, std::optional<Tick> tick,
              StartReport& report, MemoryClaim claim);
  ~ArenaMemory();
  ArenaMemory(const ArenaMemory&) = delete;
  ArenaMemory& operator=(const ArenaMemory&) = delete;

  Kind kind() const noexcept { return kind_; }
  bool persistent() const noexcept { return file_ != nullptr; }
  // The one that was adopted, or the config's own.
  const Geometry& geometry() const noexcept { return geometry_; }
  ArenaHead& head() const noexcept { return *reinterpret_cast<ArenaHead*>(base_); }
  std::byte* table() const noexcept { return base_ + sizeof(ArenaHead); }
  std::byte* buckets() const noexcept { return table() + table_bytes_; }
  std::byte* hints() const noexcept { return buckets() + bucket_bytes_; }
  std::byte* segments() const noexcept { return hints() + hint_bytes_; }
  std::uint64_t table_bytes() const noexcept { return table_bytes_; }
  std::uint64_t hint_bytes() const noexcept { return hint_bytes_; }
  std::uint64_t mapped_bytes() const noexcept { return mapped_bytes_; }
  // The NUMA node that it prefers; -1: any.
  std::int32_t numa_node() const noexcept { return numa_node_; }

 private:
  bool adopt(const std::string& path, const EngineConfig& config, std::uint64_t now_ms,
             StartReport& report);
  void lay_out(const Geometry& geometry, std::uint64_t hint_bytes);
  std::uint64_t total_bytes() const noexcept;
  void map_private(bool huge_pages, MemoryClaim claim);
  void place(std::int32_t node);
  void write_head(const EngineConfig& config, std::uint64_t now_ms, std::optional<Tick> tick);

  Kind kind_ = Kind::New;
  Geometry geometry_;
  std::uint64_t table_bytes_ = 0;
  std::uint64_t bucket_bytes_ = 0;
  std::uint64_t hint_bytes_ = 0;
  std::byte* base_ = nullptr;
  std::unique_ptr<OwnerLock> lock_;  // before the file: let go of last
  std::unique_ptr<SharedFile> file_;
  void* mapping_ = nullptr;  // of process memory
  std::uint64_t mapped_bytes_ = 0;
  std::int32_t numa_node_ = -1;
};

// What a number of segments may hold of the index.
std::uint64_t entry_budget_of(const Geometry& geometry, std::uint64_t segments) noexcept;

}  // namespace fc
