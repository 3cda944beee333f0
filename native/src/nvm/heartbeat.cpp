#include "nvm/heartbeat.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>

#include "core/ticks.hpp"

namespace fc::nvm {
namespace {

struct FreeBlock {
  void operator()(std::byte* data) const noexcept { std::free(data); }
};
using Block = std::unique_ptr<std::byte, FreeBlock>;

Block make_block(std::size_t bytes) {
  Block block(static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes)));
  if (block == nullptr) throw std::bad_alloc();
  std::memset(block.get(), 0, bytes);
  return block;
}

bool read_block(NvmDevice& device, std::uint64_t offset, const Block& to, std::uint32_t bytes) {
  IoRequest request;
  request.offset = offset;
  request.data = to.get();
  request.bytes = bytes;
  return run_request(*device.make_queue(1), request) == static_cast<std::int64_t>(bytes);
}

}  // namespace

std::uint64_t wall_now_ms() noexcept {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000 +
         static_cast<std::uint64_t>(now.tv_nsec) / 1'000'000;
}

bool write_heartbeat(IoQueue& queue, const Heartbeat& heartbeat) {
  const Block block = make_block(kBlockBytes);
  std::memcpy(block.get(), &heartbeat, sizeof(heartbeat));
  IoRequest sync;
  sync.kind = IoRequest::Kind::Sync;
  IoRequest write;
  write.kind = IoRequest::Kind::Write;
  write.offset = kHeartbeatOffset + (heartbeat.sequence & 1) * kBlockBytes;
  write.data = block.get();
  write.bytes = kBlockBytes;
  return run_request(queue, sync) == 0 &&
         run_request(queue, write) == static_cast<std::int64_t>(kBlockBytes) &&
         run_request(queue, sync) == 0;
}

std::optional<Heartbeat> read_heartbeat(NvmDevice& device) {
  const Block blocks = make_block(2 * kBlockBytes);
  if (!read_block(device, kHeartbeatOffset, blocks, 2 * kBlockBytes)) return std::nullopt;
  std::optional<Heartbeat> latest;
  for (std::size_t slot = 0; slot < 2; ++slot) {
    Heartbeat found;
    std::memcpy(&found, blocks.get() + slot * kBlockBytes, sizeof(found));
    if (found.magic != kHeartbeatMagic || found.checksum != found.sum()) continue;
    if (!latest || found.sequence > latest->sequence) latest = found;
  }
  return latest;
}

std::optional<FoundSet> find_set(const std::vector<std::shared_ptr<NvmDevice>>& devices,
                                 std::uint64_t wall_ms, std::uint64_t boot_ms,
                                 const std::string& boot_id, std::string& why) {
  FoundSet set;
  Heartbeat latest;
  std::size_t blank = 0;
  for (std::size_t d = 0; d < devices.size(); ++d) {
    const auto other = [&](const char* what) {
      why = "device " + devices[d]->path() + ": " + what;
      return std::nullopt;
    };
    const Block block = make_block(kBlockBytes);
    if (!read_block(*devices[d], 0, block, kBlockBytes)) return other("cannot be read");
    Superblock superblock{};
    std::memcpy(&superblock, block.get(), sizeof(superblock));
    if (superblock.magic == 0) {
      ++blank;
      continue;
    }
    if (superblock.magic != kSuperblockMagic || superblock.version != kFormatVersion ||
        superblock.checksum != superblock.sum() || !std::has_single_bit(superblock.region_bytes) ||
        superblock.region_bytes < layout::kMinRegionBytes ||
        superblock.region_bytes > layout::kMaxRegionBytes) {
      return other("another format, or damaged");
    }
    if (superblock.device != d || superblock.devices != devices.size() ||
        superblock.device_bytes != devices[d]->bytes()) {
      return other("of another size, or another one of several");
    }
    const std::optional<Heartbeat> found = read_heartbeat(*devices[d]);
    if (!found || found->set_id != superblock.set_id) return other("has no heartbeat");
    if (d == blank) {  // the first that is not
      set.set_id = superblock.set_id;
      set.region_bytes = superblock.region_bytes;
      set.state = found->state;
      latest = *found;
    }
    if (superblock.set_id != set.set_id) return other("of another set");
    // Stopped apart from each other: what one of them calls clean the others did not hear of.
    if (found->state != set.state ||
        (set.state == SetState::Clean && found->sequence != latest.sequence)) {
      set.state = SetState::Serving;
    }
    if (found->sequence > latest.sequence) latest = *found;
  }
  if (blank == devices.size()) return std::nullopt;  // no reason: all are new
  if (blank != 0) {
    why = "some of its devices are new";
    return std::nullopt;
  }
  set.sequence = latest.sequence;
  set.counts = latest.counts;
  std::uint64_t gone_ms = 0;
  if (std::string_view(latest.boot_id.data(), latest.boot_id.size()) == boot_id) {
    gone_ms = boot_ms - std::min(boot_ms, latest.boot_ms);
  } else if (wall_ms >= latest.wall_ms) {
    gone_ms = wall_ms - latest.wall_ms;
  } else {
    set.clock_doubt = true;
  }
  const std::uint64_t tick = latest.tick + (gone_ms >> kTickShift);
  if (tick > Ticks::kLast) {
    why = "its clock has run out";
    return std::nullopt;
  }
  set.tick = static_cast<Tick>(tick);
  return set;
}

}  // namespace fc::nvm
