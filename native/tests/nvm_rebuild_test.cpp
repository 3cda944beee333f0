// What a rebuild believes of regions that were written by hand, and that no region of an earlier
// time is ever taken for one of this.
#include <algorithm>
#include <deque>
#include <map>

#include "memory_device.hpp"
#include "nvm/region_log.hpp"
#include "restart_support.hpp"

namespace fc::testing {
namespace {

using nvm::JournalEntry;
using nvm::RegionHeader;
using nvm::RegionTrailer;

constexpr std::uint64_t bytes_for(std::size_t regions) {
  return layout::kNvmDataOffset + regions * kRegionBytes;
}

// ---- rules
// -----------------------------------------------------------------------------------------

struct Listed {
  std::uint64_t hash;
  std::uint32_t offset;
};

struct Written {
  std::uint32_t region = 0;
  std::uint64_t generation = 0;
  std::vector<Listed> list;
  const char* ns = "pin";
  std::uint16_t incarnation = 3;
  Tick last_expiry = ~Tick{0};
  Tick first_expiry = kNever;
};

constexpr std::uint64_t kSetId = 0x5E7;
constexpr std::uint32_t kRecord = 128;  // bytes from one to the next

// A hash of which the bits that an entry has are the number's own.
std::uint64_t hash_of(std::uint64_t number) {
  return XXH3_64bits(&number, sizeof(number));
}

std::vector<Listed> records(std::uint64_t first, std::uint32_t count) {
  std::vector<Listed> list;
  for (std::uint32_t i = 0; i < count; ++i) {
    list.push_back(
        {hash_of(first + i), static_cast<std::uint32_t>(sizeof(RegionHeader)) + i * kRecord});
  }
  return list;
}

class NvmRebuild : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kOfDevice = 8;
  static constexpr std::uint32_t kPinBudget = 6;

  NvmRebuild() {
    config_.namespaces = {with_nvm(name_space("pin", {domain("all", kMiB)}), kPinBudget),
                          with_nvm(name_space("user", {domain("all", kMiB)}), 4)};
    config_.nvm = nvm_config("", 2 * kOfDevice);
    plan_.set_id = kSetId;
    plan_.now = 1000;
  }

  std::byte* at(std::uint32_t region, std::size_t offset = 0) {
    return devices_[region / kOfDevice]->data().data() + layout::kNvmDataOffset +
           std::size_t{region % kOfDevice} * kRegionBytes + offset;
  }
  void write(const Written& what) {
    RegionHeader header{};
    header.magic = nvm::kHeaderMagic;
    header.generation = what.generation;
    header.set_id = kSetId;
    header.region = what.region;
    header.incarnation = what.incarnation;
    header.namespace_seed = namespace_seed(what.ns);
    header.checksum = header.sum();
    std::memcpy(at(what.region), &header, sizeof(header));
    RegionTrailer trailer{};
    trailer.magic = nvm::kTrailerMagic;
    trailer.generation = what.generation;
    trailer.records = static_cast<std::uint32_t>(what.list.size());
    trailer.used_bytes =
        what.list.empty() ? sizeof(RegionHeader) : what.list.back().offset + kRecord;
    trailer.last_expiry = what.last_expiry;
    trailer.first_expiry = what.first_expiry;
    write_tail(what, trailer);
  }
  // List and trailer, with right checksums whatever they say.
  void write_tail(const Written& what, RegionTrailer trailer) {
    const std::size_t bytes = nvm::list_bytes(what.list.size());
    std::byte* list = at(what.region, kRegionBytes - sizeof(trailer) - bytes);
    std::memset(list, 0, bytes);
    for (std::size_t i = 0; i < what.list.size(); ++i) {
      const std::uint32_t units = what.list[i].offset / layout::kNvmRecordAlignment;
      std::memcpy(list + i * 8, &what.list[i].hash, 8);
      std::memcpy(list + what.list.size() * 8 + i * 4, &units, 4);
    }
    trailer.list_checksum = XXH3_64bits_withSeed(list, bytes, trailer.generation);
    trailer.checksum = trailer.sum();
    std::memcpy(at(what.region, kRegionBytes - sizeof(trailer)), &trailer, sizeof(trailer));
  }

