// What the tier writes for what it admits, and what it brings: hits of the hybrid beside those of
// DRAM alone.

#include <algorithm>
#include <thread>

#include "nvm_bench.hpp"

namespace fc::bench {

void print_amplification(const std::string& metric, const Counters& counters) {
  const double admitted = counters["feature_cache_namespace_nvm_demoted_bytes_total"];
  print_round(metric,
              {{"value", counters["feature_cache_nvm_device_written_bytes_total"] / admitted},
               {"admitted_mib", admitted / kMiB},
               {"reinserted", counters["feature_cache_namespace_nvm_reinserted_total"]},
               {"not_admitted", counters["feature_cache_namespace_nvm_not_admitted_total"]}});
}

void run_amplification_4_kib(const Options& options) {
  const std::string metric = "write_amplification_4_kib";
  if (!options.wants(metric)) return;
  NvmEngine tier({.path = options.folder + "/large.nvm",
                  .memory_bytes = 256 * kMiB,
                  .nvm_bytes = options.data_mib / 4 * kMiB,
                  .value_bytes = 4096 - kKeyBytes});
  tier.filler().fill_up();
  print_amplification(metric, tier.counters());
}

// ---- the hybrid
// ----------------------------------------------------------------------------------

namespace {

constexpr std::uint64_t kNvmOverDram = 8;
constexpr std::uint64_t kKeysOverHybrid = 4;
constexpr double kSkew = 0.9;
constexpr unsigned kThreads = 2;
constexpr unsigned kPutEvery = 10;

// A reader that puts what it did not find, or overwrites now and then. Threads: one.
class Reader {
 public:
  struct Seen {
    std::uint64_t keys = 0;
    std::uint64_t dram = 0;
    std::uint64_t nvm = 0;
    std::uint64_t put = 0;

    void operator+=(const Seen& more) {
      keys += more.keys;
      dram += more.dram;
      nvm += more.nvm;
      put += more.put;
    }
    double hit_share() const { return static_cast<double>(dram + nvm) / static_cast<double>(keys); }
    double nvm_share() const { return static_cast<double>(nvm) / static_cast<double>(keys); }
  };

  Reader(Engine& engine, std::uint64_t ids, unsigned seed)
      : engine_(engine), zipf_(ids, kSkew), random_(seed) {}

  // A batch of keys by their popularity; what is missing is put.
  Seen read_through() {
    draw();
    GetColumn column = batch_.column();
    engine_.get(column);
    put([this](std::size_t i) { return !carries_value(batch_.statuses[i]); });
    return {kBatch, batch_.count(CellStatus::HitDram), batch_.count(CellStatus::HitNvm),
            items_.size()};
  }
  Seen read() {
    draw();
    GetColumn column = batch_.column();
    engine_.get(column);
    return {kBatch, batch_.count(CellStatus::HitDram), batch_.count(CellStatus::HitNvm), 0};
  }
  Seen overwrite() {
    draw();
    put([](std::size_t) { return true; });
    return {0, 0, 0, items_.size()};
  }

 private:
  void draw() {
    for (std::size_t i = 0; i < kBatch; ++i) {
      keys_[i] = key_of(zipf_(random_));
      batch_.keys[i] = keys_[i].view();
    }
  }
  template <class Chosen>
  void put(Chosen&& chosen) {
    items_.clear();
    for (std::size_t i = 0; i < kBatch; ++i) {
      if (!chosen(i)) continue;
      items_.emplace_back();
      items_.back().key = batch_.keys[i];
      items_.back().value = value_;
    }
    engine_.put(0, items_, std::span(written_).first(items_.size()));
  }

