// What a start makes of an NVM tier that was damaged while nobody had it, that a crash left half
// written, or whose devices failed or changed. Items may be missing then. Nothing may be wrong, and
// what was deleted, overwritten or flushed must not come back.
#include <cstddef>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <system_error>

#include "crash_support.hpp"
#include "nvm/format.hpp"
#include "nvm/heartbeat.hpp"
#include "nvm/journal_format.hpp"
#include "nvm/region.hpp"
#include "testing/fault_device.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
namespace {

constexpr std::size_t kRegionBytes = 64 * kKiB;
constexpr std::size_t kRegions = 24;
constexpr std::size_t kDeviceBytes = 64 * kKiB + kRegions * kRegionBytes;
constexpr std::size_t kKeys = 1600;
constexpr std::size_t kOthers = 700;
constexpr std::size_t kRowsAt = 4096;

using Files = std::map<std::string, std::string>;  // by name

// One byte that changed; mask 0: it became zero.
struct Flip {
  std::string file;
  std::uint64_t offset;
  std::uint8_t mask;
};

// Dies at the n-th request that changes a device, before the device sees it.
class MortalDevice final : public NvmDevice {
 public:
  MortalDevice(std::shared_ptr<NvmDevice> device, std::uint64_t lives)
      : device_(std::move(device)), lives_(lives) {}
  void arm() { armed_ = true; }
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override {
    return std::make_unique<Queue>(*this, device_->make_queue(depth));
  }
  const std::string& path() const noexcept override { return device_->path(); }
  std::uint64_t bytes() const noexcept override { return device_->bytes(); }
  const char* io() const noexcept override { return device_->io(); }
  bool direct() const noexcept override { return device_->direct(); }
  const std::string& fallback() const noexcept override { return device_->fallback(); }

 private:
  struct Queue final : IoQueue {
    Queue(MortalDevice& of, std::unique_ptr<IoQueue> queue) : device(of), inner(std::move(queue)) {}
    void submit(std::span<IoRequest* const> requests) override {
      for (const IoRequest* request : requests) {
        if (request->kind != IoRequest::Kind::Read) device.count();
      }
      inner->submit(requests);
    }
    std::size_t wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) override {
      return inner->wait(ended, timeout_ns);
    }
    void wake() noexcept override { inner->wake(); }
    MortalDevice& device;
    const std::unique_ptr<IoQueue> inner;
  };
  void count() {
    if (armed_ && lives_.fetch_sub(1) <= 1) kill(getpid(), SIGKILL);
  }
  const std::shared_ptr<NvmDevice> device_;
  std::atomic<std::uint64_t> lives_;
  std::atomic<bool> armed_{false};
};

class NvmRecovery : public ::testing::Test {
 protected:
  NvmRecovery() {
    NamespaceConfig pin = name_space("pin", {domain("all", 128 * kKiB, PolicyKind::Fifo)});
    NamespaceConfig user = name_space("user", {domain("all", 64 * kKiB, PolicyKind::Fifo)});
    pin.nvm.budget_bytes = 14 * kRegionBytes;
    user.nvm.budget_bytes = 6 * kRegionBytes;
    config_ = engine_config(7 * kMiB, {pin, user});
    config_.expected_item_bytes = 300;
    config_.persist.dir = folder_.path();
    config_.persist.name = "crash";
    config_.nvm.devices = {{folder_.file("nvm"), kDeviceBytes}};
    config_.nvm.region_bytes = kRegionBytes;
    config_.nvm.direct = false;  // tmpfs knows no other way
    config_.nvm.queue_depth = 32;
    config_.nvm.io_threads = 2;
    config_.nvm.read_memory_bytes = 4 * kMiB;
    config_.nvm.write_buffers = 4;
  }

  std::unique_ptr<Engine> start() const { return make_engine(config_, clock_, false); }
  std::shared_ptr<NvmDevice> open(std::size_t device = 0) const {
    const NvmDeviceConfig& of = config_.nvm.devices[device];
    return open_device(of.path, of.bytes, {config_.nvm.io, false, config_.nvm.io_threads});
  }
  void lose_memory() const {
    std::filesystem::remove(folder_.file("crash.arena"));
    std::filesystem::remove(folder_.file("crash.nvm"));
  }

