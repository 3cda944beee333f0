// What the parts of the NVM benchmark share: options, lines of figures, counters, a filled engine.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/clock.hpp"
#include "feature_cache/engine.hpp"
#include "load.hpp"

namespace fc::bench {

inline constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
inline constexpr std::size_t kValueBytes = 284;  // with the key 300
inline constexpr std::uint32_t kQueueDepth = 128;

struct Options {
  std::string folder;             // for the files; on the disk that is measured
  std::uint64_t data_mib = 8192;  // of the large engine
  double seconds = 3.0;           // of a round
  unsigned rounds = 5;
  double outage_seconds = 30.0;  // of the brownout
  std::vector<std::string> metrics;

  bool wants(const std::string& metric) const;
};

// One line of JSON on stdout: a round of a metric. Values are told apart by name; `value` and
// `peer_value` are what the figure is made of.
void print_round(const std::string& metric,
                 std::initializer_list<std::pair<const char*, double>> values);
// One line on stderr, for who waits.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));

// All counters and gauges, by name; values of several labels under "name{value,...}" and, summed,
// under the name alone.
class Counters final : public CounterVisitor {
 public:
  template <class Source>
  static Counters of(const Source& source) {
    Counters counters;
    source.visit(counters);
    return counters;
  }
  void counter(std::string_view name, std::string_view, Labels labels,
               std::uint64_t value) override {
    add(name, labels, static_cast<double>(value));
  }
  void gauge(std::string_view name, std::string_view, Labels labels, double value) override {
    add(name, labels, value);
  }
  void histogram(std::string_view, std::string_view, Labels, std::span<const double>,
                 std::span<const std::uint64_t>, double) override {}

  // 0 when there is none of that name.
  double operator[](const std::string& name) const;
  double regions(const char* state) const;

 private:
  void add(std::string_view name, Labels labels, double value);
  std::map<std::string, double> values_;
};

// One namespace in DRAM and on one file.
struct TierSetup {
  std::string path;
  std::uint64_t memory_bytes = 0;
  std::uint64_t nvm_bytes = 0;  // 0: DRAM alone
  std::uint32_t region_bytes = 0;
  std::uint64_t read_memory_bytes = 16 * kMiB;
  std::size_t value_bytes = kValueBytes;
  PromotionKind promotion = PromotionKind::Never;
};

// The config of a namespace `bench` that is given all the memory, and of its NVM tier.
EngineConfig tier_config(const TierSetup& setup);

// Puts items into a tier and finds keys in it. Ids count from 0.
class Filler {
 public:
  Filler(Engine& engine, const TierSetup& setup);

  // Puts the items of these ids, not faster than the device takes what they push out of DRAM.
  void fill(std::uint64_t from, std::uint64_t to);
  // The same from `ids` down to 0: what lies deepest are the last ids.
  void fill_down(std::uint64_t ids);
  // Fills until every region has been written and the oldest ones are used again; stops when a
  // region was just handed to the device. Returns the id after the last.
  std::uint64_t fill_up();
  // Keys of random ids below `ids` that are on NVM, or in DRAM. Throws std::runtime_error when
  // there are too few.
  std::vector<Key> draw(std::uint64_t ids, std::size_t count, bool on_nvm, unsigned seed);

 private:
  std::uint64_t step() const noexcept;  // items put between two looks at the device
  void put(std::uint64_t from, std::uint64_t to);
  void wait_for_room();

  Engine& engine_;
  const TierSetup setup_;
  const std::string value_;
};

// An engine over its file, which is removed at the end.
class NvmEngine {
 public:
  explicit NvmEngine(const TierSetup& setup);
  ~NvmEngine();
  NvmEngine(const NvmEngine&) = delete;
  NvmEngine& operator=(const NvmEngine&) = delete;

  Engine& engine() noexcept { return *engine_; }
  Filler& filler() noexcept { return *filler_; }
  const TierSetup& setup() const noexcept { return setup_; }
  Counters counters() const { return Counters::of(*engine_); }

 private:
  const TierSetup setup_;
  BootClock clock_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Filler> filler_;
};

// Bytes written for each byte of keys and values admitted, since the start.
void print_amplification(const std::string& metric, const Counters& counters);

// The parts; each measures those of its metrics that `options` asks for.
void run_on_full_tier(const Options& options);
void run_amplification_4_kib(const Options& options);
void run_late_reads(const Options& options);
void run_hybrid(const Options& options);

}  // namespace fc::bench
