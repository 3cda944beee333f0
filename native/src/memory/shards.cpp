// How a leaf's shards come and go.

#include <unistd.h>

#include "core/sequence_point.hpp"
#include "memory/dram_tier.hpp"

namespace fc {

// Says which copies of the process before count.
void DramTier::settle_shards(StartReport& report) {
  const std::uint32_t count = moved_.shard_count();
  if (count == 0) {
    // What happens to shards from here on is written down by nobody.
    if (!shard_path_.empty()) unlink(shard_path_.c_str());
    return;
  }
  shards_ =
      std::make_unique<ShardFile>(shard_path_, count, memory_.head().header.memory_id, report);
  kept_shards_.shard_count = count;
  if (!shards_->kept() && memory_.kind() != ArenaMemory::Kind::New) {
    if (!report.memory_reason.empty()) report.memory_reason += "; ";
    report.memory_reason += "nothing is known of its shards: all of its items are hidden";
  }
  for (std::uint32_t shard = 0; shard < count; ++shard) {
    const auto found = shards_->kept() ? shards_->at(shard) : std::nullopt;
    if (found) moved_.found(std::max(found->since, kUnknownStamp + 1));
    if (found && found->held) {
      moved_.found_dropped(shard, found->since);
      kept_shards_.shards.push_back(shard);
    } else {
      moved_.found_unknown(shard);
    }
  }
  if (kept_shards_.shards.empty()) return;
  const std::uint64_t alive_ms = shards_->last_alive_ms();
  kept_shards_.away_ms = ticks_.clock_ms() - std::min(ticks_.clock_ms(), alive_ms);
}

// Writes down what was settled, before anything is served. Those that were held stay so, and when
// the process was alive last, until hold_shards(): a start that is cut off before that leaves the
// next one what it found itself.
void DramTier::keep_shards() noexcept {
  if (shards_ == nullptr) return;
  std::size_t next = 0;
  for (std::uint32_t shard = 0; shard < moved_.shard_count(); ++shard) {
    const bool held = next < kept_shards_.shards.size() && kept_shards_.shards[next] == shard;
    next += held ? 1 : 0;
    shards_->set(shard, {.since = moved_.dropped_at(shard), .held = held});
  }
  shards_->finish();
}

void DramTier::drop_shards(std::span<const std::uint32_t> shards) {
  const std::lock_guard lock(shards_mutex_);
  drop_shards_locked(shards, true);
}

// `held`: those that are stay so.
void DramTier::drop_shards_locked(std::span<const std::uint32_t> shards, bool held) {
  if (shards.empty()) return;
  moved_.drop(
      shards,
      [&](std::uint32_t shard, Stamp since) {
        const auto before = shards_->at(shard);
        shards_->set(shard, {.since = since, .held = held && before && before->held});
        FC_SEQUENCE_POINT("drop:written");
      },
      [this] {
        for (std::uint32_t stripe = 0; stripe < layout::kWriteVersionStripes; ++stripe) {
          write_versions_[stripe].fetch_add(1, std::memory_order_acq_rel);
        }
      });
}

void DramTier::hold_shards(std::span<const std::uint32_t> shards) {
  const std::lock_guard lock(shards_mutex_);
  std::vector<bool> wanted(moved_.shard_count());
  for (const std::uint32_t shard : shards) wanted[shard] = true;
  std::vector<std::uint32_t> leaving;
  for (std::uint32_t shard = 0; shard < moved_.shard_count(); ++shard) {
    const auto now = shards_->at(shard);
    if (!wanted[shard] && (!now || now->held)) leaving.push_back(shard);
  }
  drop_shards_locked(leaving, false);
  FC_SEQUENCE_POINT("hold:left");
  // Before any is held that was not: the next process must not count from an earlier time.
  shards_->say_alive(ticks_.clock_ms());
  for (std::uint32_t shard = 0; shard < moved_.shard_count(); ++shard) {
    if (wanted[shard]) shards_->set(shard, {.since = moved_.dropped_at(shard), .held = true});
  }
  holds_.store(true, std::memory_order_release);
}

}  // namespace fc
