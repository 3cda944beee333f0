#include "engine/fan_out_engine.hpp"

#include <algorithm>
#include <array>
#include <exception>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "core/sequence_point.hpp"
#include "engine/leftovers.hpp"
#include "engine/merged_counters.hpp"
#include "engine/waiting_read.hpp"
#include "persist/free_memory.hpp"

namespace fc {
namespace {

// Keeps the calls for one reader apart, when several instances read for it.
class SharedReader final : public NvmReader {
 public:
  explicit SharedReader(std::shared_ptr<NvmReader> reader) : reader_(std::move(reader)) {}

  void answer(std::span<const NvmAnswer> answers) override {
    const std::lock_guard lock(mutex_);
    reader_->answer(answers);
  }
  void late(std::span<const NvmCell> cells) override {
    const std::lock_guard lock(mutex_);
    reader_->late(cells);
  }
  bool wanted() const noexcept override { return reader_->wanted(); }

 private:
  std::mutex mutex_;
  const std::shared_ptr<NvmReader> reader_;
};

// Calls body(i) for every instance at the same time and waits for all. What they throw comes when
// all have ended: the first instance's.
void for_all_at_once(std::size_t count, const std::function<void(std::size_t)>& body) {
  std::vector<std::exception_ptr> failures(count);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        body(i);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
}

// Of the words for what a start found, in the order of `from_best`, the worse one of two.
template <std::size_t N>
bool is_worse(const std::string& word, const std::string& than,
              const std::array<const char*, N>& from_best) {
  const auto place = [&](const std::string& of) {
    return std::find(from_best.begin(), from_best.end(), of) - from_best.begin();
  };
  return place(word) > place(than);
}

// Memory of the process is there when it is touched, or some process dies: so it is asked for
// before anything is. Shared memory is reserved as it is made.
void check_free_memory(const EngineConfig& config) {
  if (config.persist.enabled()) return;
  const FreeMemory room = free_memory();
  if (config.memory_bytes <= room.bytes) return;
  throw std::system_error(ENOMEM, std::generic_category(),
                          "memory: " + not_enough(room, config.memory_bytes));
}

}  // namespace

StartReport summed(std::span<const StartReport* const> reports) {
  constexpr std::array<const char*, 5> kMemory{"off", "clean", "new", "checked", "cold"};
  constexpr std::array<const char*, 5> kNvm{"off", "kept", "new", "rebuilt", "empty"};
  StartReport sum;
  sum.pages = reports.front()->pages;
  for (std::size_t i = 0; i < reports.size(); ++i) {
    const StartReport& one = *reports[i];
    const std::string whose = "instance " + std::to_string(i) + ": ";
    const auto reason = [&](const std::string& of) { return of.empty() ? of : whose + of; };
    if (i == 0 || is_worse(one.memory, sum.memory, kMemory)) {
      sum.memory = one.memory;
      sum.memory_reason = reason(one.memory_reason);
    }
    if (i == 0 || is_worse(one.nvm, sum.nvm, kNvm)) {
      sum.nvm = one.nvm;
      sum.nvm_reason = reason(one.nvm_reason);
    }
    if (sum.pages.find(one.pages) == std::string::npos) sum.pages += "; " + whose + one.pages;
    sum.memory_ms = std::max(sum.memory_ms, one.memory_ms);
    sum.nvm_ms = std::max(sum.nvm_ms, one.nvm_ms);
    sum.memory_items += one.memory_items;
    sum.memory_dropped += one.memory_dropped;
    sum.nvm_items += one.nvm_items;
    sum.nvm_dropped += one.nvm_dropped;
    sum.set_aside += one.set_aside;
  }
  return sum;
}

FanOutEngine::FanOutEngine(const std::vector<EngineConfig>& parts, const Clock& clock,
                           bool background, const std::vector<std::shared_ptr<NvmDevice>>& devices,
                           RecoveryProgress* progress, MemoryClaim claim,
                           const std::vector<NumaNode>& nodes)
    : instances_(parts.size()) {
  for_all_at_once(parts.size(), [&](std::size_t i) {
    EngineConfig part = parts[i];
    const NumaNode* node = node_for(nodes, part.instance, part.instance_count);
    // This thread ends with the start; the instance's own threads are its children.
    if (node != nullptr && prefer_node(*node)) part.numa_node = node->number;
    std::vector<std::shared_ptr<NvmDevice>> own;
    for (std::size_t d = i; d < devices.size(); d += parts.size()) own.push_back(devices[d]);
    RecoveryProgress of_instance(progress);
    instances_[i] = std::make_unique<BundledEngine>(part, clock, background, std::move(own),
                                                    &of_instance, claim);
  });
  std::vector<DramTier*> tiers;
  std::vector<const StartReport*> reports;
  for (const auto& instance : instances_) {
    tiers.push_back(&instance->dram());
    reports.push_back(&instance->start_report());
  }
  tiers_ = std::make_unique<TierSet>(std::move(tiers));
  report_ = summed(reports);
}

// ---- batches
// -------------------------------------------------------------------------------------

// Through all instances; what they find on NVM goes to the column's list.
void FanOutEngine::look_up(GetColumn& column) {
  std::array<std::uint64_t, layout::kMaxInstances> below_hits;
  tiers_->get(column, std::span(below_hits).first(instances_.size()));
  if (column.quiet || !instances_.front()->has_nvm()) return;
  for (std::size_t i = 0; i < instances_.size(); ++i) {
    instances_[i]->count_nvm_hits(column.ns, below_hits[i]);
  }
}

void FanOutEngine::get(GetColumn& column) {
  if (column.nvm != nullptr || column.quiet || !instances_.front()->has_nvm()) {
    return look_up(column);
  }
  std::vector<NvmCell> cells;
  column.nvm = &cells;
  look_up(column);
  column.nvm = nullptr;
  if (!cells.empty()) read_and_wait(*this, column, std::move(cells));
}

void FanOutEngine::read(std::vector<NvmCell> cells, std::shared_ptr<NvmReader> reader) {
  if (cells.empty()) return;
  const std::uint16_t first = cells.front().instance;
  const bool one = std::all_of(cells.begin(), cells.end(),
                               [&](const NvmCell& cell) { return cell.instance == first; });
  if (one) return instances_[first]->read(std::move(cells), std::move(reader));
  std::vector<std::vector<NvmCell>> by_instance(instances_.size());
  for (const NvmCell& cell : cells) by_instance[cell.instance].push_back(cell);
  const auto shared = std::make_shared<SharedReader>(std::move(reader));
  for (std::size_t i = 0; i < instances_.size(); ++i) {
    if (!by_instance[i].empty()) instances_[i]->read(std::move(by_instance[i]), shared);
  }
}

void FanOutEngine::release(std::span<const NvmCell> cells) {
  for (const NvmCell& cell : cells) instances_[cell.instance]->release({&cell, 1});
}

// One instance after the other: the top of a cursor says which, the rest is the instance's own.
std::uint64_t FanOutEngine::scan(std::uint64_t cursor, const ScanFilter& filter, std::size_t bytes,
                                 ScanBatch& batch) {
  constexpr unsigned kOwnBits = 56;
  constexpr std::uint64_t kOwnMask = (std::uint64_t{1} << kOwnBits) - 1;
  for (std::uint64_t instance = cursor >> kOwnBits; instance < instances_.size(); ++instance) {
    const std::uint64_t next = instances_[instance]->scan(cursor & kOwnMask, filter, bytes, batch);
    if (next != kScanEnd) return instance << kOwnBits | next;
    cursor = 0;
  }
  return kScanEnd;
}

// ---- operators
// -----------------------------------------------------------------------------------

std::uint64_t FanOutEngine::flush(NamespaceIndex ns) {
  std::uint64_t dropped = 0;
  for (const auto& instance : instances_) {
    dropped += instance->flush(ns);
    FC_SEQUENCE_POINT("fan_out:flushed_one");
  }
  return dropped;
}

void FanOutEngine::drop_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) {
  for (const auto& instance : instances_) instance->drop_shards(shard_count, shards);
}

