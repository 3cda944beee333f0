// The bundled engine: the seam over its tiers, and the thread that lets time pass in them.

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "engine/nvm_read.hpp"
#include "engine/promoter.hpp"
#include "feature_cache/engine.hpp"
#include "memory/dram_tier.hpp"
#include "nvm/nvm_tier.hpp"

namespace fc {
namespace {

constexpr std::chrono::milliseconds kMaintenancePeriod{100};

// Who reads from NVM and waits for it: a get() without a list for the cells.
class WaitingReader final : public NvmReader {
 public:
  explicit WaitingReader(std::size_t cells) : left_(cells), answers_(cells) {}

  void answer(std::span<const NvmAnswer> answers) override {
    const std::lock_guard lock(mutex_);
    for (const NvmAnswer& answer : answers) {
      answers_[next_++] = {answer.cell, answer.status, values_.size(),
                           static_cast<std::uint32_t>(answer.value.size())};
      values_.append(answer.value.data(), answer.value.size());
    }
    left_ -= answers.size();
    // Under the lock: who waits may be gone as soon as it is released.
    if (left_ == 0) ended_.notify_one();
  }
  void late(std::span<const NvmCell>) override {}
  bool wanted() const noexcept override { return true; }

  struct Kept {
    NvmCell cell;
    CellStatus status = CellStatus::Miss;
    std::size_t offset = 0;  // of its value
    std::uint32_t bytes = 0;
  };
  // All answers, in the order of their positions.
  const std::vector<Kept>& wait() {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return left_ == 0; });
    std::sort(answers_.begin(), answers_.end(),
              [](const Kept& a, const Kept& b) { return a.cell.position < b.cell.position; });
    return answers_;
  }
  const std::uint8_t* value(const Kept& kept) const noexcept {
    return values_.data() + kept.offset;
  }
  std::size_t value_bytes() const noexcept { return values_.size(); }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::size_t left_;
  std::size_t next_ = 0;
  std::vector<Kept> answers_;
  Buffer values_;
};

// Puts the answers of NVM cells into a column, in key order with what is there.
void merge(GetColumn& column, WaitingReader& reader) {
  const std::vector<WaitingReader::Kept>& answers = reader.wait();
  Buffer merged(column.values->size() + reader.value_bytes() + 1);
  // What other columns had put there stays in front.
  std::size_t own = 0;
  for (std::size_t i = 0; i < column.keys.size(); ++i) own += column.lengths[i];
  std::size_t at = column.values->size() - own;
  merged.append(column.values->data(), at);
  const std::size_t first = merged.size();
  std::size_t next = 0;
  bool sorted = true;
  for (std::size_t i = 0; i < column.keys.size(); ++i) {
    if (next == answers.size() || answers[next].cell.position != i) {
      merged.append(column.values->data() + at, column.lengths[i]);
      at += column.lengths[i];
      continue;
    }
    const WaitingReader::Kept& kept = answers[next++];
    column.statuses[i] = kept.status;
    if (kept.status == CellStatus::Miss && column.absent != nullptr) {
      sorted = sorted && (column.absent->empty() || column.absent->back().position < i);
      column.absent->push_back({static_cast<std::uint32_t>(i), kept.cell.token});
    }
    if (!carries_value(kept.status)) continue;
    // The reply's limit, as for what was found in DRAM.
    if (merged.size() - first + kept.bytes > column.max_value_bytes) {
      column.statuses[i] = CellStatus::Throttled;
      continue;
    }
    column.lengths[i] = kept.bytes;
    merged.append(reader.value(kept), kept.bytes);
  }
  *column.values = std::move(merged);
  if (!sorted) {
    std::sort(column.absent->begin(), column.absent->end(),
              [](const Absent& a, const Absent& b) { return a.position < b.position; });
  }
}

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

class BundledEngine final : public Engine {
 public:
  BundledEngine(const EngineConfig& asked, const Clock& clock, bool background,
                std::vector<std::shared_ptr<NvmDevice>> devices, RecoveryProgress* progress)
      : config_(prepare(asked, devices, clock)),
        dram_(config_, clock, report_, found_ ? std::optional(found_->tick) : std::nullopt,
              progress) {
    if (!devices.empty()) {
      nvm_ = std::make_unique<nvm::NvmTier>(config_, dram_.geometry(), devices, dram_.index(),
                                            dram_.epochs(), dram_.ticks(), nvm_start(progress));
      for (std::size_t n = 0; n < config_.namespaces.size(); ++n) {
        const auto ns = static_cast<NamespaceIndex>(n);
        nvm_->follow_incarnation(ns, dram_.incarnation(ns));
      }
      nvm_->recover();
      dram_.keep_incarnations();
      dram_.attach(*nvm_);
      promoter_ = std::make_unique<Promoter>(dram_, *nvm_, background);
      nvm_->start();
    }
    // What an earlier tier left must not be believed after a life without it.
    if (nvm_ == nullptr && config_.persist.enabled()) unlink(state_path().c_str());
    dram_.fit_budgets();
    if (background) thread_ = std::thread([this] { run(); });
  }
  ~BundledEngine() override { stop_threads(); }

