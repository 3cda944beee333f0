// The batched lookup: software-pipelined, without locks.
//
// Keys go through in groups of kGroup, a group in four tight passes, so that the cache misses of a
// pass overlap and what one pass fetches has arrived when the next one wants it:
//   1. hash each key, prefetch its home bucket
//   2. probe the home bucket; prefetch the record found there, or else the partner bucket
//   3. for keys that were not at home: probe the partner bucket, prefetch the record found there
//   4. compare the whole key, copy the value
// Passes beat one loop that carries keys through all stages: with little else in the processor's
// window, many more fetches are under way (docs/adr/0003-batched-lookup.md has the figures).
//
// What the passes did not find is looked up again with the index's certain find(): that confirms a
// miss against entries that moved meanwhile, after the miss took its token. Entries of the tier
// below are looked at there, too: their records are served when they lie in memory still, else
// pinned and handed to the caller to be read.
//
// With several instances the passes are the same: each key has its tier with it, so a batch goes
// through all tiers at once and its values are copied once, to where they belong.
//
// An epoch covers kChunk keys at most, so that a huge batch does not keep memory from its writers.

#include <algorithm>
#include <array>
#include <type_traits>

#include "core/placement.hpp"
#include "core/sequence_point.hpp"
#include "memory/dram_tier.hpp"
#include "memory/tier_set.hpp"

namespace fc {
namespace {

constexpr std::size_t kChunk = 256;
constexpr std::size_t kGroup = 32;       // its records fit the first-level cache
constexpr unsigned kHotFrequency = 2;    // hits that make a key worth a refresh
constexpr std::size_t kBelowMost = 4;    // entries below that may be one key's; more is unheard of
constexpr unsigned kPrefetchLines = 10;  // beyond that the hardware has recognised the stream
static_assert(kChunk % kGroup == 0);

inline Slot* first_candidate(Bucket& bucket, std::uint16_t tag, std::uint64_t* word) noexcept {
  const std::uint32_t mask = Index::candidates(bucket, tag);
  if (mask == 0) return nullptr;
  Slot& slot = Index::first_of(bucket, mask);
  *word = slot.load(std::memory_order_acquire);
  const Entry entry(*word);
  return entry.empty() || entry.tag() != tag ? nullptr : &slot;
}

inline void prefetch_record(const RecordHeader* record, unsigned lines) noexcept {
  const auto* at = reinterpret_cast<const std::byte*>(record);
  const unsigned end = std::min(lines + 1, kPrefetchLines);  // one more: records are not aligned
  for (unsigned i = 0; i < end; ++i) __builtin_prefetch(at + i * Entry::kCacheLine);
}

}  // namespace

// What a batch has at hand of one tier, and counts in it: added to the shared counters once, at its
// end. The first line is what the passes touch.
struct alignas(64) DramTier::GetTally {
  GetTally(DramTier& of, NamespaceIndex number)
      : index(of.index_.view()),
        arena(of.arena_.view()),
        first_domain(of.namespaces_[number]->first_domain),
        tier(&of),
        ns(of.namespaces_[number].get()) {}
  const IndexView index;
  const ArenaView arena;
  const DomainIndex first_domain;
  std::uint16_t incarnation = 0;
  Tick tick = 0;  // 0: not asked yet
  DramTier* const tier;
  Namespace* const ns;
  std::array<std::uint32_t, layout::kMaxDomainsOfNamespace> domain_hits{};
  std::uint64_t misses = 0;
  std::uint64_t negative_hits = 0;
  std::uint64_t below_hits = 0;
};

// A batch on its way, through one tier or several.
struct DramTier::GetBatch {
  GetBatch(GetColumn& of, std::span<const std::uint64_t> not_again)
      : column(of), rejected(not_again) {}
  GetColumn& column;
  std::span<const std::uint64_t> rejected;
  std::uint64_t value_bytes = 0;
  // Hits whose frequency rises when the chunk is done: a locked instruction amid the pipeline would
  // wait for the loads that it keeps in flight.
  struct Touched {
    Slot* slot;
    std::uint64_t seen;
  };
  std::array<Touched, kChunk> touched;
  std::size_t touched_count = 0;
};

// The passes over one tier: there is nothing to choose, and no instruction is spent on it.
class DramTier::OneTier {
 public:
  struct Choice {};
  class Chunk {
   public:
    explicit Chunk(const OneTier& tiers) : epoch_(tiers.tally_.tier->epochs_) {
      tiers.tally_.incarnation = tiers.tally_.ns->incarnation.load(std::memory_order_acquire);
    }

