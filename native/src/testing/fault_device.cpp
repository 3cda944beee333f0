#include "testing/fault_device.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <set>
#include <unordered_map>

#include "core/check.hpp"
#include "core/clock.hpp"

namespace fc::testing {
namespace {

constexpr std::uint64_t kForever = std::numeric_limits<std::uint64_t>::max();
// What a short read leaves in the rest of the buffer: data that nobody may take for the file's.
constexpr int kPoison = 0xDB;

struct FreeBytes {
  void operator()(std::byte* bytes) const noexcept { std::free(bytes); }
};
using Blocks = std::unique_ptr<std::byte, FreeBytes>;

Blocks make_blocks(std::size_t bytes) {
  auto* blocks = static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes));
  if (blocks == nullptr) throw std::bad_alloc();
  return Blocks(blocks);
}

constexpr std::uint8_t bit(IoRequest::Kind kind) {
  return static_cast<std::uint8_t>(1U << static_cast<unsigned>(kind));
}

void flip(std::byte* data, const std::vector<std::uint64_t>& bits) {
  for (const std::uint64_t at : bits) data[at / 8] ^= std::byte{1} << (at % 8);
}

std::uint64_t at_quantile(const FaultRule::Quantiles& quantiles, double quantile) {
  std::pair<double, std::uint64_t> below = quantiles.front();
  for (const auto& above : quantiles) {
    if (quantile <= above.first) {
      const double width = above.first - below.first;
      const double part = width > 0 ? (quantile - below.first) / width : 1.0;
      const double rise = static_cast<double>(above.second) - static_cast<double>(below.second);
      return below.second + static_cast<std::uint64_t>(std::max(part, 0.0) * rise);
    }
    below = above;
  }
  return quantiles.back().second;
}

}  // namespace

FaultRule FaultRule::delay(std::uint64_t nanoseconds) {
  FaultRule rule;
  rule.action = Action::Delay;
  rule.delay_ns = nanoseconds;
  return rule;
}

FaultRule FaultRule::delay_quantiles(Quantiles quantiles) {
  FC_CHECK(!quantiles.empty() && std::is_sorted(quantiles.begin(), quantiles.end()));
  FC_CHECK(std::is_sorted(quantiles.begin(), quantiles.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; }));
  FaultRule rule;
  rule.action = Action::DelayQuantiles;
  rule.quantiles = std::move(quantiles);
  return rule;
}

FaultRule FaultRule::fail(int error) {
  FC_CHECK(error > 0);
  FaultRule rule;
  rule.action = Action::Fail;
  rule.error = error;
  return rule;
}

FaultRule FaultRule::short_transfer(std::uint32_t bytes) {
  FaultRule rule;
  rule.action = Action::Short;
  rule.bytes = bytes;
  return rule;
}

FaultRule FaultRule::stall() {
  FaultRule rule;
  rule.action = Action::Stall;
  return rule;
}

FaultRule FaultRule::corrupt(std::uint32_t bits) {
  FaultRule rule;
  rule.action = Action::Corrupt;
  rule.bits = bits;
  return rule;
}

FaultRule FaultRule::torn(std::uint32_t bytes, int error) {
  FaultRule rule;
  rule.action = Action::Torn;
  rule.bytes = bytes;
  rule.error = error;
  return rule;
}

FaultRule& FaultRule::reads() {
  kinds |= bit(IoRequest::Kind::Read);
  return *this;
}

FaultRule& FaultRule::writes() {
  kinds |= bit(IoRequest::Kind::Write);
  return *this;
}

FaultRule& FaultRule::syncs() {
  kinds |= bit(IoRequest::Kind::Sync);
  return *this;
}

FaultRule& FaultRule::range(std::uint64_t first, std::uint64_t bytes_there) {
  range_first = first;
  range_end = first + bytes_there;
  return *this;
}

FaultRule& FaultRule::rate(double of_requests) {
  share = of_requests;
  return *this;
}

FaultRule& FaultRule::times(std::uint64_t at_most) {
  most = at_most;
  return *this;
}

bool FaultRule::concerns(const IoRequest& request) const noexcept {
  if (kinds != 0 && (kinds & bit(request.kind)) == 0) return false;
  if (request.kind == IoRequest::Kind::Sync) {
    return action != Action::Short && action != Action::Corrupt && action != Action::Torn;
  }
  if (action == Action::Torn && request.kind != IoRequest::Kind::Write) return false;
  return request.offset < range_end && request.offset + request.bytes > range_first;
}