  NamespaceIndex find_namespace(std::string_view name) const noexcept override {
    return dram_.find_namespace(name);
  }
  DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept override {
    return dram_.find_domain(ns, name);
  }
  void get(GetColumn& column) override {
    if (nvm_ == nullptr) return dram_.get(column);
    if (column.nvm != nullptr || column.quiet) {
      dram_.get(column);
      if (!column.quiet) count_nvm_hits(column);
      return;
    }
    std::vector<NvmCell> cells;
    column.nvm = &cells;
    dram_.get(column);
    count_nvm_hits(column);
    column.nvm = nullptr;
    if (cells.empty()) return;
    const auto reader = std::make_shared<WaitingReader>(cells.size());
    read(std::move(cells), reader);
    merge(column, *reader);
  }
  void read(std::vector<NvmCell> cells, std::shared_ptr<NvmReader> reader) override {
    if (cells.empty()) return;
    nvm_->read(std::move(cells),
               std::make_shared<NvmRead>(
                   dram_, *nvm_, [this](const nvm::ReadResult& result) { consider(result); },
                   std::move(reader)));
  }
  void release(std::span<const NvmCell> cells) override {
    for (const NvmCell& cell : cells) nvm_->unpin(Entry(cell.entry));
  }
  void put(NamespaceIndex ns, std::span<const PutItem> items,
           std::span<WriteStatus> statuses) override {
    dram_.put(ns, items, statuses);
  }
  void erase(NamespaceIndex ns, std::span<const std::string_view> keys,
             std::span<WriteStatus> statuses) override {
    dram_.erase(ns, keys, statuses);
  }
  void install(NamespaceIndex ns, std::span<const PutItem> items, std::span<const Token> tokens,
               std::span<InstallStatus> statuses) override {
    dram_.install(ns, items, tokens, statuses);
  }
  bool token_alive(NamespaceIndex ns, std::string_view key, Token token) const noexcept override {
    return dram_.token_alive(ns, key, token);
  }
  std::uint64_t flush(NamespaceIndex ns) override { return dram_.flush(ns); }
  std::uint64_t resize(DomainIndex domain, std::uint64_t budget_bytes) override {
    return dram_.resize(domain, budget_bytes);
  }
  void maintain() override {
    dram_.maintain();
    if (promoter_ != nullptr) promoter_->drain();
  }
  void visit(CounterVisitor& visitor) const override {
    dram_.visit(visitor);
    if (nvm_ != nullptr) nvm_->visit(visitor);
  }
  const StartReport& start_report() const noexcept override { return report_; }
  bool shutdown() override {
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

 private:
  // What the devices say of themselves is asked before the memory is planned: its time goes on from
  // theirs, and regions that are there keep their size where the config leaves it open.
  EngineConfig prepare(const EngineConfig& asked, std::vector<std::shared_ptr<NvmDevice>>& devices,
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
  void spill(std::uint64_t deadline_ns) {
    std::vector<std::uint64_t> bytes_most;
    for (const NamespaceConfig& ns : config_.namespaces) {
      bytes_most.push_back(ns.nvm.budget_bytes / 8 * 7);
    }
    // Time for what follows: the regions are to be written.
    const std::uint64_t now = monotonic_ns();
    dram_.spill(now + (deadline_ns - now) / 4 * 3, bytes_most);
  }
  std::string state_path() const {
    return config_.persist.dir + "/" + config_.persist.name + ".nvm";
  }
  nvm::NvmStart nvm_start(RecoveryProgress* progress) {
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
  void stop_threads() {
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
  // Hits that were served from a region still in memory.
  void count_nvm_hits(const GetColumn& column) {
    const auto hits =
        std::count(column.statuses.begin(), column.statuses.end(), CellStatus::HitNvm);
    if (hits != 0) nvm_->ns(column.ns).hits.add(static_cast<std::uint64_t>(hits));
  }
  // Whether a hit on NVM is worth a place in DRAM: `entry` counts the hits before this one.
  void consider(const nvm::ReadResult& result) {
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
  void run() {
    std::unique_lock lock(mutex_);
    while (!wake_.wait_for(lock, kMaintenancePeriod, [this] { return stop_; })) {
      lock.unlock();
      dram_.maintain();
      lock.lock();
    }
  }

  std::optional<nvm::FoundSet> found_;  // fixed with config_
  std::string not_found_;               // why the devices say nothing
  const EngineConfig config_;
  StartReport report_;
  DramTier dram_;
  std::unique_ptr<nvm::NvmTier> nvm_;   // null: DRAM alone
  std::unique_ptr<Promoter> promoter_;  // with nvm_
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> make_engine(const EngineConfig& config, const Clock& clock, bool background,
                                    std::vector<std::shared_ptr<NvmDevice>> devices,
                                    RecoveryProgress* progress) {
  return std::make_unique<BundledEngine>(config, clock, background, std::move(devices), progress);
}

}  // namespace fc