   private:
    EpochGuard epoch_;
  };
  explicit OneTier(GetTally& tally) : tally_(tally) {}

  std::uint64_t seed() const noexcept { return tally_.ns->seed; }
  Choice choose(const KeyHash&, Chunk&) const noexcept { return {}; }
  GetTally& tally(Choice) const noexcept { return tally_; }

 private:
  GetTally& tally_;
};

// The passes over the tiers of several instances: each key goes to its own, in the same groups.
class DramTier::ManyTiers {
 public:
  using Choice = GetTally*;
  // Holds the epochs of the instances that the chunk's keys have come to so far.
  class Chunk {
   public:
    explicit Chunk(const ManyTiers&) {}
    void reach(std::uint32_t instance, GetTally& tally) {
      if (epochs_.holds(instance)) [[likely]]
        return;
      epochs_.enter(instance, tally.tier->epochs_);
      if (tally.tick == 0) tally.tick = tally.tier->now();
      tally.incarnation = tally.ns->incarnation.load(std::memory_order_acquire);
    }

   private:
    EpochGuards epochs_;
  };
  ManyTiers(std::span<GetTally> tallies, const PlacementTable& table)
      : tallies_(tallies.data()), table_(table.data()) {}

  std::uint64_t seed() const noexcept { return tallies_->ns->seed; }
  Choice choose(const KeyHash& hash, Chunk& chunk) const {
    const std::uint32_t instance = table_[placement_slot(hash.high)];
    chunk.reach(instance, tallies_[instance]);
    return &tallies_[instance];
  }
  GetTally& tally(Choice choice) const noexcept { return *choice; }

