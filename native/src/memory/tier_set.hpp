// The DRAM tiers of a node's instances as one key space: a batch goes to all of them at once, each
// key to the tier of its own instance (core/placement.hpp).
//
// All tiers are of one config but for their number, so namespaces and domains have one index in
// all. A set of one would answer the same; DramTier's own calls spend nothing on the choice.
//
// Threads: any. The tiers outlive the set.
#pragma once

#include <span>
#include <vector>

#include "core/placement.hpp"
#include "memory/dram_tier.hpp"

namespace fc {

class TierSet {
 public:
  // In order of their instances; 1..layout::kMaxInstances.
  explicit TierSet(std::vector<DramTier*> tiers)
      : tiers_(std::move(tiers)),
        table_(placement_table(static_cast<std::uint32_t>(tiers_.size()))) {}

  std::size_t size() const noexcept { return tiers_.size(); }
  // The instance of a key.
  std::uint32_t instance_of_key(NamespaceIndex ns, std::string_view key) const noexcept;

  // As DramTier's own; `below_hits` has an entry a tier: how many cells were answered from below
  // it.
  void get(GetColumn& column, std::span<std::uint64_t> below_hits) const;
  void put(NamespaceIndex ns, std::span<const PutItem> items,
           std::span<WriteStatus> statuses) const;
  void erase(NamespaceIndex ns, std::span<const std::string_view> keys,
             std::span<WriteStatus> statuses) const;
  void install(NamespaceIndex ns, std::span<const PutItem> items, std::span<const Token> tokens,
               std::span<InstallStatus> statuses) const;
  std::shared_ptr<const TokenSnapshot> tokens() const;  // valid while the set is

 private:
  class Reached;

  std::uint64_t seed_of(NamespaceIndex ns) const noexcept;
  std::uint32_t instance_of_hash(const KeyHash& hash) const noexcept {
    return table_[placement_slot(hash.high)];
  }

  const std::vector<DramTier*> tiers_;
  const PlacementTable& table_;
};

}  // namespace fc
