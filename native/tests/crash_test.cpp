// Processes killed at chosen places: between append and publish, in the turn-over of segments, in
// eviction, resize, flush, region writes, and in adoption itself. The next process must have all
// that was acknowledged, nothing that was deleted, and go on as if nothing had been.
#include <memory>

#include "crash_support.hpp"
#include "testing/manual_clock.hpp"

namespace fc::testing {
namespace {

using Step = std::function<void(const Keeper&)>;

struct Scenario {
  const char* name;
  const char* point;
  Step before;  // acknowledged, all of it
  Step until;   // reaches the point
  bool evicts = false;
  bool nvm = false;
  std::uint64_t memory_bytes = 12 * kMiB;
  std::uint64_t budget_bytes = 5 * kMiB;
  PolicyKind policy = PolicyKind::S3Fifo;
  std::uint32_t item_bytes = 300;  // expected: what the index is sized for
};

constexpr std::uint32_t kSegment = 16 * kKiB;
constexpr std::uint64_t kSmall = 512 * kKiB;  // of a domain that evicts

void fill(const Keeper& keeper) {
  keeper.put(0, 2000);
}
void nothing(const Keeper&) {}

void resize(const Keeper& keeper, std::uint64_t bytes) {
  Engine& engine = keeper.engine();
  engine.resize(engine.find_domain(engine.find_namespace("pin"), "all"), bytes);
}

void fill_to_compact(const Keeper& keeper) {
  keeper.put(0, 1000);
}
// With a new key now and then: segments of much garbage, none of garbage alone.
void overwrite_most(const Keeper& keeper) {
  std::size_t fresh = 1000;
  for (unsigned round = 0; round < 100; ++round) {
    for (std::size_t key = 0; key < 800; ++key) {
      keeper.put(key, key + 1);
      if (key % 20 == 19) {
        keeper.put(fresh, fresh + 1);
        ++fresh;
      }
    }
  }
}

// Puts until somebody is killed: what happens in threads of the engine's takes its time.
void pour(const Keeper& keeper) {
  for (unsigned round = 0; round < 400; ++round) {
    const std::size_t begin = (round % 12) * 600;
    keeper.put(begin, begin + 600);
    keeper.touch(begin / 2, begin / 2 + 100, 2);  // some come up from below
    keeper.engine().maintain();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

const Scenario kScenarios[] = {
    {"NewFilled", "write:filled", fill, [](const Keeper& k) { k.put(2000, 2001); }},
    {"NewPublishing", "write:publishing", fill, [](const Keeper& k) { k.put(2000, 2001); }},
    {"OverwriteFilled", "write:filled", fill, [](const Keeper& k) { k.put(7, 8); }},
    {"OverwritePublishing", "write:publishing", fill, [](const Keeper& k) { k.put(7, 8); }},
    {"LargeFilled", "write:filled", fill, [](const Keeper& k) { k.put(96, 97); }},
    {"LargePublishing", "write:publishing", fill, [](const Keeper& k) { k.put(96, 97); }},
    {"FirstOfAll", "write:publishing", nothing, [](const Keeper& k) { k.put(0, 1); }},
    {"Erase", "erase:removing", fill, [](const Keeper& k) { k.erase(5, 6); }},
    {"EraseLarge", "erase:removing", fill, [](const Keeper& k) { k.erase(96, 97); }},
    {"Flush", "flush:hidden", fill, [](const Keeper& k) { k.flush(); }},
    {"FlushEmptied", "domain:emptied", fill, [](const Keeper& k) { k.flush(); }},
    {"EvictionEmptied", "domain:emptied", fill, [](const Keeper& k) { k.put(2000, 8000); }, true,
     false, 12 * kMiB, kSmall},
    {"EvictionKeeps", "domain:copied",
     [](const Keeper& k) {
       k.put(0, 2500);
       k.touch(0, 2500, 3);
     },
     [](const Keeper& k) {
       for (std::size_t round = 0; round < 8; ++round) {
         k.put(round * 900, round * 900 + 900);
         k.touch(round * 900, round * 900 + 900, 3);
       }
     },
     true, false, 12 * kMiB, kSmall},
    {"CompactionCopied", "domain:copied", fill_to_compact, overwrite_most, true, false, 12 * kMiB,
     kMiB},
    {"CompactionEmptied", "domain:emptied", fill_to_compact, overwrite_most, true, false, 12 * kMiB,
     kMiB},
    {"ResizeEmptied", "domain:emptied", fill, [](const Keeper& k) { resize(k, 128 * kKiB); }, true},
    {"LruKeeps", "domain:copied",
     [](const Keeper& k) {
       k.put(0, 1200);
       k.touch(0, 1200, 2);
     },
     [](const Keeper& k) {
       for (std::size_t round = 0; round < 9; ++round) {
         k.put(round * 800, round * 800 + 800);
         k.touch(0, 400, 2);
       }
     },
     true, false, 12 * kMiB, kSmall, PolicyKind::Lru},
    // An index so full that entries move to make room.
    {"IndexMoving", "index:moving", nothing, [](const Keeper& k) { k.put(0, 8000); }, true, false,
     6 * kMiB, 3 * kMiB, PolicyKind::Fifo, 1150},
    {"NvmDemoting", "domain:demoting", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmAppended", "nvm:appended", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmRegionFull", "nvm:region_full", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmHeaderWritten", "nvm:header_written", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmRegionWritten", "nvm:region_written", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmReinserting", "nvm:reinserting", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmRegionEmptied", "nvm:region_emptied", fill, pour, true, true, 24 * kMiB, kSmall},
    {"NvmPromoting", "promote:filled", fill, pour, true, true, 24 * kMiB, kSmall},
};

// Where a start or an orderly end may be cut off.
const char* const kStartPoints[] = {"adopt:begun", "adopt:checked", "adopt:domains",
                                    "arena:started"};

class CrashTest : public ::testing::Test {
 protected:
  void use(const Scenario& scenario) {
    NamespaceConfig pin =
        name_space("pin", {domain("all", scenario.budget_bytes, scenario.policy)});
    if (scenario.nvm) {
      pin.nvm.budget_bytes = 24 * 64 * kKiB;
      pin.nvm.promotion = PromotionKind::Always;
    }
    config_ = engine_config(scenario.memory_bytes,
                            {pin, name_space("user", {domain("all", 256 * kKiB)})});
    config_.segment_bytes = kSegment;
    config_.expected_item_bytes = scenario.item_bytes;
    config_.persist.dir = folder_.path();
    config_.persist.name = "crash";
    if (scenario.nvm) {
      config_.nvm.devices = {{folder_.file("nvm"), 64 * kKiB + 32 * 64 * kKiB}};
      config_.nvm.region_bytes = 64 * kKiB;
      config_.nvm.direct = false;  // tmpfs knows no other way
      config_.nvm.io_threads = 2;
      config_.nvm.read_memory_bytes = 4 * kMiB;
      config_.nvm.write_buffers = 8;
    }
    evicts_ = scenario.evicts;
  }

  // Dies at `point` while it works; what it acknowledged is in the ledger.
  void kill_at(const char* point, const Step& before, const Step& until) {
    const End end = end_of([&] {
      const auto engine = make_engine(config_, clock_, false);
      const Keeper keeper(*engine, ledger_);
      before(keeper);
      const Assassin assassin(point);
      until(keeper);
    });
    ASSERT_EQ(end, End::Killed) << point << " is never reached, or the child fails";
  }
  // Dies at `point` of its start; false when the start does not come by there.
  bool kill_start_at(const char* point) {
    const End end = end_of([&] {
      const Assassin assassin(point);
      make_engine(config_, clock_, false);
      // An orderly end would hide what a repeated start is to find.
      _exit(3);
    });
    EXPECT_NE(end, End::Failed);
    return end == End::Killed;
  }

  std::unique_ptr<Engine> start() { return make_engine(config_, clock_, false); }

  // Adopts, compares, goes on in every way, ends in order, and starts once more.
  void expect_well(std::size_t least) {
    {
      const auto engine = start();
      const StartReport& report = engine->start_report();
      EXPECT_TRUE(report.memory == "checked" || (report.memory == "new" && least == 0))
          << report.memory << ": " << report.memory_reason;
      const Keeper keeper(*engine, ledger_);
      EXPECT_GE(keeper.compare(evicts_), least);
      if (HasFailure()) return;
      go_on(keeper);
      if (HasFailure()) return;
      EXPECT_TRUE(engine->shutdown());
    }
    const auto engine = start();
    EXPECT_EQ(engine->start_report().memory, "clean") << engine->start_report().memory_reason;
    const Keeper keeper(*engine, ledger_);
    keeper.compare(evicts_);
    go_on(keeper);
  }
  void go_on(const Keeper& keeper) {
    keeper.put(0, 1500);
    keeper.erase(0, 1500, 7);
    keeper.compare(evicts_);
    if (evicts_) {
      for (std::size_t round = 0; round < 6; ++round) {
        keeper.put(round * 1000, round * 1000 + 2000);
        keeper.engine().maintain();
      }
      keeper.compare(true);
      resize(keeper, 256 * kKiB);
      keeper.compare(true);
      resize(keeper, kSmall);
    }
    keeper.flush();
    EXPECT_EQ(keeper.compare(false), 0U);
    keeper.put(0, 500);
    keeper.compare(evicts_);
  }

  CrashFolder folder_;
  Ledger ledger_;
  ManualClock clock_;
  EngineConfig config_;
  bool evicts_ = false;
};

class CrashAt : public CrashTest, public ::testing::WithParamInterface<Scenario> {};

TEST_P(CrashAt, TheNextProcessGoesOn) {
  const Scenario& scenario = GetParam();
  use(scenario);
  kill_at(scenario.point, scenario.before, scenario.until);
  if (HasFatalFailure()) return;
  expect_well(0);
}

// The start after a kill is killed too, at each of its own places, and then once more.
TEST_P(CrashAt, AStartThatIsKilledCanBeRepeated) {
  const Scenario& scenario = GetParam();
  use(scenario);
  kill_at(scenario.point, scenario.before, scenario.until);
  if (HasFatalFailure()) return;
  unsigned killed = 0;
  for (const char* point : kStartPoints) killed += kill_start_at(point) ? 1 : 0;
  EXPECT_GE(killed, 3U) << "a start that adopts comes by those places";
  expect_well(0);
}

INSTANTIATE_TEST_SUITE_P(All, CrashAt, ::testing::ValuesIn(kScenarios),
                         [](const auto& with) { return std::string(with.param.name); });

// A whole life before the kill, that nothing of it hides: no eviction, so that all must be there.
TEST_F(CrashTest, AllThatWasAcknowledgedIsThere) {
  use({"", "", nothing, nothing});
  kill_at(
      "erase:removing",
      [](const Keeper& k) {
        k.put(0, 3000);
        k.erase(0, 3000, 3);
        k.put(0, 900);
        k.flush();
        k.put(500, 4000);
        k.erase(500, 4000, 5);
      },
      [](const Keeper& k) { k.erase(501, 502); });
  if (HasFatalFailure()) return;
  expect_well(2700);
}

// The file of a start that was cut off before it had an arena is made anew.
TEST_F(CrashTest, AFirstStartThatIsKilledLeavesNothingInTheWay) {
  use({"", "", nothing, nothing});
  for (const char* point : {"arena:created", "arena:started"}) {
    EXPECT_TRUE(kill_start_at(point)) << point;
  }
  expect_well(0);
}

// An orderly end that is cut off is none: the next start checks everything.
TEST_F(CrashTest, AnOrderlyEndThatIsKilledIsNone) {
  use({"", "", nothing, nothing});
  kill_at("leave:summed", fill, [](const Keeper& k) { k.engine().shutdown(); });
  if (HasFatalFailure()) return;
  expect_well(2000);
}

}  // namespace
}  // namespace fc::testing
