#include "core/moved_keys.hpp"

#include "core/placement.hpp"

namespace fc {

void MovedKeys::settle(const InstanceCounts& found) {
  if (found.known() && found.instance == instance_) {
    counts_ = found;
    last_found_ = std::max(last_found_, counts_.counts[counts_.used - 1].since);
  } else {
    // Of what was found it is not known where its keys were meanwhile.
    counts_ = {};
    counts_.instance = instance_;
    counts_.used = 1;
    counts_.counts[0] = {instances_, last_found_};
  }
  if (counts_.counts[counts_.used - 1].instances != instances_) {
    if (counts_.used == InstanceCounts::kMost) {
      std::copy(counts_.counts.begin() + 1, counts_.counts.end(), counts_.counts.begin());
      --counts_.used;
    }
    counts_.counts[counts_.used++] = {instances_, last_found_};
  }
  counts_.checksum = counts_.sum();
  Stamp newest = counts_.counts[counts_.used - 1].since;
  for (std::uint32_t shard = 0; shard < shard_count_; ++shard) {
    if (dropped_at(shard) == kAllFound) since_[shard].store(last_found_, std::memory_order_relaxed);
    newest = std::max(newest, dropped_at(shard));
  }
  newest_.store(newest, std::memory_order_relaxed);
  if (newest != 0) active_.store(true, std::memory_order_relaxed);
  now_.store(last_found_ + 1, std::memory_order_release);
}

bool MovedKeys::hides_old(Stamp stamp, std::uint64_t high) const noexcept {
  if (shard_count_ != 0 && stamp <= dropped_at(shard_of(high, shard_count_))) return true;
  // Beyond the first count nobody knows what was before; after that the key must have been here
  // all the time.
  if (stamp <= counts_.counts[0].since) return true;
  for (std::uint32_t i = counts_.used; i-- > 1 && stamp <= counts_.counts[i].since;) {
    if (instance_of(high, counts_.counts[i].instances) != instance_) return true;
  }
  return false;
}

}  // namespace fc