 private:
  GetTally* const tallies_;
  const std::uint8_t* const table_;
};

template <bool kHides, class Tiers>
void DramTier::get_all(const Tiers tiers, GetBatch& batch) {
  GetColumn& column = batch.column;
  column.values->reserve(1);  // so that an empty value, too, is copied to an address that exists
  for (std::size_t begin = 0; begin < column.keys.size(); begin += kChunk) {
    typename Tiers::Chunk chunk(tiers);
    const std::size_t end = std::min(begin + kChunk, column.keys.size());
    for (std::size_t group = begin; group < end; group += kGroup) {
      get_group<kHides>(tiers, chunk, batch, group, std::min(group + kGroup, end));
    }
    for (std::size_t i = 0; i < batch.touched_count; ++i) {
      Index::touch(*batch.touched[i].slot, Entry(batch.touched[i].seen));
    }
    batch.touched_count = 0;
  }
}

std::uint64_t DramTier::get(GetColumn& column, std::span<const std::uint64_t> rejected) {
  GetBatch batch(column, rejected);
  GetTally tally(*this, column.ns);
  tally.tick = now();
  if (!moved_.active()) [[likely]] {
    get_all<false>(OneTier(tally), batch);
  } else {
    get_all<true>(OneTier(tally), batch);
  }
  if (!column.quiet) count(tally);
  return tally.below_hits;
}

void TierSet::get(GetColumn& column, std::span<std::uint64_t> below_hits) const {
  DramTier::GetBatch batch(column, {});
  std::vector<DramTier::GetTally> tallies;
  tallies.reserve(tiers_.size());
  bool hides = false;
  for (DramTier* tier : tiers_) {
    tallies.emplace_back(*tier, column.ns);
    hides |= tier->moved_.active();
  }
  const DramTier::ManyTiers all(tallies, table_);
  if (!hides) [[likely]] {
    DramTier::get_all<false>(all, batch);
  } else {
    DramTier::get_all<true>(all, batch);
  }
  for (std::size_t i = 0; i < tiers_.size(); ++i) {
    if (!column.quiet) tiers_[i]->count(tallies[i]);
    below_hits[i] = tallies[i].below_hits;
  }
}

void DramTier::count(const GetTally& tally) noexcept {
  Namespace& ns = *tally.ns;
  std::uint64_t hits = tally.below_hits;
  for (std::size_t i = 0; i < ns.domain_count; ++i) {
    if (tally.domain_hits[i] == 0) continue;
    domains_[ns.first_domain + i]->hits.add(tally.domain_hits[i]);
    hits += tally.domain_hits[i];
  }
  if (hits != 0) ns.hits.add(hits);
  if (tally.misses != 0) ns.misses.add(tally.misses);
  if (tally.negative_hits != 0) ns.negative_hits.add(tally.negative_hits);
}

// Makes room for a value, which the caller copies and commits; false, and the cell is Throttled,
// when the reply has none.
[[gnu::always_inline]] inline bool DramTier::append_value(GetColumn& column, GetBatch& batch,
                                                          std::size_t position, CellStatus status,
                                                          std::uint32_t bytes, std::uint8_t** to) {
  if (batch.value_bytes + bytes > column.max_value_bytes) {
    column.statuses[position] = CellStatus::Throttled;
    column.lengths[position] = 0;
    return false;
  }
  batch.value_bytes += bytes;
  *to = column.values->reserve(bytes);
  column.statuses[position] = status;
  column.lengths[position] = bytes;
  return true;
}

// Answers one key from its record; false when the record has expired, or its key moved since.
template <bool kHides>
[[gnu::always_inline]] inline bool DramTier::serve(GetColumn& column, GetBatch& batch,
                                                   GetTally& tally, std::size_t position,
                                                   const RecordHeader& record, Entry entry,
                                                   Slot& slot, const KeyHash& hash) {
  if (record.expired(tally.tick)) return false;
  if constexpr (kHides) {
    if (moved_.hides(arena_.stamp_of(arena_.segment_of(entry.location())), hash.high)) return false;
  }
  if (entry.frequency() < Entry::kMaxFrequency) {
    batch.touched[batch.touched_count++] = {&slot, entry.word()};
  }
  const DomainIndex domain = tally.arena.domain_of(entry.location());
  if (record.negative()) {
    column.statuses[position] = CellStatus::NotFound;
    column.lengths[position] = 0;
    ++tally.negative_hits;
    return true;
  }
  const std::uint32_t bytes = record.value_bytes();
  if (record.large() || !tally.arena.ends_in_segment(record, entry.location())) [[unlikely]] {
    if (!arena_.is_sound(record, entry.location())) return false;
  }
  std::uint8_t* to = nullptr;
  if (!append_value(column, batch, position, CellStatus::HitDram, bytes, &to)) return true;
  if (!record.large()) [[likely]] {
    std::memcpy(to, record.value_data(), bytes);
  } else {
    copy_value(record, entry.location(), to);
  }
  column.values->commit(bytes);
  ++tally.domain_hits[domain - tally.first_domain];
  if (column.refresh != nullptr && record.expiry != kNever &&
      record.expiry - tally.tick < domains_[domain]->refresh_ticks() &&
      entry.frequency() >= kHotFrequency) [[unlikely]] {
    // The token is younger than the value: a put in between would not void it.
    const Token token{write_version(hash.low).load(std::memory_order_acquire), tally.incarnation};
    if (Entry(slot.load(std::memory_order_acquire)).same_record(entry)) {
      column.refresh->push_back({static_cast<std::uint32_t>(position), token});
    }
  }
  return true;
}

// The value of a record that goes on in further segments.
void DramTier::copy_value(const RecordHeader& record, std::uint64_t location,
                          std::uint8_t* to) noexcept {
  std::uint32_t segment = arena_.segment_of(location);
  const std::size_t head = sizeof(RecordHeader) + record.key_bytes;
  std::size_t left = record.value_bytes();
  std::size_t offset = head;
  while (left != 0) {
    const std::size_t here = std::min(left, arena_.segment_bytes() - offset);
    std::memcpy(to, arena_.data(segment) + offset, here);
    FC_SEQUENCE_POINT("get:copying_large");
    to += here;
    left -= here;
    offset = 0;
    segment = arena_.meta(segment).next;
    if (segment >= arena_.segment_count()) return;  // damaged since its adoption
  }
}

template <bool kHides, class Tiers>
void DramTier::get_group(const Tiers tiers, typename Tiers::Chunk& chunk, GetBatch& batch,
                         std::size_t begin, std::size_t end) {
  struct NoHigh {};  // where nothing is hidden, the half that says so is not even computed
  struct Probe {
    std::uint64_t hash;
    std::uint64_t bucket;  // home, then partner
    Slot* slot;            // null: nothing found yet
    std::uint64_t word;    // of the entry; raw, so that an array of probes costs nothing to make
    [[no_unique_address]] typename Tiers::Choice choice;
    [[no_unique_address]] std::conditional_t<kHides, std::uint64_t, NoHigh> high;
    Entry entry() const noexcept { return Entry(word); }
  };
  std::array<Probe, kGroup> probes;
  std::array<std::uint32_t, kGroup> elsewhere;  // not found at home
  GetColumn& column = batch.column;
  const std::span<const std::string_view> keys = column.keys;
  const std::size_t count = end - begin;
  const std::uint64_t seed = tiers.seed();
  for (std::size_t i = 0; i < count; ++i) {
    const KeyHash hash = hash_key(seed, keys[begin + i]);
    probes[i].hash = hash.low;
    if constexpr (kHides) probes[i].high = hash.high;
    probes[i].choice = tiers.choose(hash, chunk);
  }
  for (std::size_t i = 0; i < count; ++i) {
    Probe& key = probes[i];
    const IndexView& index = tiers.tally(key.choice).index;
    key.bucket = index.home_of(key.hash);
    index.prefetch(key.bucket);
  }
  std::size_t elsewhere_count = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Probe& key = probes[i];
    const GetTally& tally = tiers.tally(key.choice);
    const std::uint16_t tag = Index::tag_of(key.hash);
    key.slot = first_candidate(tally.index.bucket(key.bucket), tag, &key.word);
    if (key.slot != nullptr) {
      if (!key.entry().on_nvm()) [[likely]] {
        prefetch_record(tally.arena.record(key.entry().location()), key.entry().lines());
      }
    } else {
      key.bucket = tally.index.partner_of(key.bucket, tag);
      tally.index.prefetch(key.bucket);
      elsewhere[elsewhere_count++] = static_cast<std::uint32_t>(i);
    }
  }
  for (std::size_t e = 0; e < elsewhere_count; ++e) {
    Probe& key = probes[elsewhere[e]];
    const GetTally& tally = tiers.tally(key.choice);
    key.slot = first_candidate(tally.index.bucket(key.bucket), Index::tag_of(key.hash), &key.word);
    if (key.slot != nullptr && !key.entry().on_nvm()) {
      prefetch_record(tally.arena.record(key.entry().location()), key.entry().lines());
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    const Probe& key = probes[i];
    const std::size_t position = begin + i;
    GetTally& tally = tiers.tally(key.choice);
    KeyHash hash{.low = key.hash, .high = 0};
    if constexpr (kHides) hash.high = key.high;
    if (key.slot != nullptr && !key.entry().on_nvm()) {
      const RecordHeader& record = *tally.arena.record(key.entry().location());
      if (record.holds(keys[position], tally.incarnation) &&
          tally.tier->template serve<kHides>(column, batch, tally, position, record, key.entry(),
                                             *key.slot, hash)) [[likely]] {
        continue;
      }
    }
    tally.tier->template find_again<kHides>(batch, tally, position, hash);
  }
}

// The certain lookup of a key that the passes did not find.
template <bool kHides>
void DramTier::find_again(GetBatch& batch, GetTally& tally, std::size_t position,
                          const KeyHash& hash) {
  GetColumn& column = batch.column;
  // The token first: a write after it voids it, a write before it is seen by the find.
  const Token token{write_version(hash.low).load(std::memory_order_acquire), tally.incarnation};
  struct Below {
    Entry entry;
    Slot* slot;
  };
  std::array<Below, kBelowMost> below;
  std::size_t below_count = 0;
  const bool present = index_.find(index_.place_of(hash.low), [&](Entry entry, Slot& slot) {
    if (entry.on_nvm()) {
      if (below_count < kBelowMost && entry.may_be_nvm_of(hash.low)) {
        below[below_count++] = {entry, &slot};
      }
      return false;
    }
    const RecordHeader& record = *arena_.record(entry.location());
    return record.holds(column.keys[position], tally.incarnation) &&
           serve<kHides>(column, batch, tally, position, record, entry, slot, hash);
  });
  if (present) return;
  for (std::size_t i = 0; i < below_count; ++i) {
    const Entry entry = below[i].entry;
    // Unread: whoever's it is, it is not the key's as it is now.
    if (kHides && moved_.hides(lower_->stamp(entry), hash.high)) continue;
    if (serve_below(batch, tally, position, entry, *below[i].slot, hash.low, token)) {
      return;
    }
  }
  column.statuses[position] = CellStatus::Miss;
  column.lengths[position] = 0;
  ++tally.misses;
  if (column.absent != nullptr) {
    column.absent->push_back({static_cast<std::uint32_t>(position), token});
  }
}

// Answers one key from the tier below, or leaves it to be read; false when this entry is not its.
bool DramTier::serve_below(GetBatch& batch, GetTally& tally, std::size_t position, Entry entry,
                           Slot& slot, std::uint64_t hash, Token token) {
  GetColumn& column = batch.column;
  for (const std::uint64_t word : batch.rejected) {
    if (Entry(word).nvm_location() == entry.nvm_location()) return false;
  }
  LowerRecord record;
  switch (lower_->locate(entry, tally.incarnation, record)) {
    case LowerTier::Where::Gone:
      return false;
    case LowerTier::Where::Memory: {
      if (record.key != column.keys[position]) return false;
      if (record.expiry != kNever && record.expiry <= tally.tick) return false;
      std::uint8_t* to = nullptr;
      if (append_value(column, batch, position, CellStatus::HitNvm, record.value_bytes, &to)) {
        std::memcpy(to, record.value, record.value_bytes);
        column.values->commit(record.value_bytes);
        ++tally.below_hits;
      }
      break;
    }
    case LowerTier::Where::Device:
      if (column.nvm == nullptr) {
        lower_->unpin(entry);
        return false;
      }
      column.statuses[position] = CellStatus::Unspecified;
      column.lengths[position] = 0;
      column.nvm->push_back({.key = column.keys[position],
                             .hash = hash,
                             .entry = entry.word(),
                             .ns = column.ns,
                             .token = token,
                             .instance = instance_,
                             .position = static_cast<std::uint32_t>(position)});
      break;
  }
  if (entry.frequency() < Entry::kMaxFrequency) {
    batch.touched[batch.touched_count++] = {&slot, entry.word()};
  }
  return true;
}

}  // namespace fc
