#include "feature_cache/config.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <set>
#include <stdexcept>

#include "core/instances.hpp"
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

void validate_nvm_share(const NamespaceConfig& ns) {
  const std::string where = "namespace " + ns.name;
  if (ns.nvm.admission_frequency < 1 || ns.nvm.admission_frequency > layout::kMaxAsked) {
    bad(where + ": nvm admission_frequency must lie in 1..15");
  }
  if (!ns.speculative.enabled) return;
  if (ns.nvm.budget_bytes == 0) bad(where + ": speculative lookups need an nvm budget");
  if (ns.store.empty()) bad(where + ": speculative lookups need a store to ask");
  if (!(ns.speculative.budget > 0.0 && ns.speculative.budget <= 1.0)) {
    bad(where + ": the speculative budget must lie above 0 and at most at 1");
  }
  if (!(ns.speculative.after_quantile >= 0.5 && ns.speculative.after_quantile < 1.0)) {
    bad(where + ": the speculative quantile must lie in 0.5..1");
  }
}

std::uint32_t automatic_region_bytes(const EngineConfig& config) {
  std::uint64_t smallest = ~0ull;
  for (const NamespaceConfig& ns : config.namespaces) {
    if (ns.nvm.budget_bytes != 0) smallest = std::min(smallest, ns.nvm.budget_bytes);
  }
  return static_cast<std::uint32_t>(
      std::clamp<std::uint64_t>(std::bit_floor(smallest / layout::kRegionsPerNamespaceWanted),
                                layout::kMinRegionBytes, layout::kMaxRegionBytes));
}

void validate_nvm(const EngineConfig& config) {
  const NvmConfig& nvm = config.nvm;
  std::uint64_t budgets = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    validate_nvm_share(ns);
    budgets += ns.nvm.budget_bytes;
  }
  if (nvm.devices.empty()) {
    if (budgets != 0) bad("a namespace has an nvm budget, but there is no nvm device");
    return;
  }
  if (nvm.devices.size() > layout::kMaxNvmDevices) bad("more than 16 nvm devices");
  if (nvm.region_bytes != 0 &&
      (!std::has_single_bit(nvm.region_bytes) || nvm.region_bytes < layout::kMinRegionBytes ||
       nvm.region_bytes > layout::kMaxRegionBytes)) {
    bad("region_bytes must be a power of two from 64 KiB to 16 MiB");
  }
  std::set<std::string> paths;
  for (const NvmDeviceConfig& device : nvm.devices) {
    if (device.path.empty()) bad("an nvm device needs a path");
    if (!paths.insert(device.path).second) bad("nvm device " + device.path + " twice");
  }
  if (nvm.queue_depth == 0 || nvm.queue_depth > 4096) bad("nvm queue_depth must lie in 1..4096");
  if (nvm.io_threads == 0 || nvm.io_threads > 256) bad("nvm io_threads must lie in 1..256");
  if (nvm.coalesce_gap_bytes > (64u << 10)) bad("nvm coalesce_gap_bytes is above 64 KiB");
  if (nvm.queued_reads == 0) bad("nvm queued_reads must be positive");
  if (nvm.read_memory_bytes < 2 * layout::kMaxNvmRecordBytes) {
    bad("nvm read_memory_bytes must be at least 4 MiB: a read may bring 2 MiB");
  }
  if (nvm.write_buffers == 0 || nvm.write_buffers > 64) bad("nvm write_buffers must lie in 1..64");
  if (nvm.errors_max == 0) bad("nvm errors_max must be positive");
  if (nvm.probe_interval_ms == 0) bad("nvm probe_interval must be positive");
}

// Regions of all devices; 0 where a size is still to be learnt from the device.
std::uint64_t region_count(const NvmConfig& nvm, std::uint32_t region_bytes) {
  std::uint64_t regions = 0;
  for (const NvmDeviceConfig& device : nvm.devices) {
    if (device.bytes > layout::kNvmDataOffset) {
      regions += (device.bytes - layout::kNvmDataOffset) / region_bytes;
    }
  }
  return regions;
}