void FanOutEngine::hold_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) {
  for (const auto& instance : instances_) instance->hold_shards(shard_count, shards);
}

// Of a shard that one instance does not know any more some items are missing: that is as good as
// none. So is a life that went on for some of them only.
KeptShards FanOutEngine::kept_shards() const {
  KeptShards kept = instances_.front()->kept_shards();
  for (const auto& instance : instances_) {
    const KeptShards also = instance->kept_shards();
    std::vector<std::uint32_t> both;
    std::set_intersection(kept.shards.begin(), kept.shards.end(), also.shards.begin(),
                          also.shards.end(), std::back_inserter(both));
    kept.shards = std::move(both);
    kept.away_ms = std::max(kept.away_ms, also.away_ms);
  }
  if (kept.shards.empty()) kept.away_ms = 0;
  return kept;
}

// In whole segments, spread evenly; what does not come out even goes where there is room. All of it
// is known to fit before the first instance changes.
std::uint64_t FanOutEngine::resize(DomainIndex domain, std::uint64_t budget_bytes) {
  const std::lock_guard lock(resize_mutex_);
  const std::uint64_t count = instances_.size();
  const std::uint64_t segment_bytes = instances_.front()->dram().segment_bytes();
  const std::uint64_t segments = budget_bytes / segment_bytes;
  if (segments < layout::kMinDomainSegments * count) {
    throw std::invalid_argument(
        "the least budget of a domain over " + std::to_string(count) + " instances is " +
        std::to_string(layout::kMinDomainSegments * count * segment_bytes) + " bytes");
  }
  std::vector<std::uint64_t> room;
  for (const auto& instance : instances_) {
    DramTier& tier = instance->dram();
    room.push_back(tier.segments_most(domain) * tier.segment_bytes() / segment_bytes);
  }
  const std::uint64_t least = *std::min_element(room.begin(), room.end());
  const auto more = static_cast<std::uint64_t>(
      std::count_if(room.begin(), room.end(), [&](std::uint64_t r) { return r > least; }));
  const std::uint64_t share = segments / count;
  std::uint64_t left = segments % count;
  if (share > least || (share == least && left > more)) {
    throw std::invalid_argument("only " + std::to_string((least * count + more) * segment_bytes) +
                                " bytes are free of other domains' budgets: shrink one first");
  }
  std::uint64_t old_bytes = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const bool one_more = left != 0 && room[i] > share;
    left -= one_more ? 1 : 0;
    old_bytes += instances_[i]->resize(domain, (share + (one_more ? 1 : 0)) * segment_bytes);
  }
  return old_bytes;
}

