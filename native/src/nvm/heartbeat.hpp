// What a set of devices says of itself when nothing else is left: what time it was, and whether its
// regions say exactly what is valid. Two blocks, written in turn, so that one is always whole.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/clock.hpp"
#include "core/hash.hpp"
#include "core/moved_keys.hpp"
#include "nvm/device.hpp"
#include "nvm/format.hpp"

namespace fc::nvm {

inline constexpr std::uint64_t kHeartbeatMagic = 0x3230544145424346ull;  // "FCBEAT02"
inline constexpr std::uint64_t kHeartbeatOffset = 8192;                  // and the block behind it

enum class SetState : std::uint32_t {
  Serving = 0,    // what became invalid since is known to memory alone
  Clean = 1,      // an orderly stop: the regions' lists name what is valid, and nothing else
  Journaled = 2,  // what became invalid is in the journal
};

struct Heartbeat {
  std::uint64_t magic = kHeartbeatMagic;
  std::uint64_t set_id = 0;
  std::uint64_t sequence = 0;  // of all devices alike
  SetState state = SetState::Serving;
  Tick tick = 0;
  std::uint64_t wall_ms = 0;  // CLOCK_REALTIME at that tick
  std::uint64_t boot_ms = 0;  // CLOCK_BOOTTIME
  std::array<char, 32> boot_id{};
  InstanceCounts counts{};     // of the node, as of this life
  std::uint64_t checksum = 0;  // of the bytes before

  std::uint64_t sum() const noexcept { return XXH3_64bits(this, offsetof(Heartbeat, checksum)); }
};
static_assert(sizeof(Heartbeat) == 168);

// Writes one and has the device keep it, and all that was written before; false when that failed.
bool write_heartbeat(IoQueue& queue, const Heartbeat& heartbeat);
// The latest that is whole; none when there is no such, or the device cannot be read.
std::optional<Heartbeat> read_heartbeat(NvmDevice& device);

// What the devices of a set say together.
struct FoundSet {
  std::uint64_t set_id = 0;
  std::uint32_t region_bytes = 0;
  std::uint64_t sequence = 0;
  SetState state = SetState::Serving;  // of all
  Tick tick = 0;                       // now
  bool clock_doubt = false;            // the time of day is before the last heartbeat's
  InstanceCounts counts{};
};
// None, and why, when they are not one set of this format, or its time has run out.
std::optional<FoundSet> find_set(const std::vector<std::shared_ptr<NvmDevice>>& devices,
                                 std::uint64_t wall_ms, std::uint64_t boot_ms,
                                 const std::string& boot_id, std::string& why);

// CLOCK_REALTIME.
std::uint64_t wall_now_ms() noexcept;

}  // namespace fc::nvm