// What the NVM tier takes of the memory: index slots, buffers, the table of regions, sketches.
void plan_nvm(const EngineConfig& config, Geometry& plan) {
  const NvmConfig& nvm = config.nvm;
  if (nvm.devices.empty()) return;
  plan.region_bytes = nvm.region_bytes != 0 ? nvm.region_bytes : automatic_region_bytes(config);
  const std::uint64_t regions = region_count(nvm, plan.region_bytes);
  if (regions * plan.region_bytes > layout::kMaxNvmBytes) {
    bad("the nvm devices hold more than the 1 TiB that one instance can address" + in_each(config));
  }
  const std::uint64_t record = (config.expected_item_bytes + layout::kNvmRecordHeaderBytes +
                                layout::kNvmListedBytes + layout::kNvmRecordAlignment / 2);
  std::uint64_t used_regions = 0;
  std::uint64_t shares = 0;
  std::uint64_t sketch_bytes = 0;
  for (const NamespaceConfig& ns : config.namespaces) {
    const std::uint64_t budget = ns.nvm.budget_bytes / plan.region_bytes;
    if (ns.nvm.budget_bytes == 0) continue;
    if (budget < layout::kMinNamespaceRegions) {
      bad("namespace " + ns.name + ": an nvm budget of " + std::to_string(ns.nvm.budget_bytes) +
          " bytes is below the least of " +
          std::to_string(std::uint64_t{layout::kMinNamespaceRegions} * plan.region_bytes) +
          ", four regions" + in_each(config));
    }
    ++shares;
    used_regions += budget;
    const std::uint64_t items = budget * plan.region_bytes / record;
    if (ns.nvm.admission == AdmissionKind::Frequency) {
      sketch_bytes += items / layout::kNvmItemsPerSketchItem * 8 + 64;
    } else if (ns.nvm.admission == AdmissionKind::RejectFirst) {
      sketch_bytes += items / layout::kNvmItemsPerGhost * 2 + 64;
    }
  }
  if (used_regions > regions) {
    bad("the namespaces' nvm budgets add up to " + std::to_string(used_regions) + " regions of " +
        std::to_string(plan.region_bytes) + " bytes, but the devices hold " +
        std::to_string(regions) + in_each(config));
  }
  const std::uint64_t items = used_regions * plan.region_bytes / record;
  plan.nvm_slots = static_cast<std::uint64_t>(static_cast<double>(items) / layout::kIndexLoad);
  const std::uint64_t listed = plan.region_bytes / record * layout::kNvmListedBytes;
  // One buffer more is the region writer's own.
  plan.nvm_memory_bytes = (shares + nvm.write_buffers + 1) * (plan.region_bytes + listed) +
                          regions * layout::kRegionTableBytes +
                          nvm.devices.size() * nvm.read_memory_bytes + sketch_bytes;
}

}  // namespace

