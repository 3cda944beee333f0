// The native half of `python -m benchmarks run engine` and `fanout`: raw rates of the engine and of
// a plain map, or of four instances and of one, alternating in one process. Prints one JSON object
// a round; medians are taken in Python.
//
//   fc_engine_bench METRIC [--items N] [--seconds S] [--rounds R]

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "feature_cache/engine.hpp"
#include "index/entry.hpp"
#include "load.hpp"
#include "plain_map.hpp"

namespace fc::bench {
namespace {

constexpr std::size_t kValueBytes = 200;
constexpr std::size_t kStream = 4'000'000;  // keys asked, drawn before the clock starts

struct Options {
  std::string metric;
  std::uint64_t items = 10'000'000;
  double seconds = 1.0;
  unsigned rounds = 5;
};

std::vector<Key> draw(std::uint64_t items, bool zipf, unsigned seed) {
  std::mt19937_64 rng(seed);
  Zipf skewed(items, 0.99);
  std::uniform_int_distribution<std::uint64_t> uniform(0, items - 1);
  std::vector<Key> keys(kStream);
  for (Key& key : keys) key = key_of(zipf ? skewed(rng) : uniform(rng));
  return keys;
}

EngineConfig config_for(std::uint64_t memory_bytes, std::uint64_t budget_bytes) {
  EngineConfig config;
  config.memory_bytes = memory_bytes;
  config.expected_item_bytes = kKeyBytes + kValueBytes;
  NamespaceConfig ns;
  ns.name = "bench";
  ns.default_domain = "all";
  DomainConfig domain;
  domain.name = "all";
  domain.budget_bytes = budget_bytes;
  ns.domains.push_back(domain);
  config.namespaces.push_back(ns);
  return config;
}

// Memory such that the domain holds `items` and not much more.
EngineConfig config_for_items(std::uint64_t items) {
  const std::uint64_t record = 12 + kKeyBytes + kValueBytes;
  std::uint64_t memory = items * (record + 11) + (3u << 20);
  for (;; memory += 1u << 20) {
    EngineConfig config = config_for(memory, 1u << 30);
    const Geometry geometry = Geometry::plan(config);
    if (geometry.domain_bytes() / geometry.segment_bytes * (geometry.segment_bytes / record) >=
        items + geometry.segment_bytes / record * 2) {
      return config_for(memory, geometry.domain_bytes());
    }
  }
}

class Ours {
 public:
  explicit Ours(const EngineConfig& config) : engine_(make_engine(config, clock_, true)) {}

  void fill(std::uint64_t from, std::uint64_t to) {
    const std::string value(kValueBytes, 'v');
    std::vector<Key> keys(kBatch);
    std::vector<PutItem> items(kBatch);
    std::vector<WriteStatus> statuses(kBatch);
    for (std::uint64_t id = from; id < to; id += kBatch) {
      const std::size_t n = std::min<std::uint64_t>(kBatch, to - id);
      for (std::size_t i = 0; i < n; ++i) {
        keys[i] = key_of(id + i);
        items[i].key = keys[i].view();
        items[i].value = value;
      }
      engine_->put(0, std::span(items).first(n), std::span(statuses).first(n));
    }
  }
  // Answers one batch; returns its hits.
  std::size_t get(Batch& batch) {
    GetColumn column = batch.column();
    engine_->get(column);
    return batch.count(CellStatus::HitDram);
  }
  Engine& engine() { return *engine_; }

