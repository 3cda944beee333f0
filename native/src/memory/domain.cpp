#include "memory/domain.hpp"

#include <algorithm>
#include <bit>
#include <thread>

#include "core/check.hpp"
#include "core/sequence_point.hpp"

namespace fc {
namespace {

constexpr std::uint8_t kForeverClass = 255;
constexpr std::uint8_t kTtlClasses = 64;  // below it, of 32-bit ticks

// Half-octave classes of the time to live: within one, no TTL is above 1.5 times another.
std::uint8_t ttl_class_of(Tick expiry, Tick now) noexcept {
  if (expiry == kNever) return kForeverClass;
  const Tick ttl = expiry > now ? expiry - now : 1;
  const auto octave = static_cast<unsigned>(std::bit_width(ttl)) - 1;
  const unsigned half = octave == 0 ? 0 : (ttl >> (octave - 1)) & 1;
  return static_cast<std::uint8_t>(2 * octave + half);
}

Tick shortest_ttl_of(std::uint8_t ttl_class) noexcept {
  const unsigned octave = ttl_class / 2;
  const Tick base = Tick{1} << octave;
  return (ttl_class & 1) != 0 && octave > 0 ? base + base / 2 : base;
}

// What the policy remembers outlives the process where the arena has room for it.
std::span<std::byte> hints_of(const ArenaMemory& memory, const DomainRow& row,
                              PolicyKind policy) noexcept {
  if (row.policy != static_cast<std::uint32_t>(policy) ||
      row.hint_offset % Entry::kCacheLine != 0 || row.hint_offset > memory.hint_bytes() ||
      row.hint_bytes > memory.hint_bytes() - row.hint_offset) {
    return {};
  }
  return {memory.hints() + row.hint_offset, row.hint_bytes};
}

unsigned class_distance(std::uint8_t a, std::uint8_t b) noexcept {
  return a > b ? a - b : b - a;
}

}  // namespace

Domain::Domain(const DomainConfig& config, DomainIndex index, NamespaceState& ns, TierParts parts,
               std::uint32_t segments, std::uint64_t entry_budget, std::uint16_t row)
    : config_(config),
      index_(index),
      row_number_(row),
      row_(parts.arena.memory().head().domains[row]),
      ns_(ns),
      parts_(parts),
      refresh_ticks_(static_cast<Tick>(static_cast<double>(config.ttl_ms >> kTickShift) *
                                       config.refresh_ahead)),
      policy_(EvictionPolicy::make(config.policy, entry_budget,
                                   hints_of(parts.arena.memory(), row_, config.policy))),
      budget_segments_(segments),
      entry_budget_(entry_budget) {}

void Domain::adopt(const AdoptedDomain& adopted) {
  const std::lock_guard lock(mutex_);
  segments_in_ = adopted.segments;
  used_segments_ = adopted.segments[0] + adopted.segments[1];
  used_shown_.store(used_segments_, std::memory_order_relaxed);
  next_sequence_ = adopted.next_sequence;
  for (std::size_t q = 0; q < kQueueCount; ++q) {
    queues_[q].assign(adopted.sealed[q].begin(), adopted.sealed[q].end());
    for (const std::uint32_t segment : adopted.open[q]) {
      const std::uint8_t ttl_class = parts_.arena.meta(segment).ttl_class;
      open_[q].push_back({segment, ttl_class < kTtlClasses ? ttl_class : kForeverClass});
    }
  }
  entries_.store(adopted.entries, std::memory_order_relaxed);
  live_bytes_.add(adopted.live_bytes);
  payload_bytes_.add(adopted.payload_bytes);
}

void Domain::leave() noexcept {
  const std::lock_guard lock(mutex_);
  row_.entries = entries();
  row_.live_bytes = live_bytes_.get();
  row_.payload_bytes = payload_bytes_.get();
}

QueueSizes Domain::sizes_locked() const noexcept {
  return {count(Queue::Small), count(Queue::Main), budget_segments()};
}

std::uint64_t Domain::used_bytes() const noexcept {
  return std::uint64_t{used_shown_.load(std::memory_order_relaxed)} * parts_.arena.segment_bytes();
}

std::uint64_t Domain::budget_bytes() const noexcept {
  return std::uint64_t{budget_segments()} * parts_.arena.segment_bytes();
}

// ---- writers
// -------------------------------------------------------------------------------------

Reservation Domain::reserve(const RecordShape& shape, Tick now) {
  const std::lock_guard lock(mutex_);
  release_dead_locked();
  // Index slots are budgeted by domain: a flood of tiny items evicts its own kind.
  for (unsigned tries = 0; entries() >= entry_budget_.load(std::memory_order_relaxed); ++tries) {
    set_filled_once(true);
    if (!evict_one_locked(now, tries < kPatience ? Purpose::Judge : Purpose::Drop)) break;
  }
  const Queue queue = policy_->admit(shape.hash);
  const std::size_t bytes = RecordHeader::bytes_for(shape.key_bytes, shape.value_bytes);
  if (bytes > large_bytes()) return append_large_locked(queue, shape, bytes, now);
  return append_locked(queue, shape, now, false);
}

void Domain::count_in(const RecordHeader& record) noexcept {
  entries_.fetch_add(1, std::memory_order_relaxed);
  payload_bytes_.add(record.payload_bytes());
}

void Domain::done(const Reservation& reservation, bool published) noexcept {
  SegmentMeta& row = parts_.arena.meta(reservation.segment);
  if (!published) {
    const auto bytes = static_cast<std::uint32_t>(reservation.record->record_bytes());
    live_bytes_.sub(bytes);
    row.live_bytes.fetch_sub(bytes, std::memory_order_relaxed);
  }
  row.writers.fetch_sub(1, std::memory_order_release);
}

void Domain::forget(std::uint32_t segment, const RecordHeader& record) noexcept {
  SegmentMeta& row = parts_.arena.meta(segment);
  const auto bytes = static_cast<std::uint32_t>(record.record_bytes());
  entries_.fetch_sub(1, std::memory_order_relaxed);
  live_bytes_.sub(bytes);
  payload_bytes_.sub(record.payload_bytes());
  const std::uint32_t before = row.live_bytes.fetch_sub(bytes, std::memory_order_acq_rel);
  if (before == bytes && row.state.load(std::memory_order_acquire) == SegmentState::Sealed) {
    dead_segments_.fetch_add(1, std::memory_order_relaxed);
  }
}

Reservation Domain::append_locked(Queue queue, const RecordShape& shape, Tick now, bool evicting) {
  const std::size_t bytes = RecordHeader::bytes_for(shape.key_bytes, shape.value_bytes);
  const Open* open = open_for_locked(queue, shape, now, evicting);
  if (open == nullptr) return {};
  const std::uint32_t segment = open->segment;
  SegmentMeta& row = parts_.arena.meta(segment);
  const std::uint32_t offset = row.used.load(std::memory_order_relaxed);
  const Reservation reservation = write_header_locked(segment, offset, shape, bytes, now);
  // After the header: what lies below is whole, should the process end here.
  row.used.store(offset + static_cast<std::uint32_t>(bytes), std::memory_order_release);
  return reservation;
}

Reservation Domain::write_header_locked(std::uint32_t segment, std::uint32_t offset,
                                        const RecordShape& shape, std::size_t bytes, Tick now) {
  const bool large = bytes > large_bytes();
  SegmentMeta& row = parts_.arena.meta(segment);
  Reservation reservation;
  reservation.segment = segment;
  reservation.location = parts_.arena.location(segment, offset);
  reservation.record = parts_.arena.record(reservation.location);
  reservation.record->size_and_flags = shape.value_bytes |
                                       (shape.negative ? RecordHeader::kNegative : 0) |
                                       (large ? RecordHeader::kLarge : 0);
  reservation.record->expiry = shape.expiry;
  reservation.record->key_bytes = shape.key_bytes;
  reservation.record->incarnation = shape.incarnation;
  if (shape.expiry == kNever) {
    row.last_expiry = SegmentMeta::kForever;
  } else {
    row.last_expiry = std::max(row.last_expiry, shape.expiry);
    const Tick ttl = shape.expiry > now ? shape.expiry - now : 1;
    row.due = std::min(row.due, now + ttl + ttl / 8 * 7);
  }
  row.writers.fetch_add(1, std::memory_order_relaxed);
  row.live_bytes.fetch_add(static_cast<std::uint32_t>(bytes), std::memory_order_relaxed);
  live_bytes_.add(bytes);
  return reservation;
}

// A record larger than a segment: a row of segments of its own, its first one in the queue.
Reservation Domain::append_large_locked(Queue queue, const RecordShape& shape, std::size_t bytes,
                                        Tick now) {
  const std::uint32_t size = parts_.arena.segment_bytes();
  const auto segments = static_cast<std::uint32_t>((bytes + size - 1) / size);
  if (!make_room_locked(segments, now)) return {};
  const std::uint32_t head = start_segment_locked(queue, ttl_class_of(shape.expiry, now), now);
  std::uint32_t last = head;
  for (std::uint32_t i = 1; i < segments; ++i) {
    const std::uint32_t more = start_segment_locked(queue, 0, now);
    parts_.arena.meta(more).state.store(SegmentState::Continuation, std::memory_order_relaxed);
    parts_.arena.meta(last).next = more;
    last = more;
  }
  const Reservation reservation = write_header_locked(head, 0, shape, bytes, now);
  SegmentMeta& row = parts_.arena.meta(head);
  row.large = 1;
  row.used.store(size, std::memory_order_release);
  row.sequence = next_sequence_++;
  row.state.store(SegmentState::Sealed, std::memory_order_release);
  queues_[static_cast<std::size_t>(queue)].push_back(head);
  return reservation;
}

// The open segment that takes a record of this class; a new one when there is none with room.
Domain::Open* Domain::open_for_locked(Queue queue, const RecordShape& shape, Tick now,
                                      bool evicting) {
  const auto q = static_cast<std::size_t>(queue);
  const std::uint8_t ttl_class = ttl_class_of(shape.expiry, now);
  const std::size_t bytes = RecordHeader::bytes_for(shape.key_bytes, shape.value_bytes);
  // Few open segments in a small domain: a class of its own is worth less than the room.
  const std::size_t allowed = std::clamp<std::size_t>(budget_segments() / 16, 1, kMaxOpen);
  for (unsigned tries = 0;; ++tries) {
    std::vector<Open>& open = open_[q];
    std::size_t best = open.size();
    for (std::size_t i = 0; i < open.size(); ++i) {
      if (best == open.size() || class_distance(open[i].ttl_class, ttl_class) <
                                     class_distance(open[best].ttl_class, ttl_class)) {
        best = i;
      }
    }
    const bool exact = best < open.size() && open[best].ttl_class == ttl_class;
    if (best < open.size() && (exact || open.size() >= allowed)) {
      if (takes(open[best].segment, shape, bytes)) return &open[best];
      seal_locked(queue, best);
    }
    if (evicting) {
      // One segment above the budget at most: rather put up with another class.
      if (used_segments_ > budget_segments()) {
        for (Open& other : open) {
          if (takes(other.segment, shape, bytes)) return &other;
        }
        return nullptr;
      }
    } else if (!make_room_locked(1, now)) {
      return nullptr;
    }
    // Making room may have opened a segment of this class for what was kept: look again.
    if (!evicting && tries == 0) {
      bool opened = false;
      for (const Open& other : open) opened |= other.ttl_class == ttl_class;
      if (opened || open.size() >= allowed) continue;
    }
    open.push_back({start_segment_locked(queue, ttl_class, now), ttl_class});
    return &open.back();
  }
}

bool Domain::takes(std::uint32_t segment, const RecordShape& shape,
                   std::size_t bytes) const noexcept {
  return parts_.arena.meta(segment).used + bytes <= parts_.arena.segment_bytes() &&
         !parts_.moved.wants_new(parts_.arena.stamp_of(segment), shape.high);
}

bool Domain::make_room_locked(std::uint32_t segments, Tick now) {
  settle_first_fill_locked();
  if (segments + 1 > budget_segments()) return false;  // one more stays for what is kept
  for (unsigned tries = 0; used_segments_ + segments > budget_segments(); ++tries) {
    set_filled_once(true);
    if (!evict_one_locked(now, tries < kPatience ? Purpose::Judge : Purpose::Drop)) return false;
    if (tries == kPatience) dropped_kept_.add();
  }
  return true;
}

// Until the domain is full for the first time nothing needs to prove itself: what outgrows the
// small queue becomes the oldest of the main queue as it is.
void Domain::settle_first_fill_locked() {
  if (row_.filled_once.load(std::memory_order_relaxed) != 0) return;
  auto& small = queues_[static_cast<std::size_t>(Queue::Small)];
  while (!small.empty() && policy_->victim(sizes_locked()) == Queue::Small) {
    const std::uint32_t oldest = small.front();
    small.pop_front();
    relabel_locked(oldest, Queue::Main);
    queues_[static_cast<std::size_t>(Queue::Main)].push_back(oldest);
  }
}

// Counts a segment, and those that a large record goes on in, to another queue.
void Domain::relabel_locked(std::uint32_t segment, Queue queue) {
  for (; segment != SegmentMeta::kNoSegment; segment = parts_.arena.meta(segment).next) {
    SegmentMeta& row = parts_.arena.meta(segment);
    --segments_in_[row.queue];
    row.queue = static_cast<std::uint8_t>(queue);
    ++segments_in_[row.queue];
  }
}

std::uint32_t Domain::start_segment_locked(Queue queue, std::uint8_t ttl_class, Tick now) {
  const std::uint32_t segment = parts_.arena.allocate(parts_.epochs);
  SegmentMeta& row = parts_.arena.meta(segment);
  FC_DCHECK(row.writers.load(std::memory_order_relaxed) == 0);
  row.queue = static_cast<std::uint8_t>(queue);
  row.ttl_class = ttl_class;
  row.large = 0;
  row.used.store(0, std::memory_order_relaxed);
  row.next = SegmentMeta::kNoSegment;
  row.opened = now;
  row.last_expiry = 0;
  row.due = SegmentMeta::kForever;
  row.live_bytes.store(0, std::memory_order_relaxed);
  parts_.arena.set_domain(segment, index_, row_number_);
  parts_.arena.set_stamp(segment, parts_.moved.now());
  row.state.store(SegmentState::Open, std::memory_order_release);
  ++segments_in_[static_cast<std::size_t>(queue)];
  used_shown_.store(++used_segments_, std::memory_order_relaxed);
  return segment;
}

void Domain::seal_locked(Queue queue, std::size_t open_place) {
  const auto q = static_cast<std::size_t>(queue);
  const std::uint32_t segment = open_[q][open_place].segment;
  open_[q].erase(open_[q].begin() + static_cast<std::ptrdiff_t>(open_place));
  SegmentMeta& row = parts_.arena.meta(segment);
  row.sequence = next_sequence_++;
  row.state.store(SegmentState::Sealed, std::memory_order_seq_cst);
  queues_[q].push_back(segment);
  // Records may have died before it was sealed, unseen by forget().
  if (row.live_bytes.load(std::memory_order_seq_cst) == 0) {
    dead_segments_.fetch_add(1, std::memory_order_relaxed);
  }
}

bool Domain::seal_any_locked() {
  for (const Queue queue : {Queue::Main, Queue::Small}) {
    if (!open_[static_cast<std::size_t>(queue)].empty()) {
      seal_locked(queue, 0);
      return true;
    }
  }
  return false;
}

// ---- giving segments back
// ------------------------------------------------------------------------

void Domain::release_locked(std::uint32_t segment) {
  for (std::uint32_t next = segment; next != SegmentMeta::kNoSegment;) {
    SegmentMeta& row = parts_.arena.meta(next);
    const std::uint32_t following = row.next;
    --segments_in_[row.queue];
    used_shown_.store(--used_segments_, std::memory_order_relaxed);
    parts_.arena.retire(next, parts_.epochs);
    next = following;
  }
}

// Sealed segments whose last record died give their memory back without a walk.
void Domain::release_dead_locked() {
  if (dead_segments_.load(std::memory_order_relaxed) == 0) return;
  dead_segments_.store(0, std::memory_order_relaxed);
  for (auto& sealed : queues_) {
    std::erase_if(sealed, [&](std::uint32_t segment) {
      const SegmentMeta& row = parts_.arena.meta(segment);
      if (row.writers.load(std::memory_order_acquire) != 0 ||
          row.live_bytes.load(std::memory_order_acquire) != 0) {
        return false;
      }
      release_locked(segment);
      return true;
    });
  }
}

// ---- time and operators
// --------------------------------------------------------------------------

void Domain::maintain(Tick now) {
  const std::lock_guard lock(mutex_);
  release_dead_locked();
  for (const Queue queue : {Queue::Small, Queue::Main}) {
    auto& open = open_[static_cast<std::size_t>(queue)];
    for (std::size_t i = open.size(); i-- > 0;) {
      const SegmentMeta& row = parts_.arena.meta(open[i].segment);
      if (row.due <= now) {
        seal_locked(queue, i);
        continue;
      }
      if (open[i].ttl_class == kForeverClass || row.used == 0) continue;
      if (now - row.opened >= std::max<Tick>(1, shortest_ttl_of(open[i].ttl_class) / 4)) {
        seal_locked(queue, i);
      }
    }
    auto& sealed = queues_[static_cast<std::size_t>(queue)];
    std::vector<std::uint32_t> due;
    std::erase_if(sealed, [&](std::uint32_t segment) {
      const SegmentMeta& row = parts_.arena.meta(segment);
      if (row.due > now && row.last_expiry > now) return false;
      due.push_back(segment);
      return true;
    });
    // What has expired goes; what was put beside it for want of a segment of its class moves on.
    for (const std::uint32_t segment : due) empty_locked(segment, now, Purpose::Compact);
  }
}

std::uint64_t Domain::flush(Tick now) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t before = entries();
  while (evict_one_locked(now, Purpose::Drop)) {
  }
  policy_->clear();
  set_filled_once(false);
  return before - std::min(before, entries());
}

