#include "feature_cache/config.hpp"

#include <algorithm>
#include <bit>
#include <set>
#include <stdexcept>

#include "core/layout.hpp"
#include "feature_cache/types.hpp"

namespace fc {
namespace {

[[noreturn]] void bad(const std::string& message) {
  throw std::invalid_argument(message);
}

void validate_domain(const std::string& where, const DomainConfig& domain) {
  if (domain.name.empty()) bad(where + ": a domain needs a name");
  if (domain.ttl_ms > layout::kMaxTtlMs) bad(where + ": ttl is above one year");
  if (!(domain.ttl_jitter >= 0.0 && domain.ttl_jitter <= 0.9)) {
    bad(where + ": ttl_jitter must lie in 0..0.9");
  }
  if (!(domain.refresh_ahead >= 0.0 && domain.refresh_ahead <= 0.9)) {
    bad(where + ": refresh_ahead must lie in 0..0.9");
  }
}

void validate_namespace(const NamespaceConfig& ns) {
  const std::string where = "namespace " + ns.name;
  if (ns.name.empty()) bad("a namespace needs a name");
  if (ns.domains.empty()) bad(where + ": needs at least one domain");
  if (ns.domains.size() > layout::kMaxDomainsOfNamespace) bad(where + ": more than 32 domains");
  std::set<std::string> names;
  for (const DomainConfig& domain : ns.domains) {
    validate_domain(where + ", domain " + domain.name, domain);
    if (!names.insert(domain.name).second) bad(where + ": domain " + domain.name + " twice");
  }
  if (!names.contains(ns.default_domain)) {
    bad(where + ": default_domain " + ns.default_domain + " is not one of its domains");
  }
  for (const RouteRule& rule : ns.rules) {
    if (!names.contains(rule.domain))
      bad(where + ": a rule names the unknown domain " + rule.domain);
    if (rule.prefix.empty() && rule.asked_at_least == 0) {
      bad(where + ": a rule needs a prefix or asked_at_least");
    }
    if (rule.asked_at_least > layout::kMaxAsked) bad(where + ": asked_at_least is above 15");
  }
  if (ns.negative_ttl_ms > layout::kMaxTtlMs) bad(where + ": negative_ttl is above one year");
}

std::uint32_t automatic_segment_bytes(const EngineConfig& config) {
  std::uint64_t smallest = config.memory_bytes;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      if (domain.budget_bytes != 0) smallest = std::min(smallest, domain.budget_bytes);
    }
  }
  const std::uint64_t wanted = std::bit_floor(std::max<std::uint64_t>(
      smallest / layout::kSegmentsPerDomainWanted, layout::kMinSegmentBytes));
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(wanted, layout::kMaxSegmentBytes));
}

// Ghosts and sketches of the hungriest domain, for each of the expected items. They are made for as
// many items as the index may hold, which are a few more.
double side_bytes_per_item(const EngineConfig& config) {
  double policy = 0;
  double router = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      if (domain.policy == PolicyKind::TinyLfu) policy = layout::kSketchBytesPerItem;
      if (domain.policy == PolicyKind::S3Fifo) {
        policy = std::max(policy, layout::kGhostBytesPerItem);
      }
    }
    for (const RouteRule& rule : ns.rules) {
      if (rule.asked_at_least != 0) router = layout::kSketchBytesPerItem;
    }
  }
  return (policy + router) * layout::kIndexLoadLimit / layout::kIndexLoad;
}

}  // namespace

PolicyKind parse_policy(const std::string& name) {
  if (name == "s3fifo") return PolicyKind::S3Fifo;
  if (name == "lru") return PolicyKind::Lru;
  if (name == "fifo") return PolicyKind::Fifo;
  if (name == "tinylfu") return PolicyKind::TinyLfu;
  bad("unknown eviction policy '" + name + "': s3fifo, lru, fifo or tinylfu");
}

const char* policy_name(PolicyKind kind) noexcept {
  switch (kind) {
    case PolicyKind::S3Fifo:
      return "s3fifo";
    case PolicyKind::Lru:
      return "lru";
    case PolicyKind::Fifo:
      return "fifo";
    case PolicyKind::TinyLfu:
      return "tinylfu";
  }
  return "?";
}

