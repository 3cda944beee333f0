// Walks the index for those who copy what is in memory, and says under which tokens a copy may
// enter.
//
// A group of buckets is looked at inside an epoch: what an entry points at stays as it is
// meanwhile. Nothing is encoded or sent in there.

#include <algorithm>
#include <array>

#include "core/sequence_point.hpp"
#include "memory/dram_tier.hpp"
#include "memory/tier_set.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kGroupBuckets = 8;
constexpr std::uint64_t kMaxCopiedTtlMs = ~std::uint32_t{0};

}  // namespace

// ---- tokens
// --------------------------------------------------------------------------------------

class DramTier::Tokens final : public TokenSnapshot {
 public:
  explicit Tokens(const DramTier& tier) {
    for (const auto& ns : tier.namespaces_) {
      seeds_.push_back(ns->seed);
      // The incarnation first: a flush after it voids the token, whatever the versions say.
      incarnations_.push_back(ns->incarnation.load(std::memory_order_acquire));
    }
    versions_.reserve(layout::kWriteVersionStripes);
    for (std::uint32_t stripe = 0; stripe < layout::kWriteVersionStripes; ++stripe) {
      versions_.push_back(tier.write_versions_[stripe].load(std::memory_order_acquire));
    }
  }
  Token token(NamespaceIndex ns, std::string_view key) const noexcept override {
    return token_of(ns, hash_key(seeds_[ns], key));
  }
  Token token_of(NamespaceIndex ns, const KeyHash& hash) const noexcept {
    return {versions_[(hash.low >> 16) & (layout::kWriteVersionStripes - 1)], incarnations_[ns]};
  }

 private:
  std::vector<std::uint64_t> seeds_;
  std::vector<std::uint16_t> incarnations_;
  std::vector<std::uint32_t> versions_;
};

std::shared_ptr<const TokenSnapshot> DramTier::tokens() const {
  return std::make_shared<const Tokens>(*this);
}

namespace {

class SeveralTokens final : public TokenSnapshot {
 public:
  SeveralTokens(const TierSet& tiers, std::vector<std::shared_ptr<const TokenSnapshot>> of_each)
      : tiers_(tiers), of_each_(std::move(of_each)) {}
  Token token(NamespaceIndex ns, std::string_view key) const noexcept override {
    return of_each_[tiers_.instance_of_key(ns, key)]->token(ns, key);
  }

 private:
  const TierSet& tiers_;
  const std::vector<std::shared_ptr<const TokenSnapshot>> of_each_;
};

}  // namespace

std::shared_ptr<const TokenSnapshot> TierSet::tokens() const {
  std::vector<std::shared_ptr<const TokenSnapshot>> of_each;
  for (const DramTier* tier : tiers_) of_each.push_back(tier->tokens());
  return std::make_shared<const SeveralTokens>(*this, std::move(of_each));
}

// ---- the walk
// ------------------------------------------------------------------------------------

std::uint64_t DramTier::scan(std::uint64_t bucket, const ScanFilter& filter, std::size_t bytes,
                             ScanBatch& batch) {
  const std::uint64_t count = index_.bucket_count();
  const bool hashes = moved_.active() || !filter.shards.empty();
  std::array<Entry, kGroupBuckets * layout::kSlotsPerBucket> entries;
  while (bucket < count && batch.bytes.size() < bytes) {
    const Tick tick = now();
    const std::uint64_t end = std::min(bucket + kGroupBuckets, count);
    const EpochGuard epoch(epochs_);
    std::size_t found = 0;
    for (; bucket < end; ++bucket) {
      for (const Slot& slot : index_.bucket(bucket).slots) {
        const Entry entry(slot.load(std::memory_order_acquire));
        if (entry.empty() || entry.on_nvm()) continue;
        __builtin_prefetch(arena_.record(entry.location()));
        entries[found++] = entry;
      }
    }
    FC_SEQUENCE_POINT("scan:loaded");
    for (std::size_t i = 0; i < found; ++i) {
      const std::uint64_t location = entries[i].location();
      const RecordHeader& record = *arena_.record(location);
      const std::uint32_t segment = arena_.segment_of(location);
      const DomainIndex domain = arena_.domain_of(segment);
      if (domain >= filter.domains.size() || filter.domains[domain] == ScanFilter::kNone) continue;
      if (record.negative() || record.expired(tick) || record.key_bytes == 0) continue;
      // Of a namespace that was flushed since, or of one that is none of ours.
      const auto ns = std::find_if(namespaces_.begin(), namespaces_.end(), [&](const auto& each) {
        return each->incarnation.load(std::memory_order_acquire) == record.incarnation &&
               domain - each->first_domain < each->domain_count;
      });
      if (ns == namespaces_.end() || !arena_.is_sound(record, location)) continue;
      if (hashes) {
        const KeyHash hash = hash_key((*ns)->seed, record.key());
        if (moved_.hides(arena_.stamp_of(segment), hash.high)) continue;
        if (!filter.shards.empty() && !filter.shards[shard_of(hash.high, filter.shard_count)]) {
          continue;
        }
      }
      std::uint32_t ttl_ms = 0;
      if (record.expiry != kNever) {
        const std::uint64_t left = std::uint64_t{record.expiry - tick} << kTickShift;
        ttl_ms = static_cast<std::uint32_t>(std::clamp<std::uint64_t>(left, 1, kMaxCopiedTtlMs));
      }
      const std::uint32_t value_bytes = record.value_bytes();
      std::uint8_t* const to = batch.bytes.reserve(record.payload_bytes());
      std::memcpy(to, record.key_data(), record.key_bytes);
      if (!record.large()) {
        std::memcpy(to + record.key_bytes, record.value_data(), value_bytes);
      } else {
        copy_value(record, location, to + record.key_bytes);
      }
      batch.bytes.commit(record.payload_bytes());
      batch.domains.push_back(filter.domains[domain]);
      batch.key_lengths.push_back(record.key_bytes);
      batch.value_lengths.push_back(value_bytes);
      batch.ttl_ms.push_back(ttl_ms);
    }
  }
  return bucket;
}

}  // namespace fc
