#include "memory/shard_file.hpp"

#include <unistd.h>

#include <array>
#include <cstring>

#include "core/sequence_point.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kHeldBit = std::uint64_t{1} << 32;
constexpr unsigned kShardCheckShift = 33;
constexpr unsigned kAliveBits = 48;
constexpr std::uint64_t kAliveMask = (std::uint64_t{1} << kAliveBits) - 1;

std::uint64_t check_of(std::uint64_t memory_id, std::uint64_t what, std::uint64_t value) noexcept {
  const std::array<std::uint64_t, 3> all{memory_id, what, value};
  return XXH3_64bits(all.data(), sizeof(all));
}
std::uint64_t shard_word(std::uint64_t memory_id, std::uint32_t shard,
                         std::uint64_t value) noexcept {
  return check_of(memory_id, shard, value) << kShardCheckShift | value;
}
std::uint64_t alive_word(std::uint64_t memory_id, std::uint64_t ms) noexcept {
  return check_of(memory_id, ~0ull, ms) << kAliveBits | ms;
}

}  // namespace

ShardFile::ShardFile(const std::string& path, std::uint32_t shard_count, std::uint64_t memory_id,
                     StartReport& report)
    : shard_count_(shard_count), memory_id_(memory_id) {
  const std::size_t bytes = bytes_of(shard_count);
  if (path.empty()) {
    own_ = std::make_unique<std::uint64_t[]>(bytes / sizeof(std::uint64_t));
    base_ = reinterpret_cast<std::byte*>(own_.get());
  } else {
    file_ = SharedFile::open(path, false);
    if (file_ != nullptr) {
      const Found found = look_at(*file_);
      kept_ = found == Found::Fits;
      if (!kept_) {
        file_.reset();
        if (found == Found::Unknown) {
          (void)SharedFile::set_aside(path, bytes);
          ++report.set_aside;
        } else {
          unlink(path.c_str());
        }
      }
    }
    if (file_ == nullptr) file_ = SharedFile::create(path, bytes, false);
    base_ = file_->data();
  }
  if (kept_) return;
  header().version = kShardFileVersion;
  header().shard_count = shard_count;
  header().memory_id = memory_id;
  header().alive.store(0, std::memory_order_relaxed);
}

ShardFile::Found ShardFile::look_at(const SharedFile& file) const noexcept {
  const auto& found = *reinterpret_cast<const ShardFileHeader*>(file.data());
  if (file.bytes() >= kHeaderBytes && found.magic == 0) return Found::Other;  // never finished
  if (file.bytes() < kHeaderBytes || found.magic != kShardFileMagic ||
      found.version != kShardFileVersion || found.checksum != found.sum()) {
    return Found::Unknown;
  }
  const bool fits = found.memory_id == memory_id_ && found.shard_count == shard_count_ &&
                    file.bytes() >= bytes_of(shard_count_);
  return fits ? Found::Fits : Found::Other;
}

std::optional<ShardFile::Shard> ShardFile::at(std::uint32_t shard) const noexcept {
  const std::uint64_t found = word(shard).load(std::memory_order_acquire);
  const std::uint64_t value = found & ((std::uint64_t{1} << kShardCheckShift) - 1);
  if (found != shard_word(memory_id_, shard, value)) return std::nullopt;
  return Shard{.since = static_cast<Stamp>(value), .held = (value & kHeldBit) != 0};
}

// By one store: whoever comes next finds the one or the other.
void ShardFile::set(std::uint32_t shard, const Shard& to) noexcept {
  const std::uint64_t value = to.since | (to.held ? kHeldBit : 0);
  word(shard).store(shard_word(memory_id_, shard, value), std::memory_order_seq_cst);
}

void ShardFile::finish() noexcept {
  if (kept_) return;
  FC_SEQUENCE_POINT("shards:written");
  ShardFileHeader& now = header();
  const std::array<std::uint64_t, 3> whole{
      kShardFileMagic, std::uint64_t{now.shard_count} << 32 | now.version, now.memory_id};
  static_assert(sizeof(whole) == offsetof(ShardFileHeader, checksum));
  now.checksum = XXH3_64bits(whole.data(), sizeof(whole));
  std::atomic_ref<std::uint64_t>(now.magic).store(kShardFileMagic, std::memory_order_seq_cst);
}

void ShardFile::say_alive(std::uint64_t now_ms) noexcept {
  header().alive.store(alive_word(memory_id_, now_ms & kAliveMask), std::memory_order_release);
}

std::uint64_t ShardFile::last_alive_ms() const noexcept {
  const std::uint64_t found = header().alive.load(std::memory_order_acquire);
  const std::uint64_t ms = found & kAliveMask;
  return found == alive_word(memory_id_, ms) ? ms : 0;
}

}  // namespace fc