 private:
  BootClock clock_;
  std::unique_ptr<Engine> engine_;
};

Rate measure_ours(Ours& ours, const std::vector<Key>& stream, double seconds) {
  Batch batch(kBatch);
  return measure(stream, seconds, [&](const Key* keys) {
    for (std::size_t i = 0; i < kBatch; ++i) batch.keys[i] = keys[i].view();
    return ours.get(batch);
  });
}

Rate measure_plain(PlainMap& plain, const std::vector<Key>& stream, double seconds) {
  std::vector<std::uint8_t> values(kBatch * kValueBytes);
  return measure(stream, seconds, [&](const Key* keys) {
    std::size_t hits = 0;
    for (std::size_t i = 0; i < kBatch; ++i) {
      hits += plain.get(keys[i].view(), values.data() + i * kValueBytes);
    }
    return hits;
  });
}

void print(const Options& options, double value, double peer, const char* extra = "") {
  std::printf("{\"metric\": \"%s\", \"value\": %.6g, \"peer_value\": %.6g%s}\n",
              options.metric.c_str(), value, peer, extra);
  std::fflush(stdout);
}

void fill_plain(PlainMap& plain, std::uint64_t items) {
  const std::string value(kValueBytes, 'v');
  for (std::uint64_t id = 0; id < items; ++id) plain.put(key_of(id).view(), value.data());
}

std::string hit_share(const Rate& rate) {
  return ", \"hit_share\": " + std::to_string(rate.hit_share);
}

void run_batch_get(const Options& options, bool zipf) {
  Ours ours(config_for_items(options.items));
  ours.fill(0, options.items);
  PlainMap plain(options.items, kValueBytes);
  fill_plain(plain, options.items);
  const std::vector<Key> stream = draw(options.items, zipf, 1);
  // To the steady state of a cache that is hit: frequencies have risen as far as they go.
  for (unsigned pass = 0; pass < Entry::kMaxFrequency; ++pass) {
    measure_ours(ours, stream, options.seconds / 2);
    measure_plain(plain, stream, options.seconds / 2);
  }
  for (unsigned round = 0; round < options.rounds; ++round) {
    const Rate mine = measure_ours(ours, stream, options.seconds);
    const Rate theirs = measure_plain(plain, stream, options.seconds);
    print(options, mine.per_second, theirs.per_second, hit_share(mine).c_str());
  }
}

// The rate of several threads, each with a stream of its own, counted over the same time.
double threads_rate(Ours& ours, const std::vector<std::vector<Key>>& streams, unsigned threads,
                    double seconds) {
  std::vector<std::thread> running;
  std::vector<double> rates(threads);
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([&, t] { rates[t] = measure_ours(ours, streams[t], seconds).per_second; });
  }
  for (std::thread& thread : running) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

void run_two_threads(const Options& options) {
  Ours ours(config_for_items(options.items));
  ours.fill(0, options.items);
  const std::vector<std::vector<Key>> streams = {draw(options.items, true, 1),
                                                 draw(options.items, true, 2)};
  threads_rate(ours, streams, 2, options.seconds / 2);
  for (unsigned round = 0; round < options.rounds; ++round) {
    const double one = threads_rate(ours, streams, 1, options.seconds);
    const double two = threads_rate(ours, streams, 2, options.seconds);
    print(options, two, one);
  }
}

// Two threads over the same keys; in the mixed case every tenth batch is a batch of puts.
void run_ten_percent_puts(const Options& options) {
  // Room for the overwritten records to lie about until their segments are compacted.
  Ours ours(config_for_items(options.items + options.items / 4));
  ours.fill(0, options.items);
  const std::vector<Key> stream = draw(options.items, true, 3);
  const std::string value(kValueBytes, 'w');
  std::vector<PutItem> items(kBatch);
  std::vector<WriteStatus> statuses(kBatch);
  Batch batch(kBatch);
  const auto mixed = [&](unsigned put_every) {
    unsigned turn = 0;
    return measure(stream, options.seconds, [&](const Key* keys) -> std::size_t {
      if (put_every != 0 && ++turn % put_every == 0) {
        for (std::size_t i = 0; i < kBatch; ++i) {
          items[i].key = keys[i].view();
          items[i].value = value;
        }
        ours.engine().put(0, items, statuses);
        return kBatch;
      }
      for (std::size_t i = 0; i < kBatch; ++i) batch.keys[i] = keys[i].view();
      return ours.get(batch);
    });
  };
  mixed(10);
  for (unsigned round = 0; round < options.rounds; ++round) {
    const Rate with_puts = mixed(10);
    const Rate read_only = mixed(0);
    print(options, with_puts.per_second, read_only.per_second, hit_share(with_puts).c_str());
  }
}

// The same memory over so many instances, all of what it leaves for values in the one domain.
EngineConfig over_instances(std::uint64_t memory_bytes, std::uint32_t instances) {
  EngineConfig config = config_for(memory_bytes, memory_bytes);
  config.instances = instances;
  // What is left depends a little on the budget, by the size of segments.
  for (unsigned round = 0; round < 4; ++round) {
    std::uint64_t least = memory_bytes;
    for (const EngineConfig& part : split_instances(config)) {
      least = std::min(least, Geometry::plan(part).domain_bytes());
    }
    config.namespaces[0].domains[0].budget_bytes =
        std::min(config.namespaces[0].domains[0].budget_bytes, least * instances);
  }
  return config;
}

// The time that this thread had a processor: what shares the machine takes turns with it.
std::uint64_t thread_ns() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(now.tv_nsec);
}

// Four instances beside one, over the same data in the same memory. They take turns of some batches
// each, so that whatever else goes on in the caches hits both; who begins changes with the round.
// `batch` works on one batch of an engine's turn.
void run_fan_out(const Options& options, const std::function<void(Ours&, std::size_t)>& batch) {
  constexpr std::size_t kTurn = 50;  // batches
  // Instances do not get exactly a quarter of the keys each.
  const std::uint64_t memory = config_for_items(options.items + options.items / 50).memory_bytes;
  Ours one(over_instances(memory, 1));
  Ours four(over_instances(memory, 4));
  for (Ours* ours : {&one, &four}) ours->fill(0, options.items);
  std::array<std::size_t, 2> next{};
  const auto turn = [&](bool of_four) {
    const std::uint64_t start = thread_ns();
    for (std::size_t i = 0; i < kTurn; ++i) batch(of_four ? four : one, next[of_four]++);
    return static_cast<double>(thread_ns() - start);
  };
  const auto measure_round = [&](bool four_first) {
    const std::uint64_t until = monotonic_ns() + static_cast<std::uint64_t>(options.seconds * 2e9);
    std::array<double, 2> spent_ns{};
    double turns = 0;
    for (; monotonic_ns() < until; ++turns) {
      for (const bool of_four : {four_first, !four_first}) spent_ns[of_four] += turn(of_four);
    }
    const double keys = turns * kTurn * kBatch * 1e9;
    return std::pair(keys / spent_ns[true], keys / spent_ns[false]);
  };
  // To the steady state of a cache that is hit: frequencies have risen as far as they go.
  for (unsigned pass = 0; pass < Entry::kMaxFrequency; ++pass) measure_round(false);
  for (unsigned round = 0; round < options.rounds; ++round) {
    const auto [of_four, of_one] = measure_round(round % 2 != 0);
    print(options, of_four, of_one);
  }
}

void run_fan_out_get(const Options& options, bool zipf) {
  const std::vector<Key> stream = draw(options.items, zipf, 5);
  Batch batch(kBatch);
  run_fan_out(options, [&](Ours& ours, std::size_t number) {
    const Key* keys = &stream[number % (kStream / kBatch) * kBatch];
    for (std::size_t i = 0; i < kBatch; ++i) batch.keys[i] = keys[i].view();
    if (ours.get(batch) < kBatch - kBatch / 100) std::abort();  // not the same data
  });
}

// New items into a full cache, evicting.
void run_fan_out_put(const Options& options) {
  run_fan_out(options, [&](Ours& ours, std::size_t number) {
    const std::uint64_t from = options.items + number * kBatch;
    ours.fill(from, from + kBatch);
  });
}

void run_put(const Options& options) {
  Ours ours(config_for_items(options.items));
  ours.fill(0, options.items);
  PlainMap plain(options.items, kValueBytes);
  fill_plain(plain, options.items);
  const std::string value(kValueBytes, 'w');
  const std::vector<Key> stream = draw(options.items, false, 4);
  std::uint64_t next = options.items;
  for (unsigned round = 0; round < options.rounds; ++round) {
    // Ours takes new keys into a full cache; the plain map cannot, so it overwrites.
    const std::uint64_t start = monotonic_ns();
    std::uint64_t done = 0;
    while (static_cast<double>(monotonic_ns() - start) < options.seconds * 1e9) {
      ours.fill(next, next + kBatch);
      next += kBatch;
      done += kBatch;
    }
    const double mine =
        static_cast<double>(done) * 1e9 / static_cast<double>(monotonic_ns() - start);
    const Rate theirs = measure(stream, options.seconds, [&](const Key* keys) {
      for (std::size_t i = 0; i < kBatch; ++i) plain.put(keys[i].view(), value.data());
      return kBatch;
    });
    print(options, mine, theirs.per_second);
  }
}

struct Gauges final : CounterVisitor {
  void counter(std::string_view, std::string_view, Labels, std::uint64_t) override {}
  void gauge(std::string_view name, std::string_view, Labels, double value) override {
    if (name == "feature_cache_memory_budget_bytes") memory = value;
    if (name == "feature_cache_domain_items") items = value;
    if (name == "feature_cache_domain_payload_bytes") payload = value;
  }
  void histogram(std::string_view, std::string_view, Labels, std::span<const double>,
                 std::span<const std::uint64_t>, double) override {}
  double memory = 0;
  double items = 0;
  double payload = 0;
};

std::uint64_t resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  unsigned long size = 0;
  unsigned long resident = 0;
  if (file == nullptr || std::fscanf(file, "%lu %lu", &size, &resident) != 2) resident = 0;
  if (file != nullptr) std::fclose(file);
  return std::uint64_t{resident} * 4096;
}

