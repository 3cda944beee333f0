// The sharded topology as the data plane sees it: which leaf answers which shard, and which shards
// a leaf owns. Python makes both from ZooKeeper; the data plane never waits for it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fc {

// The virtual shard of a key: the upper 32 bits of the high half of the published hash (XXH3-128 of
// the key, seeded with XXH3-64 of the namespace's name), scaled to [0, shard_count).
std::uint32_t shard_of(std::string_view ns, std::string_view key,
                       std::uint32_t shard_count) noexcept;

enum class ReplicaState : std::uint8_t {
  Warming = 0,  // gets writes, is not asked for values
  Online = 1,
};

// One version of the external view. Immutable once a node has it.
struct ShardMap {
  struct Leaf {
    std::string name;     // unique in the cluster
    std::string address;  // host:port or unix:/path
    std::string zone;
  };
  struct Replica {
    std::uint32_t leaf = 0;
    ReplicaState state = ReplicaState::Online;
  };
  std::uint64_t version = 0;  // rises with every change
  std::vector<Leaf> leaves;
  std::vector<std::uint32_t> first;  // shard_count + 1 numbers: a shard's replicas are first[s]..
  std::vector<Replica> replicas;

  std::uint32_t shard_count() const noexcept {
    return first.empty() ? 0 : static_cast<std::uint32_t>(first.size() - 1);
  }
  // Throws std::invalid_argument for a map that contradicts itself.
  void validate() const;
};

// What a leaf answers for, as its participant in the cluster says.
struct OwnedShards {
  std::uint64_t version = 0;  // of the newest external view that the leaf has seen
  std::uint32_t shard_count = 0;
  std::vector<std::uint32_t> shards;  // rising; warming ones are among them
  // One a shard: since which version of the view its writes go to as many replicas as now. A write
  // of a root with an older map would miss one of them. Empty: all zero.
  std::vector<std::uint64_t> written_since;
  // One a shard: 0 while what the leaf holds of it may be older than what others were told, so that
  // it takes writes and answers no reads: a root that has not heard yet that the leaf was away may
  // still ask it. Empty: all may be read.
  std::vector<std::uint8_t> readable;
};

// What was written to shards of late, by namespace.
struct RecentWrites {
  struct Column {
    std::string ns;
    std::vector<std::string> keys;
  };
  // Whether that is all: the log reaches back that far, and the shards were the leaf's all the
  // while.
  bool complete = false;
  std::uint64_t map_version = 0;  // of the leaf that says so
  std::vector<Column> columns;
};

}  // namespace fc
