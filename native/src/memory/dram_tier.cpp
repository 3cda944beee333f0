#include "memory/dram_tier.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/check.hpp"
#include "core/sequence_point.hpp"

namespace fc {
namespace {

// What a new entry's frequency starts with.
unsigned known_hits(const PutItem& item) noexcept {
  return std::min<unsigned>(std::max<unsigned>(item.asked, 1) - 1, Entry::kMaxFrequency);
}

}  // namespace

NamespaceIndex DramTier::find_namespace(std::string_view name) const noexcept {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? kNoNamespace : found->second;
}

DomainIndex DramTier::find_domain(NamespaceIndex ns, std::string_view name) const noexcept {
  const Namespace& in = *namespaces_[ns];
  for (DomainIndex d = 0; d < in.domain_count; ++d) {
    const auto domain = static_cast<DomainIndex>(in.first_domain + d);
    if (domains_[domain]->config().name == name) return domain;
  }
  return kNoDomain;
}

// ---- writes
// --------------------------------------------------------------------------------------

Tick DramTier::expiry_of(const Domain& domain, const PutItem& item, const Namespace& ns,
                         const KeyHash& hash, Tick tick) const noexcept {
  std::uint64_t ttl_ms = item.ttl_ms != 0 ? item.ttl_ms
                         : item.negative  ? ns.negative_ttl_ms
                                          : domain.config().ttl_ms;
  if (ttl_ms == 0) return kNever;
  ttl_ms = std::min(ttl_ms, layout::kMaxTtlMs);
  // Shortened by a share that differs by key and by time of writing, so that what was loaded
  // together does not expire together.
  const auto spread = static_cast<std::uint32_t>(hash.high >> 32) ^ (tick * 0x9E3779B1u);
  const double cut = item.exact_ttl
                         ? 0.0
                         : domain.config().ttl_jitter * static_cast<double>(spread) / 4294967296.0;
  const auto ticks =
      static_cast<std::uint64_t>(static_cast<double>(ttl_ms) * (1.0 - cut)) >> kTickShift;
  return tick + static_cast<Tick>(std::max<std::uint64_t>(ticks, 1));
}

Slot* DramTier::find_key_locked(const Namespace& ns, const Place& place,
                                std::string_view key) noexcept {
  Slot* found = nullptr;
  const std::uint16_t incarnation = ns.incarnation.load(std::memory_order_relaxed);
  const auto match = [&](Entry entry, Slot& slot) {
    if (entry.on_nvm() || !arena_.record(entry.location())->holds(key, incarnation)) return false;
    found = &slot;
    return true;
  };
  if (!index_.find_in(place.home, place.tag, match) && place.partner != place.home) {
    index_.find_in(place.partner, place.tag, match);
  }
  return found;
}

// The slot's record gives way to `replacement` (0: to nothing).
void DramTier::supersede_locked(Slot& slot, Entry entry, std::uint64_t replacement,
                                bool by_tag) noexcept {
  slot.store(replacement, std::memory_order_release);
  if (entry.on_nvm()) return lower_->forget(entry, by_tag);
  const std::uint32_t segment = arena_.segment_of(entry.location());
  domains_[arena_.domain_of(segment)]->forget(segment, *arena_.record(entry.location()));
}

Slot* DramTier::find_below_locked(const Place& place, std::uint64_t hash,
                                  const Slot* except) noexcept {
  Slot* found = nullptr;
  const auto match = [&](Entry entry, Slot& slot) {
    if (!entry.may_be_nvm_of(hash) || &slot == except) return false;
    found = &slot;
    return true;
  };
  if (!index_.find_in(place.home, place.tag, match) && place.partner != place.home) {
    index_.find_in(place.partner, place.tag, match);
  }
  return found;
}

void DramTier::drop_all_below_locked(const Place& place, std::uint64_t hash,
                                     const Slot* except) noexcept {
  while (Slot* slot = find_below_locked(place, hash, except)) {
    below_dropped_.add();
    supersede_locked(*slot, Entry(slot->load(std::memory_order_relaxed)), 0, true);
  }
}

// Copies key and value behind the record's header.
void DramTier::fill(const Reservation& reservation, std::string_view key,
                    std::string_view value) noexcept {
  RecordHeader& record = *reservation.record;
  auto* bytes = reinterpret_cast<std::uint8_t*>(&record + 1);
  std::memcpy(bytes, key.data(), key.size());
  if (!record.large()) {
    if (!value.empty()) std::memcpy(bytes + key.size(), value.data(), value.size());
    return;
  }
  std::uint32_t segment = reservation.segment;
  std::size_t offset = sizeof(RecordHeader) + key.size();
  while (!value.empty()) {
    const std::size_t here = std::min(value.size(), arena_.segment_bytes() - offset);
    std::memcpy(arena_.data(segment) + offset, value.data(), here);
    value.remove_prefix(here);
    offset = 0;
    segment = arena_.meta(segment).next;
  }
}

DramTier::Outcome DramTier::write(Namespace& ns, const PutItem& item, const KeyHash& hash,
                                  const Token* token, Tick tick) {
  const Place place = index_.place_of(hash.low);
  const std::uint16_t incarnation = ns.incarnation.load(std::memory_order_acquire);
  FC_SEQUENCE_POINT("write:begun");
  if (token != nullptr &&
      (token->incarnation != incarnation ||
       token->write_version != write_version(hash.low).load(std::memory_order_acquire))) {
    return Outcome::TokenVoid;
  }
  const bool fits =
      !item.key.empty() && item.key.size() <= kMaxKeyBytes && item.value.size() <= max_value_bytes_;
  Reservation reservation;
  Domain* domain = nullptr;
  if (fits) {
    const DomainIndex wanted =
        item.domain != kNoDomain ? item.domain : ns.router->route(item.key, hash.low, item.asked);
    domain = domains_[wanted].get();
    RecordShape shape;
    shape.hash = hash.low;
    shape.high = hash.high;
    shape.key_bytes = static_cast<std::uint16_t>(item.key.size());
    shape.value_bytes = static_cast<std::uint32_t>(item.value.size());
    shape.negative = item.negative;
    shape.expiry = expiry_of(*domain, item, ns, hash, tick);
    shape.incarnation = incarnation;
    reservation = domain->reserve(shape, tick);
  }
  if (reservation.record == nullptr) {
    // The new value cannot be kept. For a put the older one must not outlive it.
    if (token == nullptr && !item.key.empty() && item.key.size() <= kMaxKeyBytes) {
      remove(ns, item.key, hash);
    }
    ns.rejected.add();
    return Outcome::Rejected;
  }
  fill(reservation, item.key, item.value);
  FC_SEQUENCE_POINT("write:filled");
  const Outcome outcome =
      publish(ns, *domain, item, place, hash.low, reservation, incarnation, token);
  domain->done(reservation, outcome == Outcome::Stored);
  if (outcome == Outcome::Stored) ns.stores.add();
  if (outcome == Outcome::Rejected) ns.rejected.add();
  return outcome;
}

// Raises a write version when the write is visible, and not before: a lookup that took its token
// earlier has a void one, a lookup that takes it later sees the write. Raised first, a lookup in
// between would miss the write and still hold a token that outlives it.
class DramTier::VersionRaiser {
 public:
  explicit VersionRaiser(std::atomic<std::uint32_t>* version) noexcept : version_(version) {}
  ~VersionRaiser() {
    if (version_ != nullptr) version_->fetch_add(1, std::memory_order_acq_rel);
  }
  VersionRaiser(const VersionRaiser&) = delete;
  VersionRaiser& operator=(const VersionRaiser&) = delete;

