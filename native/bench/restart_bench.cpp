// The native half of `python -m benchmarks run restart`: what persistence costs while serving, and
// how fast the NVM tier is rebuilt. Prints one JSON object a round; medians are taken in Python.
//
//   fc_restart_bench METRIC... [--dir D] [--folder F] [--items N] [--data-mib N] [--seconds S]
//                    [--rounds R] [--huge-pages]

#include "restart_bench.hpp"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "feature_cache/engine.hpp"
#include "load.hpp"

namespace fc::bench {
namespace {

constexpr std::size_t kValueBytes = 200;
constexpr std::size_t kStream = 4'000'000;

EngineConfig config_for(std::uint64_t memory_bytes, std::uint64_t budget_bytes, bool huge_pages) {
  EngineConfig config;
  config.memory_bytes = memory_bytes;
  config.expected_item_bytes = kKeyBytes + kValueBytes;
  config.huge_pages = huge_pages;
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
EngineConfig config_for_items(std::uint64_t items, bool huge_pages, const PersistConfig& persist) {
  const std::uint64_t record = 12 + kKeyBytes + kValueBytes;
  for (std::uint64_t memory = items * (record + 11) + (3u << 20);; memory += 1u << 20) {
    EngineConfig config = config_for(memory, 1u << 30, huge_pages);
    config.persist = persist;
    const Geometry geometry = Geometry::plan(config);
    if (geometry.domain_bytes() / geometry.segment_bytes * (geometry.segment_bytes / record) >=
        items + geometry.segment_bytes / record * 2) {
      config.namespaces[0].domains[0].budget_bytes = geometry.domain_bytes();
      return config;
    }
  }
}

// Kilobytes of this process that lie on large pages, shared and not: what was got, not asked for.
struct LargePages {
  std::uint64_t shared_kib = 0;
  std::uint64_t private_kib = 0;

  static LargePages now() {
    LargePages found;
    std::ifstream file("/proc/self/smaps_rollup");
    for (std::string name; file >> name;) {
      if (name == "ShmemPmdMapped:") file >> found.shared_kib;
      if (name == "AnonHugePages:") file >> found.private_kib;
    }
    return found;
  }
};

class Side {
 public:
  explicit Side(const EngineConfig& config) : engine_(make_engine(config, clock_, true)) {}

  void put(std::uint64_t from, std::uint64_t count) {
    for (std::uint64_t id = from; id < from + count; id += kBatch) {
      const std::size_t n = std::min<std::uint64_t>(kBatch, from + count - id);
      for (std::size_t i = 0; i < n; ++i) {
        keys_[i] = key_of(id + i);
        items_[i].key = keys_[i].view();
        items_[i].value = value_;
      }
      engine_->put(0, std::span(items_).first(n), std::span(statuses_).first(n));
    }
    next_ = std::max(next_, from + count);
  }
  Rate get_rate(const std::vector<Key>& stream, double seconds) {
    return measure(stream, seconds, [&](const Key* keys) {
      for (std::size_t i = 0; i < kBatch; ++i) batch_.keys[i] = keys[i].view();
      GetColumn column = batch_.column();
      engine_->get(column);
      return batch_.count(CellStatus::HitDram);
    });
  }
  // New keys into a full cache: every one makes another go.
  double put_rate(double seconds) {
    const std::uint64_t start = monotonic_ns();
    const std::uint64_t first = next_;
    std::uint64_t elapsed = 0;
    while (static_cast<double>(elapsed) < seconds * 1e9) {
      put(next_, kBatch);
      elapsed = monotonic_ns() - start;
    }
    return static_cast<double>(next_ - first) * 1e9 / static_cast<double>(elapsed);
  }
  const StartReport& report() const { return engine_->start_report(); }

 private:
  BootClock clock_;
  std::unique_ptr<Engine> engine_;
  Batch batch_{kBatch};
  std::vector<Key> keys_{kBatch};
  std::vector<PutItem> items_{kBatch};
  std::vector<WriteStatus> statuses_{kBatch};
  const std::string value_ = std::string(kValueBytes, 'v');
  std::uint64_t next_ = 0;
};

void print(const char* metric, double value, double peer, const LargePages& large) {
  std::printf(
      "{\"metric\": \"%s\", \"value\": %.6g, \"peer_value\": %.6g, "
      "\"large_pages_mib\": %.6g, \"peer_large_pages_mib\": %.6g}\n",
      metric, value, peer, static_cast<double>(large.shared_kib) / 1024,
      static_cast<double>(large.private_kib) / 1024);
  std::fflush(stdout);
}

// Removes what a run leaves in shared memory.
class Files {
 public:
  Files(std::string dir, std::string name) : dir_(std::move(dir)), name_(std::move(name)) {
    remove();
  }
  ~Files() { remove(); }
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;

 private:
  void remove() const noexcept {
    std::error_code ignored;
    std::vector<std::filesystem::path> ours;
    for (const auto& entry : std::filesystem::directory_iterator(dir_, ignored)) {
      if (entry.path().filename().string().starts_with(name_)) ours.push_back(entry.path());
    }
    for (const auto& path : ours) std::filesystem::remove(path, ignored);
  }

  const std::string dir_;
  const std::string name_;
};

}  // namespace

void run_persist_cost(const RestartOptions& options) {
  const bool gets = options.wants("persist_cost");
  const bool puts = options.wants("persist_cost_put");
  if (!gets && !puts) return;
  PersistConfig persist;
  persist.dir = options.dir;
  persist.name = "fc-restart-bench-" + std::to_string(getpid());
  const Files files(persist.dir, persist.name);
  const EngineConfig with = config_for_items(options.items, options.huge_pages, persist);
  EngineConfig without = with;
  without.persist = {};
  without.namespaces[0].domains[0].budget_bytes =
      std::min(with.namespaces[0].domains[0].budget_bytes, Geometry::plan(without).domain_bytes());
  // Each fills its memory before the other takes any, so that neither gets the better pages.
  Side ours(with);
  ours.put(0, options.items);
  Side peer(without);
  peer.put(0, options.items);
  const LargePages large = LargePages::now();
  std::fprintf(stderr, "memory that outlives the process lies on %s\n",
               ours.report().pages.c_str());

  std::mt19937_64 rng(1);
  Zipf skewed(options.items, 0.99);
  std::vector<Key> stream(kStream);
  for (Key& key : stream) key = key_of(skewed(rng));
  // Who goes first changes with every round.
  const auto rounds = [&](const char* metric, auto&& rate) {
    rate(ours);
    rate(peer);
    for (unsigned round = 0; round < options.rounds; ++round) {
      double values[2];
      for (unsigned turn = 0; turn < 2; ++turn) {
        const bool mine = (round + turn) % 2 == 0;
        values[mine ? 0 : 1] = rate(mine ? ours : peer);
      }
      print(metric, values[0], values[1], large);
    }
  };
  if (gets) {
    rounds("persist_cost",
           [&](Side& side) { return side.get_rate(stream, options.seconds).per_second; });
  }
  if (puts) {
    rounds("persist_cost_put", [&](Side& side) { return side.put_rate(options.seconds); });
  }
}

}  // namespace fc::bench

int main(int argc, char** argv) {
  fc::bench::RestartOptions options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto next = [&]() -> const char* { return i + 1 < argc ? argv[++i] : "0"; };
    if (word == "--dir") {
      options.dir = next();
    } else if (word == "--folder") {
      options.folder = next();
    } else if (word == "--items") {
      options.items = std::strtoull(next(), nullptr, 10);
    } else if (word == "--data-mib") {
      options.data_mib = std::strtoull(next(), nullptr, 10);
    } else if (word == "--seconds") {
      options.seconds = std::strtod(next(), nullptr);
    } else if (word == "--rounds") {
      options.rounds = static_cast<unsigned>(std::strtoul(next(), nullptr, 10));
    } else if (word == "--huge-pages") {
      options.huge_pages = true;
    } else {
      options.metrics.push_back(word);
    }
  }
  try {
    fc::bench::run_persist_cost(options);
    fc::bench::run_nvm_rebuild(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fc_restart_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
