#include "engine/bundled_engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "engine/nvm_read.hpp"
#include "engine/waiting_read.hpp"

namespace fc {
namespace {

constexpr std::chrono::milliseconds kMaintenancePeriod{100};

// The devices are opened first: they know their sizes, and the memory is planned by these.
EngineConfig with_sizes(EngineConfig config, std::vector<std::shared_ptr<NvmDevice>>& devices) {
  config.validate();
  if (devices.empty()) {
    devices = nvm::open_devices(config.nvm);
  } else {
    for (std::size_t d = 0; d < devices.size(); ++d) {
      config.nvm.devices.at(d).bytes = devices[d]->bytes();
    }
  }
  return config;
}

}  // namespace

BundledEngine::BundledEngine(const EngineConfig& asked, const Clock& clock, bool background,
                             std::vector<std::shared_ptr<NvmDevice>> devices,
                             RecoveryProgress* progress, MemoryClaim claim)
    : config_(prepare(asked, devices, clock)),
      dram_(config_, clock, report_, found_ ? std::optional(found_->tick) : std::nullopt, progress,
            claim) {
  if (!devices.empty()) {
    nvm_ = std::make_unique<nvm::NvmTier>(config_, dram_.geometry(), devices, dram_.index(),
                                          dram_.epochs(), dram_.moved(), dram_.ticks(),
                                          nvm_start(progress));
    for (std::size_t n = 0; n < config_.namespaces.size(); ++n) {
      const auto ns = static_cast<NamespaceIndex>(n);
      nvm_->follow_incarnation(ns, dram_.incarnation(ns));
    }
    nvm_->recover();
    dram_.keep_incarnations();
    dram_.settle_moves(found_ ? found_->counts : InstanceCounts{}, report_);
    dram_.attach(*nvm_);
    promoter_ = std::make_unique<Promoter>(dram_, *nvm_, background);
    nvm_->start();
  }
  if (nvm_ == nullptr) dram_.settle_moves({}, report_);
  // What an earlier tier left must not be believed after a life without it.
  if (nvm_ == nullptr && config_.persist.enabled()) unlink(state_path().c_str());
  dram_.fit_budgets();
  if (background) thread_ = std::thread([this] { run(); });
}

void BundledEngine::get(GetColumn& column) {
  if (nvm_ == nullptr) {
    dram_.get(column);
    return;
  }
  if (column.nvm != nullptr || column.quiet) {
    const std::uint64_t below_hits = dram_.get(column);
    if (!column.quiet) count_nvm_hits(column.ns, below_hits);
    return;
  }
  std::vector<NvmCell> cells;
  column.nvm = &cells;
  count_nvm_hits(column.ns, dram_.get(column));
  column.nvm = nullptr;
  if (!cells.empty()) read_and_wait(*this, column, std::move(cells));
}

void BundledEngine::read(std::vector<NvmCell> cells, std::shared_ptr<NvmReader> reader) {
  if (cells.empty()) return;
  nvm_->read(std::move(cells),
             std::make_shared<NvmRead>(
                 dram_, *nvm_, [this](const nvm::ReadResult& result) { consider(result); },
                 std::move(reader)));
}

void BundledEngine::drop_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) {
  check_shards(shard_count, shards);
  dram_.drop_shards(shards);
}

void BundledEngine::hold_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) {
  check_shards(shard_count, shards);
  dram_.hold_shards(shards);
}

void BundledEngine::check_shards(std::uint32_t shard_count,
                                 std::span<const std::uint32_t> shards) const {
  if (shard_count == 0 || shard_count != config_.shard_count) {
    throw std::invalid_argument("the engine was made for " + std::to_string(config_.shard_count) +
                                " shards, not for " + std::to_string(shard_count));
  }
  for (const std::uint32_t shard : shards) {
    if (shard < shard_count) continue;
    throw std::invalid_argument("there is no shard " + std::to_string(shard) + " of " +
                                std::to_string(shard_count));
  }
}

bool BundledEngine::shutdown() {
  stop_threads();
  if (!config_.persist.enabled()) return true;
  bool whole = true;
  if (nvm_ != nullptr) {
    const std::uint64_t deadline_ns =
        monotonic_ns() + config_.persist.shutdown_limit_ms * 1'000'000;
    if (config_.persist.spill_on_shutdown) spill(deadline_ns);
    whole = nvm_->shutdown(deadline_ns);
  }
  dram_.leave();
  return whole;
}

// What the devices say of themselves is asked before the memory is planned: its time goes on from
// theirs, and regions that are there keep their size where the config leaves it open.
EngineConfig BundledEngine::prepare(const EngineConfig& asked,
                                    std::vector<std::shared_ptr<NvmDevice>>& devices,
                                    const Clock& clock) {
  EngineConfig config = with_sizes(asked, devices);
  if (!config.persist.enabled() || devices.empty()) return config;
  found_ = nvm::find_set(devices, nvm::wall_now_ms(), clock.now_ms(), boot_id(), not_found_);
  if (found_ && config.nvm.region_bytes == 0) {
    const bool fits = std::all_of(
        config.namespaces.begin(), config.namespaces.end(), [&](const NamespaceConfig& ns) {
          return ns.nvm.budget_bytes == 0 ||
                 ns.nvm.budget_bytes / found_->region_bytes >= layout::kMinNamespaceRegions;
        });
    if (fits) config.nvm.region_bytes = found_->region_bytes;
  }
  return config;
}

// As much of each namespace as its regions hold, with some to spare: what comes last must not
// push out what came first.
void BundledEngine::spill(std::uint64_t deadline_ns) {
  std::vector<std::uint64_t> bytes_most;
  for (const NamespaceConfig& ns : config_.namespaces) {
    bytes_most.push_back(ns.nvm.budget_bytes / 8 * 7);
  }
  // Time for what follows: the regions are to be written.
  const std::uint64_t now = monotonic_ns();
  dram_.spill(now + (deadline_ns - now) / 4 * 3, bytes_most);
}

nvm::NvmStart BundledEngine::nvm_start(RecoveryProgress* progress) {
  nvm::NvmStart start;
  if (config_.persist.enabled()) start.state_path = state_path();
  start.memory_id = dram_.memory().head().header.memory_id;
  start.memory_kept = dram_.memory().kind() != ArenaMemory::Kind::New;
  start.found = found_;
  start.not_found = not_found_;
  start.report = &report_;
  start.progress = progress;
  return start;
}

void BundledEngine::stop_threads() {
  if (thread_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }
  // Reads first: what they bring may be on its way up.
  if (nvm_ != nullptr) nvm_->stop_reads();
  promoter_.reset();
}

// Whether a hit on NVM is worth a place in DRAM: `entry` counts the hits before this one.
void BundledEngine::consider(const nvm::ReadResult& result) {
  switch (config_.namespaces[result.cell.ns].nvm.promotion) {
    case PromotionKind::Never:
      return;
    case PromotionKind::SecondHit:
      if (Entry(result.cell.entry).frequency() == 0) return;
      break;
    case PromotionKind::Always:
      break;
  }
  promoter_->offer(result);
}

void BundledEngine::run() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, kMaintenancePeriod, [this] { return stop_; })) {
    lock.unlock();
    dram_.maintain();
    lock.lock();
  }
}

}  // namespace fc