void EngineConfig::validate() const {
  if (namespaces.empty()) bad("at least one namespace is needed");
  if (namespaces.size() > layout::kMaxNamespaces) bad("more than 256 namespaces");
  std::set<std::string> names;
  std::size_t domains = 0;
  for (const NamespaceConfig& ns : namespaces) {
    validate_namespace(ns);
    if (!names.insert(ns.name).second) bad("namespace " + ns.name + " twice");
    domains += ns.domains.size();
  }
  if (domains > layout::kMaxDomains) bad("more than 1024 domains");
  if (segment_bytes != 0 &&
      (!std::has_single_bit(segment_bytes) || segment_bytes < layout::kMinSegmentBytes ||
       segment_bytes > layout::kMaxSegmentBytes)) {
    bad("segment_bytes must be a power of two between 16 KiB and 1 MiB");
  }
  if (expected_item_bytes == 0) bad("expected_item_bytes must be positive");
  if (max_value_bytes > kMaxValueBytes) bad("max_value_bytes is above 8 MiB");
}

void NodeConfig::validate() const {
  engine.validate();
  std::set<std::string> names;
  for (const StoreConfig& store : stores) {
    if (!names.insert(store.name).second) bad("store " + store.name + " twice");
    if (store.max_batch_keys == 0) bad("store " + store.name + ": max_batch_keys must be positive");
    if (store.concurrency == 0) bad("store " + store.name + ": concurrency must be positive");
    if (store.timeout_ms == 0) bad("store " + store.name + ": timeout must be positive");
  }
  for (const NamespaceConfig& ns : engine.namespaces) {
    if (!ns.store.empty() && !names.contains(ns.store)) {
      bad("namespace " + ns.name + " names the unknown store " + ns.store);
    }
  }
  if (max_batch_keys == 0) bad("max_batch_keys must be positive");
  if (max_pending_batches == 0) bad("max_pending_batches must be positive");
}

Geometry Geometry::plan(const EngineConfig& config) {
  Geometry plan;
  plan.segment_bytes =
      config.segment_bytes != 0 ? config.segment_bytes : automatic_segment_bytes(config);
  std::uint32_t domains = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    domains += static_cast<std::uint32_t>(ns.domains.size());
  }
  // Each domain may hold one segment above its budget while it evicts, and some wait for readers.
  plan.reserve_segments = domains + 2;

  // Bytes beside one arena byte: index slots, ghosts (and sketches), the segment table.
  const double record =
      static_cast<double>(config.expected_item_bytes) + layout::kRecordHeaderBytes;
  const double per_item = layout::kSlotBytes / layout::kIndexLoad + side_bytes_per_item(config);
  const double fixed = static_cast<double>(layout::kFixedBytes) +
                       static_cast<double>(domains) * layout::kBytesPerDomain;
  const double per_arena_byte =
      1.0 + per_item / record + layout::kSegmentTableBytes / plan.segment_bytes;
  const double arena = (static_cast<double>(config.memory_bytes) - fixed) / per_arena_byte;
  const double smallest_arena =
      static_cast<double>(plan.segment_bytes) *
      (plan.reserve_segments + static_cast<double>(domains) * layout::kMinDomainSegments);
  if (arena < smallest_arena) {
    bad("memory of " + std::to_string(config.memory_bytes) + " bytes is too small for " +
        std::to_string(domains) + " domains with segments of " +
        std::to_string(plan.segment_bytes) + " bytes: at least " +
        std::to_string(static_cast<std::uint64_t>(smallest_arena * per_arena_byte + fixed) + 1) +
        " are needed");
  }
  const double segments = arena / plan.segment_bytes;
  if (segments >= static_cast<double>(layout::kMaxSegments)) {
    bad("memory is above what one instance can address");
  }
  plan.segment_count = static_cast<std::uint32_t>(segments);
  const double items = static_cast<double>(plan.domain_bytes()) / record;
  plan.bucket_count =
      static_cast<std::uint64_t>(items / layout::kIndexLoad / layout::kSlotsPerBucket) + 1;
  plan.side_bytes = config.memory_bytes - std::uint64_t{plan.segment_count} * plan.segment_bytes -
                    plan.bucket_count * layout::kSlotsPerBucket * layout::kSlotBytes;
  return plan;
}

}  // namespace fc
