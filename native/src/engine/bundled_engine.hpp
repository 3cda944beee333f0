// The bundled engine: the seam over the tiers of one instance, and the thread that lets time pass
// in them.
//
// Threads: as the seam's. The tiers are shown for a fan-out engine, which sends batches through
// those of several instances at once.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/promoter.hpp"
#include "feature_cache/engine.hpp"
#include "memory/dram_tier.hpp"
#include "nvm/nvm_tier.hpp"

namespace fc {

class BundledEngine final : public Engine {
 public:
  BundledEngine(const EngineConfig& asked, const Clock& clock, bool background,
                std::vector<std::shared_ptr<NvmDevice>> devices, RecoveryProgress* progress,
                MemoryClaim claim);
  ~BundledEngine() override { stop_threads(); }

  NamespaceIndex find_namespace(std::string_view name) const noexcept override {
    return dram_.find_namespace(name);
  }
  DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept override {
    return dram_.find_domain(ns, name);
  }
  void get(GetColumn& column) override;
  void read(std::vector<NvmCell> cells, std::shared_ptr<NvmReader> reader) override;
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
  std::shared_ptr<const TokenSnapshot> tokens() const override { return dram_.tokens(); }
  std::uint64_t scan(std::uint64_t cursor, const ScanFilter& filter, std::size_t bytes,
                     ScanBatch& batch) override {
    const std::uint64_t next = dram_.scan(cursor, filter, bytes, batch);
    return next < dram_.index().bucket_count() ? next : kScanEnd;
  }
  std::uint64_t flush(NamespaceIndex ns) override { return dram_.flush(ns); }
  void drop_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) override;
  void hold_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) override;
  KeptShards kept_shards() const override { return dram_.kept_shards(); }
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
  bool shutdown() override;

  DramTier& dram() noexcept { return dram_; }
  const DramTier& dram() const noexcept { return dram_; }
  bool has_nvm() const noexcept { return nvm_ != nullptr; }
  // Hits that were served from a region still in memory.
  void count_nvm_hits(NamespaceIndex ns, std::uint64_t hits) {
    if (hits != 0) nvm_->ns(ns).hits.add(hits);
  }

 private:
  EngineConfig prepare(const EngineConfig& asked, std::vector<std::shared_ptr<NvmDevice>>& devices,
                       const Clock& clock);
  void check_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) const;
  void spill(std::uint64_t deadline_ns);
  std::string state_path() const {
    return config_.persist.dir + "/" + config_.persist.name + ".nvm";
  }
  nvm::NvmStart nvm_start(RecoveryProgress* progress);
  void stop_threads();
  void consider(const nvm::ReadResult& result);
  void run();

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

}  // namespace fc
