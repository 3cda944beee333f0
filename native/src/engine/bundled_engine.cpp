// The bundled engine: the seam over its tiers, and the thread that lets time pass in them.

#include <condition_variable>
#include <mutex>
#include <thread>

#include "feature_cache/engine.hpp"
#include "memory/dram_tier.hpp"

namespace fc {
namespace {

constexpr std::chrono::milliseconds kMaintenancePeriod{100};

class BundledEngine final : public Engine {
 public:
  BundledEngine(const EngineConfig& config, const Clock& clock, bool background)
      : dram_(config, clock) {
    if (background) thread_ = std::thread([this] { run(); });
  }
  ~BundledEngine() override {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  NamespaceIndex find_namespace(std::string_view name) const noexcept override {
    return dram_.find_namespace(name);
  }
  DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept override {
    return dram_.find_domain(ns, name);
  }
  void get(GetColumn& column) override { dram_.get(column); }
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
  void read(std::vector<NvmCell>, std::shared_ptr<NvmReader>) override {}
  void release(std::span<const NvmCell>) override {}
  bool token_alive(NamespaceIndex ns, std::string_view key, Token token) const noexcept override {
    return dram_.token_alive(ns, key, token);
  }
  std::uint64_t flush(NamespaceIndex ns) override { return dram_.flush(ns); }
  std::uint64_t resize(DomainIndex domain, std::uint64_t budget_bytes) override {
    return dram_.resize(domain, budget_bytes);
  }
  void maintain() override { dram_.maintain(); }
  void visit(CounterVisitor& visitor) const override { dram_.visit(visitor); }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (!wake_.wait_for(lock, kMaintenancePeriod, [this] { return stop_; })) {
      lock.unlock();
      dram_.maintain();
      lock.lock();
    }
  }

  DramTier dram_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> make_engine(const EngineConfig& config, const Clock& clock, bool background,
                                    std::vector<std::shared_ptr<NvmDevice>>) {
  config.validate();
  return std::make_unique<BundledEngine>(config, clock, background);
}

}  // namespace fc