  // Not faster than the regions are written.
  static void pour(const Keeper& keeper, std::size_t begin, std::size_t end) {
    for (std::size_t key = begin; key < end; key += 50) {
      keeper.put(key, std::min(key + 50, end));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  // Overwrites, deletes and a flush, of much that was on NVM by then.
  void work(Engine& engine) const {
    const Keeper pin(engine, ledger_);
    const Keeper user(engine, others_, "user");
    pour(pin, 0, kKeys);
    pour(pin, 0, kKeys / 4);
    pin.erase(0, kKeys, 9);
    pour(user, 0, kOthers);
    user.flush();
    pour(user, 0, kOthers / 2);
    user.erase(0, kOthers, 7);
  }
  // What a life leaves that ends in order, or at once.
  void leave(bool in_order) {
    const End end = end_of([&] {
      const auto engine = start();
      work(*engine);
      if (in_order && !engine->shutdown()) _exit(2);
      kill(getpid(), SIGKILL);
    });
    ASSERT_EQ(end, End::Killed);
    take();
  }
  void leave_at(const char* point) {
    const End end = end_of([&] {
      const auto engine = start();
      work(*engine);
      const Assassin assassin(point);
      const Keeper pin(*engine, ledger_);
      for (unsigned round = 0; round < 200; ++round)
        pour(pin, round % 8 * 200, round % 8 * 200 + 200);
    });
    ASSERT_EQ(end, End::Killed);
    take();
  }

  void take() {
    files_.clear();
    for (const auto& file : std::filesystem::directory_iterator(folder_.path())) {
      if (file.is_regular_file()) files_[file.path().filename()] = read(file.path());
    }
    ASSERT_EQ(files_["nvm"].size(), kDeviceBytes);
  }
  static std::string read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  void restore(const Files& files) const {
    for (const auto& file : std::filesystem::directory_iterator(folder_.path())) {
      std::filesystem::remove(file.path());
    }
    for (const auto& [name, bytes] : files) write(name, bytes);
  }
  void write(const std::string& name, const std::string& bytes) const {
    const std::string path = folder_.file(name);
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    std::filesystem::permissions(
        path, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  }
  template <class Struct>
  Struct at(const std::string& file, std::uint64_t offset) const {
    Struct read;
    std::memcpy(static_cast<void*>(&read), files_.at(file).data() + offset, sizeof(read));
    return read;
  }
  static constexpr std::uint64_t region_at(std::size_t region) {
    return 64 * kKiB + region * kRegionBytes;
  }

  // What is wrong; empty: nothing. A key of two versions may have either.
  static std::string wrong(Engine& engine, const Ledger& ledger, const char* ns, std::size_t keys,
                           std::size_t* hits = nullptr) {
    std::vector<std::string> names;
    for (std::size_t key = 0; key < keys; ++key) names.push_back(Ledger::name_of(key));
    const std::vector<std::string_view> views(names.begin(), names.end());
    const std::vector<Got> got = get_all(engine, engine.find_namespace(ns), views);
    for (std::size_t key = 0; key < keys; ++key) {
      if (!carries_value(got[key].status)) continue;
      if (hits != nullptr) ++*hits;
      const auto is = [&](std::uint32_t version) {
        return (version & Ledger::kGone) == 0 && got[key].value == Ledger::value_of(key, version);
      };
      if (is(ledger[key].acknowledged) || is(ledger[key].begun)) continue;
      const bool gone = (ledger[key].acknowledged & Ledger::kGone) != 0;
      return names[key] + " of " + ns + (gone ? " has come back" : " has a wrong value");
    }
    return {};
  }
  std::string all_wrong(Engine& engine, std::size_t* hits = nullptr) const {
    const std::string pin = wrong(engine, ledger_, "pin", kKeys, hits);
    return pin.empty() ? wrong(engine, others_, "user", kOthers, hits) : pin;
  }

  // Starts on what a flip left, goes on, ends in order, and starts after a reboot.
  std::string outcome(const Files& files, const Flip& flip, bool once_more, bool may_refuse) const {
    restore(files);
    std::string bytes = files.at(flip.file);
    char& byte = bytes[flip.offset];
    byte = flip.mask == 0 ? '\0' : static_cast<char>(byte ^ flip.mask);
    write(flip.file, bytes);
    try {
      {
        const auto engine = start();
        const std::string found = all_wrong(*engine);
        if (!found.empty()) return found + " after the start (" + engine->start_report().nvm + ")";
        const NamespaceIndex pin = engine->find_namespace("pin");
        put(*engine, pin, "last", "value");
        if (get(*engine, pin, "last").value != "value") return "nothing is taken";
        if (!once_more) return {};
        if (!engine->shutdown()) return {};
      }
      lose_memory();
      const auto engine = start();
      const std::string found = all_wrong(*engine);
      if (!found.empty()) return found + " after a reboot (" + engine->start_report().nvm + ")";
    } catch (const std::system_error& error) {
      if (!may_refuse) return std::string("the start fails: ") + error.what();
    }
    return {};
  }

  // All of them, in children; one that crashes or hangs costs no more than its flip.
  void sweep(const Files& files, const std::vector<Flip>& flips, bool once_more) {
    std::atomic<std::uint64_t>& at = ledger_.note();
    at = 0;
    std::size_t failed = 0;
    while (at < flips.size() && failed < 12) {
      const End end = end_of([&] {
        for (; at < flips.size(); ++at) {
          alarm(30);
          const Flip& flip = flips[at];
          // With another magic number the file is somebody else's, and is refused.
          const bool foreign = flip.file == "nvm" && flip.offset < sizeof(std::uint64_t);
          const std::string why = outcome(files, flip, once_more, foreign);
          if (why.empty() && !HasFailure()) continue;
          std::fprintf(stderr, "%s\n", why.c_str());
          _exit(2);
        }
        kill(getpid(), SIGKILL);
      });
      if (end == End::Killed) break;
      ++failed;
      const Flip& flip = flips[at];
      ADD_FAILURE() << flip.file << ", offset " << flip.offset << ", mask " << int{flip.mask};
      ++at;
    }
    std::printf("%zu flips\n", flips.size());
  }
  void add(std::vector<Flip>& flips, const std::string& file, std::uint64_t begin,
           std::uint64_t bytes, std::uint64_t step = 1, bool zero = false) const {
    for (std::uint64_t i = 0; i < bytes; i += step) {
      flips.push_back({file, begin + i, static_cast<std::uint8_t>(1u << (i / step % 8))});
      if (step == 1) flips.push_back({file, begin + i, 0xff});
      if (zero && files_.at(file)[begin + i] != 0) flips.push_back({file, begin + i, 0});
    }
  }
  // Regions whose header says that they are in use, of those that have a whole trailer.
  std::vector<std::size_t> valid_regions() const {
    std::vector<std::size_t> regions;
    for (std::size_t r = 0; r < kRegions; ++r) {
      const auto header = at<nvm::RegionHeader>("nvm", region_at(r));
      if (header.magic == nvm::kHeaderMagic && header.checksum == header.sum()) {
        regions.push_back(r);
      }
    }
    return regions;
  }

  CrashFolder folder_;
  Ledger ledger_;
  Ledger others_;
  ManualClock clock_;
  EngineConfig config_;
  Files files_;
};

// ---- damage

TEST_F(NvmRecovery, AFlipOnTheDeviceIsNoWrongValueAfterAReboot) {
  leave(true);
  if (HasFatalFailure()) return;
  Files files = files_;
  files.erase("crash.arena");
  files.erase("crash.nvm");
  {
    restore(files);
    const auto engine = start();
    ASSERT_EQ(engine->start_report().nvm, "rebuilt") << engine->start_report().nvm_reason;
    std::size_t hits = 0;
    EXPECT_EQ(all_wrong(*engine, &hits), "");
    EXPECT_GT(hits, 500U);
  }
  std::vector<Flip> flips;
  add(flips, "nvm", 0, sizeof(nvm::Superblock));
  for (std::uint64_t beat = 0; beat < 2; ++beat) {
    add(flips, "nvm", nvm::kHeartbeatOffset + beat * 4096, sizeof(nvm::Heartbeat));
  }
  const std::vector<std::size_t> regions = valid_regions();
  ASSERT_GT(regions.size(), 8U);
  for (const std::size_t r : {regions.front(), regions[regions.size() / 2], regions.back()}) {
    const std::uint64_t end = region_at(r) + kRegionBytes - sizeof(nvm::RegionTrailer);
    const auto trailer = at<nvm::RegionTrailer>("nvm", end);
    const std::size_t list = nvm::list_bytes(trailer.records);
    add(flips, "nvm", region_at(r), sizeof(nvm::RegionHeader));
    add(flips, "nvm", end, sizeof(nvm::RegionTrailer));
    add(flips, "nvm", end - list, list, 41);
    add(flips, "nvm", region_at(r) + sizeof(nvm::RegionHeader), trailer.used_bytes, 509);
  }
  sweep(files, flips, false);
}

class NvmRecoveryFlips : public NvmRecovery {
 protected:
  // Rows of every state that there is, header, buffers.
  void flip_memory(bool rows) {
    std::vector<Flip> flips;
    std::map<nvm::RegionState, unsigned> seen;
    for (std::size_t r = 0; rows && r < kRegions; ++r) {
      const std::uint64_t row = kRowsAt + r * sizeof(nvm::Region);
      const auto state =
          static_cast<nvm::RegionState>(files_.at("crash.nvm")[row + offsetof(nvm::Region, state)]);
      if (++seen[state] <= 2) add(flips, "crash.nvm", row, sizeof(nvm::Region), 1, true);
    }
    if (!rows) {
      add(flips, "crash.nvm", 0, 64, 1, true);
      const std::uint64_t buffers = kRowsAt + 4096;
      add(flips, "crash.nvm", buffers, files_.at("crash.nvm").size() - buffers, 1021);
    }
    for (const auto& [state, count] : seen) {
      std::printf("%u rows of state %d\n", count, static_cast<int>(state));
    }
    sweep(files_, flips, rows);
  }
};

TEST_F(NvmRecoveryFlips, OfRowsAfterAnOrderlyStop) {
  leave(true);
  if (!HasFatalFailure()) flip_memory(true);
}
TEST_F(NvmRecoveryFlips, OfRowsAfterNone) {
  leave_at("nvm:header_written");
  if (!HasFatalFailure()) flip_memory(true);
}
TEST_F(NvmRecoveryFlips, OfHeaderAndBuffersAfterAnOrderlyStop) {
  leave(true);
  if (!HasFatalFailure()) flip_memory(false);
}
TEST_F(NvmRecoveryFlips, OfHeaderAndBuffersAfterNone) {
  leave_at("nvm:header_written");
  if (!HasFatalFailure()) flip_memory(false);
}

}  // namespace
}  // namespace fc::testing
