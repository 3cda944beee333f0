#include <unistd.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>

#include "core/layout.hpp"
#include "nvm_bench.hpp"

namespace fc::bench {
namespace {

constexpr std::uint64_t kPollEvery = kMiB;  // of items put
constexpr std::uint64_t kSayEveryNs = 5'000'000'000;
constexpr double kLeastFree = 2;  // regions that demotions find clean

}  // namespace

bool Options::wants(const std::string& metric) const {
  return std::find(metrics.begin(), metrics.end(), metric) != metrics.end();
}

void print_round(const std::string& metric,
                 std::initializer_list<std::pair<const char*, double>> values) {
  std::printf("{\"metric\": \"%s\"", metric.c_str());
  for (const auto& [name, value] : values) std::printf(", \"%s\": %.6g", name, value);
  std::printf("}\n");
  std::fflush(stdout);
}

void say(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("nvm: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

double Counters::operator[](const std::string& name) const {
  const auto found = values_.find(name);
  return found == values_.end() ? 0 : found->second;
}

double Counters::regions(const char* state) const {
  return (*this)[std::string("feature_cache_nvm_device_regions{") + state + "}"];
}

// The first label says whose it is, and each of ours is one of its kind: the others tell apart.
void Counters::add(std::string_view name, Labels labels, double value) {
  values_[std::string(name)] += value;
  if (labels.size() < 2) return;
  std::string key(name);
  for (std::size_t i = 1; i < labels.size(); ++i) {
    key += i == 1 ? '{' : ',';
    key += labels[i].value;
  }
  values_[key + '}'] += value;
}

EngineConfig tier_config(const TierSetup& setup) {
  EngineConfig config;
  config.memory_bytes = setup.memory_bytes;
  config.expected_item_bytes = static_cast<std::uint32_t>(kKeyBytes + setup.value_bytes);
  NamespaceConfig ns;
  ns.name = "bench";
  ns.default_domain = "all";
  ns.domains.push_back({.name = "all"});
  ns.nvm.budget_bytes = setup.nvm_bytes;
  ns.nvm.promotion = setup.promotion;
  config.namespaces.push_back(ns);
  if (setup.nvm_bytes != 0) {
    config.nvm.devices = {{setup.path, layout::kNvmDataOffset + setup.nvm_bytes}};
    config.nvm.region_bytes = setup.region_bytes;
    config.nvm.queue_depth = kQueueDepth;
    config.nvm.read_memory_bytes = setup.read_memory_bytes;
  }
  const Geometry geometry = Geometry::plan(config);
  config.segment_bytes = geometry.segment_bytes;
  config.namespaces[0].domains[0].budget_bytes = geometry.domain_bytes();
  return config;
}

NvmEngine::NvmEngine(const TierSetup& setup)
    : setup_(setup),
      engine_(make_engine(tier_config(setup), clock_, true)),
      filler_(std::make_unique<Filler>(*engine_, setup)) {}

NvmEngine::~NvmEngine() {
  engine_.reset();
  if (setup_.nvm_bytes != 0) unlink(setup_.path.c_str());
}

Filler::Filler(Engine& engine, const TierSetup& setup)
    : engine_(engine), setup_(setup), value_(setup.value_bytes, 'v') {}

void Filler::put(std::uint64_t from, std::uint64_t to) {
  std::vector<Key> keys(kBatch);
  std::vector<PutItem> items(kBatch);
  std::vector<WriteStatus> statuses(kBatch);
  for (std::uint64_t id = from; id < to; id += kBatch) {
    const std::size_t n = std::min<std::uint64_t>(kBatch, to - id);
    for (std::size_t i = 0; i < n; ++i) {
      keys[i] = key_of(id + i);
      items[i].key = keys[i].view();
      items[i].value = value_;
    }
    engine_.put(0, std::span(items).first(n), std::span(statuses).first(n));
  }
}

// What finds no write buffer or no clean region is dropped.
void Filler::wait_for_room() {
  for (;;) {
    const Counters now = Counters::of(engine_);
    if (now.regions("writing") == 0 && now.regions("free") >= kLeastFree) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

std::uint64_t Filler::step() const noexcept {
  return kPollEvery / (kKeyBytes + setup_.value_bytes);
}

void Filler::fill(std::uint64_t from, std::uint64_t to) {
  for (std::uint64_t id = from; id < to; id += step()) {
    put(id, std::min(id + step(), to));
    if (setup_.nvm_bytes != 0) wait_for_room();
  }
}

void Filler::fill_down(std::uint64_t ids) {
  for (std::uint64_t end = ids; end > 0;) {
    const std::uint64_t from = end - std::min(end, step());
    fill(from, end);
    end = from;
  }
}

std::uint64_t Filler::fill_up() {
  const double region = Counters::of(engine_)["feature_cache_nvm_region_bytes"];
  const double wanted = static_cast<double>(setup_.nvm_bytes) + 2 * region;
  std::uint64_t next = 0;
  std::uint64_t said = monotonic_ns();
  double written = 0;
  while (written < wanted) {
    fill(next, next + step());
    next += step();
    written = Counters::of(engine_)["feature_cache_nvm_device_written_bytes_total"];
    if (monotonic_ns() - said < kSayEveryNs) continue;
    say("filling: %.0f of %.0f MiB", written / kMiB, wanted / kMiB);
    said = monotonic_ns();
  }
  // To the seam between two regions: what was admitted and what was written are then the same.
  while (Counters::of(engine_).regions("writing") == 0) {
    put(next, next + kBatch / 10);
    next += kBatch / 10;
  }
  wait_for_room();
  return next;
}

std::vector<Key> Filler::draw(std::uint64_t ids, std::size_t count, bool on_nvm, unsigned seed) {
  std::mt19937_64 rng(seed);
  std::uniform_int_distribution<std::uint64_t> uniform(0, ids - 1);
  std::vector<Key> found;
  std::vector<Key> keys(kBatch);
  Batch batch(kBatch);
  std::vector<NvmCell> cells;
  // In DRAM are few: bounded, should there be none.
  for (std::size_t tries = 0; found.size() < count && tries < 100 * count; tries += kBatch) {
    for (std::size_t i = 0; i < kBatch; ++i) {
      keys[i] = key_of(uniform(rng));
      batch.keys[i] = keys[i].view();
    }
    cells.clear();
    GetColumn column = batch.column();
    column.nvm = &cells;
    engine_.get(column);
    engine_.release(cells);
    if (on_nvm) {
      for (const NvmCell& cell : cells) found.push_back(keys[cell.position]);
    } else {
      for (std::size_t i = 0; i < kBatch; ++i) {
        if (batch.statuses[i] == CellStatus::HitDram) found.push_back(keys[i]);
      }
    }
  }
  if (found.size() < count) throw std::runtime_error("too few keys are where they should be");
  found.resize(count);
  return found;
}

}  // namespace fc::bench
