#include "nvm/read_queue.hpp"

#include <algorithm>
#include <new>

#include "core/clock.hpp"
#include "core/sequence_point.hpp"

namespace fc::nvm {
namespace {

constexpr std::size_t kCoalescedMost = std::size_t{128} << 10;
constexpr std::size_t kKeptBuffer = std::size_t{16} << 10;  // a free read keeps no larger one
constexpr std::uint64_t kLateCheckNs = 400'000;
constexpr std::uint64_t kIdleWaitNs = 1'000'000'000;
constexpr std::uint64_t kLateBeforeKnown = 20'000'000;  // while a quantile is not known yet
constexpr std::size_t kEndedAtOnce = 256;

constexpr std::uint32_t down(std::uint32_t bytes) noexcept {
  return bytes / kBlockBytes * kBlockBytes;
}
constexpr std::uint32_t up(std::uint32_t bytes) noexcept {
  return down(bytes + kBlockBytes - 1);
}

}  // namespace

ReadQueue::ReadQueue(Regions& regions, std::size_t device, const NvmConfig& config,
                     std::vector<LateRule> rules, ReadCounters& counters)
    : regions_(regions),
      part_(*regions.devices()[device]),
      config_(config),
      rules_(std::move(rules)),
      may_be_late_(std::any_of(rules_.begin(), rules_.end(),
                               [](const LateRule& rule) { return rule.enabled; })),
      counters_(counters),
      queue_(part_.device->make_queue(config.queue_depth)),
      thread_([this] { run(); }) {}

void ReadQueue::stop() {
  stop_.store(true, std::memory_order_release);
  queue_->wake();
  if (thread_.joinable()) thread_.join();
}

// Answers cells without a read, in the caller's thread.
void ReadQueue::end_now(std::span<const NvmCell> cells, ReadWaiter& waiter, ReadOutcome outcome) {
  std::vector<ReadResult> results;
  results.reserve(cells.size());
  for (const NvmCell& cell : cells) {
    regions_.at(regions_.region_of(Entry(cell.entry))).pins.fetch_sub(1, std::memory_order_release);
    results.push_back({cell, outcome, {}, 0});
  }
  waiter.done(results);
}

void ReadQueue::read(std::vector<NvmCell> cells, std::shared_ptr<ReadWaiter> waiter) {
  auto batch = std::make_unique<Batch>();
  const std::uint64_t queued = counters_.queued.fetch_add(cells.size(), std::memory_order_relaxed);
  if (queued + cells.size() > config_.queued_reads) {
    // What does not fit is refused at once; the rest keeps its place.
    const std::size_t room =
        queued < config_.queued_reads ? static_cast<std::size_t>(config_.queued_reads - queued) : 0;
    const std::vector<NvmCell> refused(cells.begin() + static_cast<std::ptrdiff_t>(room),
                                       cells.end());
    cells.resize(room);
    counters_.queued.fetch_sub(refused.size(), std::memory_order_relaxed);
    counters_.refused.add(refused.size());
    end_now(refused, *waiter, ReadOutcome::Refused);
    if (cells.empty()) return;
  }
  std::sort(cells.begin(), cells.end(), [](const NvmCell& a, const NvmCell& b) {
    return Entry(a.entry).nvm_location() < Entry(b.entry).nvm_location();
  });
  batch->waiter = std::move(waiter);
  batch->cells = std::move(cells);
  batch->came_ns = monotonic_ns();
  {
    const std::lock_guard lock(inbox_mutex_);
    if (!closed_) {
      inbox_.push_back(std::move(batch));
      queue_->wake();
      return;
    }
  }
  counters_.queued.fetch_sub(batch->cells.size(), std::memory_order_relaxed);
  end_now(batch->cells, *batch->waiter, ReadOutcome::Abandoned);
}

void ReadQueue::run() {
  std::vector<IoRequest*> ended(kEndedAtOnce);
  for (;;) {
    take_inbox();
    if (stop_.load(std::memory_order_acquire)) break;
    fill();
    deliver();
    const bool watch = may_be_late_ && !under_way_.empty();
    const std::size_t before = under_way_.size();
    const std::size_t count = queue_->wait(ended, watch ? kLateCheckNs : kIdleWaitNs);
    const std::uint64_t now = monotonic_ns();
    if (count != 0) service_.completed(count, before, now);
    for (std::size_t i = 0; i < count; ++i) handle(*static_cast<Read*>(ended[i]->owner), now);
    // The device gets its next reads before the answers are carried away.
    take_inbox();
    fill();
    deliver();
    if (watch && now >= next_late_check_ns_) {
      name_late(now);
      next_late_check_ns_ = now + kLateCheckNs / 2;
    }
  }
  end_all();
}

void ReadQueue::take_inbox() {
  std::vector<std::unique_ptr<Batch>> came;
  {
    const std::lock_guard lock(inbox_mutex_);
    came.swap(inbox_);
  }
  for (auto& batch : came) {
    turns_.push_back(batch.get());
    batches_.emplace(batch.get(), std::move(batch));
  }
}

// ---- starting reads
// ------------------------------------------------------------------------------

// Lets batches take turns while the device has room.
void ReadQueue::fill() {
  while (!turns_.empty() && under_way_.size() < config_.queue_depth) {
    Batch& batch = *turns_.front();
    if (!take_turn(batch)) break;
    turns_.pop_front();
    if (batch.next < batch.cells.size()) turns_.push_back(&batch);
  }
  if (starting_.empty()) return;
  counters_.in_flight.fetch_add(starting_.size(), std::memory_order_relaxed);
  queue_->submit(starting_);
  starting_.clear();
}

// One read, or records that need none; false when there is no memory for it by now.
bool ReadQueue::take_turn(Batch& batch) {
  const auto take = [&](std::size_t count) {
    batch.next += count;
    counters_.queued.fetch_sub(count, std::memory_order_relaxed);
  };
  if (!part_.health.in_service() || !batch.waiter->wanted()) {
    const bool out = !part_.health.in_service();
    const std::size_t left = batch.cells.size() - batch.next;
    if (!out) counters_.abandoned.add(left);
    for (std::size_t i = batch.next; i < batch.cells.size(); ++i) {
      result(batch, batch.cells[i], out ? ReadOutcome::OutOfService : ReadOutcome::Abandoned);
    }
    take(left);
    return true;
  }
  const NvmCell& first = batch.cells[batch.next];
  const Entry entry(first.entry);
  if (const auto found = by_place_.find(entry.nvm_location()); found != by_place_.end()) {
    Read& read = *found->second;
    // A wider read of the same place covers every entry that points there.
    read.targets.push_back({first, &batch});
    read.may_be_late |= rules_[first.ns].enabled;
    counters_.shared.add();
    take(1);
    return true;
  }
  const std::uint32_t region = regions_.region_of(entry);
  const std::uint32_t size = regions_.region_bytes();
  const auto end_of = [&](Entry of) {
    return std::min(size,
                    up(regions_.offset_in_region(of) + static_cast<std::uint32_t>(of.nvm_bytes())));
  };
  const std::uint32_t begin = down(regions_.offset_in_region(entry));
  std::uint32_t end = end_of(entry);
  std::size_t count = 1;
  for (; batch.next + count < batch.cells.size(); ++count) {
    const Entry next(batch.cells[batch.next + count].entry);
    if (regions_.region_of(next) != region) break;
    if (regions_.offset_in_region(next) > end + config_.coalesce_gap_bytes) break;
    const std::uint32_t wider = std::max(end, end_of(next));
    if (wider - begin > kCoalescedMost && wider != end) break;
    if (by_place_.contains(next.nvm_location()) && next.nvm_location() != entry.nvm_location()) {
      break;  // it is being read already: its own turn finds that
    }
    end = wider;
  }
  if (!fits(end - begin)) return false;
  start(batch, count, begin, end);
  take(count);
  return true;
}

bool ReadQueue::fits(std::size_t bytes) {
  // Buffers that nothing uses give way to those that are wanted.
  for (auto& read : free_reads_) {
    if (memory_bytes_ + bytes <= config_.read_memory_bytes) return true;
    drop_buffer(*read);
  }
  return under_way_.empty() || memory_bytes_ + bytes <= config_.read_memory_bytes;
}

void ReadQueue::drop_buffer(Read& read) {
  memory_bytes_ -= read.capacity;
  read.capacity = 0;
  read.data.reset();
}

void ReadQueue::start(Batch& batch, std::size_t count, std::uint32_t begin, std::uint32_t end) {
  Read& read = take_read(end - begin);
  const NvmCell* cells = &batch.cells[batch.next];
  read.region = regions_.region_of(Entry(cells[0].entry));
  read.begin = begin;
  read.may_be_late = false;
  for (std::size_t i = 0; i < count; ++i) {
    read.targets.push_back({cells[i], &batch});
    read.may_be_late |= rules_[cells[i].ns].enabled;
    by_place_.emplace(Entry(cells[i].entry).nvm_location(), &read);
  }
  counters_.coalesced.add(count - 1);
  read.request.kind = IoRequest::Kind::Read;
  read.request.offset = regions_.offset_of(read.region) + begin;
  read.request.data = read.data.get();
  read.request.bytes = end - begin;
  read.request.owner = &read;
  read.submitted_ns = monotonic_ns();
  read.expected_queue_ns = (under_way_.size() - 1) * service_.ns();
  counters_.queue_seconds.record_ns(read.submitted_ns - batch.came_ns);
  starting_.push_back(&read.request);
}

ReadQueue::Read& ReadQueue::take_read(std::size_t bytes) {
  std::unique_ptr<Read> read;
  if (free_reads_.empty()) {
    read = std::make_unique<Read>();
  } else {
    read = std::move(free_reads_.back());
    free_reads_.pop_back();
  }
  if (read->capacity < bytes) {
    drop_buffer(*read);
    read->data.reset(static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes)));
    if (read->data == nullptr) throw std::bad_alloc();
    read->capacity = bytes;
    memory_bytes_ += bytes;
  }
  read->place = under_way_.size();
  under_way_.push_back(std::move(read));
  return *under_way_.back();
}