  Engine& engine_;
  Zipf zipf_;
  std::mt19937_64 random_;
  const std::string value_ = std::string(kValueBytes, 'v');
  std::vector<Key> keys_ = std::vector<Key>(kBatch);
  Batch batch_{kBatch};
  std::vector<PutItem> items_;
  std::vector<WriteStatus> written_ = std::vector<WriteStatus>(kBatch);
};

// Reads through until nothing changes any more, then measures; the same keys for whoever is asked.
Reader::Seen hit_ratio(NvmEngine& tier, std::uint64_t ids, std::uint64_t requests) {
  Reader reader(tier.engine(), ids, 11);
  for (std::uint64_t done = 0; done < requests; done += kBatch) reader.read_through();
  Reader::Seen seen;
  for (std::uint64_t done = 0; done < requests; done += kBatch) seen += reader.read_through();
  return seen;
}

void run_mixed(const Options& options, NvmEngine& tier, std::uint64_t ids) {
  for (unsigned round = 0; round < options.rounds; ++round) {
    std::vector<Reader::Seen> seen(kThreads);
    std::vector<std::thread> threads;
    const std::uint64_t start = monotonic_ns();
    const std::uint64_t end = start + static_cast<std::uint64_t>(options.seconds * 1e9);
    for (unsigned t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        Reader reader(tier.engine(), ids, 100 + round * kThreads + t);
        for (unsigned turn = 1; monotonic_ns() < end; ++turn) {
          seen[t] += turn % kPutEvery == 0 ? reader.overwrite() : reader.read();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    const double seconds = static_cast<double>(monotonic_ns() - start) * 1e-9;
    Reader::Seen all;
    for (const Reader::Seen& one : seen) all += one;
    print_round("mixed_10_percent_puts",
                {{"value", static_cast<double>(all.keys + all.put) / seconds},
                 {"hit_share", all.hit_share()},
                 {"nvm_share", all.nvm_share()}});
  }
}

}  // namespace

void run_hybrid(const Options& options) {
  const bool ratio = options.wants("hybrid_hit_ratio");
  const bool mixed = options.wants("mixed_10_percent_puts");
  if (!ratio && !mixed) return;
  const std::uint64_t nvm_bytes = std::max<std::uint64_t>(options.data_mib / 4, 256) * kMiB;
  const std::uint64_t memory_bytes = nvm_bytes / kNvmOverDram;
  const std::uint64_t held = nvm_bytes / (kKeyBytes + kValueBytes);
  const std::uint64_t ids =
      kKeysOverHybrid * (nvm_bytes + memory_bytes) / (kKeyBytes + kValueBytes);
  // Requests until every item that is worth it has been asked for, more or less.
  const std::uint64_t requests = held;
  NvmEngine hybrid({.path = options.folder + "/hybrid.nvm",
                    .memory_bytes = memory_bytes,
                    .nvm_bytes = nvm_bytes,
                    .region_bytes = 1 << 20,
                    .read_memory_bytes = 4 * kMiB,
                    .promotion = PromotionKind::SecondHit});
  say("hybrid: %.0f MiB of memory and %.0f MiB of NVM, %.1f M keys",
      static_cast<double>(memory_bytes) / kMiB, static_cast<double>(nvm_bytes) / kMiB,
      static_cast<double>(ids) * 1e-6);
  // The popular ones last, as an old cache would have them.
  hybrid.filler().fill_down(held);
  if (ratio) {
    const Reader::Seen with = hit_ratio(hybrid, ids, requests);
    const Counters counters = hybrid.counters();
    NvmEngine dram({.path = {}, .memory_bytes = memory_bytes});
    const Reader::Seen without = hit_ratio(dram, ids, requests);
    print_round("hybrid_hit_ratio",
                {{"value", 100 * with.hit_share()},
                 {"peer_value", 100 * without.hit_share()},
                 {"nvm_share", 100 * with.nvm_share()},
                 {"promoted", counters["feature_cache_namespace_nvm_promoted_total"]},
                 {"reinserted", counters["feature_cache_namespace_nvm_reinserted_total"]},
                 {"demoted", counters["feature_cache_namespace_nvm_demoted_total"]},
                 {"not_admitted", counters["feature_cache_namespace_nvm_not_admitted_total"]}});
  }
  if (mixed) run_mixed(options, hybrid, ids);
}

}  // namespace fc::bench