std::uint32_t automatic_segment_bytes(const EngineConfig& config) noexcept {
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

namespace {

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

void validate_persist(const EngineConfig& config) {
  const PersistConfig& persist = config.persist;
  if (!persist.enabled()) return;
  if (persist.dir.front() != '/') bad("persist.dir must be an absolute path");
  if (persist.name.empty() || persist.name.find('/') != std::string::npos ||
      persist.name.front() == '.') {
    bad("persist.name must be a plain file name");
  }
  if (persist.spill_on_shutdown && config.nvm.devices.empty()) {
    bad("spilling to NVM on shutdown needs an NVM device");
  }
  if (persist.durability == DurabilityKind::Bounded && persist.durability_window_ms == 0) {
    bad("the window of bounded durability must be positive");
  }
}

constexpr std::uint64_t kMinWindowMs = 1000;
constexpr std::uint64_t kMinRecordBuffer = 64u << 10;
constexpr std::uint32_t kMinDictionaryKeys = 1024;
constexpr std::uint32_t kMaxDictionaryKeys = 64u << 20;
constexpr std::size_t kMaxHostBytes = 255;
constexpr std::size_t kMinHashKeyBytes = 16;

void validate_record(const NodeConfig& config) {
  const RecordConfig& record = config.record;
  if (!(record.sample > 0 && record.sample <= 1)) bad("record: sample must be above 0, at most 1");
  if (record.window_ms < kMinWindowMs) bad("record: window must be at least 1 s");
  if (record.buffer_bytes < kMinRecordBuffer) bad("record: buffer_bytes must be at least 64 KiB");
  if (record.dictionary_keys < kMinDictionaryKeys || record.dictionary_keys > kMaxDictionaryKeys) {
    bad("record: dictionary_keys must be 1,024 to 64 M");
  }
  if (record.host.size() > kMaxHostBytes) bad("record: host has more than 255 bytes");
  bool hashes = false;
  for (const RecordConfig::Privacy& entry : record.privacy) {
    const auto named = [&](const NamespaceConfig& ns) { return ns.name == entry.ns; };
    if (std::none_of(config.engine.namespaces.begin(), config.engine.namespaces.end(), named)) {
      bad("record: unknown namespace " + entry.ns);
    }
    hashes |= entry.privacy == KeyPrivacy::Hashed;
  }
  if (hashes && record.hash_key.size() < kMinHashKeyBytes) {
    bad("record: hash_key must have at least 16 bytes, to hash keys by");
  }
}

void validate_root(const NodeConfig& config) {
  const RootConfig& root = config.root;
  if (config.leaf.enabled) bad("a node is a root or a leaf, not both");
  if (root.attempts == 0) bad("root: attempts must be positive");
  if (!(root.hedge_quantile > 0.0 && root.hedge_quantile < 1.0)) {
    bad("root: hedge_quantile must lie between 0 and 1");
  }
  for (const double share : {root.retry_budget, root.hedge_budget, root.store_budget}) {
    if (!(share >= 0.0 && share <= 1.0)) bad("root: budgets must lie in 0..1");
  }
  if (!config.engine.nvm.devices.empty()) bad("a root has no NVM tier");
  if (config.engine.persist.enabled()) bad("a root's hot tier does not outlive its process");
  if (config.engine.memory_bytes == 0) return;
  for (const NamespaceConfig& ns : config.engine.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      if (domain.ttl_ms == 0 || domain.ttl_ms > kHotTierTtlMs) {
        bad("namespace " + ns.name + ", domain " + domain.name +
            ": a root's hot tier holds values for at most a second");
      }
    }
    if (ns.negative_ttl_ms > kHotTierTtlMs) {
      bad("namespace " + ns.name + ": a root caches not-found answers for at most a second");
    }
  }
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

AdmissionKind parse_admission(const std::string& name) {
  if (name == "all") return AdmissionKind::All;
  if (name == "frequency") return AdmissionKind::Frequency;
  if (name == "reject_first") return AdmissionKind::RejectFirst;
  bad("unknown admission '" + name + "': all, frequency or reject_first");
}

const char* admission_name(AdmissionKind kind) noexcept {
  switch (kind) {
    case AdmissionKind::All:
      return "all";
    case AdmissionKind::Frequency:
      return "frequency";
    case AdmissionKind::RejectFirst:
      return "reject_first";
  }
  return "?";
}

SampleBy parse_sample_by(const std::string& name) {
  if (name == "requests") return SampleBy::Requests;
  if (name == "keys") return SampleBy::Keys;
  bad("unknown way to sample '" + name + "': requests or keys");
}

const char* sample_by_name(SampleBy by) noexcept {
  return by == SampleBy::Requests ? "requests" : "keys";
}

KeyPrivacy parse_privacy(const std::string& name) {
  if (name == "plain") return KeyPrivacy::Plain;
  if (name == "hash") return KeyPrivacy::Hashed;
  if (name == "exclude") return KeyPrivacy::Excluded;
  bad("unknown way to record keys '" + name + "': plain, hash or exclude");
}

const char* privacy_name(KeyPrivacy privacy) noexcept {
  switch (privacy) {
    case KeyPrivacy::Plain:
      return "plain";
    case KeyPrivacy::Hashed:
      return "hash";
    case KeyPrivacy::Excluded:
      return "exclude";
  }
  return "?";
}

PromotionKind parse_promotion(const std::string& name) {
  if (name == "always") return PromotionKind::Always;
  if (name == "second_hit") return PromotionKind::SecondHit;
  if (name == "never") return PromotionKind::Never;
  bad("unknown promotion '" + name + "': always, second_hit or never");
}

const char* promotion_name(PromotionKind kind) noexcept {
  switch (kind) {
    case PromotionKind::Always:
      return "always";
    case PromotionKind::SecondHit:
      return "second_hit";
    case PromotionKind::Never:
      return "never";
  }
  return "?";
}

IoKind parse_io(const std::string& name) {
  if (name == "auto") return IoKind::Auto;
  if (name == "io_uring") return IoKind::Uring;
  if (name == "threads") return IoKind::Threads;
  bad("unknown io '" + name + "': auto, io_uring or threads");
}

const char* io_name(IoKind kind) noexcept {
  switch (kind) {
    case IoKind::Auto:
      return "auto";
    case IoKind::Uring:
      return "io_uring";
    case IoKind::Threads:
      return "threads";
  }
  return "?";
}

DurabilityKind parse_durability(const std::string& name) {
  if (name == "drop_nvm") return DurabilityKind::DropNvm;
  if (name == "bounded") return DurabilityKind::Bounded;
  if (name == "sync") return DurabilityKind::Sync;
  bad("unknown durability '" + name + "': drop_nvm, bounded or sync");
}

const char* durability_name(DurabilityKind kind) noexcept {
  switch (kind) {
    case DurabilityKind::DropNvm:
      return "drop_nvm";
    case DurabilityKind::Bounded:
      return "bounded";
    case DurabilityKind::Sync:
      return "sync";
  }
  return "?";
}

std::uint32_t EngineConfig::instances_wanted() const noexcept {
  if (instances != 0) return instances;
  const std::uint64_t most = std::max<std::uint64_t>(max_instance_bytes, 1);
  const std::uint64_t wanted = memory_bytes / most + (memory_bytes % most != 0 ? 1 : 0);
  return static_cast<std::uint32_t>(
      std::clamp<std::uint64_t>(wanted, 1, std::numeric_limits<std::uint32_t>::max()));
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
  if (max_instance_bytes == 0) bad("max_instance_bytes must be positive");
  if (instances_wanted() > layout::kMaxInstances) {
    bad("memory of " + std::to_string(memory_bytes) + " bytes makes " +
        std::to_string(instances_wanted()) + " instances of at most " +
        std::to_string(max_instance_bytes) + " bytes; a node has at most " +
        std::to_string(layout::kMaxInstances) + ": raise max_instance_bytes");
  }
  if (instance_count == 0 || instance_count > layout::kMaxInstances || instance >= instance_count) {
    bad("instance " + std::to_string(instance) + " of " + std::to_string(instance_count) +
        " is none");
  }
  if (shard_count > layout::kMaxShards) bad("more than 1,048,576 shards");
  validate_nvm(*this);
  validate_persist(*this);
}

void NodeConfig::validate() const {
  engine.validate();
  if (record.enabled()) validate_record(*this);
  if (root.enabled) validate_root(*this);
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
  plan_nvm(config, plan);
  const double fixed =
      static_cast<double>(layout::kFixedBytes) +
      static_cast<double>(domains) * layout::kBytesPerDomain +
      static_cast<double>(config.shard_count) * layout::kShardBytes +
      static_cast<double>(plan.nvm_slots * layout::kSlotBytes + plan.nvm_memory_bytes);
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
        " are needed" + in_each(config));
  }
  const double segments = arena / plan.segment_bytes;
  if (segments >= static_cast<double>(layout::kMaxSegments)) {
    bad("memory is above what one instance can address: set max_instance_bytes lower");
  }
  plan.segment_count = static_cast<std::uint32_t>(segments);
  const double items = static_cast<double>(plan.domain_bytes()) / record;
  plan.bucket_count = static_cast<std::uint64_t>(
                          (items / layout::kIndexLoad + static_cast<double>(plan.nvm_slots)) /
                          layout::kSlotsPerBucket) +
                      1;
  plan.side_bytes = config.memory_bytes - std::uint64_t{plan.segment_count} * plan.segment_bytes -
                    plan.bucket_count * layout::kSlotsPerBucket * layout::kSlotBytes;
  return plan;
}

}  // namespace fc
