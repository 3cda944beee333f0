// The half of the node that gives its items to others.

#include <algorithm>
#include <map>

#include "upstream/cache_node.hpp"

namespace fc {
namespace {

constexpr std::size_t kSampledBytes = 64u << 10;  // of items, at each of so many places
constexpr unsigned kSampledPlaces = 16;

CallStatus not_now(std::string message) {
  return {CallStatus::FailedPrecondition, std::move(message)};
}

// Sums of gauges by (namespace, domain).
class DomainGauges final : public CounterVisitor {
 public:
  void counter(std::string_view, std::string_view, Labels, std::uint64_t) override {}
  void gauge(std::string_view name, std::string_view, Labels labels, double value) override {
    const bool counts = name == "feature_cache_domain_items";
    if (!counts && name != "feature_cache_domain_live_bytes") return;
    std::string ns;
    std::string domain;
    for (const Label& label : labels) {
      if (label.name == "namespace") ns = label.value;
      if (label.name == "domain") domain = label.value;
    }
    (counts ? items : bytes)[{ns, domain}] += value;
  }
  void histogram(std::string_view, std::string_view, Labels, std::span<const double>,
                 std::span<const std::uint64_t>, double) override {}

  std::map<std::pair<std::string, std::string>, double> items;
  std::map<std::pair<std::string, std::string>, double> bytes;
};

}  // namespace

CallStatus CacheNode::begin_copy(const CopyWanted& wanted, ScanFilter& filter) {
  if (leaves_ != nullptr) return not_now("a root has nothing of its own to be copied");
  filter = {};
  for (std::uint32_t number = 0; number < wanted.domains.size(); ++number) {
    const CopyWanted::Domain& named = wanted.domains[number];
    const NamespaceIndex ns = engine_->find_namespace(named.ns);
    const DomainIndex domain =
        ns == kNoNamespace ? kNoDomain : engine_->find_domain(ns, named.name);
    if (domain == kNoDomain) {
      return {CallStatus::NotFound, "there is no eviction domain " + named.ns.substr(0, 64) + "/" +
                                        named.name.substr(0, 64) + " here"};
    }
    if (filter.domains.size() <= domain) filter.domains.resize(domain + 1u, ScanFilter::kNone);
    filter.domains[domain] = number;
  }
  if (!wanted.shards.empty()) {
    filter.shard_count = wanted.shard_count;
    filter.shards.resize(wanted.shard_count);
    for (const std::uint32_t shard : wanted.shards) {
      if (shard >= wanted.shard_count) {
        return {CallStatus::InvalidArgument,
                "shard " + std::to_string(shard) + " of " + std::to_string(wanted.shard_count)};
      }
      filter.shards[shard] = true;
    }
  }
  return may_copy(wanted);
}

// Of a leaf: whether it answers reads of these shards, and takes no write any more that does not go
// to whoever copies, too.
CallStatus CacheNode::may_copy(const CopyWanted& wanted) const {
  if (stopped_.load(std::memory_order_relaxed)) {
    return {CallStatus::Unavailable, "the node is stopping"};
  }
  if (leaf_ == nullptr) return {};
  if (leaf_->settled_version() < wanted.map_version) {
    return not_now("this leaf still goes by shard map " + std::to_string(leaf_->settled_version()) +
                   ", not " + std::to_string(wanted.map_version));
  }
  const std::shared_ptr<const LeafShards::View> view = leaf_->view();
  if (wanted.shards.empty() || wanted.shard_count != view->shard_count()) {
    return not_now("this leaf has " + std::to_string(view->shard_count()) +
                   " shards: name those of them that are wanted");
  }
  for (const std::uint32_t shard : wanted.shards) {
    if (view->readable[shard] == 0) {
      return not_now("this leaf does not answer for shard " + std::to_string(shard));
    }
  }
  return {};
}

CallStatus CacheNode::copy_items(const CopyWanted& wanted, const ScanFilter& filter,
                                 std::uint64_t& cursor, std::size_t bytes, ScanBatch& batch) {
  cursor = engine_->scan(cursor, filter, bytes, batch);
  // Asked afterwards: what was scanned while the leaf still had the shards is not given later.
  return may_copy(wanted);
}

std::vector<ItemTotals> CacheNode::item_totals() {
  std::vector<ItemTotals> totals;
  if (leaves_ != nullptr) return totals;
  DomainGauges gauges;
  engine_->visit(gauges);
  ScanFilter filter;
  for (const NamespaceConfig& ns : config_.engine.namespaces) {
    for (const DomainConfig& domain : ns.domains) {
      ItemTotals& to = totals.emplace_back();
      to.ns = ns.name;
      to.domain = domain.name;
      to.items = static_cast<std::uint64_t>(gauges.items[{ns.name, domain.name}]);
      to.bytes = static_cast<std::uint64_t>(gauges.bytes[{ns.name, domain.name}]);
      to.ttl_ms = domain.ttl_ms;
      filter.domains.push_back(static_cast<std::uint32_t>(totals.size() - 1));
    }
  }
  // Wherever a scan may begin: hashes have no order, so any place is as good as another.
  std::vector<std::uint64_t> items(totals.size());
  std::vector<std::uint64_t> left_ms(totals.size());
  std::uint64_t cursor = 0;
  for (unsigned place = 0; place < kSampledPlaces && cursor != kScanEnd; ++place) {
    ScanBatch batch;
    cursor = engine_->scan(cursor, filter, kSampledBytes, batch);
    for (std::size_t i = 0; i < batch.items(); ++i) {
      if (batch.ttl_ms[i] == 0) continue;
      ++items[batch.domains[i]];
      left_ms[batch.domains[i]] += batch.ttl_ms[i];
    }
  }
  for (std::size_t i = 0; i < totals.size(); ++i) {
    if (items[i] != 0) totals[i].mean_ttl_left_ms = left_ms[i] / items[i];
  }
  return totals;
}

}  // namespace fc
