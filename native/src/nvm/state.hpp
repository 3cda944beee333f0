// What the tier has in memory and the next process may adopt: the regions' rows, and the buffers of
// those that are not on the device yet. In memory of the process, or in a file beside the arena's.
//
//   [header 4 KiB][rows][buffers]
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/hash.hpp"
#include "feature_cache/recovery.hpp"
#include "nvm/region.hpp"
#include "persist/shared_file.hpp"

namespace fc::nvm {

inline constexpr std::uint64_t kStateMagic = 0x3130455441545346ull;  // "FSTATE01"
inline constexpr std::uint32_t kStateVersion = 2;

// What rows and buffers are for; another one is another tier.
struct StateShape {
  std::uint64_t memory_id = 0;  // of the arena, whose index points here
  std::uint32_t region_bytes = 0;
  std::uint32_t regions = 0;
  std::uint32_t buffers = 0;
  std::uint32_t reserved = 0;
  std::uint64_t devices = 0;  // a hash over their paths and sizes

  bool operator==(const StateShape&) const = default;
};

class State {
 public:
  // `path` empty: memory of the process. Else what is there is adopted when its shape is this one,
  // or removed (but for the number of buffers, of which there may be others); why goes to `why`, a
  // file of an unknown format is set aside and counted. Throws std::bad_alloc, std::system_error.
  State(const std::string& path, const StateShape& shape, StartReport& report, std::string& why);
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // There was one before, with these rows.
  bool kept() const noexcept { return kept_; }
  std::uint64_t set_id() const noexcept;
  // A start was cut off while it rebuilt this set for this memory, which has served nothing since;
  // 0: it was not. Of starts that were cut off otherwise it is not known what memory did before.
  std::uint64_t unfinished_set() const noexcept { return unfinished_set_; }
  // Makes it the state of these devices, every region free: whatever was kept is gone. Nobody
  // adopts it before finish(): rows that say nothing yet would be believed.
  void start_anew(std::uint64_t set_id, bool rebuilds = false);
  void finish() noexcept;
  Region* rows() const noexcept { return reinterpret_cast<Region*>(base_ + kHeaderBytes); }
  std::byte* buffer(std::uint32_t number) const noexcept {
    return base_ + buffers_at_ + std::uint64_t{number} * shape_.region_bytes;
  }
  std::uint32_t buffers() const noexcept { return shape_.buffers; }

 private:
  static constexpr std::uint64_t kHeaderBytes = 4096;

  StateShape shape_;
  const std::uint64_t buffers_at_;
  std::uint64_t bytes_;
  std::unique_ptr<SharedFile> file_;
  void* mapping_ = nullptr;  // of process memory
  std::byte* base_ = nullptr;
  bool kept_ = false;
  std::uint64_t unfinished_set_ = 0;
};

}  // namespace fc::nvm
