// What the engine tells of one request's cells on NVM, turned into answers, fetches and speculative
// lookups.
//
// Threads: the engine's, one at a time; nothing here blocks on more than a short lock. Lifetime:
// the engine keeps it until the last of its cells is answered, which may be long after the request
// has ended; so it keeps the request, and with it the bytes that the keys lie in. The node outlives
// its engine.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "upstream/cache_node.hpp"

namespace fc {

class CacheNode::NvmReads final : public NvmReader {
 public:
  NvmReads(CacheNode& node, std::shared_ptr<PendingGet> get, std::vector<DomainIndex> hints,
           std::uint64_t ended_before)
      : node_(node), get_(std::move(get)), hints_(std::move(hints)), ended_before_(ended_before) {}

  void answer(std::span<const NvmAnswer> answers) override;
  void late(std::span<const NvmCell> cells) override;
  bool wanted() const noexcept override { return !get_->ended(); }

 private:
  // Speculative lookups of cells of one namespace; those that got none are left in `cells`.
  void ask(NamespaceIndex ns, std::vector<NvmCell>& cells);

  static std::uint64_t place_of(const NvmCell& cell) noexcept {
    return std::uint64_t{cell.column} << 32 | cell.position;
  }

  CacheNode& node_;
  const std::shared_ptr<PendingGet> get_;
  const std::vector<DomainIndex> hints_;  // by column
  const std::uint64_t ended_before_;      // flights, before the lookup
  // Flights below live priority that will answer a cell; only the engine's calls touch it.
  std::unordered_map<std::uint64_t, FlightRef> asked_;
};

}  // namespace fc
