#include "memory/arena_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <random>

#include "core/numa.hpp"
#include "core/sequence_point.hpp"
#include "core/ticks.hpp"
#include "eviction/policy.hpp"
#include "memory/arena.hpp"

namespace fc {
namespace {

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t to) noexcept {
  return (value + to - 1) / to * to;
}

constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;
constexpr std::uint64_t kOwnerWaitMs = 5'000;  // a large process takes its time to be gone
// Behind the last segment: as far as the comparison with a key may look from a damaged place.
constexpr std::uint64_t kTailBytes = round_up(kMaxKeyBytes + sizeof(RecordHeader), 4096);
// Budgets that are above what there is by no more than this are shortened.
constexpr double kBudgetSlack = 0.95;

std::uint64_t random_id() {
  std::random_device source;
  return (std::uint64_t{source()} << 32 | source()) | 1;
}

std::uint64_t hint_bytes_of(const EngineConfig& config, const Geometry& geometry) {
  std::uint64_t bytes = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      bytes += EvictionPolicy::hint_bytes(
          domain.policy, entry_budget_of(geometry, domain.budget_bytes / geometry.segment_bytes));
    }
  }
  return round_up(bytes, 4096);
}

std::string count(std::uint64_t number, const char* what) {
  return std::to_string(number) + " " + what;
}

// Why a head is not one that this release wrote, as a whole; empty: it is.
std::string damage_of(const SharedFile& file) {
  if (file.bytes() < sizeof(ArenaHead)) return "it is too short";
  const ArenaHeader& header = reinterpret_cast<const ArenaHead*>(file.data())->header;
  if (header.magic != kArenaMagic) return "it is of an unknown format";
  if (header.version != kArenaVersion) {
    return "it is of format version " + std::to_string(header.version) + ", this is version " +
           std::to_string(kArenaVersion);
  }
  if (header.checksum != header.sum() || header.head_bytes != sizeof(ArenaHead) ||
      header.total_bytes > file.bytes()) {
    return "its header is damaged";
  }
  return {};
}

// Why the memory cannot serve this config; empty: it can. What fits is kept, so sizes that the
// config leaves open are the memory's.
std::string mismatch_of(const ArenaHeader& header, const EngineConfig& config,
                        const Geometry& planned, Geometry& geometry) {
  if (header.memory_bytes != config.memory_bytes) {
    return "memory was " + count(header.memory_bytes, "bytes and is now ") +
           std::to_string(config.memory_bytes);
  }
  if (config.segment_bytes != 0 && config.segment_bytes != header.segment_bytes) {
    return "segment_bytes was " + std::to_string(header.segment_bytes);
  }
  geometry = planned;
  geometry.segment_bytes = header.segment_bytes;
  geometry.segment_count = header.segment_count;
  geometry.bucket_count = header.bucket_count;
  geometry.nvm_slots = std::min(planned.nvm_slots, header.nvm_slots);
  if (header.nvm_slots * 2 < planned.nvm_slots) {
    return "the NVM tier needs more of the index than was set apart for it";
  }
  const std::uint64_t arena = std::uint64_t{header.segment_count} * header.segment_bytes;
  if (arena + header.bucket_count * sizeof(Bucket) + planned.nvm_memory_bytes >
      config.memory_bytes) {
    return "the NVM tier needs more memory than was left for it";
  }
  geometry.side_bytes = config.memory_bytes - arena - header.bucket_count * sizeof(Bucket);
  if (geometry.segment_count <= geometry.reserve_segments) return "there are too many domains";
  std::uint64_t budgeted = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      const std::uint64_t segments = domain.budget_bytes / geometry.segment_bytes;
      if (segments < layout::kMinDomainSegments) {
        return "domain " + ns.name + "/" + domain.name + " is too small for segments of " +
               std::to_string(geometry.segment_bytes) + " bytes";
      }
      budgeted += segments;
    }
  }
  if (static_cast<double>(geometry.segment_count - geometry.reserve_segments) <
      static_cast<double>(budgeted) * kBudgetSlack) {
    return "the domains' budgets need more segments than it has";
  }
  return {};
}

}  // namespace

std::uint64_t entry_budget_of(const Geometry& geometry, std::uint64_t segments) noexcept {
  const double share = static_cast<double>(segments) /
                       static_cast<double>(geometry.segment_count - geometry.reserve_segments);
  const std::uint64_t slots = geometry.bucket_count * layout::kSlotsPerBucket;
  return static_cast<std::uint64_t>(static_cast<double>(slots - geometry.nvm_slots) *
                                    layout::kIndexLoadLimit * share);
}

ArenaMemory::ArenaMemory(const EngineConfig& config, std::uint64_t now_ms, std::optional<Tick> tick,
                         StartReport& report, MemoryClaim claim) {
  geometry_ = Geometry::plan(config);
  if (!config.persist.enabled()) {
    lay_out(geometry_, hint_bytes_of(config, geometry_));
    map_private(config.huge_pages, claim);
    place(config.numa_node);
    write_head(config, now_ms, tick);
    return;
  }
  const std::string path = config.persist.dir + "/" + config.persist.name;
  lock_ = std::make_unique<OwnerLock>(path + ".lock", kOwnerWaitMs);
  if (adopt(path + ".arena", config, now_ms, report)) {
    place(config.numa_node);
    return;
  }
  kind_ = Kind::New;
  report.memory = report.memory_reason.empty() ? "new" : "cold";
  geometry_ = Geometry::plan(config);
  lay_out(geometry_, hint_bytes_of(config, geometry_));
  file_ = SharedFile::create(path + ".arena", total_bytes(), config.huge_pages);
  base_ = file_->data();
  mapped_bytes_ = file_->bytes();
  report.pages = file_->pages();
  place(config.numa_node);
  FC_SEQUENCE_POINT("arena:created");
  write_head(config, now_ms, tick);
  FC_SEQUENCE_POINT("arena:started");
}

