// The node behind the data service, or what is answered while there is none yet.
#pragma once

#include <atomic>
#include <cstdint>

#include "feature_cache/node.hpp"
#include "feature_cache/server.hpp"

namespace fc::server {

// Thread-safe. Calls go to the node from the moment of attach(); before it, reads are answered MISS
// cell by cell or refused, as the config says, and writes are refused.
class NodeSlot {
 public:
  explicit NodeSlot(const ServerConfig& config)
      : misses_until_attached_(config.misses_until_attached),
        max_batch_keys_(config.max_batch_keys) {}

  // `node` must outlive the slot.
  void attach(Node& node) noexcept { node_.store(&node, std::memory_order_release); }

  void batch_get(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) {
    if (Node* const node = get()) {
      node->batch_get(std::move(request), timeout_ms, std::move(done));
    } else {
      answer_without_node(request, done);
    }
  }
  void batch_put(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) {
    Node* const node = get();
    if (node == nullptr) return done(recovering(), {});
    node->batch_put(std::move(request), timeout_ms, std::move(done));
  }
  void batch_delete(RequestBytes request, std::uint64_t timeout_ms, ReplyDone done) {
    Node* const node = get();
    if (node == nullptr) return done(recovering(), {});
    node->batch_delete(std::move(request), timeout_ms, std::move(done));
  }
  // Null while there is none.
  Node* node() const noexcept { return get(); }
  // Empty while there is no node.
  RecentWrites recent_writes(std::uint32_t shard_count, std::span<const std::uint32_t> shards,
                             std::uint64_t age_ms) const {
    const Node* const node = get();
    return node != nullptr ? node->recent_writes(shard_count, shards, age_ms) : RecentWrites{};
  }

 private:
  Node* get() const noexcept { return node_.load(std::memory_order_acquire); }
  void answer_without_node(const RequestBytes& request, const ReplyDone& done) const;
  static CallStatus recovering();

  const bool misses_until_attached_;
  const std::uint32_t max_batch_keys_;
  std::atomic<Node*> node_{nullptr};
};

}  // namespace fc::server
