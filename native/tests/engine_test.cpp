// The bundled engine against the contract of any engine.
#include "engine_contract.hpp"

namespace fc::testing {

INSTANTIATE_TEST_SUITE_P(Bundled, EngineContract,
                         ::testing::Values(EngineFactory{
                             "bundled",
                             [](const EngineConfig& config, const Clock& clock) {
                               return make_engine(config, clock, false);
                             }}),
                         [](const auto& tested) { return tested.param.name; });

}  // namespace fc::testing
