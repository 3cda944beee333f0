// What a full tier does: its index and what was written to fill it, random reads, the latency of a
// batch, and DRAM while the device is busy. All over one engine, since filling it takes a minute.

#include <atomic>
#include <stdexcept>
#include <thread>

#include "bare_uring.hpp"
#include "core/layout.hpp"
#include "index/entry.hpp"
#include "nvm/format.hpp"
#include "nvm/regions.hpp"
#include "nvm_bench.hpp"
#include "read_client.hpp"

namespace fc::bench {
namespace {

constexpr std::uint64_t kMemory = 512 * kMiB;
constexpr std::size_t kStream = 1'000'000;   // keys on NVM that are asked for
constexpr std::size_t kDramStream = 50'000;  // keys in DRAM
constexpr std::size_t kUnderWay = 4;         // batches
constexpr std::size_t kSmallBatch = 500;
constexpr std::size_t kSmallBatchesEachRound = 16;
constexpr std::size_t kStrangers = 5;  // keys of a batch that only share another's tag, at most

double ns_to_us(std::uint64_t ns) {
  return static_cast<double>(ns) * 1e-3;
}

void print_space(const Options& options, NvmEngine& tier) {
  const Counters counters = tier.counters();
  const double items = counters["feature_cache_namespace_nvm_items"];
  const double slots = counters["feature_cache_nvm_index_slots"];
  const double regions =
      static_cast<double>(tier.setup().nvm_bytes) / counters["feature_cache_nvm_region_bytes"];
  const double table = regions * sizeof(nvm::Region);
  if (options.wants("index_bytes_per_item")) {
    print_round("index_bytes_per_item", {{"value", (slots * layout::kSlotBytes + table) / items},
                                         {"items", items},
                                         {"slots_filled", items / slots},
                                         {"region_table_bytes", table}});
  }
  if (options.wants("write_amplification")) print_amplification("write_amplification", counters);
}

// ---- random reads
// --------------------------------------------------------------------------------

// One batch after the other through the call that waits.
double waiting_gets_per_second(Engine& engine, const std::vector<Key>& stream, double seconds) {
  Batch batch(kBatch);
  return measure(stream, seconds,
                 [&](const Key* keys) {
                   for (std::size_t i = 0; i < kBatch; ++i) batch.keys[i] = keys[i].view();
                   GetColumn column = batch.column();
                   engine.get(column);
                   return batch.count(CellStatus::HitNvm);
                 })
      .per_second;
}

struct DeviceReads {
  explicit DeviceReads(const NvmEngine& tier) {
    const Counters counters = tier.counters();
    reads = counters["feature_cache_nvm_device_reads_total"];
    bytes = counters["feature_cache_nvm_device_read_bytes_total"];
  }
  double reads;
  double bytes;
};

// The two take turns of half a second: the device's pace changes within seconds when others share
// it. A third one reads blocks as ours does, some by twos: what that costs is not the engine's.
void run_random_read(const Options& options, NvmEngine& tier, const std::vector<Key>& stream) {
  constexpr double kTurn = 0.5;
  const DirectFile file(tier.setup().path);
  BareUring bare(file, kQueueDepth, layout::kNvmDataOffset, tier.setup().nvm_bytes);
  ReadClient client(tier.engine(), stream, kUnderWay);
  client.run(kTurn);
  bare.run(kTurn);
  const auto turns = std::max(1u, static_cast<unsigned>(options.seconds / kTurn));
  for (unsigned round = 0; round < options.rounds; ++round) {
    ReadClient::Total ours;
    double theirs = 0;
    double theirs_as_ours = 0;
    double reads = 0;
    double bytes = 0;
    for (unsigned turn = 0; turn < turns; ++turn) {
      const DeviceReads before(tier);
      ours += client.run(kTurn);
      const DeviceReads after(tier);
      reads += after.reads - before.reads;
      bytes += after.bytes - before.bytes;
      theirs += bare.run(kTurn) / turns;
      theirs_as_ours += bare.run(kTurn, bytes / reads / DirectFile::kBlock - 1) / turns;
    }
    const double waiting = waiting_gets_per_second(tier.engine(), stream, kTurn);
    const double keys = static_cast<double>(ours.all_keys);
    print_round("random_read", {{"value", ours.keys_per_second()},
                                {"peer_value", theirs},
                                {"device_reads_per_second", ours.keys_per_second() * reads / keys},
                                {"bytes_each_read", bytes / reads},
                                {"peer_of_those_bytes", theirs_as_ours},
                                {"one_batch_at_a_time", waiting},
                                {"hit_share", static_cast<double>(ours.hits) / keys}});
  }
}

// ---- the latency of a batch
// ----------------------------------------------------------------------

// Where the records of a batch lie, in the order of its keys.
std::vector<Place> places_of(Engine& engine, Batch& batch) {
  std::vector<NvmCell> cells;
  GetColumn column = batch.column();
  column.nvm = &cells;
  engine.get(column);
  engine.release(cells);
  constexpr std::uint64_t kBlock = DirectFile::kBlock;
  const std::uint64_t record = nvm::RecordHeader::bytes_for(kKeyBytes, kValueBytes);
  std::vector<Place> places;
  for (const NvmCell& cell : cells) {
    // One device: locations count from the start of its data.
    const std::uint64_t begin =
        layout::kNvmDataOffset + Entry(cell.entry).nvm_location() * layout::kNvmRecordAlignment;
    const std::uint64_t first = begin / kBlock * kBlock;
    const std::uint64_t end = (begin + record + kBlock - 1) / kBlock * kBlock;
    places.push_back({first, static_cast<std::uint32_t>(end - first)});
  }
  return places;
}

void run_batch_latency(const Options& options, NvmEngine& tier, const std::vector<Key>& stream) {
  const DirectFile file(tier.setup().path);
  const AlignedBlocks block = aligned_blocks(2);
  BareUring bare(file, kQueueDepth, layout::kNvmDataOffset, tier.setup().nvm_bytes);
  Batch batch(kSmallBatch);
  std::size_t at = 0;
  for (unsigned round = 0; round < options.rounds; ++round) {
    std::vector<double> ours;
    std::vector<double> theirs;
    std::vector<double> least;
    for (std::size_t b = 0; b < kSmallBatchesEachRound; ++b) {
      for (std::size_t i = 0; i < kSmallBatch; ++i) batch.keys[i] = stream[at + i].view();
      at = at + 2 * kSmallBatch > stream.size() ? 0 : at + kSmallBatch;
      const std::vector<Place> places = places_of(tier.engine(), batch);
      const auto mine = [&] {
        GetColumn column = batch.column();
        const std::uint64_t start = monotonic_ns();
        tier.engine().get(column);
        ours.push_back(ns_to_us(monotonic_ns() - start));
        if (batch.count(CellStatus::HitNvm) + kStrangers < kSmallBatch) {
          throw std::runtime_error("a batch was not read from NVM");
        }
      };
      // The second of the two may find what the first has read in some cache of the host.
      if (b % 2 == 0) mine();
      const std::uint64_t start = monotonic_ns();
      for (const Place& place : places) file.read(block.get(), place.bytes, place.offset);
      theirs.push_back(ns_to_us(monotonic_ns() - start));
      if (b % 2 != 0) mine();
      least.push_back(ns_to_us(bare.read_all(places)));
    }
    const double p50 = quantile(ours, 0.5);
    print_round("batch_latency", {{"value", p50},
                                  {"peer_value", quantile(theirs, 0.5)},
                                  {"bare_io_uring_us", quantile(least, 0.5)},
                                  {"slowest_us", ours.back()},
                                  {"peer_slowest_us", theirs.back()}});
  }
}

// ---- DRAM while the device is busy
// ---------------------------------------------------------------

// The median latency of batches in DRAM. A batch every millisecond or so: a request's thread, too,
// wakes up for each.
double dram_p50_us(Engine& engine, const std::vector<Key>& stream, double seconds) {
  constexpr std::chrono::microseconds kPause{500};
  Batch batch(kBatch);
  std::vector<double> took;
  std::size_t at = 0;
  const std::uint64_t end = monotonic_ns() + static_cast<std::uint64_t>(seconds * 1e9);
  while (monotonic_ns() < end) {
    for (std::size_t i = 0; i < kBatch; ++i) batch.keys[i] = stream[at + i].view();
    at = at + 2 * kBatch > stream.size() ? 0 : at + kBatch;
    GetColumn column = batch.column();
    const std::uint64_t start = monotonic_ns();
    engine.get(column);
    took.push_back(ns_to_us(monotonic_ns() - start));
    std::this_thread::sleep_for(kPause);
  }
  return quantile(took, 0.5);
}

void run_dram_under_saturation(const Options& options, NvmEngine& tier,
                               const std::vector<Key>& on_nvm, const std::vector<Key>& in_dram) {
  dram_p50_us(tier.engine(), in_dram, 0.3);
  for (unsigned round = 0; round < options.rounds; ++round) {
    double idle = 0;
    if (round % 2 == 0) idle = dram_p50_us(tier.engine(), in_dram, options.seconds / 2);
    std::atomic<bool> stop{false};
    ReadClient::Total total;
    std::thread others([&] {
      ReadClient client(tier.engine(), on_nvm, kUnderWay);
      total = client.run_until([&](std::uint64_t) { return stop.load(); });
    });
    const double busy = dram_p50_us(tier.engine(), in_dram, options.seconds / 2);
    stop.store(true);
    others.join();
    if (round % 2 != 0) idle = dram_p50_us(tier.engine(), in_dram, options.seconds / 2);
    print_round("dram_under_saturation", {{"value", busy / idle},
                                          {"p50_us", busy},
                                          {"p50_us_idle", idle},
                                          {"nvm_keys_per_second", total.keys_per_second()}});
  }
}

}  // namespace

void run_on_full_tier(const Options& options) {
  const bool reads = options.wants("random_read") || options.wants("batch_latency") ||
                     options.wants("dram_under_saturation");
  if (!reads && !options.wants("index_bytes_per_item") && !options.wants("write_amplification")) {
    return;
  }
  NvmEngine tier({.path = options.folder + "/full.nvm",
                  .memory_bytes = kMemory,
                  .nvm_bytes = options.data_mib * kMiB});
  const std::uint64_t ids = tier.filler().fill_up();
  print_space(options, tier);
  if (!reads) return;
  const std::vector<Key> on_nvm = tier.filler().draw(ids, kStream, true, 1);
  if (options.wants("random_read")) run_random_read(options, tier, on_nvm);
  if (options.wants("batch_latency")) run_batch_latency(options, tier, on_nvm);
  if (options.wants("dram_under_saturation")) {
    run_dram_under_saturation(options, tier, on_nvm,
                              tier.filler().draw(ids, kDramStream, false, 2));
  }
}

}  // namespace fc::bench
