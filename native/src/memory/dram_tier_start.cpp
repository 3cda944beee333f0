// How the DRAM tier begins and ends: from nothing or from an adopted memory, and in order for the
// next process.

#include <algorithm>
#include <stdexcept>

#include "core/instances.hpp"
#include "core/sequence_point.hpp"
#include "memory/dram_tier.hpp"

namespace fc {

DramTier::DramTier(const EngineConfig& config, const Clock& clock, StartReport& report,
                   std::optional<Tick> tick, RecoveryProgress* progress, MemoryClaim claim)
    : memory_((config.validate(), config), clock.now_ms(), tick, report, claim),
      geometry_(memory_.geometry()),
      ticks_(clock, memory_.head().header.tick_base_ms),
      max_value_bytes_(config.max_value_bytes),
      memory_bytes_(config.memory_bytes),
      instance_(static_cast<std::uint16_t>(config.instance)),
      arena_(memory_),
      index_(arena_.buckets(), geometry_.bucket_count, memory_.head().moves),
      moved_(config.instance, config.instance_count, config.shard_count),
      write_versions_(std::make_unique<std::atomic<std::uint32_t>[]>(layout::kWriteVersionStripes)),
      shard_path_(config.persist.enabled()
                      ? config.persist.dir + "/" + config.persist.name + ".shards"
                      : "") {
  make_namespaces(config);
  const std::vector<std::uint32_t> budgets = budgets_of(config);
  const std::uint64_t begun_ns = monotonic_ns();
  const std::vector<AdoptedDomain> adopted = adopt(config, report, progress);
  arena_.adopt_stamps(moved_);
  const TierParts parts{arena_, index_, epochs_, moved_};
  for (std::size_t n = 0; n < namespaces_.size(); ++n) {
    Namespace& ns = *namespaces_[n];
    const NamespaceConfig& ns_config = config.namespaces[n];
    std::uint64_t ns_entries = 0;
    for (const DomainConfig& domain : ns_config.domains) {
      const auto index = static_cast<DomainIndex>(domains_.size());
      const std::uint64_t entries = entry_budget_of(geometry_, budgets[index]);
      ns_entries += entries;
      domains_.push_back(std::make_unique<Domain>(domain, index, ns, parts, budgets[index], entries,
                                                  adopted[index].row));
      domains_.back()->adopt(adopted[index]);
    }
    const auto domain_named = [&](const std::string& name) {
      for (DomainIndex d = 0; d < ns.domain_count; ++d) {
        if (ns_config.domains[d].name == name) return static_cast<DomainIndex>(ns.first_domain + d);
      }
      return kNoDomain;
    };
    std::vector<Router::Rule> rules;
    for (const RouteRule& rule : ns_config.rules) {
      rules.push_back({rule.prefix, rule.asked_at_least, domain_named(rule.domain)});
    }
    ns.router = std::make_unique<Router>(std::move(rules), domain_named(ns_config.default_domain),
                                         ns_entries);
    by_name_.emplace(ns.name, static_cast<NamespaceIndex>(n));
  }
  report.memory_ms = static_cast<double>(monotonic_ns() - begun_ns) * 1e-6;
}

void DramTier::fit_budgets() {
  for (const auto& domain : domains_) domain->fit_budget(now());
}

void DramTier::settle_moves(const InstanceCounts& below, StartReport& report) {
  settle_shards(report);
  InstanceCounts& kept = memory_.head().counts;
  moved_.settle(memory_.kind() == ArenaMemory::Kind::New ? below : kept);
  // Cut off in here nothing is known to the next start, which then hides all.
  kept = moved_.counts();
  keep_shards();
  FC_SEQUENCE_POINT("moves:settled");
}

void DramTier::make_namespaces(const EngineConfig& config) {
  auto& rows = memory_.head().namespaces;
  DomainIndex domains = 0;
  for (const NamespaceConfig& ns_config : config.namespaces) {
    auto ns = std::make_unique<Namespace>();
    ns->index = static_cast<NamespaceIndex>(namespaces_.size());
    ns->name = ns_config.name;
    ns->seed = namespace_seed(ns_config.name);
    ns->incarnation.store(0, std::memory_order_relaxed);
    ns->negative_ttl_ms = ns_config.negative_ttl_ms;
    ns->first_domain = domains;
    ns->domain_count = static_cast<DomainIndex>(ns_config.domains.size());
    domains = static_cast<DomainIndex>(domains + ns->domain_count);
    const auto found = std::find_if(rows.begin(), rows.end(), [&](const NamespaceRow& row) {
      return row.seed == ns->seed && row.incarnation() != 0;
    });
    if (found != rows.end()) {
      const std::uint16_t incarnation = found->incarnation();
      const bool taken =
          std::any_of(namespaces_.begin(), namespaces_.end(), [&](const auto& other) {
            return other->incarnation.load(std::memory_order_relaxed) == incarnation;
          });
      if (!taken) {
        ns->row = &*found;
        ns->incarnation.store(incarnation, std::memory_order_relaxed);
      }
    }
    namespaces_.push_back(std::move(ns));
  }
}

// Takes over what the arena holds, and gives rows to what is new in it.
std::vector<AdoptedDomain> DramTier::adopt(const EngineConfig& config, StartReport& report,
                                           RecoveryProgress* progress) {
  std::vector<DomainIdentity> identities;
  std::vector<std::uint64_t> seeds;
  std::vector<std::uint16_t> incarnations;
  for (std::size_t n = 0; n < namespaces_.size(); ++n) {
    seeds.push_back(namespaces_[n]->seed);
    incarnations.push_back(namespaces_[n]->incarnation.load(std::memory_order_relaxed));
    for (const DomainConfig& domain : config.namespaces[n].domains) {
      identities.push_back({seeds.back(), XXH3_64bits(domain.name.data(), domain.name.size()),
                            static_cast<NamespaceIndex>(n)});
    }
  }
  std::vector<AdoptedDomain> adopted;
  if (memory_.kind() == ArenaMemory::Kind::New) {
    adopted = lay_out_domains(config, identities);
  } else {
    Adoption adoption(arena_, index_, identities, seeds, incarnations, !config.nvm.devices.empty(),
                      progress);
    // What lies here of a namespace whose incarnation is not known is to be found and dropped.
    const auto& rows = memory_.head().domains;
    bool check = memory_.kind() == ArenaMemory::Kind::Unchecked;
    for (const DomainRow& row : rows) {
      for (std::size_t n = 0; n < seeds.size(); ++n) {
        check |= row.ns_seed == seeds[n] && incarnations[n] == 0;
      }
    }
    adoption.run(check, report);
    for (std::size_t d = 0; d < identities.size(); ++d) {
      adopted.push_back(adoption.domain(static_cast<DomainIndex>(d)));
    }
  }
  // No record is left of a namespace that is not in the config: its row is free.
  auto& rows = memory_.head().namespaces;
  for (NamespaceRow& row : rows) {
    const bool used = std::any_of(namespaces_.begin(), namespaces_.end(),
                                  [&](const auto& ns) { return ns->row == &row; });
    if (!used) row.seed = 0;
  }
  for (const auto& ns : namespaces_) {
    if (ns->row != nullptr) continue;
    ns->incarnation.store(new_incarnation(), std::memory_order_relaxed);
    ns->row = &*std::find_if(rows.begin(), rows.end(),
                             [](const NamespaceRow& row) { return row.seed == 0; });
    keep_incarnation(*ns, ns->incarnation.load(std::memory_order_relaxed));
    ns->row->seed = ns->seed;
  }
  return adopted;
}

std::vector<AdoptedDomain> DramTier::lay_out_domains(const EngineConfig& config,
                                                     std::span<const DomainIdentity> identities) {
  std::vector<AdoptedDomain> laid_out;
  std::uint64_t hints = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      const std::size_t d = laid_out.size();
      DomainRow& row = memory_.head().domains[d];
      row.policy = static_cast<std::uint32_t>(domain.policy);
      row.hint_offset = hints;
      row.hint_bytes = EvictionPolicy::hint_bytes(
          domain.policy, entry_budget_of(geometry_, domain.budget_bytes / geometry_.segment_bytes));
      hints += row.hint_bytes;
      row.name_hash = identities[d].name_hash;
      row.ns_seed = identities[d].ns_seed;
      laid_out.emplace_back().row = static_cast<std::uint16_t>(d);
    }
  }
  return laid_out;
}