 private:
  std::atomic<std::uint32_t>* const version_;  // null: nothing to raise
};

DramTier::Outcome DramTier::publish(Namespace& ns, Domain& domain, const PutItem& item,
                                    const Place& place, std::uint64_t hash,
                                    const Reservation& reservation, std::uint16_t incarnation,
                                    const Token* token) {
  const RecordHeader& record = *reservation.record;
  const std::size_t bytes = record.record_bytes();
  const EpochGuard epoch(epochs_);
  const PairLock pair(index_, place);
  std::atomic<std::uint32_t>& version = write_version(hash);
  const bool flushed = ns.incarnation.load(std::memory_order_relaxed) != incarnation;
  if (token != nullptr &&
      (flushed || version.load(std::memory_order_relaxed) != token->write_version)) {
    return Outcome::TokenVoid;
  }
  const VersionRaiser raiser(token == nullptr ? &version : nullptr);
  if (flushed) return Outcome::TokenVoid;  // stored, then flushed: nothing is left of it
  FC_SEQUENCE_POINT("write:publishing");
  if (Slot* slot = find_key_locked(ns, place, item.key)) {
    const Entry old(slot->load(std::memory_order_relaxed));
    domain.count_in(record);
    supersede_locked(*slot, old,
                     Entry::dram(place.tag, reservation.location, bytes, old.frequency()).word());
    if (lower_ != nullptr) drop_all_below_locked(place, hash, slot);
    return Outcome::Stored;
  }
  if (lower_ != nullptr) {
    if (Slot* slot = find_below_locked(place, hash, nullptr)) {
      // By one store: in between a reader would find neither.
      const Entry old(slot->load(std::memory_order_relaxed));
      domain.count_in(record);
      below_dropped_.add();
      supersede_locked(*slot, old,
                       Entry::dram(place.tag, reservation.location, bytes, known_hits(item)).word(),
                       true);
      drop_all_below_locked(place, hash, slot);
      return Outcome::Stored;
    }
  }
  Slot* slot = index_.free_slot_locked(place);
  if (slot == nullptr) {
    // Both buckets are full and so are those around. Take an entry of this domain, or of one that
    // has more than its share; another domain's entries are not ours to take.
    no_slot_.add();
    slot = index_.victim_locked(place, [&](Entry entry) {
      if (entry.on_nvm()) return lower_->yields(entry, ns.index);
      Domain& owner = *domains_[arena_.domain_of(arena_.segment_of(entry.location()))];
      return &owner == &domain || owner.over_entry_share();
    });
    if (slot == nullptr) return Outcome::Rejected;
    displaced_.add();
    supersede_locked(*slot, Entry(slot->load(std::memory_order_relaxed)), 0);
  }
  domain.count_in(record);
  slot->store(Entry::dram(place.tag, reservation.location, bytes, known_hits(item)).word(),
              std::memory_order_release);
  return Outcome::Stored;
}

void DramTier::remove(Namespace& ns, std::string_view key, const KeyHash& hash) {
  const Place place = index_.place_of(hash.low);
  const EpochGuard epoch(epochs_);
  const PairLock pair(index_, place);
  const VersionRaiser raiser(&write_version(hash.low));
  FC_SEQUENCE_POINT("erase:removing");
  if (Slot* slot = find_key_locked(ns, place, key)) {
    supersede_locked(*slot, Entry(slot->load(std::memory_order_relaxed)), 0);
  }
  if (lower_ != nullptr) drop_all_below_locked(place, hash.low, nullptr);
}

// ---- the tier below
// ------------------------------------------------------------------------------

bool DramTier::promote(NamespaceIndex ns_index, const Promotion& item) {
  Namespace& ns = *namespaces_[ns_index];
  if (item.domain >= ns.domain_count) return false;
  Domain& domain = *domains_[ns.first_domain + item.domain];
  const Place place = index_.place_of(item.hash);
  RecordShape shape;
  shape.hash = item.hash;
  shape.high = hash_key(ns.seed, item.key).high;
  shape.key_bytes = static_cast<std::uint16_t>(item.key.size());
  shape.value_bytes = static_cast<std::uint32_t>(item.value.size());
  shape.expiry = item.expiry;
  shape.incarnation = item.incarnation;
  const Reservation reservation = domain.reserve(shape, now());
  if (reservation.record == nullptr) return false;
  fill(reservation, item.key, item.value);
  FC_SEQUENCE_POINT("promote:filled");
  bool published = false;
  {
    const EpochGuard epoch(epochs_);
    const PairLock pair(index_, place);
    Slot* slot = index_.find_nvm_locked(place, Entry(item.entry).nvm_location());
    // The place may have been used again since the read.
    if (slot != nullptr && lower_->generation(Entry(item.entry)) == item.generation &&
        !moved_.hides(lower_->stamp(Entry(item.entry)), shape.high) &&
        ns.incarnation.load(std::memory_order_relaxed) == item.incarnation) {
      const Entry old(slot->load(std::memory_order_relaxed));
      domain.count_in(*reservation.record);
      supersede_locked(*slot, old,
                       Entry::dram(place.tag, reservation.location,
                                   reservation.record->record_bytes(), old.frequency())
                           .word());
      published = true;
    }
  }
  domain.done(reservation, published);
  return published;
}

bool DramTier::is_hidden_below(NamespaceIndex ns, std::string_view key,
                               std::uint64_t entry) const noexcept {
  return moved_.active() &&
         moved_.hides(lower_->stamp(Entry(entry)), hash_key(namespaces_[ns]->seed, key).high);
}

void DramTier::drop_below(std::uint64_t hash, std::uint64_t entry) {
  const Place place = index_.place_of(hash);
  const PairLock pair(index_, place);
  if (Slot* slot = index_.find_nvm_locked(place, Entry(entry).nvm_location())) {
    supersede_locked(*slot, Entry(slot->load(std::memory_order_relaxed)), 0);
  }
}

void DramTier::count_later(NamespaceIndex ns, std::uint64_t hits, std::uint64_t misses) noexcept {
  if (hits != 0) namespaces_[ns]->hits.add(hits);
  if (misses != 0) namespaces_[ns]->misses.add(misses);
}

bool DramTier::token_alive(NamespaceIndex ns_index, std::string_view key,
                           Token token) const noexcept {
  const Namespace& ns = *namespaces_[ns_index];
  return token.incarnation == ns.incarnation.load(std::memory_order_acquire) &&
         token.write_version ==
             write_version(hash_key(ns.seed, key).low).load(std::memory_order_acquire);
}

// ---- operators
// -----------------------------------------------------------------------------------

// A number that no namespace has now; 0 is none. Whoever had it before was flushed since: no record
// is left of that time. For the holder of resize_mutex_, or before there are other threads.
std::uint16_t DramTier::new_incarnation() noexcept {
  for (;;) {
    const std::uint16_t candidate = ++last_incarnation_;
    bool taken = candidate == 0;
    for (const auto& ns : namespaces_) {
      taken |= ns->incarnation.load(std::memory_order_relaxed) == candidate;
    }
    taken |= lower_ != nullptr && lower_->uses_incarnation(candidate);
    if (!taken) return candidate;
  }
}

std::uint64_t DramTier::flush(NamespaceIndex ns_index) {
  Namespace& ns = *namespaces_[ns_index];
  const std::lock_guard lock(resize_mutex_);
  // From here on every older record is invisible.
  const std::uint16_t incarnation = new_incarnation();
  keep_incarnation(ns, incarnation);
  ns.incarnation.store(incarnation, std::memory_order_seq_cst);
  FC_SEQUENCE_POINT("flush:hidden");
  std::uint64_t dropped = 0;
  for (DomainIndex d = 0; d < ns.domain_count; ++d) {
    dropped += domains_[ns.first_domain + d]->flush(now());
  }
  if (lower_ != nullptr) {
    dropped += lower_->flush(ns_index);
    lower_->settle_writes();
  }
  return dropped;
}

std::uint64_t DramTier::segments_most(DomainIndex domain) {
  const std::lock_guard lock(resize_mutex_);
  return segments_most_locked(domain);
}

std::uint64_t DramTier::segments_most_locked(DomainIndex domain) const noexcept {
  std::uint64_t left = geometry_.segment_count - geometry_.reserve_segments;
  for (std::size_t d = 0; d < domains_.size(); ++d) {
    if (d != domain) left -= std::min<std::uint64_t>(left, domains_[d]->budget_segments());
  }
  return left;
}

std::uint64_t DramTier::resize(DomainIndex domain_index, std::uint64_t budget_bytes) {
  const std::lock_guard lock(resize_mutex_);
  Domain& domain = *domains_[domain_index];
  const std::uint64_t old_bytes = domain.budget_bytes();
  const std::uint64_t segments = budget_bytes / geometry_.segment_bytes;
  if (segments < layout::kMinDomainSegments) {
    throw std::invalid_argument(
        "the least budget of a domain is " +
        std::to_string(std::uint64_t{layout::kMinDomainSegments} * geometry_.segment_bytes) +
        " bytes");
  }
  const std::uint64_t most = segments_most_locked(domain_index);
  if (segments > most) {
    throw std::invalid_argument("only " + std::to_string(most * geometry_.segment_bytes) +
                                " bytes are free of other domains' budgets: shrink one first");
  }
  domain.resize(static_cast<std::uint32_t>(segments), entry_budget_of(geometry_, segments), now());
  return old_bytes;
}

void DramTier::maintain() {
  const Tick tick = now();
  for (const auto& domain : domains_) domain->maintain(tick);
  if (holds_.load(std::memory_order_acquire)) shards_->say_alive(ticks_.clock_ms());
}

// All memory that is neither segments nor buckets.
std::uint64_t DramTier::side_bytes() const noexcept {
  std::uint64_t bytes = arena_.side_bytes() + Index::side_bytes() + EpochManager::memory_bytes() +
                        moved_.memory_bytes() + (shards_ != nullptr ? shards_->memory_bytes() : 0) +
                        layout::kWriteVersionStripes * sizeof(std::uint32_t);
  for (const auto& domain : domains_) bytes += domain->side_bytes();
  for (const auto& ns : namespaces_) bytes += sizeof(*ns) + ns->router->memory_bytes();
  return bytes;
}

// What is to be seen of one instance beside the others; all else adds up over them.
void DramTier::visit_instance(CounterVisitor& visitor) const {
  const std::string number = std::to_string(instance_);
  const Label labels[] = {{"instance", number}};
  std::uint64_t items = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t hits = 0;
  for (const auto& domain : domains_) {
    items += domain->entries();
    used_bytes += domain->used_bytes();
  }
  for (const auto& ns : namespaces_) hits += ns->hits.get();
  visitor.gauge("feature_cache_instance_items", "Items in DRAM of an instance.", labels,
                static_cast<double>(items));
  visitor.gauge("feature_cache_instance_used_bytes", "Bytes of its segments in use.", labels,
                static_cast<double>(used_bytes));
  visitor.gauge("feature_cache_instance_memory_bytes", "The memory it was given.", labels,
                static_cast<double>(memory_bytes_));
  visitor.gauge("feature_cache_instance_numa_node", "The NUMA node that it prefers; -1: any.",
                labels, memory_.numa_node());
  visitor.counter("feature_cache_instance_hits_total", "Keys that it answered with a value.",
                  labels, hits);
}

void DramTier::visit(CounterVisitor& visitor) const {
  for (const auto& domain : domains_) domain->visit(visitor);
  for (const auto& ns : namespaces_) {
    const Label labels[] = {{"namespace", ns->name}};
    visitor.counter("feature_cache_namespace_hits_total", "Keys answered with a cached value.",
                    labels, ns->hits.get());
    visitor.counter("feature_cache_namespace_misses_total", "Keys that were not cached.", labels,
                    ns->misses.get());
    visitor.counter("feature_cache_namespace_negative_hits_total",
                    "Keys answered from the negative cache.", labels, ns->negative_hits.get());
    visitor.counter("feature_cache_namespace_stores_total", "Values that entered.", labels,
                    ns->stores.get());
    visitor.counter("feature_cache_namespace_rejected_total",
                    "Values that could not enter: too large for the domain, or no index slot.",
                    labels, ns->rejected.get());
    visitor.counter("feature_cache_namespace_erased_total", "Keys that were asked to go.", labels,
                    ns->erased.get());
    visitor.counter("feature_cache_namespace_tokens_void_total",
                    "Fetched values not kept, because a write came in between.", labels,
                    ns->tokens_void.get());
  }
  visit_instance(visitor);
  visitor.gauge("feature_cache_memory_budget_bytes", "The configured memory.", {},
                static_cast<double>(memory_bytes_));
  visitor.gauge("feature_cache_arena_bytes", "Segments, reserve included.", {},
                static_cast<double>(geometry_.segment_count) * geometry_.segment_bytes);
  visitor.gauge("feature_cache_segment_bytes", "Size of a segment.", {}, geometry_.segment_bytes);
  visitor.gauge("feature_cache_index_bytes", "Index buckets.", {},
                static_cast<double>(index_.bucket_count() * sizeof(Bucket)));
  visitor.gauge("feature_cache_side_bytes", "Tables, locks, versions, ghosts and sketches.", {},
                static_cast<double>(side_bytes()));
  visitor.gauge("feature_cache_index_slots", "Index slots.", {},
                static_cast<double>(index_.slot_count()));
  visitor.counter("feature_cache_index_moves_total", "Entries moved to make room in a bucket.", {},
                  index_.moves());
  visitor.counter("feature_cache_index_no_slot_total", "Inserts that found no slot even by moving.",
                  {}, no_slot_.get());
  visitor.counter("feature_cache_index_displaced_total",
                  "Entries dropped because their buckets were full.", {}, displaced_.get());
  visitor.counter("feature_cache_index_below_dropped_total",
                  "Entries of the tier below that gave way to a write of a key of their tag.", {},
                  below_dropped_.get());
  visitor.counter("feature_cache_arena_reader_waits_total",
                  "Times a writer waited for readers to leave a segment.", {},
                  arena_.reader_waits());
}

}  // namespace fc
