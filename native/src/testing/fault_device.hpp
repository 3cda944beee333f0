// A device that fails in every way that devices do: late, not at all, with errors, with half of the
// data, with wrong data. Rules say which requests; they may be added and removed at any time.
//
// Without rules it hands requests through, so a benchmark may run on it as on the device itself.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "nvm/device.hpp"

namespace fc::testing {

// Where and how often a rule applies, and what it does. Built in words:
//   FaultRule::fail(EIO).reads().range(0, kBlockBytes).rate(0.1)
//
// A request may meet several rules: of their delays the longest counts, a stall counts in any case,
// and of the other actions that of the oldest rule.
struct FaultRule {
  enum class Action : std::uint8_t {
    Delay,           // ends no sooner than `delay_ns` after its submission
    DelayQuantiles,  // the same, drawn from `quantiles`
    Fail,            // ends with -error; the device never sees it
    Short,           // only `bytes` are moved, without an error
    Stall,           // the device does not see it until the rule is removed
    Corrupt,         // `bits` of the data read or written are flipped
    Torn,  // only the first `bytes` of a write reach the device; ends well, or with -error
  };
  // Quantile in 0..1 and delay, both rising; straight lines between, level outside.
  using Quantiles = std::vector<std::pair<double, std::uint64_t>>;

  static FaultRule delay(std::uint64_t nanoseconds);
  static FaultRule delay_quantiles(Quantiles quantiles);
  static FaultRule fail(int error);
  static FaultRule short_transfer(std::uint32_t bytes);
  static FaultRule stall();
  static FaultRule corrupt(std::uint32_t bits);
  static FaultRule torn(std::uint32_t bytes, int error = 0);

  // Which requests; all kinds unless one of these was called.
  FaultRule& reads();
  FaultRule& writes();
  FaultRule& syncs();
  // Those that touch these bytes. A sync touches all.
  FaultRule& range(std::uint64_t first, std::uint64_t bytes_there);
  FaultRule& rate(double of_requests);
  FaultRule& times(std::uint64_t at_most);  // then the rule rests

  bool concerns(const IoRequest& request) const noexcept;

  std::uint64_t range_first = 0;
  std::uint64_t range_end = std::numeric_limits<std::uint64_t>::max();
  double share = 1.0;
  std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t delay_ns = 0;
  Quantiles quantiles;
  int error = 0;
  std::uint32_t bytes = 0;
  std::uint32_t bits = 0;
  Action action = Action::Delay;
  std::uint8_t kinds = 0;  // bits by IoRequest::Kind; 0: all
};

// What went through so far, faults included.
struct FaultCounts {
  std::uint64_t reads = 0;
  std::uint64_t writes = 0;
  std::uint64_t syncs = 0;
  std::uint64_t read_bytes = 0;
  std::uint64_t written_bytes = 0;
};

class FaultQueue;

// Threads: any. Its queues are as those of any device, and it lives longer than they do.
class FaultDevice final : public NvmDevice {
 public:
  using RuleId = std::uint64_t;
  static constexpr std::chrono::seconds kPatience{30};

  explicit FaultDevice(std::shared_ptr<NvmDevice> device, std::uint64_t seed = 1);

  RuleId add(FaultRule rule);
  void remove(RuleId id);               // what it stalled goes on; unknown ids are ignored
  void clear();                         // removes all
  std::uint64_t hits(RuleId id) const;  // requests that the rule met; kept when it is removed
  // Waits until the rule met so many; false when that takes longer than kPatience.
  [[nodiscard]] bool wait_hits(RuleId id, std::uint64_t hits) const;
  FaultCounts counts() const noexcept;

  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override;
  const std::string& path() const noexcept override { return device_->path(); }
  std::uint64_t bytes() const noexcept override { return device_->bytes(); }
  const char* io() const noexcept override { return device_->io(); }
  bool direct() const noexcept override { return device_->direct(); }
  const std::string& fallback() const noexcept override { return device_->fallback(); }

 private:
  friend class FaultQueue;

  // What happens to one request.
  struct Fate {
    std::uint64_t delay_ns = 0;
    RuleId stalled_by = 0;  // 0: none
    bool altered = false;   // by `action`, never a delay or a stall
    FaultRule::Action action = FaultRule::Action::Fail;
    int error = 0;
    std::uint32_t bytes = 0;
    std::uint32_t bits = 0;
    bool none() const noexcept { return delay_ns == 0 && stalled_by == 0 && !altered; }
  };
  struct Rule {
    RuleId id = 0;
    FaultRule rule;
    std::uint64_t hits = 0;
    bool removed = false;
  };

  void count(const IoRequest& request) noexcept;
  bool has_rules() const noexcept { return active_.load(std::memory_order_acquire) != 0; }
  Fate fate_of(const IoRequest& request);
  bool stalls(RuleId id) const;
  std::vector<std::uint64_t> random_bits(std::uint32_t bits, std::uint64_t bytes);
  void enter(FaultQueue* queue);
  void leave(FaultQueue* queue);
  void rouse_locked();

  const std::shared_ptr<NvmDevice> device_;

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;  // a rule met a request
  std::vector<Rule> rules_;                  // guarded by mutex_; by id, from 1
  std::vector<FaultQueue*> queues_;          // guarded by mutex_
  std::mt19937_64 random_;                   // guarded by mutex_

  // Rules that are not removed: a queue that reads 0 looks no further. Written under mutex_.
  std::atomic<std::uint64_t> active_{0};
  // Relaxed: they order nothing.
  std::atomic<std::uint64_t> reads_{0};
  std::atomic<std::uint64_t> writes_{0};
  std::atomic<std::uint64_t> syncs_{0};
  std::atomic<std::uint64_t> read_bytes_{0};
  std::atomic<std::uint64_t> written_bytes_{0};
};

}  // namespace fc::testing