// In segments, by domain. An adopted arena may have a few less than the config reckons with.
std::vector<std::uint32_t> DramTier::budgets_of(const EngineConfig& config) const {
  std::vector<std::uint32_t> budgets;
  std::uint64_t all = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      const auto segments =
          static_cast<std::uint32_t>(domain.budget_bytes / geometry_.segment_bytes);
      if (segments < layout::kMinDomainSegments) {
        throw std::invalid_argument(
            "namespace " + ns.name + ", domain " + domain.name + ": a budget of " +
            std::to_string(domain.budget_bytes) + " bytes is below the least of " +
            std::to_string(std::uint64_t{layout::kMinDomainSegments} * geometry_.segment_bytes) +
            in_each(config));
      }
      all += segments;
      budgets.push_back(segments);
    }
  }
  const std::uint64_t available = geometry_.segment_count - geometry_.reserve_segments;
  if (all <= available) return budgets;
  if (memory_.kind() == ArenaMemory::Kind::New) {
    throw std::invalid_argument("the domains' budgets add up to " +
                                std::to_string(all * geometry_.segment_bytes) +
                                " bytes, but of memory of " + std::to_string(config.memory_bytes) +
                                " bytes only " + std::to_string(geometry_.domain_bytes()) +
                                " are left after index and tables" + in_each(config));
  }
  for (std::uint32_t& budget : budgets) {
    budget = std::max<std::uint32_t>(layout::kMinDomainSegments,
                                     static_cast<std::uint32_t>(budget * available / all));
  }
  return budgets;
}