  void rebuild() { rebuild({devices_.begin(), devices_.end()}); }
  void rebuild(const std::vector<std::shared_ptr<NvmDevice>>& devices) {
    log_.reset();
    regions_ = std::make_unique<nvm::Regions>(devices, kRegionBytes, 1000);
    nvm::StateShape shape;
    shape.region_bytes = kRegionBytes;
    shape.regions = regions_->count();
    shape.buffers = nvm::buffers_of(config_);
    std::string why;
    state_ = std::make_unique<nvm::State>("", shape, report_, why);
    regions_->use(state_->rows());
    Geometry geometry;
    geometry.nvm_slots = buckets_ * layout::kSlotsPerBucket;
    log_ = std::make_unique<nvm::RegionLog>(config_, geometry, *regions_, *state_, epochs_, moved_);
    for (NamespaceIndex n = 0; n < 2; ++n) {
      incarnations_[n] = static_cast<std::uint16_t>(n + 1);
      log_->ns(n).incarnation = &incarnations_[n];
    }
    memory_ = std::vector<Bucket>(buckets_);
    index_ = std::make_unique<Index>(memory_.data(), memory_.size());
    found_ = log_->rebuild(plan_, *index_);
    entries_.clear();
    std::uint64_t items = 0;
    for (const Bucket& bucket : memory_) {
      for (const Slot& slot : bucket.slots) {
        const Entry entry(slot.load());
        if (entry.empty()) continue;
        EXPECT_TRUE(entries_.emplace(entry.nvm_location(), entry).second)
            << "a place is there twice";
      }
    }
    for (NamespaceIndex n = 0; n < 2; ++n) items += log_->ns(n).items;
    EXPECT_EQ(items, entries_.size());
    EXPECT_EQ(found_.items, entries_.size());
  }
  bool has(std::uint32_t region, const Listed& record) {
    const auto found = entries_.find(regions_->location(region, record.offset));
    return found != entries_.end() && found->second.may_be_nvm_of(record.hash);
  }
  std::size_t count(const Written& what) {
    return static_cast<std::size_t>(
        std::count_if(what.list.begin(), what.list.end(),
                      [&](const Listed& record) { return has(what.region, record); }));
  }
  // The generation of the region that is written next.
  std::uint64_t next_generation() {
    DemotedRecord record;
    const std::string value(100, 'v');
    const std::span<const std::uint8_t> bytes(reinterpret_cast<const std::uint8_t*>(value.data()),
                                              value.size());
    record.ns = 0;
    record.incarnation = incarnations_[0];
    record.hash = 1;
    record.key = "key";
    record.value = {&bytes, 1};
    record.value_bytes = 100;
    const Demotion taken = log_->append(record, true, plan_.now, 0);
    EXPECT_TRUE(taken.taken());
    const std::uint64_t generation = regions_->at(regions_->region_of(taken.entry)).generation;
    log_->published(taken, false);
    return generation;
  }