// Its buffer is needed until its answers are delivered.
void ReadQueue::set_aside(Read& read) {
  const std::size_t place = read.place;
  std::swap(under_way_[place], under_way_.back());
  under_way_[place]->place = place;
  ended_reads_.push_back(std::move(under_way_.back()));
  under_way_.pop_back();
}

// ---- ending reads
// --------------------------------------------------------------------------------

void ReadQueue::handle(Read& read, std::uint64_t now_ns) {
  const std::uint64_t took = now_ns - read.submitted_ns;
  counters_.read_seconds.record_ns(took);
  latencies_.record(took > read.expected_queue_ns ? took - read.expected_queue_ns : 0);
  part_.health.reads.add();
  if (read.request.ok()) {
    part_.health.read_bytes.add(read.request.bytes);
    part_.health.good();
  } else {
    part_.health.read_errors.add();
    (void)part_.health.bad();
  }
  for (const Target& target : read.targets)
    by_place_.erase(Entry(target.cell.entry).nvm_location());
  for (const Target& target : read.targets) {
    if (read.request.ok()) {
      check(read, target);
    } else {
      result(*target.batch, target.cell, ReadOutcome::DeviceError);
    }
  }
  counters_.in_flight.fetch_sub(1, std::memory_order_relaxed);
  set_aside(read);
}

