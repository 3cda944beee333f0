// The writes of a batch, to one tier or to each key's own of several.

#include <array>
#include <bit>

#include "memory/tier_set.hpp"

namespace fc {

// Calls body(i, tier, hash) for every item, some items after its bucket and ghosts were prefetched.
template <class Choose, class Body>
void DramTier::for_each_prefetched(NamespaceIndex ns, std::uint64_t seed,
                                   std::span<const PutItem> items, Choose&& choose, Body&& body) {
  constexpr std::size_t kAhead = 8;
  struct Begun {
    KeyHash hash;
    DramTier* tier;
  };
  std::array<Begun, kAhead> begun;
  for (std::size_t step = 0; step < items.size() + kAhead; ++step) {
    if (step >= kAhead) {
      const Begun& item = begun[step % kAhead];
      body(step - kAhead, *item.tier, item.hash);
    }
    if (step < items.size()) {
      const KeyHash hash = hash_key(seed, items[step].key);
      DramTier& tier = choose(hash);
      begun[step % kAhead] = {hash, &tier};
      tier.index_.prefetch(tier.index_.home_of(hash.low));
      const DomainIndex domain = items[step].domain != kNoDomain
                                     ? items[step].domain
                                     : tier.namespaces_[ns]->router->fallback();
      tier.domains_[domain]->prefetch(hash.low);
    }
  }
}

inline WriteStatus DramTier::put_one(NamespaceIndex ns, const PutItem& item, const KeyHash& hash,
                                     Tick tick) {
  const Outcome outcome = write(*namespaces_[ns], item, hash, nullptr, tick);
  return outcome == Outcome::Rejected ? WriteStatus::Rejected : WriteStatus::Stored;
}

inline InstallStatus DramTier::install_one(NamespaceIndex ns, const PutItem& item,
                                           const Token& token, const KeyHash& hash, Tick tick) {
  switch (write(*namespaces_[ns], item, hash, &token, tick)) {
    case Outcome::Stored:
      return InstallStatus::Installed;
    case Outcome::Rejected:
      return InstallStatus::Rejected;
    case Outcome::TokenVoid:
      break;
  }
  namespaces_[ns]->tokens_void.add();
  return InstallStatus::TokenVoid;
}

inline WriteStatus DramTier::erase_one(NamespaceIndex ns, std::string_view key,
                                       const KeyHash& hash) {
  remove(*namespaces_[ns], key, hash);
  namespaces_[ns]->erased.add();
  return WriteStatus::Stored;
}

// ---- one tier
// ------------------------------------------------------------------------------------

void DramTier::put(NamespaceIndex ns, std::span<const PutItem> items,
                   std::span<WriteStatus> statuses) {
  const Tick tick = now();
  for_each_prefetched(
      ns, namespaces_[ns]->seed, items, [this](const KeyHash&) -> DramTier& { return *this; },
      [&](std::size_t i, DramTier&, const KeyHash& hash) {
        statuses[i] = put_one(ns, items[i], hash, tick);
      });
  if (lower_ != nullptr) lower_->settle_writes();
}

void DramTier::install(NamespaceIndex ns, std::span<const PutItem> items,
                       std::span<const Token> tokens, std::span<InstallStatus> statuses) {
  const Tick tick = now();
  for_each_prefetched(
      ns, namespaces_[ns]->seed, items, [this](const KeyHash&) -> DramTier& { return *this; },
      [&](std::size_t i, DramTier&, const KeyHash& hash) {
        statuses[i] = install_one(ns, items[i], tokens[i], hash, tick);
      });
}

void DramTier::erase(NamespaceIndex ns, std::span<const std::string_view> keys,
                     std::span<WriteStatus> statuses) {
  const std::uint64_t seed = namespaces_[ns]->seed;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    statuses[i] = erase_one(ns, keys[i], hash_key(seed, keys[i]));
  }
  if (lower_ != nullptr) lower_->settle_writes();
}

// ---- several
// -------------------------------------------------------------------------------------

std::uint64_t TierSet::seed_of(NamespaceIndex ns) const noexcept {
  return tiers_.front()->namespaces_[ns]->seed;
}

std::uint32_t TierSet::instance_of_key(NamespaceIndex ns, std::string_view key) const noexcept {
  return instance_of_hash(hash_key(seed_of(ns), key));
}

// The instances that a batch of writes has come to, and what time it is in each: their clocks began
// when each was made.
class TierSet::Reached {
 public:
  explicit Reached(const TierSet& set) : set_(set) {}

  std::uint32_t by(const KeyHash& hash) {
    const std::uint32_t instance = set_.instance_of_hash(hash);
    if ((mask_ >> instance & 1) == 0) {
      mask_ |= std::uint64_t{1} << instance;
      ticks_[instance] = set_.tiers_[instance]->now();
    }
    return instance;
  }
  Tick tick_of(const DramTier& tier) const noexcept { return ticks_[tier.instance_]; }
  // Before the writes are acknowledged.
  void settle() const {
    for (std::uint64_t left = mask_; left != 0; left &= left - 1) {
      LowerTier* const lower = set_.tiers_[std::countr_zero(left)]->lower_;
      if (lower != nullptr) lower->settle_writes();
    }
  }

 private:
  static_assert(layout::kMaxInstances <= 64);
  const TierSet& set_;
  std::uint64_t mask_ = 0;
  std::array<Tick, layout::kMaxInstances> ticks_;  // of those in the mask
};

void TierSet::put(NamespaceIndex ns, std::span<const PutItem> items,
                  std::span<WriteStatus> statuses) const {
  Reached reached(*this);
  DramTier::for_each_prefetched(
      ns, seed_of(ns), items,
      [&](const KeyHash& hash) -> DramTier& { return *tiers_[reached.by(hash)]; },
      [&](std::size_t i, DramTier& tier, const KeyHash& hash) {
        statuses[i] = tier.put_one(ns, items[i], hash, reached.tick_of(tier));
      });
  reached.settle();
}

void TierSet::install(NamespaceIndex ns, std::span<const PutItem> items,
                      std::span<const Token> tokens, std::span<InstallStatus> statuses) const {
  Reached reached(*this);
  DramTier::for_each_prefetched(
      ns, seed_of(ns), items,
      [&](const KeyHash& hash) -> DramTier& { return *tiers_[reached.by(hash)]; },
      [&](std::size_t i, DramTier& tier, const KeyHash& hash) {
        statuses[i] = tier.install_one(ns, items[i], tokens[i], hash, reached.tick_of(tier));
      });
}

void TierSet::erase(NamespaceIndex ns, std::span<const std::string_view> keys,
                    std::span<WriteStatus> statuses) const {
  Reached reached(*this);
  const std::uint64_t seed = seed_of(ns);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const KeyHash hash = hash_key(seed, keys[i]);
    statuses[i] = tiers_[reached.by(hash)]->erase_one(ns, keys[i], hash);
  }
  reached.settle();
}

}  // namespace fc