void FanOutEngine::maintain() {
  for (const auto& instance : instances_) instance->maintain();
}

void FanOutEngine::visit(CounterVisitor& visitor) const {
  MergedCounters merged;
  for (const auto& instance : instances_) instance->visit(merged);
  merged.visit(visitor);
}

bool FanOutEngine::shutdown() {
  std::vector<char> whole(instances_.size());
  for_all_at_once(instances_.size(),
                  [&](std::size_t i) { whole[i] = instances_[i]->shutdown() ? 1 : 0; });
  return std::all_of(whole.begin(), whole.end(), [](char one) { return one != 0; });
}

// ---- how engines are made
// ------------------------------------------------------------------------

std::unique_ptr<Engine> make_instances(const EngineConfig& config, const Clock& clock,
                                       bool background,
                                       std::vector<std::shared_ptr<NvmDevice>> devices,
                                       RecoveryProgress* progress, MemoryClaim claim,
                                       const std::vector<NumaNode>& nodes) {
  const std::vector<EngineConfig> parts = split_instances(config, !devices.empty());
  if (config.instance_count == 1) {
    remove_leftovers(config, static_cast<std::uint32_t>(parts.size()));
  }
  if (claim == MemoryClaim::Whole) check_free_memory(config);
  if (parts.size() == 1) {
    return std::make_unique<BundledEngine>(parts.front(), clock, background, std::move(devices),
                                           progress, claim);
  }
  return std::make_unique<FanOutEngine>(parts, clock, background, devices, progress, claim, nodes);
}

std::unique_ptr<Engine> make_engine(const EngineConfig& config, const Clock& clock, bool background,
                                    std::vector<std::shared_ptr<NvmDevice>> devices,
                                    RecoveryProgress* progress) {
  return make_instances(config, clock, background, std::move(devices), progress, MemoryClaim::Whole,
                        numa_nodes());
}

}  // namespace fc