// Whether what was read is the record that the entry promised, and of the key that was asked.
void ReadQueue::check(const Read& read, const Target& target) {
  const Entry entry(target.cell.entry);
  const std::uint32_t offset = regions_.offset_in_region(entry) - read.begin;
  ReadResult& to = deliveries_.emplace_back(Delivery{target.batch, {}}).result;
  to.generation = regions_.at(read.region).generation.load(std::memory_order_relaxed);
  to.cell = target.cell;
  if (!read_record(read.data.get() + offset, read.request.bytes - offset, to.generation,
                   entry.nvm_location(), to.record)) {
    to.outcome = ReadOutcome::Damaged;
    counters_.checksum_errors.add();
    (void)part_.health.bad();
  } else if (to.record.key != target.cell.key) {
    to.outcome = ReadOutcome::OtherKey;
  } else {
    to.outcome = ReadOutcome::Hit;
  }
}

void ReadQueue::result(Batch& batch, const NvmCell& cell, ReadOutcome outcome) {
  deliveries_.push_back({&batch, {cell, outcome, {}, 0}});
}

// Tells every waiter what became of its cells, one call a batch, and takes their pins off.
void ReadQueue::deliver() {
  if (deliveries_.empty()) return;
  FC_SEQUENCE_POINT("nvm:read_ended");
  std::vector<Delivery> now;
  now.swap(deliveries_);
  std::stable_sort(now.begin(), now.end(),
                   [](const Delivery& a, const Delivery& b) { return a.batch < b.batch; });
  for (std::size_t begin = 0; begin < now.size();) {
    Batch& batch = *now[begin].batch;
    group_.clear();
    for (; begin < now.size() && now[begin].batch == &batch; ++begin) {
      group_.push_back(now[begin].result);
    }
    batch.waiter->done(group_);
    for (const ReadResult& ended : group_) {
      regions_.at(regions_.region_of(Entry(ended.cell.entry)))
          .pins.fetch_sub(1, std::memory_order_release);
    }
    // Every cell ends in a delivery, the last one ends its batch.
    batch.delivered += group_.size();
    if (batch.delivered == batch.cells.size()) batches_.erase(&batch);
  }
  for (auto& read : ended_reads_) {
    read->targets.clear();
    if (read->capacity > kKeptBuffer) drop_buffer(*read);
    free_reads_.push_back(std::move(read));
  }
  ended_reads_.clear();
}