  EngineConfig config_;
  nvm::RebuildPlan plan_;
  std::uint64_t buckets_ = 4096;
  std::vector<std::shared_ptr<MemoryDevice>> devices_{
      std::make_shared<MemoryDevice>("first", bytes_for(kOfDevice)),
      std::make_shared<MemoryDevice>("second", bytes_for(kOfDevice))};
  EpochManager epochs_;
  MovedKeys moved_{0, 1, 0};
  StartReport report_;
  std::array<std::atomic<std::uint16_t>, 2> incarnations_{};
  std::unique_ptr<nvm::Regions> regions_;
  std::unique_ptr<nvm::State> state_;
  std::vector<Bucket> memory_;
  std::unique_ptr<Index> index_;
  std::unique_ptr<nvm::RegionLog> log_;
  nvm::RegionLog::Adopted found_;
  std::map<std::uint64_t, Entry> entries_;  // by location
};

TEST_F(NvmRebuild, WhatIsListedIsThereAndNothingElse) {
  std::vector<Written> all;
  for (const std::uint32_t region : {0u, 3u, 7u, 8u, 15u}) {
    all.push_back({region, 10 + region, records(1000 * region, 200 + region)});
  }
  all.push_back({5, 40, records(90'000, 10), "user", 4});
  std::size_t listed = 0;
  for (const Written& each : all) {
    write(each);
    listed += each.list.size();
  }
  rebuild();
  EXPECT_EQ(entries_.size(), listed);
  for (const Written& each : all) EXPECT_EQ(count(each), each.list.size());
  EXPECT_EQ(found_.dropped, 0U);
  EXPECT_EQ(incarnations_[0], 3);
  EXPECT_EQ(incarnations_[1], 4);
  EXPECT_EQ(log_->ns(0).used_regions, 5U);
  // Oldest first: so they are emptied.
  EXPECT_EQ(log_->ns(0).sealed, (std::deque<std::uint32_t>{0, 3, 7, 8, 15}));
  for (const auto& [location, entry] : entries_) EXPECT_GE(entry.nvm_bytes(), kRecord);
}

TEST_F(NvmRebuild, AnOlderIncarnationIsDropped) {
  const Written old{1, 20, records(0, 50), "pin", 2};
  const Written latest{2, 21, records(100, 50), "pin", 3};
  write(old);
  write(latest);
  write({3, 10, records(200, 50), "pin", 2});
  rebuild();
  EXPECT_EQ(count(latest), 50U);
  EXPECT_EQ(entries_.size(), 50U);
  EXPECT_EQ(found_.dropped, 100U);
  EXPECT_EQ(incarnations_[0], 3);
}

TEST_F(NvmRebuild, NamespacesThatStartAnewDoNotShareAnIncarnation) {
  write({1, 20, records(0, 50), "pin", 2});  // which "user" was about to have
  rebuild();
  EXPECT_EQ(incarnations_[0], 2);
  EXPECT_NE(incarnations_[1], 2);
}

TEST_F(NvmRebuild, OfTwoThatMayBeOneKeysTheLaterStays) {
  const Written older{9, 20, {{hash_of(1), 64}, {hash_of(2), 64 + kRecord}}};
  const Written newer{
      2, 30, {{hash_of(3), 64}, {hash_of(1), 64 + kRecord}, {hash_of(1), 64 + 2 * kRecord}}};
  write(older);
  write(newer);
  for (int round = 0; round < 50; ++round) {  // whichever thread comes first
    rebuild();
    EXPECT_FALSE(has(9, older.list[0]));
    EXPECT_TRUE(has(9, older.list[1]));
    EXPECT_FALSE(has(2, newer.list[1]));
    EXPECT_TRUE(has(2, newer.list[2]));
    EXPECT_EQ(entries_.size(), 3U);
    EXPECT_EQ(found_.dropped, 2U);
    EXPECT_EQ(regions_->at(9).items, 1U);
    EXPECT_EQ(regions_->at(2).items, 2U);
  }
}

TEST_F(NvmRebuild, ABudgetKeepsTheNewest) {
  for (std::uint32_t r = 0; r < kPinBudget + 3; ++r) write({r, 100 - r, records(1000 * r, 20)});
  rebuild();
  for (std::uint32_t r = 0; r < kPinBudget + 3; ++r) {
    EXPECT_EQ(count({r, 100 - r, records(1000 * r, 20)}), r < kPinBudget ? 20U : 0U);
  }
  EXPECT_EQ(found_.dropped, 60U);
}

TEST_F(NvmRebuild, AnUnknownNamespaceOrAnotherSetIsDropped) {
  write({0, 20, records(0, 20), "gone"});
  write({1, 21, records(100, 20)});
  write({2, 22, records(200, 20)});
  RegionHeader header{};
  std::memcpy(&header, at(1), sizeof(header));
  header.set_id = kSetId + 1;
  header.checksum = header.sum();
  std::memcpy(at(1), &header, sizeof(header));
  std::memcpy(at(4), at(2), kRegionBytes);  // of another place
  rebuild();
  EXPECT_EQ(entries_.size(), 20U);
  EXPECT_EQ(count({2, 22, records(200, 20)}), 20U);
}

TEST_F(NvmRebuild, WhatHasExpiredIsDroppedAndWhatMayHaveInDoubt) {
  write({0, 20, records(0, 20), "pin", 3, plan_.now, 5});
  write({1, 21, records(100, 20), "pin", 3, plan_.now + 1, 5});
  write({2, 22, records(200, 20)});
  write({3, 23, records(300, 20), "pin", 3, ~Tick{0}, 5});
  rebuild();
  EXPECT_EQ(entries_.size(), 60U);
  EXPECT_EQ(count({0, 20, records(0, 20)}), 0U);
  plan_.drop_expiring = true;
  rebuild();
  EXPECT_EQ(entries_.size(), 20U);
  EXPECT_EQ(count({2, 22, records(200, 20)}), 20U);
}

TEST_F(NvmRebuild, WhatTheJournalNamesIsInvalid) {
  write({0, 20, records(0, 20)});
  write({1, 21, records(100, 20)});
  write({2, 22, records(200, 20), "user"});
  write({3, 30, records(300, 20), "user"});
  const std::vector<JournalEntry> journal{
      JournalEntry::record(0, 20, 64 + kRecord), JournalEntry::record(0, 19, 64),
      JournalEntry::region_gone(1, 21), JournalEntry::region_gone(0, 21),
      JournalEntry::flush(namespace_seed("user"), 30)};
  plan_.journal = journal;
  rebuild();
  EXPECT_EQ(count({0, 20, records(0, 20)}), 19U);
  EXPECT_FALSE(has(0, records(0, 20)[1]));
  EXPECT_EQ(count({1, 21, records(100, 20)}), 0U);
  EXPECT_EQ(count({2, 22, records(200, 20)}), 0U);
  EXPECT_EQ(count({3, 30, records(300, 20)}), 20U);
}

TEST_F(NvmRebuild, AnIndexThatIsTooSmallDropsTheRest) {
  buckets_ = 8;
  write({0, 20, records(0, 200)});
  rebuild();
  EXPECT_LE(entries_.size(), 64U);
  EXPECT_GT(entries_.size(), 32U);
  EXPECT_EQ(found_.items + found_.dropped, 200U);
}

TEST_F(NvmRebuild, WhatCannotBeReadIsLeftOut) {
  write({0, 20, records(0, 20)});
  write({1, 21, records(100, 20)});
  auto faults = std::make_shared<FaultDevice>(devices_[0]);
  faults->add(FaultRule::fail(EIO).reads().range(
      layout::kNvmDataOffset + 2 * kRegionBytes - kBlockBytes, kBlockBytes));
  rebuild({faults, devices_[1]});
  EXPECT_EQ(entries_.size(), 20U);
  EXPECT_EQ(count({0, 20, records(0, 20)}), 20U);
}

// Any byte of header, list and trailer; sums that fit what is absurd; noise.
TEST_F(NvmRebuild, DamageCostsARegionAndMakesUpNothing) {
  const Written whole{1, 21, records(100, 300)};
  const Written hit{2, 22, records(1000, 300)};
  const auto check = [&](const char* what, std::size_t place) {
    rebuild();
    ASSERT_EQ(count(whole), 300U) << what << ' ' << place;
    // What bears a checksum is believed whole or not at all.
    ASSERT_TRUE(entries_.size() == 300 || (entries_.size() == 600 && count(hit) == 300))
        << what << ' ' << place << ": " << entries_.size();
  };
  const std::size_t tail = sizeof(RegionTrailer) + nvm::list_bytes(300);
  std::size_t lost = 0;
  for (std::size_t i = 0; i < sizeof(RegionHeader) + tail; i += i < 64 ? 1 : 37) {
    write(whole);
    write(hit);
    const std::size_t place = i < 64 ? i : kRegionBytes - (i - 63);
    *at(2, place) ^= std::byte{0x10};
    check("a flip at", place);
    lost += entries_.size() == 300 ? 1 : 0;
  }
  EXPECT_GT(lost, 150U);
  std::mt19937_64 random(seed_of(83));
  for (std::size_t round = 0; round < scaled(300); ++round) {
    write(whole);
    write(hit);
    RegionTrailer trailer{};
    std::memcpy(&trailer, at(2, kRegionBytes - sizeof(trailer)), sizeof(trailer));
    Written absurd = hit;
    switch (random() % 5) {
      case 0:
        trailer.records = static_cast<std::uint32_t>(random() >> (random() % 64));
        break;
      case 1:
        trailer.used_bytes = static_cast<std::uint32_t>(random() >> (random() % 64)) % 30'000;
        break;
      case 2:
        absurd.list[random() % 300].offset = static_cast<std::uint32_t>(random() % 16) * 8;
        break;
      case 3:
        std::swap(absurd.list[random() % 300].offset, absurd.list[random() % 300].offset);
        break;
      default:
        absurd.list[random() % 300].offset = ~7u;
    }
    if (trailer.used_bytes >= hit.list.back().offset + kRecord) trailer.used_bytes = 0;
    write_tail(absurd, trailer);
    rebuild();
    ASSERT_EQ(count(whole), 300U);
    for (const auto& [location, entry] : entries_) {
      const std::uint32_t region = regions_->region_of(entry);
      ASSERT_TRUE(region == 1 || region == 2);
      ASSERT_GE(regions_->offset_in_region(entry), sizeof(RegionHeader));
    }
  }
  for (int round = 0; round < 20; ++round) {
    for (std::uint32_t r = 0; r < 2 * kOfDevice; ++r) {
      for (std::size_t i = 0; i < kRegionBytes; i += 8) {
        const std::uint64_t noise = random();
        std::memcpy(at(r, i), &noise, sizeof(noise));
      }
    }
    rebuild();
    EXPECT_EQ(entries_.size(), 0U);
  }
}

// ---- a generation is had once
// ----------------------------------------------------------------------

TEST_F(NvmRebuild, ANewRegionIsNewerThanAllThatCounts) {
  write({0, 20, records(0, 20)});
  write({1, 70, records(100, 20), "gone"});
  rebuild();
  EXPECT_GT(next_generation(), 70U);
}

// An orderly stop takes a region's header and leaves its trailer and its records where they are.
TEST_F(NvmRebuild, ANewRegionIsNewerThanThoseThatLostTheirHeaders) {
  write({0, 20, records(0, 20)});
  write({1, 70, records(100, 20)});
  std::memset(at(1), 0, kBlockBytes);
  rebuild();
  EXPECT_EQ(entries_.size(), 20U);
  EXPECT_GT(next_generation(), 70U);
}

// The machine loses power when a region's header is on the device and nothing else of it. What lay
// there before had the same keys deleted, and that was acknowledged.
class NvmPowerLoss : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kRegions = 12;
  static constexpr int kKeys = 2000;

  NvmPowerLoss() {
    config_ = engine_config(
        8 * kMiB,
        {with_nvm(name_space("pin", {domain("all", 128 * kKiB, PolicyKind::Fifo)}), kRegions)});
    config_.nvm = nvm_config("memory", kRegions + 4);
    config_.persist.dir = shared_.path();
    config_.persist.name = "cache";
    config_.persist.journal = journal_;
    config_.persist.durability = DurabilityKind::Sync;
  }
  const StartReport& start() {
    engine_.reset();
    for (const char* name : {"cache.arena", "cache.nvm"}) {
      std::filesystem::remove(shared_.file(name));
    }
    engine_ = make_engine(config_, clock_, false, {device_});
    return engine_->start_report();
  }
  NamespaceIndex pin() { return engine_->find_namespace("pin"); }
  static std::string key(const char* of, int k) { return of + std::to_string(10'000 + k); }
  void fill(const char* of) {
    for (int k = 0; k < kKeys; ++k) {
      ASSERT_EQ(put(*engine_, pin(), key(of, k), std::string(284, of[0])), WriteStatus::Stored);
      if (k % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  void erase_all() {
    for (int k = 0; k < kKeys; ++k) erase(*engine_, pin(), key("old", k));
  }
  // Fills until a header is written, and goes back to that moment.
  void lose_power_at_a_header() {
    std::vector<std::byte> then;
    const std::string journal_then = shared_.file("journal then");
    device_->written = [&](const IoRequest& request) {
      if (!then.empty() || request.offset < layout::kNvmDataOffset ||
          (request.offset - layout::kNvmDataOffset) % kRegionBytes != 0 ||
          request.bytes != kBlockBytes) {
        return;
      }
      then = device_->data();
      std::filesystem::copy_file(journal_, journal_then);
    };
    fill("new");
    engine_.reset();
    device_->written = nullptr;
    ASSERT_FALSE(then.empty());
    device_->data() = std::move(then);
    std::filesystem::rename(journal_then, journal_);
  }
  int come_back() {
    int count = 0;
    for (int k = 0; k < kKeys; ++k) {
      count += carries_value(get(*engine_, pin(), key("old", k)).status) ? 1 : 0;
    }
    return count;
  }

  SharedFolder shared_;
  const std::string journal_ = shared_.file("journal");
  ManualClock clock_;
  EngineConfig config_;
  std::shared_ptr<MemoryDevice> device_ =
      std::make_shared<MemoryDevice>("memory", bytes_for(kRegions + 4));
  std::unique_ptr<Engine> engine_;
};

TEST_F(NvmPowerLoss, BringsNothingBackThatAnOrderlyStopTookOut) {
  start();
  fill("old");
  erase_all();
  ASSERT_TRUE(engine_->shutdown());
  ASSERT_EQ(start().nvm, "rebuilt") << engine_->start_report().nvm_reason;
  EXPECT_EQ(come_back(), 0);
  lose_power_at_a_header();
  ASSERT_EQ(start().nvm, "rebuilt") << engine_->start_report().nvm_reason;
  EXPECT_EQ(come_back(), 0);
}

TEST_F(NvmPowerLoss, BringsNothingBackThatAnEmptyStartLeft) {
  start();
  fill("old");
  engine_.reset();
  std::filesystem::remove(journal_);
  ASSERT_EQ(start().nvm, "empty");
  EXPECT_EQ(come_back(), 0);
  lose_power_at_a_header();
  ASSERT_EQ(start().nvm, "rebuilt") << engine_->start_report().nvm_reason;
  EXPECT_EQ(come_back(), 0);
}

}  // namespace
}  // namespace fc::testing