// Threads: as IoQueue. What a rule changes goes to the device as a request of the queue's own; what
// is to end later waits here, so no thread is needed for it.
class FaultQueue final : public IoQueue {
 public:
  FaultQueue(FaultDevice& device, std::uint32_t depth)
      : device_(device), inner_(device.device_->make_queue(depth)) {
    device_.enter(this);
  }
  // Waits for what the device works on; what a delay or a stall holds is dropped.
  ~FaultQueue() override { device_.leave(this); }
  FaultQueue(const FaultQueue&) = delete;
  FaultQueue& operator=(const FaultQueue&) = delete;

  void submit(std::span<IoRequest* const> requests) override {
    for (const IoRequest* request : requests) device_.count(*request);
    if (!device_.has_rules()) {
      inner_->submit(requests);
      return;
    }
    const std::uint64_t now = monotonic_ns();
    batch_.clear();
    for (IoRequest* request : requests) {
      const FaultDevice::Fate fate = device_.fate_of(*request);
      if (fate.none()) {
        batch_.push_back(request);
        continue;
      }
      auto plan = std::make_unique<Plan>();
      plan->outer = request;
      plan->inner = *request;
      plan->fate = fate;
      plan->due = now + fate.delay_ns;
      if (fate.stalled_by != 0) {
        stalled_.push_back(std::move(plan));
      } else {
        launch(std::move(plan));
      }
    }
    if (!batch_.empty()) inner_->submit(batch_);
  }