// ---- lateness
// ------------------------------------------------------------------------------------

std::uint64_t ReadQueue::late_after(NamespaceIndex ns) const noexcept {
  const LateRule& rule = rules_[ns];
  return rule.after_ns != 0 ? rule.after_ns : latencies_.quantile(rule.quantile, kLateBeforeKnown);
}

void ReadQueue::name_late(std::uint64_t now_ns) {
  std::vector<std::pair<Batch*, NvmCell>> late;
  std::vector<std::uint64_t> after(rules_.size(), 0);
  for (const auto& read : under_way_) {
    if (!read->may_be_late) continue;
    // Reads were started since that time was taken: they have waited for nothing yet.
    const std::uint64_t waited = now_ns - std::min(now_ns, read->submitted_ns);
    bool open = false;
    for (Target& target : read->targets) {
      const NamespaceIndex ns = target.cell.ns;
      if (!rules_[ns].enabled || target.named_late) continue;
      if (after[ns] == 0) after[ns] = late_after(ns);
      if (waited > read->expected_queue_ns + after[ns]) {
        target.named_late = true;
        late.emplace_back(target.batch, target.cell);
      } else {
        open = true;
      }
    }
    read->may_be_late = open;
  }
  if (late.empty()) return;
  std::stable_sort(late.begin(), late.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<NvmCell> cells;
  for (std::size_t begin = 0; begin < late.size();) {
    Batch* batch = late[begin].first;
    cells.clear();
    for (; begin < late.size() && late[begin].first == batch; ++begin) {
      cells.push_back(late[begin].second);
    }
    batch->waiter->late(cells);
  }
}

// The end: nothing new is started, what is under way is waited for.
void ReadQueue::end_all() {
  {
    const std::lock_guard lock(inbox_mutex_);
    closed_ = true;
  }
  take_inbox();
  for (Batch* batch : turns_) {
    counters_.queued.fetch_sub(batch->cells.size() - batch->next, std::memory_order_relaxed);
    for (; batch->next < batch->cells.size(); ++batch->next) {
      result(*batch, batch->cells[batch->next], ReadOutcome::Abandoned);
    }
  }
  turns_.clear();
  deliver();
  std::vector<IoRequest*> ended(kEndedAtOnce);
  while (!under_way_.empty()) {
    const std::size_t count = queue_->wait(ended, kIdleWaitNs);
    for (std::size_t i = 0; i < count; ++i) {
      handle(*static_cast<Read*>(ended[i]->owner), monotonic_ns());
    }
    deliver();
  }
}

}  // namespace fc::nvm
