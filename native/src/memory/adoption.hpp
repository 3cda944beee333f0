// What a new process makes of an arena that another one left: repaired segment rows, an index whose
// every entry points at a record of a namespace and a domain that are still there, and the queues
// of each domain.
//
// After an orderly stop the entries are only looked at for where they point; after anything else,
// or when that finds something wrong, every record is looked at too (its size, its namespace, and
// that its key belongs where the entry stands), and all counts are made up anew.
//
// Nothing is changed that a cut-off would leave half-done for the next one: rows are given back
// only when no entry points into their segments any more. So an adoption may be killed and
// repeated.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "eviction/policy.hpp"
#include "feature_cache/recovery.hpp"
#include "memory/arena.hpp"

namespace fc {

// A domain of the config, in the order of its index.
struct DomainIdentity {
  std::uint64_t ns_seed = 0;
  std::uint64_t name_hash = 0;
  NamespaceIndex ns = kNoNamespace;

  bool is(const DomainRow& row) const noexcept {
    return row.ns_seed == ns_seed && row.name_hash == name_hash;
  }
};

// What a domain has.
struct AdoptedDomain {
  std::uint16_t row = 0;
  std::uint64_t entries = 0;
  std::uint64_t live_bytes = 0;
  std::uint64_t payload_bytes = 0;
  std::uint64_t next_sequence = 1;
  std::array<std::vector<std::uint32_t>, kQueueCount> sealed;  // oldest first
  std::array<std::vector<std::uint32_t>, kQueueCount> open;
  std::array<std::uint32_t, kQueueCount> segments{};  // all, further ones of large records too
};

class Adoption {
 public:
  // `incarnations`: of the namespaces, 0 for one that has nothing here. `keep_below`: whether there
  // is a tier below, that sees to its own entries.
  Adoption(Arena& arena, Index& index, std::span<const DomainIdentity> domains,
           std::span<const std::uint64_t> seeds, std::span<const std::uint16_t> incarnations,
           bool keep_below, RecoveryProgress* progress);

  // `check`: look at every record whatever the rows say. Fills in the report.
  void run(bool check, StartReport& report);
  const AdoptedDomain& domain(DomainIndex index) const noexcept { return adopted_[index]; }

 private:
  enum class Use : std::uint8_t { None, Records, Large, Further };

  void match_rows();
  bool classify();
  bool is_whole(std::uint32_t segment) const noexcept;
  bool claim_large(std::uint32_t head);
  struct Walked {
    std::uint64_t kept = 0;
    std::uint64_t dropped = 0;
  };
  template <class Goes>
  Walked walk_index(Goes&& goes);
  std::uint64_t count_records();
  void count_segment(std::uint32_t segment, std::span<AdoptedDomain> counts);
  std::uint64_t drop_unwalkable();
  bool is_indexed(const Place& place, std::uint64_t location) const noexcept;
  bool is_headed(const RecordHeader& record, std::uint32_t segment,
                 std::uint64_t offset) const noexcept;
  bool points_well(Entry entry) const noexcept;
  bool is_right(Entry entry, std::uint64_t bucket) const noexcept;
  void settle(bool counted);
  void free_rows();
  void queue_up();

  Arena& arena_;
  Index& index_;
  const std::span<const DomainIdentity> domains_;
  const std::span<const std::uint64_t> seeds_;
  const bool keep_below_;
  RecoveryProgress* const progress_;
  std::vector<NamespaceIndex> ns_of_incarnation_;  // by incarnation
  std::vector<DomainIndex> domain_of_row_;
  std::vector<Use> use_;            // by segment
  std::vector<DomainIndex> owner_;  // by segment
  std::vector<AdoptedDomain> adopted_;
};

// The sum that an orderly stop leaves in the header.
std::uint64_t clean_sum_of(const ArenaMemory& memory) noexcept;

}  // namespace fc