DramTier::~DramTier() = default;

// The row first: whoever was told of a flush finds it there, however this process ends.
void DramTier::keep_incarnation(Namespace& ns, std::uint16_t incarnation) noexcept {
  ns.row->word.store(NamespaceRow::word_of(ns.seed, incarnation), std::memory_order_seq_cst);
}

void DramTier::keep_incarnations() noexcept {
  for (const auto& ns : namespaces_) {
    keep_incarnation(*ns, ns->incarnation.load(std::memory_order_relaxed));
  }
}

void DramTier::leave() noexcept {
  for (const auto& domain : domains_) domain->leave();
  ArenaHeader& header = memory_.head().header;
  header.clean_sum = clean_sum_of(memory_);
  FC_SEQUENCE_POINT("leave:summed");
  header.state.store(ArenaHeader::kClean, std::memory_order_seq_cst);
}

void DramTier::spill(std::uint64_t deadline_ns, std::span<const std::uint64_t> bytes_most) {
  for (std::size_t n = 0; n < namespaces_.size(); ++n) {
    std::uint64_t left = bytes_most[n];
    for (DomainIndex d = 0; d < namespaces_[n]->domain_count; ++d) {
      Domain& domain = *domains_[namespaces_[n]->first_domain + d];
      left -= std::min(left, domain.spill(now(), deadline_ns, left));
    }
  }
}

void DramTier::attach(LowerTier& lower) {
  lower_ = &lower;
  for (const auto& ns : namespaces_) {
    for (DomainIndex d = 0; d < ns->domain_count; ++d) {
      domains_[ns->first_domain + d]->attach(lower, ns->index, d);
    }
  }
}

}  // namespace fc
