#include "core/placement.hpp"

#include <memory>

#include "core/check.hpp"

namespace fc {
namespace {

using Tables = std::array<PlacementTable, layout::kMaxInstances>;  // [n - 1]: for n instances

// How many slots an instance has among `instances`; who came first has the odd ones.
constexpr std::uint32_t share_of(std::uint32_t instance, std::uint32_t instances) noexcept {
  return kPlacementSlots / instances + (instance < kPlacementSlots % instances ? 1 : 0);
}

std::unique_ptr<const Tables> make_tables() {
  auto tables = std::make_unique<Tables>();
  (*tables)[0].fill(0);
  std::array<std::uint32_t, layout::kMaxInstances> counts{};
  counts[0] = kPlacementSlots;
  for (std::uint32_t instances = 2; instances <= layout::kMaxInstances; ++instances) {
    const std::uint32_t joins = instances - 1;
    PlacementTable& table = (*tables)[instances - 1];
    table = (*tables)[instances - 2];
    // Which slots go is all the same: keys are spread over them by their hash.
    for (std::uint8_t& owner : table) {
      if (counts[owner] <= share_of(owner, instances)) continue;
      --counts[owner];
      ++counts[joins];
      owner = static_cast<std::uint8_t>(joins);
    }
  }
  return tables;
}

}  // namespace

const PlacementTable& placement_table(std::uint32_t instances) noexcept {
  static const std::unique_ptr<const Tables> tables = make_tables();
  FC_CHECK(instances >= 1 && instances <= layout::kMaxInstances);
  return (*tables)[instances - 1];
}

}  // namespace fc