// The whole configured memory over what is in it, and what the process really took for it.
void run_overhead(const Options& options) {
  const std::uint64_t before = resident_bytes();
  Ours ours(config_for_items(options.items));
  ours.fill(0, options.items);
  const std::uint64_t after = resident_bytes();
  Gauges gauges;
  ours.engine().visit(gauges);
  const double overhead = (gauges.memory - gauges.payload) / gauges.items;
  const double resident = (static_cast<double>(after - before) - gauges.payload) / gauges.items;
  char extra[160];
  std::snprintf(extra, sizeof(extra), ", \"items\": %.0f, \"resident_overhead\": %.4g",
                gauges.items, resident);
  print(options, overhead, 0, extra);
}

void run_same_key(const Options& options, bool put) {
  constexpr unsigned kTimes = 10'000;
  for (const std::size_t bytes : {100u, 1024u, 10u << 10, 100u << 10}) {
    EngineConfig config = config_for(std::uint64_t{512} << 20, std::uint64_t{256} << 20);
    Ours ours(config);
    const std::string value(bytes, 'v');
    const std::string_view key = "feature:1234567";
    PutItem item;
    item.key = key;
    item.value = value;
    WriteStatus status{};
    Batch batch(1);
    batch.keys[0] = key;
    ours.engine().put(0, {&item, 1}, {&status, 1});
    for (unsigned round = 0; round < options.rounds; ++round) {
      const std::uint64_t start = monotonic_ns();
      for (unsigned i = 0; i < kTimes; ++i) {
        if (put) {
          ours.engine().put(0, {&item, 1}, {&status, 1});
        } else if (ours.get(batch) != 1) {
          std::abort();
        }
      }
      const double ns = static_cast<double>(monotonic_ns() - start) / kTimes;
      char extra[64];
      std::snprintf(extra, sizeof(extra), ", \"value_bytes\": %zu", bytes);
      print(options, ns, 0, extra);
    }
  }
}