void Domain::resize(std::uint32_t segments, std::uint64_t entry_budget, Tick now) {
  budget_segments_.store(segments, std::memory_order_relaxed);
  entry_budget_.store(entry_budget, std::memory_order_relaxed);
  for (unsigned tries = 0;; ++tries) {
    const std::lock_guard lock(mutex_);
    release_dead_locked();
    if (used_segments_ <= segments) return;
    // Judged, so that what was hit survives a shrink; dropped when that gains nothing.
    const std::uint32_t before = used_segments_;
    if (!evict_one_locked(now, tries % 4 != 3 ? Purpose::Judge : Purpose::Drop)) return;
    if (used_segments_ < before) tries = 0;
  }
}

void Domain::visit(CounterVisitor& visitor) const {
  const Label labels[] = {{"namespace", ns_.name}, {"domain", config_.name}};
  visitor.counter("feature_cache_domain_hits_total", "Keys answered from this domain.", labels,
                  hits.get());
  visitor.counter("feature_cache_domain_evictions_total", "Items evicted to make room.", labels,
                  evictions_.get());
  visitor.counter("feature_cache_domain_expirations_total",
                  "Expired items whose memory was taken back.", labels, expirations_.get());
  visitor.counter(
      "feature_cache_domain_hidden_total",
      "Items of keys that had moved away since, dropped when their segment was emptied.", labels,
      hidden_.get());
  visitor.counter("feature_cache_domain_kept_total",
                  "Items that the policy kept when their segment was emptied.", labels,
                  kept_.get());
  visitor.counter("feature_cache_domain_segments_emptied_total",
                  "Segments emptied by eviction, compaction or expiry.", labels,
                  segments_emptied_.get());
  visitor.counter("feature_cache_domain_patience_exhausted_total",
                  "Times a policy kept so much that a segment was dropped whole.", labels,
                  dropped_kept_.get());
  visitor.counter("feature_cache_domain_segments_swept_total",
                  "Segments whose records were damaged: their entries were looked for one by one.",
                  labels, swept_.get());
  visitor.gauge("feature_cache_domain_items", "Items in the index.", labels,
                static_cast<double>(entries()));
  visitor.gauge("feature_cache_domain_budget_bytes", "Byte budget.", labels,
                static_cast<double>(budget_bytes()));
  visitor.gauge("feature_cache_domain_used_bytes", "Bytes of the segments in use.", labels,
                static_cast<double>(used_bytes()));
  visitor.gauge("feature_cache_domain_live_bytes", "Bytes of indexed records, headers included.",
                labels, static_cast<double>(live_bytes_.get()));
  visitor.gauge("feature_cache_domain_payload_bytes", "Bytes of indexed keys and values.", labels,
                static_cast<double>(payload_bytes_.get()));
  visitor.gauge("feature_cache_domain_entry_budget", "Index slots this domain may fill.", labels,
                static_cast<double>(entry_budget_.load(std::memory_order_relaxed)));
  visitor.gauge("feature_cache_domain_policy_bytes", "Memory of the policy's ghosts and sketches.",
                labels, static_cast<double>(policy_->memory_bytes()));
  visitor.gauge("feature_cache_domain_ttl_seconds", "Time to live; 0: none.", labels,
                static_cast<double>(config_.ttl_ms) / 1000.0);
}

}  // namespace fc
