// The request log by itself: how large it is beside the entropy of what it tells, and how fast it
// is written and read. One JSON object a round and metric on stdout.
//
//   fc_request_log_bench [rounds] [keys] [items]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "feature_cache/warm_plan.hpp"
#include "load.hpp"
#include "request_log/recorder.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using fc::request_log::Recorder;
namespace fs = std::filesystem;

constexpr std::size_t kBatch = 1000;
constexpr double kSkew = 0.9;
constexpr std::uint64_t kSeed = 7;
constexpr std::uint32_t kShards = 256;

double seconds_since(Clock::time_point began) {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

std::vector<fc::NamespaceConfig> namespaces() {
  fc::NamespaceConfig pin;
  pin.name = "pin";
  pin.domains = {{.name = "all", .budget_bytes = 1 << 20}};
  pin.default_domain = "all";
  return {pin};
}

// Dictionary and references: each distinct id once, and each key at the entropy of its popularity.
double entropy_bytes(const std::vector<std::uint32_t>& counts, std::size_t keys) {
  double bits = 0;
  for (const std::uint32_t count : counts) {
    if (count == 0) continue;
    bits += 64 - count * std::log2(static_cast<double>(count) / static_cast<double>(keys));
  }
  return bits / 8;
}

void run(std::size_t keys, std::size_t items) {
  std::mt19937_64 random(kSeed);
  std::vector<std::uint64_t> ids(items);
  for (std::uint64_t& id : ids) id = random();
  fc::bench::Zipf zipf(items, kSkew);
  std::vector<std::uint32_t> ranks(keys);
  std::vector<std::uint32_t> counts(items);
  for (std::uint32_t& rank : ranks) ++counts[rank = static_cast<std::uint32_t>(zipf(random))];

  const fs::path dir = fs::temp_directory_path() / ("fc_log_bench_" + std::to_string(getpid()));
  fc::RecordConfig config;
  config.dir = dir.string();
  config.sample = 1.0;
  config.buffer_bytes = 64u << 20;
  double offered = 0;
  double written = 0;
  {
    Recorder recorder(config, namespaces(), {}, false);
    std::vector<std::string_view> batch(kBatch);
    for (std::size_t at = 0; at + kBatch <= keys; at += kBatch) {
      for (std::size_t i = 0; i < kBatch; ++i) {
        batch[i] = {reinterpret_cast<const char*>(&ids[ranks[at + i]]), sizeof(std::uint64_t)};
      }
      const Recorder::Column column{0, fc::kNoDomain, batch};
      auto began = Clock::now();
      recorder.offer({&column, 1});
      offered += seconds_since(began);
      if (at / kBatch % 64 != 63) continue;
      began = Clock::now();
      recorder.write_out();
      written += seconds_since(began);
    }
    const auto began = Clock::now();
    recorder.write_out();
    recorder.end_window();
    written += seconds_since(began);
  }
  std::vector<std::uint8_t> file;
  for (const auto& entry : fs::directory_iterator(dir)) {
    if (entry.path().extension() != ".fcrl") continue;
    std::ifstream in(entry.path(), std::ios::binary);
    file.assign(std::istreambuf_iterator<char>(in), {});
  }
  fs::remove_all(dir);
  const auto count = static_cast<double>(keys / kBatch * kBatch);

  // A leaf that has half of the shards reads it.
  fc::WarmPlan plan({{.name = "pin", .domains = {{"all", 0}}}}, items);
  std::vector<std::uint32_t> owned;
  for (std::uint32_t shard = 0; shard < kShards; shard += 2) owned.push_back(shard);
  plan.own(kShards, owned);
  fc::WarmPlan::Added added;
  auto began = Clock::now();
  const fc::LogFault fault = plan.add(file, 1.0, added);
  const double decoded = seconds_since(began);
  if (fault != fc::LogFault::None || added.keys != static_cast<std::uint64_t>(count)) {
    std::fprintf(stderr, "the log cannot be read: %s\n", fc::describe(fault));
    std::exit(1);
  }
  began = Clock::now();
  plan.order(0);
  const double ordered = seconds_since(began);
  const auto distinct = static_cast<double>(
      std::count_if(counts.begin(), counts.end(), [](std::uint32_t each) { return each != 0; }));
  std::printf(
      "{\"metric\": \"log_bytes_per_key\", \"bytes\": %.4f, \"entropy\": %.4f, \"keys\": %.0f, "
      "\"distinct\": %.0f}\n",
      static_cast<double>(file.size()) / count, entropy_bytes(counts, keys) / count, count,
      distinct);
  std::printf(
      "{\"metric\": \"replay_decode\", \"keys_per_second\": %.0f, \"order_seconds\": %.4f, "
      "\"not_owned\": %.0f, \"planned\": %.0f}\n",
      count / decoded, ordered, static_cast<double>(added.not_owned),
      static_cast<double>(plan.keys()));
  std::printf(
      "{\"metric\": \"recording\", \"offer_ns_per_key\": %.2f, \"write_ns_per_key\": %.2f}\n",
      offered * 1e9 / count, written * 1e9 / count);
  std::fflush(stdout);
}

std::size_t number(int argc, char** argv, int which, std::size_t fallback) {
  return argc > which ? std::strtoull(argv[which], nullptr, 10) : fallback;
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t rounds = number(argc, argv, 1, 3);
  for (std::size_t round = 0; round < rounds; ++round) {
    run(number(argc, argv, 2, 10'000'000), number(argc, argv, 3, 1'000'000));
  }
  return 0;
}
