// An engine that keeps nothing: of a root without a hot tier. Every key is absent, every write is
// taken and forgotten.

#include <algorithm>

#include "feature_cache/engine.hpp"

namespace fc {
namespace {

class EmptyEngine final : public Engine {
 public:
  explicit EmptyEngine(const EngineConfig& config) : config_(config) {}

  NamespaceIndex find_namespace(std::string_view name) const noexcept override {
    const auto found = std::find_if(config_.namespaces.begin(), config_.namespaces.end(),
                                    [&](const NamespaceConfig& ns) { return ns.name == name; });
    return found == config_.namespaces.end()
               ? kNoNamespace
               : static_cast<NamespaceIndex>(found - config_.namespaces.begin());
  }
  DomainIndex find_domain(NamespaceIndex ns, std::string_view name) const noexcept override {
    std::size_t first = 0;
    for (NamespaceIndex before = 0; before < ns; ++before) {
      first += config_.namespaces[before].domains.size();
    }
    const std::vector<DomainConfig>& domains = config_.namespaces[ns].domains;
    const auto found =
        std::find_if(domains.begin(), domains.end(),
                     [&](const DomainConfig& domain) { return domain.name == name; });
    return found == domains.end() ? kNoDomain
                                  : static_cast<DomainIndex>(
                                        first + static_cast<std::size_t>(found - domains.begin()));
  }
  void get(GetColumn& column) override {
    std::fill(column.statuses.begin(), column.statuses.end(), CellStatus::Miss);
    std::fill(column.lengths.begin(), column.lengths.end(), 0);
    if (column.absent == nullptr) return;
    column.absent->reserve(column.absent->size() + column.keys.size());
    for (std::uint32_t i = 0; i < column.keys.size(); ++i) column.absent->push_back({i, {}});
  }
  void read(std::vector<NvmCell>, std::shared_ptr<NvmReader>) override {}  // none is handed out
  void release(std::span<const NvmCell>) override {}
  void put(NamespaceIndex, std::span<const PutItem>, std::span<WriteStatus> statuses) override {
    std::fill(statuses.begin(), statuses.end(), WriteStatus::Stored);
  }
  void erase(NamespaceIndex, std::span<const std::string_view>,
             std::span<WriteStatus> statuses) override {
    std::fill(statuses.begin(), statuses.end(), WriteStatus::Stored);
  }
  void install(NamespaceIndex, std::span<const PutItem>, std::span<const Token>,
               std::span<InstallStatus> statuses) override {
    std::fill(statuses.begin(), statuses.end(), InstallStatus::Installed);
  }
  bool token_alive(NamespaceIndex, std::string_view, Token) const noexcept override { return true; }
  std::shared_ptr<const TokenSnapshot> tokens() const override {
    class None final : public TokenSnapshot {
      Token token(NamespaceIndex, std::string_view) const noexcept override { return {}; }
    };
    return std::make_shared<const None>();
  }
  std::uint64_t scan(std::uint64_t, const ScanFilter&, std::size_t, ScanBatch&) override {
    return kScanEnd;
  }
  std::uint64_t flush(NamespaceIndex) override { return 0; }
  void drop_shards(std::uint32_t, std::span<const std::uint32_t>) override {}
  void hold_shards(std::uint32_t, std::span<const std::uint32_t>) override {}
  KeptShards kept_shards() const override { return {}; }
  std::uint64_t resize(DomainIndex, std::uint64_t) override {
    throw std::invalid_argument("this node keeps nothing: its domains have no budget");
  }
  void maintain() override {}
  void visit(CounterVisitor&) const override {}
  const StartReport& start_report() const noexcept override { return report_; }
  bool shutdown() override { return true; }

 private:
  const EngineConfig config_;
  const StartReport report_{};
};

}  // namespace

std::unique_ptr<Engine> make_empty_engine(const EngineConfig& config) {
  return std::make_unique<EmptyEngine>(config);
}

}  // namespace fc
