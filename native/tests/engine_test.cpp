// The bundled engine against the contract of any engine: over DRAM alone and with a tier below, as
// one instance and as three.
#include "engine_contract.hpp"
#include "nvm_support.hpp"

namespace fc::testing {
namespace {

EngineConfig with_nvm_tier(EngineConfig config, std::uint32_t instances) {
  // An engine that is still there keeps its files, though the folder is gone.
  static std::unique_ptr<Folder> folder;
  folder = std::make_unique<Folder>();
  const std::uint32_t regions = 8 * instances;
  const auto namespaces = static_cast<std::uint32_t>(config.namespaces.size());
  for (NamespaceConfig& ns : config.namespaces) ns = with_nvm(ns, regions, PromotionKind::Always);
  config.nvm = nvm_config(folder->file("nvm"), regions * namespaces + instances);
  config.memory_bytes += instances * 16 * kMiB;
  return config;
}

// What an instance takes before it holds anything is small beside a real one's memory, not here.
EngineConfig over_three(EngineConfig config) {
  config.instances = 3;
  config.memory_bytes += 2 * 2 * kMiB;
  return config;
}

EngineFactory factory(std::string name, std::function<EngineConfig(EngineConfig)> adapt) {
  return {std::move(name),
          [adapt = std::move(adapt)](const EngineConfig& config, const Clock& clock) {
            return make_engine(adapt(config), clock, false);
          }};
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(
    Bundled, EngineContract,
    ::testing::Values(
        factory("bundled", [](EngineConfig config) { return config; }),
        factory("bundled_nvm", [](EngineConfig config) { return with_nvm_tier(config, 1); }),
        factory("fan_out", over_three),
        factory("fan_out_nvm",
                [](EngineConfig config) { return with_nvm_tier(over_three(config), 3); })),
    [](const auto& tested) { return tested.param.name; });

}  // namespace fc::testing
