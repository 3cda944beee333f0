#include "feature_cache/cluster.hpp"

#include <stdexcept>

#include "core/hash.hpp"

namespace fc {

void ShardMap::validate() const {
  const auto bad = [](const std::string& what) {
    throw std::invalid_argument("shard map: " + what);
  };
  if (first.size() < 2) bad("it has no shards");
  if (first.front() != 0 || first.back() != replicas.size()) {
    bad("`first` does not span the replicas");
  }
  for (std::size_t s = 1; s < first.size(); ++s) {
    if (first[s] < first[s - 1]) bad("`first` falls at shard " + std::to_string(s - 1));
  }
  for (const Replica& replica : replicas) {
    if (replica.leaf >= leaves.size()) {
      bad("a replica is on leaf " + std::to_string(replica.leaf) + " of " +
          std::to_string(leaves.size()));
    }
    if (replica.state > ReplicaState::Online) bad("a replica has an unknown state");
  }
  for (const Leaf& leaf : leaves) {
    if (leaf.name.empty() || leaf.address.empty()) bad("a leaf has no name or no address");
  }
}

}  // namespace fc
