// A node of several instances: each key lives on one of them (core/placement.hpp), and a batch goes
// through all of them in one pass.
//
// Instances share nothing but the node's config: each has its own arena, index, epochs, NVM files,
// journal and maintenance thread. They start and end at the same time, each on its own NUMA node
// where the machine has several. Tokens and NVM cells are an instance's; both find it again, by the
// key's hash and by the cell's own word for it.
//
// Threads: as the seam's.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/numa.hpp"
#include "engine/bundled_engine.hpp"
#include "memory/tier_set.hpp"

namespace fc {

class FanOutEngine final : public Engine {
 public:
  // `parts`: of split_instances(), more than one. Throws what the first instance throws that
  // cannot start.
  FanOutEngine(const std::vector<EngineConfig>& parts, const Clock& clock, bool background,
               const std::vector<std::shared_ptr<NvmDevice>>& devices, RecoveryProgress* progress,
               MemoryClaim claim, const std::vector<NumaNode>& nodes);

  NamespaceIndex find_namespace(std::string_view name) const noexcept override {
    return instances_.front()->find_namespace(name);
  }
  DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept override {
    return instances_.front()->find_domain(ns, name);
  }
  void get(GetColumn& column) override;
  void read(std::vector<NvmCell> cells, std::shared_ptr<NvmReader> reader) override;
  void release(std::span<const NvmCell> cells) override;
  void put(NamespaceIndex ns, std::span<const PutItem> items,
           std::span<WriteStatus> statuses) override {
    tiers_->put(ns, items, statuses);
  }
  void erase(NamespaceIndex ns, std::span<const std::string_view> keys,
             std::span<WriteStatus> statuses) override {
    tiers_->erase(ns, keys, statuses);
  }
  void install(NamespaceIndex ns, std::span<const PutItem> items, std::span<const Token> tokens,
               std::span<InstallStatus> statuses) override {
    tiers_->install(ns, items, tokens, statuses);
  }
  bool token_alive(NamespaceIndex ns, std::string_view key, Token token) const noexcept override {
    return instances_[tiers_->instance_of_key(ns, key)]->token_alive(ns, key, token);
  }
  std::shared_ptr<const TokenSnapshot> tokens() const override { return tiers_->tokens(); }
  std::uint64_t scan(std::uint64_t cursor, const ScanFilter& filter, std::size_t bytes,
                     ScanBatch& batch) override;
  std::uint64_t flush(NamespaceIndex ns) override;
  void drop_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) override;
  void hold_shards(std::uint32_t shard_count, std::span<const std::uint32_t> shards) override;
  KeptShards kept_shards() const override;
  std::uint64_t resize(DomainIndex domain, std::uint64_t budget_bytes) override;
  void maintain() override;
  void visit(CounterVisitor& visitor) const override;
  const StartReport& start_report() const noexcept override { return report_; }
  bool shutdown() override;

 private:
  void look_up(GetColumn& column);

  std::vector<std::unique_ptr<BundledEngine>> instances_;  // fixed after construction
  std::unique_ptr<TierSet> tiers_;                         // of all instances
  StartReport report_;
  std::mutex resize_mutex_;  // one resize at a time
};

// As make_engine(); for tests, memory that is not there (MemoryClaim::Lazy) and nodes of machines
// that we do not have.
std::unique_ptr<Engine> make_instances(const EngineConfig& config, const Clock& clock,
                                       bool background,
                                       std::vector<std::shared_ptr<NvmDevice>> devices,
                                       RecoveryProgress* progress, MemoryClaim claim,
                                       const std::vector<NumaNode>& nodes);

// What the starts of all instances come to: sums, the longest times, the worst of what they found
// and whose it was.
StartReport summed(std::span<const StartReport* const> reports);

}  // namespace fc