  std::size_t wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) override {
    FC_CHECK(!ended.empty());
    const std::uint64_t start = monotonic_ns();
    for (std::uint64_t now = start;;) {
      if (!stalled_.empty()) release_stalled();
      std::size_t count = take_due(ended, now);
      if (count < ended.size()) {
        const std::span<IoRequest*> room = ended.subspan(count);
        const std::size_t inner_ended =
            inner_->wait(room, count != 0 ? 0 : to_wait(now, start, timeout_ns));
        count += settle(room.first(inner_ended));
      }
      if (take_wake() || count != 0) return count;
      now = monotonic_ns();
      if (now - start >= timeout_ns) return take_due(ended, now);
    }
  }

  void wake() noexcept override {
    woken_.store(true, std::memory_order_release);
    inner_->wake();
  }

  // Ends the inner wait alone: the rules have changed.
  void rouse() noexcept { inner_->wake(); }

 private:
  struct Plan {
    IoRequest* outer = nullptr;
    IoRequest inner;
    FaultDevice::Fate fate;
    std::uint64_t due = 0;
    Blocks blocks;  // what is written instead of the caller's data
  };
  struct Held {
    std::uint64_t due = 0;
    IoRequest* request = nullptr;
    bool operator<(const Held& other) const noexcept { return due > other.due; }  // soonest first
  };

  bool take_wake() noexcept {
    return woken_.load(std::memory_order_relaxed) &&
           woken_.exchange(false, std::memory_order_acquire);
  }

  std::uint64_t to_wait(std::uint64_t now, std::uint64_t start, std::uint64_t timeout_ns) const {
    const std::uint64_t left = timeout_ns == kForever ? kForever : timeout_ns - (now - start);
    return held_.empty() ? left : std::min(left, held_.front().due - now);
  }

  void hold(IoRequest* request, std::uint64_t due) {
    held_.push_back({due, request});
    std::push_heap(held_.begin(), held_.end());
  }

  std::size_t take_due(std::span<IoRequest*> ended, std::uint64_t now) {
    std::size_t count = 0;
    while (count < ended.size() && !held_.empty() && held_.front().due <= now) {
      ended[count++] = held_.front().request;
      std::pop_heap(held_.begin(), held_.end());
      held_.pop_back();
    }
    return count;
  }

  void release_stalled() {
    batch_.clear();
    for (auto& plan : stalled_) {
      if (!device_.stalls(plan->fate.stalled_by)) launch(std::move(plan));
    }
    std::erase(stalled_, nullptr);
    if (!batch_.empty()) inner_->submit(batch_);
  }

  // Puts into batch_ what the device is to do for it, if anything.
  void launch(std::unique_ptr<Plan> plan) {
    const FaultDevice::Fate& fate = plan->fate;
    if (fate.altered && !alter(*plan)) {
      hold(plan->outer, plan->due);
      return;
    }
    IoRequest* inner = &plan->inner;
    plans_.emplace(inner, std::move(plan));
    batch_.push_back(inner);
  }

  // False: the device has nothing to do for it, and its result is set.
  bool alter(Plan& plan) {
    const FaultDevice::Fate& fate = plan.fate;
    const std::uint32_t bytes = plan.outer->bytes;
    const bool writes = plan.outer->kind == IoRequest::Kind::Write;
    if (fate.action == FaultRule::Action::Fail) {
      plan.outer->result = -std::int64_t{fate.error};
      return false;
    }
    if (!writes) return true;  // altered when it was read
    if (fate.action == FaultRule::Action::Corrupt) {
      plan.blocks = make_blocks(bytes);
      std::memcpy(plan.blocks.get(), plan.outer->data, bytes);
      flip(plan.blocks.get(), device_.random_bits(fate.bits, bytes));
    } else {
      const std::uint32_t kept = std::min(fate.bytes, bytes);
      if (kept == 0) {
        plan.outer->result = result_of_part(plan, 0);
        return false;
      }
      plan.inner.bytes = (kept + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
      plan.blocks = make_blocks(plan.inner.bytes);
      const std::uint32_t whole = kept / kBlockBytes * kBlockBytes;
      if (whole < kept) read_block(plan.inner.offset + whole, plan.blocks.get() + whole);
      std::memcpy(plan.blocks.get(), plan.outer->data, kept);
    }
    plan.inner.data = plan.blocks.get();
    return true;
  }

  // The old data of a block of which only the first part is written anew.
  void read_block(std::uint64_t offset, std::byte* data) {
    if (side_ == nullptr) side_ = device_.device_->make_queue(1);
    IoRequest read;
    read.offset = offset;
    read.data = data;
    read.bytes = kBlockBytes;
    if (run_request(*side_, read) != std::int64_t{kBlockBytes}) std::memset(data, 0, kBlockBytes);
  }

  // Of a short or torn write of which `kept` bytes reached the device.
  static std::int64_t result_of_part(const Plan& plan, std::uint32_t kept) {
    if (plan.fate.action == FaultRule::Action::Short) return kept;
    return plan.fate.error != 0 ? -std::int64_t{plan.fate.error} : plan.outer->bytes;
  }

  // Sorts what the device ended: the callers' own stay in `ended`, the rest becomes held.
  std::size_t settle(std::span<IoRequest*> ended) {
    if (plans_.empty()) return ended.size();
    std::size_t count = 0;
    for (IoRequest* request : ended) {
      const auto found = plans_.find(request);
      if (found == plans_.end()) {
        ended[count++] = request;
        continue;
      }
      Plan& plan = *found->second;
      plan.outer->result = plan.inner.result;
      if (plan.fate.altered && plan.inner.result > 0) finish(plan);
      hold(plan.outer, plan.due);
      plans_.erase(found);
    }
    return count;
  }

  void finish(Plan& plan) {
    IoRequest& outer = *plan.outer;
    const FaultDevice::Fate& fate = plan.fate;
    if (outer.kind == IoRequest::Kind::Write) {
      if (fate.action != FaultRule::Action::Corrupt && plan.inner.ok()) {
        outer.result = result_of_part(plan, std::min(fate.bytes, outer.bytes));
      }
    } else if (fate.action == FaultRule::Action::Corrupt) {
      flip(outer.data, device_.random_bits(fate.bits, static_cast<std::uint64_t>(outer.result)));
    } else if (fate.bytes < outer.result) {
      outer.result = fate.bytes;
      std::memset(outer.data + fate.bytes, kPoison, outer.bytes - fate.bytes);
    }
  }

  FaultDevice& device_;
  std::vector<std::unique_ptr<Plan>> stalled_;  // the device has not seen them
  std::unordered_map<const IoRequest*, std::unique_ptr<Plan>> plans_;  // the device works on them
  std::vector<Held> held_;                                             // a heap; ended, not yet due
  std::vector<IoRequest*> batch_;                                      // of one submission
  std::atomic<bool> woken_{false};  // by the caller's wake(), not by rouse()
  std::unique_ptr<IoQueue> side_;   // for read_block()
  std::unique_ptr<IoQueue> inner_;  // last: its end waits for requests in plans_
};

FaultDevice::FaultDevice(std::shared_ptr<NvmDevice> device, std::uint64_t seed)
    : device_(std::move(device)), random_(seed) {}

FaultDevice::RuleId FaultDevice::add(FaultRule rule) {
  const std::lock_guard lock(mutex_);
  const RuleId id = rules_.size() + 1;
  rules_.push_back({id, std::move(rule), 0, false});
  active_.fetch_add(1, std::memory_order_release);
  return id;
}

