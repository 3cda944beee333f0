// The bundled engine against the contract of any engine: over DRAM alone, and with a tier below.
#include "engine_contract.hpp"
#include "nvm_support.hpp"

namespace fc::testing {
namespace {

std::unique_ptr<Engine> make_with_nvm(EngineConfig config, const Clock& clock) {
  // An engine that is still there keeps its file, though the folder is gone.
  static std::unique_ptr<Folder> folder;
  folder = std::make_unique<Folder>();
  for (NamespaceConfig& ns : config.namespaces) ns = with_nvm(ns, 8, PromotionKind::Always);
  config.nvm =
      nvm_config(folder->file("nvm"), 8 * static_cast<std::uint32_t>(config.namespaces.size()));
  config.memory_bytes += 16 * kMiB;
  return make_engine(config, clock, false);
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Bundled, EngineContract,
                         ::testing::Values(EngineFactory{"bundled",
                                                         [](const EngineConfig& config,
                                                            const Clock& clock) {
                                                           return make_engine(config, clock, false);
                                                         }},
                                           EngineFactory{"bundled_nvm", make_with_nvm}),
                         [](const auto& tested) { return tested.param.name; });

}  // namespace fc::testing