int run(const Options& options) {
  const std::vector<std::pair<std::string, std::function<void()>>> metrics = {
      {"batch_get_zipf", [&] { run_batch_get(options, true); }},
      {"batch_get_uniform", [&] { run_batch_get(options, false); }},
      {"two_threads", [&] { run_two_threads(options); }},
      {"ten_percent_puts", [&] { run_ten_percent_puts(options); }},
      {"overhead_bytes_per_item", [&] { run_overhead(options); }},
      {"same_key_get_ns", [&] { run_same_key(options, false); }},
      {"same_key_put_ns", [&] { run_same_key(options, true); }},
      {"put", [&] { run_put(options); }},
      {"fanout_uniform", [&] { run_fan_out_get(options, false); }},
      {"fanout_zipf", [&] { run_fan_out_get(options, true); }},
      {"fanout_put", [&] { run_fan_out_put(options); }},
  };
  for (const auto& [name, body] : metrics) {
    if (name != options.metric) continue;
    body();
    return 0;
  }
  std::fprintf(stderr, "unknown metric %s\n", options.metric.c_str());
  return 2;
}

}  // namespace
}  // namespace fc::bench

int main(int argc, char** argv) {
  fc::bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto next = [&]() -> const char* { return i + 1 < argc ? argv[++i] : "0"; };
    if (word == "--items") {
      options.items = std::strtoull(next(), nullptr, 10);
    } else if (word == "--seconds") {
      options.seconds = std::strtod(next(), nullptr);
    } else if (word == "--rounds") {
      options.rounds = static_cast<unsigned>(std::strtoul(next(), nullptr, 10));
    } else {
      options.metric = word;
    }
  }
  return fc::bench::run(options);
}
