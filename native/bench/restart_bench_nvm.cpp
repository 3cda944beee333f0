// The NVM tier after the memory is gone, as after a reboot: a start that makes up its index from
// the regions' lists, against a bare loop that reads the same lists from the same file and looks at
// every record they name. Both on one core, in alternating rounds.
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/layout.hpp"
#include "nvm/device.hpp"
#include "nvm/format.hpp"
#include "nvm_bench.hpp"
#include "restart_bench.hpp"

namespace fc::bench {
namespace {

constexpr std::uint32_t kRegion = 4u << 20;
constexpr std::uint32_t kDepth = 32;
constexpr std::uint64_t kIndexBytesPerItem = 10;

// This process and the threads that it starts from now on share one core.
void use_one_core() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) != 0) throw std::runtime_error("no affinity");
  bool first = true;
  for (unsigned core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &cores)) continue;
    if (!first) CPU_CLR(core, &cores);
    first = false;
  }
  sched_setaffinity(0, sizeof(cores), &cores);
}

struct Freed {
  void operator()(std::byte* memory) const noexcept { std::free(memory); }
};
using Block = std::unique_ptr<std::byte[], Freed>;

Block block_of(std::size_t bytes) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return Block(memory);
}

// Reads all requests, kDepth at a time; throws when one fails.
void read_all(IoQueue& queue, std::vector<IoRequest>& requests) {
  std::vector<IoRequest*> ended(kDepth);
  std::size_t next = 0;
  std::size_t done = 0;
  while (done < requests.size()) {
    while (next < requests.size() && next - done < kDepth) {
      IoRequest* one = &requests[next++];
      queue.submit({&one, 1});
    }
    const std::size_t count = queue.wait(ended, 1'000'000'000);
    for (std::size_t i = 0; i < count; ++i) {
      if (!ended[i]->ok()) throw std::runtime_error("a read of the bare loop fails");
    }
    done += count;
  }
}

struct Bare {
  std::uint64_t items = 0;
  double seconds = 0;
};

// The reads of a rebuild: headers and trailers first, each in a block; then each list whole.
Bare read_bare(const std::string& path, std::uint64_t bytes) {
  const auto device = open_device(path, bytes, {});
  const auto queue = device->make_queue(kDepth);
  const std::uint64_t regions = (bytes - layout::kNvmDataOffset) / kRegion;
  const Block ends = block_of(2 * regions * kBlockBytes);  // both of each region
  const std::uint64_t start = monotonic_ns();
  std::vector<IoRequest> requests(2 * regions);
  for (std::uint64_t i = 0; i < 2 * regions; ++i) {
    const std::uint64_t region = layout::kNvmDataOffset + i / 2 * kRegion;
    requests[i].offset = i % 2 == 0 ? region : region + kRegion - kBlockBytes;
    requests[i].data = ends.get() + i * kBlockBytes;
    requests[i].bytes = kBlockBytes;
  }
  read_all(*queue, requests);
  std::vector<nvm::ListedRecord> list;
  std::vector<Block> parts;
  std::vector<nvm::RegionTrailer> trailers;
  requests.clear();
  for (std::uint64_t r = 0; r < regions; ++r) {
    const std::byte* at = ends.get() + 2 * r * kBlockBytes;
    nvm::RegionHeader header;
    std::memcpy(&header, at, sizeof(header));
    if (header.magic != nvm::kHeaderMagic || header.checksum != header.sum()) continue;
    nvm::RegionTrailer trailer;
    at += 2 * kBlockBytes - sizeof(trailer);
    if (!nvm::read_trailer(at, kRegion, header.generation, trailer)) continue;
    const std::size_t tail = nvm::list_bytes(trailer.records) + sizeof(trailer);
    const std::size_t whole = (tail + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    parts.push_back(block_of(whole));
    trailers.push_back(trailer);
    IoRequest& request = requests.emplace_back();
    request.offset = layout::kNvmDataOffset + (r + 1) * kRegion - whole;
    request.data = parts.back().get();
    request.bytes = static_cast<std::uint32_t>(whole);
  }
  read_all(*queue, requests);
  Bare bare;
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < trailers.size(); ++i) {
    const std::byte* end = parts[i].get() + requests[i].bytes - sizeof(nvm::RegionTrailer);
    if (!nvm::read_list(end - nvm::list_bytes(trailers[i].records), trailers[i], list)) continue;
    for (const nvm::ListedRecord& record : list) sum += record.hash ^ record.offset;
    bare.items += list.size();
  }
  bare.seconds = static_cast<double>(monotonic_ns() - start) / 1e9;
  if (sum == 0) throw std::runtime_error("the bare loop finds nothing");
  return bare;
}

void remove_memory(const PersistConfig& persist) {
  std::vector<std::filesystem::path> ours;
  for (const auto& entry : std::filesystem::directory_iterator(persist.dir)) {
    if (entry.path().filename().string().starts_with(persist.name)) ours.push_back(entry.path());
  }
  for (const auto& path : ours) std::filesystem::remove(path);
}

}  // namespace

void run_nvm_rebuild(const RestartOptions& options) {
  if (!options.wants("nvm_rebuild")) return;
  TierSetup setup;
  setup.path = options.folder + "/nvm";
  setup.nvm_bytes = options.data_mib * kMiB / kRegion * kRegion;
  setup.region_bytes = kRegion;
  const std::uint64_t items = setup.nvm_bytes / (kKeyBytes + setup.value_bytes);
  setup.memory_bytes = 128 * kMiB + items * kIndexBytesPerItem;
  EngineConfig config = tier_config(setup);
  config.persist.dir = options.dir;
  config.persist.name = "fc-restart-nvm-" + std::to_string(getpid());
  const Geometry geometry = Geometry::plan(config);
  config.namespaces[0].domains[0].budget_bytes = geometry.domain_bytes();
  const BootClock clock;
  try {
    {
      const auto engine = make_engine(config, clock, true);
      say("filling %llu MiB", static_cast<unsigned long long>(options.data_mib));
      Filler(*engine, setup).fill_up();
      if (!engine->shutdown()) throw std::runtime_error("the engine does not end in order");
    }
    use_one_core();
    for (unsigned round = 0; round < options.rounds; ++round) {
      remove_memory(config.persist);
      const Bare bare = read_bare(setup.path, config.nvm.devices[0].bytes);
      const auto engine = make_engine(config, clock, true);
      const StartReport& report = engine->start_report();
      if (report.nvm != "rebuilt") {
        throw std::runtime_error("NVM is " + report.nvm + ", not rebuilt: " + report.nvm_reason);
      }
      print_round("nvm_rebuild",
                  {{"value", static_cast<double>(report.nvm_items) / report.nvm_ms * 1e3},
                   {"peer_value", static_cast<double>(bare.items) / bare.seconds},
                   {"items", static_cast<double>(report.nvm_items)},
                   {"listed", static_cast<double>(bare.items)},
                   {"rebuild_ms", report.nvm_ms}});
      if (!engine->shutdown()) throw std::runtime_error("the engine does not end in order");
    }
  } catch (...) {
    remove_memory(config.persist);
    throw;
  }
  remove_memory(config.persist);
}

}  // namespace fc::bench