void FaultDevice::remove(RuleId id) {
  const std::lock_guard lock(mutex_);
  if (id == 0 || id > rules_.size() || rules_[id - 1].removed) return;
  rules_[id - 1].removed = true;
  active_.fetch_sub(1, std::memory_order_release);
  rouse_locked();
}

void FaultDevice::clear() {
  const std::lock_guard lock(mutex_);
  for (Rule& rule : rules_) rule.removed = true;
  active_.store(0, std::memory_order_release);
  rouse_locked();
}

void FaultDevice::rouse_locked() {
  for (FaultQueue* queue : queues_) queue->rouse();
}

std::uint64_t FaultDevice::hits(RuleId id) const {
  const std::lock_guard lock(mutex_);
  FC_CHECK(id != 0 && id <= rules_.size());
  return rules_[id - 1].hits;
}

bool FaultDevice::wait_hits(RuleId id, std::uint64_t hits) const {
  std::unique_lock lock(mutex_);
  FC_CHECK(id != 0 && id <= rules_.size());
  return changed_.wait_for(lock, kPatience, [&] { return rules_[id - 1].hits >= hits; });
}

FaultCounts FaultDevice::counts() const noexcept {
  FaultCounts counts;
  counts.reads = reads_.load(std::memory_order_relaxed);
  counts.writes = writes_.load(std::memory_order_relaxed);
  counts.syncs = syncs_.load(std::memory_order_relaxed);
  counts.read_bytes = read_bytes_.load(std::memory_order_relaxed);
  counts.written_bytes = written_bytes_.load(std::memory_order_relaxed);
  return counts;
}

void FaultDevice::count(const IoRequest& request) noexcept {
  switch (request.kind) {
    case IoRequest::Kind::Read:
      reads_.fetch_add(1, std::memory_order_relaxed);
      read_bytes_.fetch_add(request.bytes, std::memory_order_relaxed);
      break;
    case IoRequest::Kind::Write:
      writes_.fetch_add(1, std::memory_order_relaxed);
      written_bytes_.fetch_add(request.bytes, std::memory_order_relaxed);
      break;
    case IoRequest::Kind::Sync:
      syncs_.fetch_add(1, std::memory_order_relaxed);
      break;
  }
}

FaultDevice::Fate FaultDevice::fate_of(const IoRequest& request) {
  Fate fate;
  const std::lock_guard lock(mutex_);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  bool met = false;
  for (Rule& entry : rules_) {
    const FaultRule& rule = entry.rule;
    if (entry.removed || entry.hits >= rule.most || !rule.concerns(request)) continue;
    if (rule.share < 1.0 && uniform(random_) >= rule.share) continue;
    ++entry.hits;
    met = true;
    switch (rule.action) {
      case FaultRule::Action::Delay:
        fate.delay_ns = std::max(fate.delay_ns, rule.delay_ns);
        break;
      case FaultRule::Action::DelayQuantiles:
        fate.delay_ns = std::max(fate.delay_ns, at_quantile(rule.quantiles, uniform(random_)));
        break;
      case FaultRule::Action::Stall:
        if (fate.stalled_by == 0) fate.stalled_by = entry.id;
        break;
      default:
        if (fate.altered) break;
        fate.altered = true;
        fate.action = rule.action;
        fate.error = rule.error;
        fate.bytes = rule.bytes;
        fate.bits = rule.bits;
    }
  }
  if (met) changed_.notify_all();
  return fate;
}

bool FaultDevice::stalls(RuleId id) const {
  const std::lock_guard lock(mutex_);
  return !rules_[id - 1].removed;
}

std::vector<std::uint64_t> FaultDevice::random_bits(std::uint32_t bits, std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  std::uniform_int_distribution<std::uint64_t> any(0, bytes * 8 - 1);
  // Different ones: two flips of one bit would be none.
  std::set<std::uint64_t> chosen;
  while (chosen.size() < std::min<std::uint64_t>(bits, bytes * 8)) chosen.insert(any(random_));
  return {chosen.begin(), chosen.end()};
}

void FaultDevice::enter(FaultQueue* queue) {
  const std::lock_guard lock(mutex_);
  queues_.push_back(queue);
}

void FaultDevice::leave(FaultQueue* queue) {
  const std::lock_guard lock(mutex_);
  std::erase(queues_, queue);
}

std::unique_ptr<IoQueue> FaultDevice::make_queue(std::uint32_t depth) {
  return std::make_unique<FaultQueue>(*this, depth);
}

}  // namespace fc::testing