ArenaMemory::~ArenaMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_ + kHugePage);
}

// False: there is nothing to adopt, and nothing in the way any more.
bool ArenaMemory::adopt(const std::string& path, const EngineConfig& config, std::uint64_t now_ms,
                        StartReport& report) {
  file_ = SharedFile::open(path, config.huge_pages);
  if (file_ == nullptr) return false;
  const auto& found = *reinterpret_cast<const ArenaHead*>(file_->data());
  if (file_->bytes() >= sizeof(ArenaHead) && found.header.magic == 0) {
    file_.reset();  // a start was cut off before it could hold anything
    unlink(path.c_str());
    return false;
  }
  if (const std::string damage = damage_of(*file_); !damage.empty()) {
    file_.reset();
    report.memory_reason = "what is at " + path + " cannot be used: " + damage + "; " +
                           SharedFile::set_aside(path, config.memory_bytes);
    ++report.set_aside;
    return false;
  }
  const ArenaHeader& header = found.header;
  const std::string boot = boot_id();
  std::string why;
  if (std::string_view(header.boot_id.data(), header.boot_id.size()) !=
      std::string_view(boot).substr(0, header.boot_id.size())) {
    why = "the machine was started anew since";
  } else if (Ticks::at(now_ms, header.tick_base_ms) > Ticks::kLast) {
    why = "its clock has run out";
  } else {
    why = mismatch_of(header, config, geometry_, geometry_);
  }
  if (why.empty()) {
    lay_out(geometry_, header.hint_bytes);
    if (total_bytes() != header.total_bytes) why = "its parts do not add up";
  }
  if (!why.empty()) {
    report.memory_reason = "the earlier memory does not fit: " + why;
    file_.reset();
    unlink(path.c_str());
    return false;
  }
  base_ = file_->data();
  mapped_bytes_ = file_->bytes();
  report.pages = file_->pages();
  const bool ended_in_order =
      head().header.state.load(std::memory_order_acquire) == ArenaHeader::kClean;
  kind_ = ended_in_order ? Kind::Clean : Kind::Unchecked;
  if (!ended_in_order) {
    report.memory_reason = "the owner before ended without an orderly stop";
    if (lock_->stale_owner() != 0) {
      report.memory_reason += " (pid " + std::to_string(lock_->stale_owner()) + ")";
    }
  }
  return true;
}

void ArenaMemory::lay_out(const Geometry& geometry, std::uint64_t hint_bytes) {
  table_bytes_ = round_up(std::uint64_t{geometry.segment_count} * sizeof(SegmentMeta), 4096);
  bucket_bytes_ = round_up(geometry.bucket_count * sizeof(Bucket), 4096);
  hint_bytes_ = hint_bytes;
}

std::uint64_t ArenaMemory::total_bytes() const noexcept {
  return sizeof(ArenaHead) + table_bytes_ + bucket_bytes_ + hint_bytes_ +
         std::uint64_t{geometry_.segment_count} * geometry_.segment_bytes + kTailBytes;
}

// What the kernel does not refuse is counted as taken, where it keeps count; pages that are never
// touched cost nothing beyond that.
void ArenaMemory::map_private(bool huge_pages, MemoryClaim claim) {
  mapped_bytes_ = total_bytes();
  const int lazy = claim == MemoryClaim::Lazy ? MAP_NORESERVE : 0;
  // Room to start on a huge page's boundary.
  mapping_ = mmap(nullptr, mapped_bytes_ + kHugePage, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | lazy, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  base_ =
      reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uint64_t>(mapping_), kHugePage));
  if (huge_pages) {
    // Advice only: without transparent huge pages the cache works, with more TLB misses.
    (void)madvise(base_, mapped_bytes_, MADV_HUGEPAGE);
  }
}

void ArenaMemory::place(std::int32_t node) {
  if (node >= 0 && place_memory(base_, mapped_bytes_, node)) numa_node_ = node;
}

// Of zeroes.
void ArenaMemory::write_head(const EngineConfig& config, std::uint64_t now_ms,
                             std::optional<Tick> tick) {
  ArenaHeader& header = head().header;
  header.version = kArenaVersion;
  header.head_bytes = sizeof(ArenaHead);
  header.memory_id = random_id();
  header.memory_bytes = config.memory_bytes;
  header.segment_bytes = geometry_.segment_bytes;
  header.segment_count = geometry_.segment_count;
  header.bucket_count = geometry_.bucket_count;
  header.nvm_slots = geometry_.nvm_slots;
  header.hint_bytes = hint_bytes_;
  header.total_bytes = total_bytes();
  const std::string boot = boot_id();
  std::copy_n(boot.begin(), std::min(boot.size(), header.boot_id.size()), header.boot_id.begin());
  header.tick_base_ms = Ticks::base_ms(now_ms, tick.value_or(Ticks::kFirst));
  auto* rows = reinterpret_cast<SegmentMeta*>(table());
  for (std::uint32_t i = 0; i < geometry_.segment_count; ++i) new (&rows[i]) SegmentMeta();
  ArenaHeader whole;
  std::memcpy(static_cast<void*>(&whole), &header, sizeof(header));
  whole.magic = kArenaMagic;
  header.checksum = whole.sum();
  std::atomic_ref<std::uint64_t>(header.magic).store(kArenaMagic, std::memory_order_release);
}

}  // namespace fc
