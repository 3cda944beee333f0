// What the parts of the NVM benchmark share: options, lines of figures, counters, a filled engine.
#pragma once

#include <cstdint>
#include <functional>
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

// An engine with one namespace in DRAM and on one file, which is removed at the end.
class NvmEngine {
 public:
  struct Setup {
    std::string path;
    std::uint64_t memory_bytes = 0;
    std::uint64_t nvm_bytes = 0;  // 0: DRAM alone
    std::uint32_t region_bytes = 0;
    std::size_t value_bytes = kValueBytes;
    PromotionKind promotion = PromotionKind::Never;
  };
  explicit NvmEngine(const Setup& setup);
  ~NvmEngine();
  NvmEngine(const NvmEngine&) = delete;
  NvmEngine& operator=(const NvmEngine&) = delete;

  Engine& engine() noexcept { return *engine_; }
  const Setup& setup() const noexcept { return setup_; }
  Counters counters() const { return Counters::of(*engine_); }
  // Puts the items of these ids, not faster than the device takes what they push out of DRAM.
  void fill(std::uint64_t from, std::uint64_t to);
  // Fills with ids from 0 until every region has been written and the oldest ones are used again;
  // stops when a region was just handed to the device. Returns the id after the last.
  std::uint64_t fill_up();
  // Keys of random ids below `ids` that are where `on_nvm` says.
  std::vector<Key> draw(std::uint64_t ids, std::size_t count, bool on_nvm, unsigned seed);

 private:
  void put(std::uint64_t from, std::uint64_t to);
  void wait_for_room();

  const Setup setup_;
  BootClock clock_;
  std::unique_ptr<Engine> engine_;
  const std::string value_;
};

// The config of a namespace `bench` that is given all the memory, and of its NVM tier.
EngineConfig nvm_engine_config(const NvmEngine::Setup& setup);
// Gives the domains of a config equal parts of what its memory leaves them.
void share_memory(EngineConfig& config);

// Bytes written for each byte of keys and values admitted, since the start.
void print_amplification(const std::string& metric, const Counters& counters);

// The parts; each measures those of its metrics that `options` asks for.
void run_on_full_tier(const Options& options);
void run_amplification_4_kib(const Options& options);

}  // namespace fc::bench
