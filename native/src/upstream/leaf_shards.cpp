#include "upstream/leaf_shards.hpp"

#include <chrono>
#include <stdexcept>
#include <thread>

namespace fc {
namespace {

constexpr std::chrono::microseconds kSettlePoll{50};

}  // namespace

// ---- the log
// -------------------------------------------------------------------------------------

std::uint64_t RecentWriteLog::boot_now_ms() {
  return BootClock().now_ms();
}

void RecentWriteLog::add(NamespaceIndex ns, std::string_view key, std::uint64_t high) {
  Entry entry{boot_now_ms(), high, ns, std::string(key)};
  const std::lock_guard lock(mutex_);
  bytes_ += bytes_of(entry);
  entries_.push_back(std::move(entry));
  while (bytes_ > bytes_most_) {
    since_ms_ = entries_.front().at_ms + 1;
    bytes_ -= bytes_of(entries_.front());
    entries_.pop_front();
  }
}

bool RecentWriteLog::since(std::uint64_t age_ms, std::uint32_t shard_count,
                           const std::vector<bool>& shards,
                           std::vector<RecentWrites::Column>& columns) const {
  const std::lock_guard lock(mutex_);
  const std::uint64_t now = boot_now_ms();
  const std::uint64_t from = now - std::min(now, age_ms);
  if (from < since_ms_) return false;
  for (auto entry = entries_.rbegin(); entry != entries_.rend() && entry->at_ms >= from; ++entry) {
    if (shards[shard_of(entry->high, shard_count)]) columns[entry->ns].keys.push_back(entry->key);
  }
  return true;
}

std::size_t RecentWriteLog::size() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

// ---- the shards
// ----------------------------------------------------------------------------------

void LeafShards::set(const OwnedShards& owned) {
  if (owned.shard_count == 0) throw std::invalid_argument("owned shards: of a cluster without any");
  if (!owned.written_since.empty() && owned.written_since.size() != owned.shards.size()) {
    throw std::invalid_argument("owned shards: `written_since` has not one number a shard");
  }
  if (!owned.readable.empty() && owned.readable.size() != owned.shards.size()) {
    throw std::invalid_argument("owned shards: `readable` has not one flag a shard");
  }
  auto view = std::make_shared<View>();
  view->version = owned.version;
  view->written_since.assign(owned.shard_count, View::kNotOwned);
  view->readable.assign(owned.shard_count, 0);
  for (std::size_t i = 0; i < owned.shards.size(); ++i) {
    if (owned.shards[i] >= owned.shard_count) {
      throw std::invalid_argument("owned shards: shard " + std::to_string(owned.shards[i]) +
                                  " of " + std::to_string(owned.shard_count));
    }
    view->readable[owned.shards[i]] = owned.readable.empty() ? 1 : owned.readable[i];
    view->written_since[owned.shards[i]] = owned.written_since.empty() ? 0 : owned.written_since[i];
  }
  view->owned = static_cast<std::uint32_t>(owned.shards.size());
  view->owned_since_ms.assign(owned.shard_count, RecentWriteLog::boot_now_ms());
  const std::lock_guard one(set_mutex_);
  std::shared_ptr<const View> before = this->view();
  if (before->shard_count() == owned.shard_count) {
    for (const std::uint32_t shard : owned.shards) {
      if (before->written_since[shard] == View::kNotOwned) continue;
      view->owned_since_ms[shard] = before->owned_since_ms[shard];
    }
  }
  {
    const std::lock_guard lock(mutex_);
    view_ = std::move(view);
  }
  // Nobody gets hold of the older view any more; who has it is reading or writing by it.
  while (before.use_count() != 1) std::this_thread::sleep_for(kSettlePoll);
  std::atomic_thread_fence(std::memory_order_acquire);
  settled_version_.store(owned.version, std::memory_order_release);
}

void LeafShards::visit(CounterVisitor& visitor) const {
  const std::shared_ptr<const View> now = view();
  visitor.gauge("feature_cache_leaf_shards", "Shards that this leaf answers for.", {}, now->owned);
  visitor.gauge("feature_cache_leaf_map_version", "Newest shard map that this leaf knows.", {},
                static_cast<double>(now->version));
  visitor.counter("feature_cache_leaf_wrong_shard_total",
                  "Cells of reads that were for other leaves.", {}, wrong_shard.get());
  visitor.counter("feature_cache_leaf_writes_refused_total",
                  "Keys of writes for other leaves, or by a map that is too old.", {},
                  writes_refused.get());
  visitor.gauge("feature_cache_leaf_write_log_entries",
                "Writes that a returning replica can catch up with.", {},
                static_cast<double>(log.size()));
}

}  // namespace fc
