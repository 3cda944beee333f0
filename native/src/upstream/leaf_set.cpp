#include "upstream/leaf_set.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/clock.hpp"

namespace fc {

// ---- one leaf
// ------------------------------------------------------------------------------------

void Leaf::asked(std::uint64_t keys) noexcept {
  outstanding_.fetch_add(keys, std::memory_order_relaxed);
  calls_.add();
  keys_.add(keys);
}

void Leaf::answered(std::uint64_t keys, std::uint64_t now_ns, bool failed) noexcept {
  outstanding_.fetch_sub(keys, std::memory_order_relaxed);
  if (!failed) {
    if (failures_.load(std::memory_order_relaxed) == 0) return;
    failures_.store(0, std::memory_order_relaxed);
    avoid_until_ns_.store(0, std::memory_order_relaxed);
    return;
  }
  failed_.add();
  // Many calls fail together when a leaf dies: they count as one.
  if (avoided(now_ns)) return;
  const std::uint32_t before = failures_.fetch_add(1, std::memory_order_relaxed);
  avoid_until_ns_.store(now_ns + (kFirstPauseNs << std::min(before, kPausesMost)),
                        std::memory_order_relaxed);
}

bool Leaf::try_use(std::uint64_t now_ns) noexcept {
  if (failures_.load(std::memory_order_relaxed) == 0) return true;
  std::uint64_t until = avoid_until_ns_.load(std::memory_order_relaxed);
  return now_ns >= until && avoid_until_ns_.compare_exchange_strong(until, now_ns + kFirstPauseNs,
                                                                    std::memory_order_relaxed);
}

void Leaf::visit(CounterVisitor& visitor, std::uint64_t now_ns) const {
  const Label labels[] = {{"leaf", name_}};
  visitor.counter("feature_cache_leaf_calls_total", "Sub-requests to a leaf.", labels,
                  calls_.get());
  visitor.counter("feature_cache_leaf_keys_total", "Keys that a leaf was asked for.", labels,
                  keys_.get());
  visitor.counter("feature_cache_leaf_failures_total", "Sub-requests that a leaf did not answer.",
                  labels, failed_.get());
  visitor.gauge("feature_cache_leaf_outstanding_keys", "Keys that a leaf has not answered yet.",
                labels, static_cast<double>(outstanding()));
  visitor.gauge("feature_cache_leaf_avoided", "1 while a leaf is left out, since its calls failed.",
                labels, avoided(now_ns) ? 1 : 0);
}

// ---- all leaves
// ----------------------------------------------------------------------------------

LeafSet::LeafSet(std::shared_ptr<LeafConnector> connector)
    : connector_(std::move(connector)), map_(std::make_shared<RoutedMap>()) {
  if (connector_ == nullptr) throw std::invalid_argument("a root needs a way to its leaves");
}

void LeafSet::set(ShardMap map) {
  map.validate();
  told(map.version);
  const std::lock_guard lock(mutex_);
  if (map.version < map_->map.version) return;
  std::unordered_map<std::string, std::shared_ptr<Leaf>> known;
  for (const std::shared_ptr<Leaf>& leaf : map_->leaves) known.emplace(leaf->name(), leaf);
  auto routed = std::make_shared<RoutedMap>();
  for (const ShardMap::Leaf& leaf : map.leaves) {
    const auto found = known.find(leaf.name);
    if (found != known.end() && found->second->address() == leaf.address) {
      routed->leaves.push_back(found->second);
    } else {
      routed->leaves.push_back(
          std::make_shared<Leaf>(leaf.name, leaf.address, connector_->connect(leaf.address)));
    }
  }
  routed->map = std::move(map);
  map_ = std::move(routed);
}

std::shared_ptr<const RoutedMap> LeafSet::map() const {
  const std::lock_guard lock(mutex_);
  return map_;
}

void LeafSet::told(std::uint64_t version) noexcept {
  std::uint64_t newest = newest_.load(std::memory_order_relaxed);
  while (newest < version &&
         !newest_.compare_exchange_weak(newest, version, std::memory_order_relaxed)) {
  }
}

void LeafSet::visit(CounterVisitor& visitor) const {
  const std::shared_ptr<const RoutedMap> routed = map();
  const std::uint64_t now = monotonic_ns();
  for (const std::shared_ptr<Leaf>& leaf : routed->leaves) leaf->visit(visitor, now);
  visitor.gauge("feature_cache_root_map_version", "Version of the shard map that is routed by.", {},
                static_cast<double>(routed->map.version));
  visitor.gauge("feature_cache_root_newest_map_version",
                "Newest version of the shard map that a leaf told of.", {},
                static_cast<double>(newest()));
}

// ---- one batch
// -----------------------------------------------------------------------------------

ReplicaChooser::Seen& ReplicaChooser::seen(std::uint32_t leaf) {
  Seen& seen = leaves_[leaf];
  if (seen.use == Use::Unknown) {
    seen.use = routed_.leaves[leaf]->try_use(now_ns_) ? Use::Yes : Use::Avoid;
    seen.load = routed_.leaves[leaf]->outstanding();
  }
  return seen;
}

std::uint32_t ReplicaChooser::choose(std::uint32_t shard, std::span<const std::uint32_t> tried) {
  const ShardMap& map = routed_.map;
  std::uint32_t best = kNone;
  std::pair<bool, std::uint64_t> best_cost{};  // avoided, load
  for (std::uint32_t r = map.first[shard]; r < map.first[shard + 1]; ++r) {
    const ShardMap::Replica& replica = map.replicas[r];
    if (replica.state != ReplicaState::Online ||
        std::find(tried.begin(), tried.end(), replica.leaf) != tried.end()) {
      continue;
    }
    const Seen& found = seen(replica.leaf);
    const std::pair<bool, std::uint64_t> cost{found.use == Use::Avoid, found.load};
    if (best == kNone || cost < best_cost) {
      best = replica.leaf;
      best_cost = cost;
    }
  }
  if (best != kNone) ++leaves_[best].load;
  return best;
}

}  // namespace fc
