// Bits of the arena that changed while nobody had it: the header, the rows of namespaces, domains
// and moves, the segment table, words of the index. A start may then drop items. It must not fail,
// hang or crash, and what it serves must be right.
#include <cstddef>
#include <fstream>
#include <iterator>
#include <memory>

#include "crash_support.hpp"
#include "memory/arena_header.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
namespace {

constexpr std::size_t kKeys = 900;

struct Flip {
  std::uint64_t offset;
  std::uint8_t mask;
};

class FlipTest : public ::testing::TestWithParam<bool> {
 protected:
  FlipTest() {
    config_ = engine_config(3 * kMiB, {name_space("pin", {domain("all", kMiB)}),
                                       name_space("user", {domain("all", 256 * kKiB)})});
    config_.expected_item_bytes = 300;
    config_.persist.dir = folder_.path();
    config_.persist.name = "flip";
  }

  // What an engine leaves that held, overwrote and deleted some, after an orderly end or none.
  void leave(bool in_order) {
    const End end = end_of([&] {
      const auto engine = make_engine(config_, clock_, false);
      const Keeper keeper(*engine, ledger_);
      keeper.put(0, kKeys);
      keeper.put(0, kKeys / 2);
      keeper.erase(0, kKeys, 9);
      Keeper(*engine, others_, "user").put(0, 50);
      if (in_order && !engine->shutdown()) _exit(2);
      kill(getpid(), SIGKILL);
    });
    ASSERT_EQ(end, End::Killed);
    std::ifstream file(arena(), std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    ASSERT_GT(bytes_.size(), sizeof(ArenaHead));
  }

  std::string arena() const { return folder_.file("flip.arena"); }
  void write_arena(const Flip& flip) const {
    std::fstream file(arena(), std::ios::binary | std::ios::in | std::ios::out);
    if (!file) file.open(arena(), std::ios::binary | std::ios::out);
    file.write(bytes_.data(), static_cast<std::streamsize>(bytes_.size()));
    const char damaged =
        static_cast<char>(static_cast<std::uint8_t>(bytes_[flip.offset]) ^ flip.mask);
    file.seekp(static_cast<std::streamoff>(flip.offset));
    file.write(&damaged, 1);
  }

  // Starts on a damaged arena; false when something is not as it must be.
  bool is_well(const Flip& flip) const {
    std::filesystem::remove(arena() + ".set-aside");
    write_arena(flip);
    std::filesystem::permissions(
        arena(), std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
    const auto engine = make_engine(config_, clock_, false);
    const NamespaceIndex pin = engine->find_namespace("pin");
    bool well = true;
    const auto expect = [&](bool holds, const std::string& what) {
      if (holds) return;
      well = false;
      std::fprintf(stderr, "offset %llu, bits %02x, start %s: %s\n",
                   static_cast<unsigned long long>(flip.offset), flip.mask,
                   engine->start_report().memory.c_str(), what.c_str());
    };
    const auto look = [&](const Ledger& ledger, NamespaceIndex ns, std::size_t keys) {
      for (std::size_t key = 0; key < keys; ++key) {
        const Got got = get(*engine, ns, Ledger::name_of(key));
        if (!carries_value(got.status)) continue;
        const std::uint32_t version = ledger[key].acknowledged;
        expect((version & Ledger::kGone) == 0, Ledger::name_of(key) + " has come back");
        expect(got.value == Ledger::value_of(key, version & ~Ledger::kGone),
               Ledger::name_of(key) + " has a wrong value");
      }
    };
    look(ledger_, pin, kKeys);
    look(others_, engine->find_namespace("user"), 50);
    // It goes on: everything is written anew, some is evicted, and all of it is right.
    const DomainIndex all = engine->find_domain(pin, "all");
    for (std::size_t key = 0; key < 300; ++key) {
      const WriteStatus status = put(*engine, pin, Ledger::name_of(key), "new");
      expect(status == WriteStatus::Stored, Ledger::name_of(key) + " is not taken");
    }
    for (std::size_t key = 0; key < 300; ++key) {
      const Got got = get(*engine, pin, Ledger::name_of(key));
      expect(!carries_value(got.status) || got.value == "new",
             Ledger::name_of(key) + " is not what was put last");
    }
    engine->resize(all, 256 * kKiB);
    engine->maintain();
    engine->resize(all, kMiB);
    engine->flush(pin);
    for (std::size_t key = 0; key < kKeys; ++key) {
      expect(!carries_value(get(*engine, pin, Ledger::name_of(key)).status),
             Ledger::name_of(key) + " outlives a flush");
    }
    put(*engine, pin, "last", "value");
    expect(get(*engine, pin, "last").value == "value", "nothing is kept");
    engine->shutdown();
    return well;
  }

  // All of them, in children; one that crashes or hangs costs no more than its flip.
  void sweep(const std::vector<Flip>& flips) {
    std::atomic<std::uint64_t>& at = ledger_.note();
    at = 0;
    std::size_t failed = 0;
    while (at < flips.size() && failed < 10) {
      const End end = end_of([&] {
        while (at < flips.size()) {
          alarm(30);
          if (!is_well(flips[at])) _exit(2);
          ++at;
        }
        kill(getpid(), SIGKILL);
      });
      if (end == End::Killed) break;
      ++failed;
      const Flip& flip = flips[at];
      ADD_FAILURE() << "offset " << flip.offset << ", bits " << std::hex << int{flip.mask};
      ++at;
    }
    std::printf("%zu flips\n", flips.size());
  }

  // Every byte of a part, each with one bit, by turns, and with all of them.
  static void add(std::vector<Flip>& flips, std::uint64_t begin, std::uint64_t bytes,
                  std::uint64_t every = 1) {
    // Fewer where a sanitizer makes each start cost many times as much.
#if defined(FC_ASAN) || defined(FC_TSAN)
    const std::uint64_t step = every * 7;
#else
    const std::uint64_t step = every;
#endif
    for (std::uint64_t i = 0; i < bytes; i += step) {
      flips.push_back({begin + i, static_cast<std::uint8_t>(1u << (i / step % 8))});
      flips.push_back({begin + i, 0xff});
    }
  }
  std::uint64_t table_bytes() const {
    ArenaHeader header;
    std::memcpy(static_cast<void*>(&header), bytes_.data(), sizeof(header));
    return header.total_bytes - sizeof(ArenaHead) - header.bucket_count * 64 - header.hint_bytes -
           std::uint64_t{header.segment_bytes} * header.segment_count;
  }

  CrashFolder folder_;
  Ledger ledger_;
  Ledger others_;
  ManualClock clock_;
  EngineConfig config_;
  std::string bytes_;
};

TEST_P(FlipTest, OfTheHeader) {
  leave(GetParam());
  if (HasFatalFailure()) return;
  std::vector<Flip> flips;
  add(flips, 0, sizeof(ArenaHeader));
  add(flips, sizeof(ArenaHeader), sizeof(ArenaHead::unused), 401);
  sweep(flips);
}

TEST_P(FlipTest, OfTheRowsOfNamespacesDomainsAndMoves) {
  leave(GetParam());
  if (HasFatalFailure()) return;
  std::vector<Flip> flips;
  add(flips, offsetof(ArenaHead, namespaces), 3 * sizeof(NamespaceRow));
  add(flips, offsetof(ArenaHead, domains), 3 * sizeof(DomainRow));
  add(flips, offsetof(ArenaHead, moves), 2 * sizeof(MoveRow));
  sweep(flips);
}

TEST_P(FlipTest, OfTheSegmentTable) {
  leave(GetParam());
  if (HasFatalFailure()) return;
  std::vector<Flip> flips;
  add(flips, sizeof(ArenaHead), table_bytes(), 13);
  sweep(flips);
}

TEST_P(FlipTest, OfTheIndex) {
  leave(GetParam());
  if (HasFatalFailure()) return;
  // Words that are in use, each with another of its bits.
  std::vector<Flip> flips;
  const std::uint64_t begin = sizeof(ArenaHead) + table_bytes();
  ArenaHeader header;
  std::memcpy(static_cast<void*>(&header), bytes_.data(), sizeof(header));
  unsigned bit = 0;
  for (std::uint64_t word = begin; word < begin + header.bucket_count * 64; word += 8) {
    std::uint64_t entry = 0;
    std::memcpy(&entry, bytes_.data() + word, sizeof(entry));
    if (entry == 0) continue;
    bit = (bit + 13) % 64;
    flips.push_back({word + bit / 8, static_cast<std::uint8_t>(1u << (bit % 8))});
    if (flips.size() % 8 == 0) flips.push_back({word + bit / 8, 0xff});
  }
  EXPECT_GT(flips.size(), kKeys / 2);
  sweep(flips);
}

INSTANTIATE_TEST_SUITE_P(After, FlipTest, ::testing::Values(true, false),
                         [](const auto& with) { return with.param ? "AnOrderlyEnd" : "AKill"; });

}  // namespace
}  // namespace fc::testing
