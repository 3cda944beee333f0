#include "nvm/state.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <new>

#include "core/sequence_point.hpp"

namespace fc::nvm {
namespace {

struct StateHeader {
  std::uint64_t magic;  // written last: a file without it was never finished
  std::uint32_t version;
  std::uint32_t rebuilds;  // 1 until what the devices list is in the index
  StateShape shape;
  std::uint64_t set_id;
  std::uint64_t checksum;  // of the bytes before

  std::uint64_t sum() const noexcept { return XXH3_64bits(this, offsetof(StateHeader, checksum)); }
};
static_assert(sizeof(StateHeader) == 64);

constexpr std::uint64_t round_up(std::uint64_t value) noexcept {
  return (value + 4095) / 4096 * 4096;
}

constexpr std::uint64_t kRowsAt = 4096;

std::uint64_t buffers_at(const StateShape& shape) noexcept {
  return round_up(kRowsAt + std::uint64_t{shape.regions} * sizeof(Region));
}

std::uint64_t bytes_of(const StateShape& shape) noexcept {
  return buffers_at(shape) + std::uint64_t{shape.buffers} * shape.region_bytes;
}

StateHeader& header_at(std::byte* base) noexcept {
  return *reinterpret_cast<StateHeader*>(base);
}

// The set that was being rebuilt for this memory when a start was cut off; 0: none was.
std::uint64_t unfinished_set_of(const SharedFile& file, const StateShape& wanted) {
  StateHeader header = header_at(file.data());
  header.magic = kStateMagic;
  const bool whole = header.version == kStateVersion && header.checksum == header.sum();
  return whole && header.rebuilds == 1 && header.shape.memory_id == wanted.memory_id &&
                 header.shape.devices == wanted.devices
             ? header.set_id
             : 0;
}

// Why the file is not this tier's; empty: it is. `unknown`: nothing this release wrote.
std::string mismatch_of(const SharedFile& file, const StateShape& wanted, bool* unknown) {
  *unknown = true;
  if (file.bytes() < sizeof(StateHeader)) return "its file is too short";
  const StateHeader& header = header_at(file.data());
  if (header.magic != kStateMagic) return "its file is of an unknown format";
  if (header.version != kStateVersion) {
    return "its file is of format version " + std::to_string(header.version) +
           ", this is version " + std::to_string(kStateVersion);
  }
  if (header.checksum != header.sum()) return "its file's header is damaged";
  *unknown = false;
  if (header.shape.memory_id != wanted.memory_id) return "the memory started anew";
  if (header.shape.devices != wanted.devices) return "its devices are others";
  StateShape shape = header.shape;
  shape.buffers = wanted.buffers;
  if (shape != wanted) return "its regions are others";
  // With a few less the log works, too; each was reserved when the file was made.
  if (header.shape.buffers * 2 < wanted.buffers || header.shape.buffers < 2) {
    return "it has too few write buffers";
  }
  if (file.bytes() < bytes_of(header.shape)) return "its file is too short";
  return {};
}

}  // namespace

State::State(const std::string& path, const StateShape& shape, StartReport& report,
             std::string& why)
    : shape_(shape), buffers_at_(buffers_at(shape)), bytes_(bytes_of(shape)) {
  if (path.empty()) {
    mapping_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      throw std::bad_alloc();
    }
    base_ = static_cast<std::byte*>(mapping_);
    start_anew(0);
    return;
  }
  file_ = SharedFile::open(path, false);
  if (file_ != nullptr) {
    bool unknown = false;
    const bool finished =
        file_->bytes() >= sizeof(StateHeader) && header_at(file_->data()).magic != 0;
    if (finished) {
      why = mismatch_of(*file_, shape, &unknown);
      kept_ = why.empty();
      if (kept_) shape_ = header_at(file_->data()).shape;
    }
    if (!kept_) {
      if (!finished && file_->bytes() >= sizeof(StateHeader)) {
        unfinished_set_ = unfinished_set_of(*file_, shape);
      }
      file_.reset();
      if (finished && unknown) {
        why += "; " + SharedFile::set_aside(path, bytes_);
        ++report.set_aside;
      } else {
        unlink(path.c_str());
      }
    }
  }
  if (!kept_) file_ = SharedFile::create(path, bytes_, false);
  base_ = file_->data();
}

State::~State() {
  if (mapping_ != nullptr) munmap(mapping_, bytes_);
}

std::uint64_t State::set_id() const noexcept {
  return header_at(base_).set_id;
}

void State::start_anew(std::uint64_t set_id, bool rebuilds) {
  StateHeader& header = header_at(base_);
  // First of all: a start that is cut off here leaves a file that was never finished.
  std::atomic_ref<std::uint64_t>(header.magic).store(0, std::memory_order_seq_cst);
  kept_ = false;
  StateHeader made{};
  made.magic = kStateMagic;
  made.version = kStateVersion;
  made.shape = shape_;
  made.set_id = set_id;
  made.rebuilds = rebuilds ? 1 : 0;
  made.checksum = made.sum();
  std::memcpy(reinterpret_cast<std::byte*>(&header) + sizeof(header.magic),
              reinterpret_cast<const std::byte*>(&made) + sizeof(made.magic),
              sizeof(made) - sizeof(made.magic));
  for (std::uint32_t r = 0; r < shape_.regions; ++r) new (&rows()[r]) Region();
  FC_SEQUENCE_POINT("nvm:state_cleared");
}

void State::finish() noexcept {
  StateHeader& header = header_at(base_);
  StateHeader made = header;
  made.magic = kStateMagic;
  made.rebuilds = 0;
  made.checksum = made.sum();
  header.rebuilds = made.rebuilds;
  header.checksum = made.checksum;
  std::atomic_ref<std::uint64_t>(header.magic).store(kStateMagic, std::memory_order_seq_cst);
}

}  // namespace fc::nvm
