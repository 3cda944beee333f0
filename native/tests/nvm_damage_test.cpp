// Bytes on a device that are not what was written there: bits flipped anywhere, regions of another
// place or time, lists that are whole and wrong.
#include <set>

#include "nvm/format.hpp"
#include "nvm_support.hpp"

namespace fc::testing {
namespace {

using nvm::ListedRecord;
using nvm::RecordHeader;
using nvm::RegionHeader;
using nvm::RegionTrailer;

std::uint64_t region_begin(std::uint32_t region) {
  return layout::kNvmDataOffset + std::uint64_t{region} * kRegionBytes;
}

// The whole content of a device, read and written past the engine.
class Image {
 public:
  explicit Image(NvmDevice& device)
      : queue_(device.make_queue(1)), bytes_(device.bytes()), data_(aligned(bytes_)) {
    read();
  }
  void read() { transfer(IoRequest::Kind::Read, 0, bytes_); }
  // Writes the blocks in which these bytes lie.
  void write(std::uint64_t first, std::uint64_t bytes) {
    const std::uint64_t begin = first / kBlockBytes * kBlockBytes;
    const std::uint64_t end = (first + bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    transfer(IoRequest::Kind::Write, begin, end - begin);
  }
  std::byte* at(std::uint64_t offset) { return data_.get() + offset; }
  template <class Part>
  Part part(std::uint64_t offset) {
    Part got;
    std::memcpy(&got, at(offset), sizeof(got));
    return got;
  }
  void flip(std::uint64_t bit) { *at(bit / 8) ^= std::byte{1} << (bit % 8); }

 private:
  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  static std::unique_ptr<std::byte, Free> aligned(std::size_t bytes) {
    return std::unique_ptr<std::byte, Free>(
        static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, bytes)));
  }
  void transfer(IoRequest::Kind kind, std::uint64_t offset, std::uint64_t bytes) {
    IoRequest request;
    request.kind = kind;
    request.offset = offset;
    request.data = at(offset);
    request.bytes = static_cast<std::uint32_t>(bytes);
    ASSERT_EQ(run_request(*queue_, request), static_cast<std::int64_t>(bytes));
  }

  const std::unique_ptr<IoQueue> queue_;
  const std::size_t bytes_;
  const std::unique_ptr<std::byte, Free> data_;
};

// A region as it lies on the device.
struct OnDevice {
  std::uint32_t region = 0;
  RegionTrailer trailer{};
  std::vector<ListedRecord> list;

  std::uint64_t begin() const { return region_begin(region); }
  std::uint64_t trailer_begin() const { return begin() + kRegionBytes - sizeof(RegionTrailer); }
  std::uint64_t hashes_begin() const { return trailer_begin() - nvm::list_bytes(list.size()); }
  std::uint64_t offsets_begin() const { return hashes_begin() + list.size() * 8; }
};

// All that are whole. What was damaged in an earlier life of a free region stays so.
std::vector<OnDevice> regions_of(Image& image, std::uint32_t count) {
  std::vector<OnDevice> regions;
  for (std::uint32_t r = 0; r < count; ++r) {
    OnDevice found;
    found.region = r;
    const auto header = image.part<RegionHeader>(found.begin());
    if (header.magic != nvm::kHeaderMagic || header.checksum != header.sum()) continue;
    EXPECT_EQ(header.region, r);
    if (!nvm::read_trailer(image.at(found.trailer_begin()), kRegionBytes, header.generation,
                           found.trailer)) {
      continue;
    }
    const std::uint64_t bytes = nvm::list_bytes(found.trailer.records);
    if (!nvm::read_list(image.at(found.trailer_begin() - bytes), found.trailer, found.list)) {
      continue;
    }
    EXPECT_FALSE(found.list.empty());
    regions.push_back(std::move(found));
  }
  return regions;
}

class NvmDamage : public NvmTest {
 protected:
  static constexpr std::uint32_t kRegions = kSmallBudget + 4;
  static constexpr std::size_t kRound = 5200;  // more items than the log and DRAM hold

  void SetUp() override { start(small_config(folder_.file("nvm"))); }

  // The keys of [from, to) that are found on NVM.
  std::set<std::string> found_on_nvm(std::size_t from, std::size_t to) {
    std::set<std::string> found;
    const std::vector<Got> got = look(from, to);
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (!carries_value(got[i].status)) continue;
      EXPECT_TRUE(got[i].value == value(from + i)) << key(from + i) << " has a wrong value";
      if (got[i].status == CellStatus::HitNvm) found.insert(key(from + i));
    }
    return found;
  }
  // All that ever came down is here, or has left for a reason that was counted; `twice`: damaged
  // records that two keys of one tag met.
  void expect_counters_add_up(double twice = 0) {
    const Counters counters = Counters::of(*engine_);
    EXPECT_EQ(pin_counter("demoted_total") + twice,
              pin_counter("items") + pin_counter("evicted_total") + lost("device") +
                  counters.at("feature_cache_nvm_checksum_errors_total") +
                  counters.at("feature_cache_index_below_dropped_total"));
    EXPECT_EQ(counters.sum("feature_cache_nvm_device_outages_total"), 0);
    EXPECT_EQ(counters.at("feature_cache_index_displaced_total"), 0);
    EXPECT_EQ(lost("out_of_service"), 0);
  }
};

// ---- flipped bits
// --------------------------------------------------------------------------------

// Where a bit may flip. What lies before kFirstHarmful is read by nobody while the engine runs.
enum class Where : std::uint8_t {
  Superblock,
  ProbeBlock,
  Header,
  Padding,
  Gap,
  RecordChecksum,
  RecordSize,
  RecordExpiry,
  RecordKeySize,
  RecordIncarnation,
  Key,
  Value,
  Hashes,
  Offsets,
  Trailer,
  Count
};
constexpr auto kFirstHarmful = Where::RecordChecksum;
constexpr auto kFirstOfList = Where::Hashes;

class NvmFlips : public NvmDamage {
 protected:
  // What a group of flips has hit.
  struct Hit {
    std::set<std::string> records;  // keys
    std::set<std::uint32_t> lists;  // regions
  };

  // A place of that kind: its first byte and how many bytes there are; none: no such place.
  std::pair<std::uint64_t, std::uint64_t> place_of(Image& image, const OnDevice& region,
                                                   std::size_t record, Where where) {
    const std::uint64_t at = region.begin() + region.list[record].offset;
    const auto header = image.part<RecordHeader>(at);
    const std::uint64_t payload = at + sizeof(RecordHeader);
    const std::uint64_t end = payload + header.key_bytes + header.value_bytes();
    switch (where) {
      case Where::Superblock:
        return {0, kBlockBytes};
      case Where::ProbeBlock:
        return {nvm::kProbeOffset, kBlockBytes};
      case Where::Header:
        return {region.begin(), sizeof(RegionHeader)};
      case Where::Padding:
        return {end, at + header.bytes() - end};
      case Where::Gap: {
        const std::uint64_t used = region.begin() + region.trailer.used_bytes;
        return {used, region.hashes_begin() - used};
      }
      case Where::RecordChecksum:
        return {at, 4};
      case Where::RecordSize:
        return {at + offsetof(RecordHeader, size_and_domain), 4};
      case Where::RecordExpiry:
        return {at + offsetof(RecordHeader, expiry), 4};
      case Where::RecordKeySize:
        return {at + offsetof(RecordHeader, key_bytes), 2};
      case Where::RecordIncarnation:
        return {at + offsetof(RecordHeader, incarnation), 2};
      case Where::Key:
        return {payload, header.key_bytes};
      case Where::Value:
        return {payload + header.key_bytes, header.value_bytes()};
      case Where::Hashes:
        return {region.hashes_begin(), region.list.size() * 8};
      case Where::Offsets:
        return {region.offsets_begin(), region.trailer_begin() - region.offsets_begin()};
      case Where::Trailer:
        return {region.trailer_begin(), sizeof(RegionTrailer)};
      case Where::Count:
        break;
    }
    return {};
  }

  // Flips so many bits of the device, of every kind of place alike.
  Hit flip(std::size_t flips, std::mt19937_64& random) {
    Image image(*fault_);
    const std::vector<OnDevice> regions = regions_of(image, kRegions);
    EXPECT_GE(regions.size(), kSmallBudget - 6);
    // A key that was kept when its region went may lie in two: the later one is its.
    std::map<std::string, std::uint64_t> latest;
    const auto key_at = [&](const OnDevice& region, std::size_t record) {
      const std::uint64_t at = region.begin() + region.list[record].offset;
      const auto header = image.part<RecordHeader>(at);
      return std::string(reinterpret_cast<const char*>(image.at(at + sizeof(RecordHeader))),
                         header.key_bytes);
    };
    for (const OnDevice& region : regions) {
      for (std::size_t i = 0; i < region.list.size(); ++i) {
        std::uint64_t& generation = latest[key_at(region, i)];
        generation = std::max(generation, region.trailer.generation);
      }
    }
    Hit hit;
    std::set<std::uint64_t> bits;
    while (bits.size() < flips) {
      const auto where = static_cast<Where>(random() % static_cast<unsigned>(Where::Count));
      // A few regions take all that hits lists: of the others the list is to be believed.
      const std::size_t some = where >= kFirstOfList ? regions.size() / 4 : regions.size();
      const OnDevice& region = regions[random() % some];
      const std::size_t record = random() % region.list.size();
      const auto [first, bytes] = place_of(image, region, record, where);
      if (bytes == 0 || !bits.insert(8 * first + random() % (8 * bytes)).second) continue;
      ++flipped_[static_cast<std::size_t>(where)];
      if (where >= kFirstOfList) {
        hit.lists.insert(region.region);
      } else if (where >= kFirstHarmful) {
        const std::string key = key_at(region, record);
        if (latest[key] == region.trailer.generation) hit.records.insert(key);
      }
    }
    for (const std::uint64_t bit : bits) image.flip(bit);
    for (const std::uint64_t bit : bits) image.write(bit / 8, 1);
    return hit;
  }

  std::array<std::size_t, static_cast<std::size_t>(Where::Count)> flipped_{};
};

TEST_F(NvmFlips, AreDetectedOrHarmless) {
  std::mt19937_64 random(seed_of(51));
  value_bytes_ = 270;  // leaves a gap between records and list, and padding behind a record
  constexpr std::size_t kRounds = scaled(25);
  constexpr std::size_t kFlips = 180;
  static_assert(scaled(1000) < 1000 || kRounds * kFlips >= 4000);
  std::size_t end = 0;
  double twice = 0;
  double walked = 0;
  double kept_damaged = 0;
  for (std::size_t round = 0; round < kRounds; ++round) {
    const std::size_t begin = end;
    end += kRound;
    // Filling on empties every region that the last round has damaged.
    fill(begin, end);
    ASSERT_TRUE(items_add_up(0, end)) << "entries were left behind, round " << round;
    walked = lost("device");
    kept_damaged =
        lost("checksum") - Counters::of(*engine_).at("feature_cache_nvm_checksum_errors_total");
    const std::set<std::string> before = found_on_nvm(0, end);
    ASSERT_GT(before.size(), 15 * kItemsOfRegion);
    const double lost_before = lost("checksum");
    const Hit hit = flip(kFlips, random);
    ASSERT_FALSE(hit.records.empty());
    ASSERT_FALSE(hit.lists.empty());
    // In every other round the region writer meets the damage first: all items have been hit, so
    // it would keep them.
    if (round % 2 == 1) continue;
    const std::set<std::string> after = found_on_nvm(0, end);
    std::size_t gone = 0;
    for (const std::string& key : before) {
      if (after.contains(key)) continue;
      ++gone;
      EXPECT_TRUE(hit.records.contains(key)) << key << " is gone, but was not hit";
    }
    std::size_t expected = 0;
    for (const std::string& key : hit.records) expected += before.contains(key) ? 1 : 0;
    // Some of those lie in memory again, being kept: then a flip hits a copy that nobody reads.
    EXPECT_LE(gone, expected);
    EXPECT_GE(gone * 10, expected * 7);
    // A key whose tag is a damaged record's meets it as its own key does: counted for both.
    const double met_twice = lost("checksum") - lost_before - static_cast<double>(gone);
    EXPECT_GE(met_twice, 0);
    EXPECT_LE(met_twice, 3);
    twice += met_twice;
    EXPECT_EQ(pin_counter("items"), static_cast<double>(after.size()));
  }
  EXPECT_GT(walked, 0) << "no list was ever found damaged";
  EXPECT_GT(kept_damaged, 0) << "no record that was to be kept was ever found damaged";
  for (std::size_t i = 0; i < flipped_.size(); ++i) EXPECT_GT(flipped_[i], 10U) << "place " << i;
  fill(end, end + kRound);
  EXPECT_TRUE(items_add_up(0, end + kRound));
  expect_counters_add_up(twice);
  std::cout << "flips " << kRounds * kFlips << ", walked " << walked << ", kept damaged "
            << kept_damaged << ", found damaged " << lost("checksum") << std::endl;
}

// ---- whole and wrong
// -----------------------------------------------------------------------------

TEST_F(NvmDamage, ARegionOfAnotherPlaceIsNone) {
  fill(0, 4000);
  ASSERT_TRUE(settled());
  ASSERT_EQ(check(0, 4000).missing, 0U);
  Image image(*fault_);
  const std::vector<OnDevice> regions = regions_of(image, kRegions);
  ASSERT_GT(regions.size(), 10U);
  std::memcpy(image.at(regions[3].begin()), image.at(regions[2].begin()), kRegionBytes);
  image.write(regions[3].begin(), kRegionBytes);
  const double items = pin_counter("items");
  const Found found = check(0, 4000);
  EXPECT_EQ(found.missing, regions[3].list.size());
  EXPECT_EQ(lost("checksum"), static_cast<double>(found.missing));
  EXPECT_EQ(pin_counter("items"), items - static_cast<double>(found.missing));
  fill(10'000, 10'000 + kRound);
  EXPECT_TRUE(items_add_up(0, 10'000 + kRound));
  expect_counters_add_up();
}

TEST_F(NvmDamage, ARegionOfAnotherTimeIsNone) {
  fill(0, 4000);
  ASSERT_TRUE(settled());
  Image earlier(*fault_);
  fill(10'000, 10'000 + kRound);
  ASSERT_TRUE(items_add_up(0, 10'000 + kRound));
  // The whole device as it was: each record whole and valid, at its place, of a former life.
  earlier.write(layout::kNvmDataOffset, std::uint64_t{kRegions} * kRegionBytes);
  const Found found = check(10'000, 10'000 + kRound);
  EXPECT_LT(found.nvm, 2 * kItemsOfRegion) << "but for what is in memory still";
  EXPECT_EQ(check(0, 4000).hits(), 0U) << "a former life shows";
  fill(20'000, 20'000 + kRound);
  EXPECT_TRUE(items_add_up(0, 20'000 + kRound));
  expect_counters_add_up();
}

// Lists with good checksums that name places where no records can be.
TEST_F(NvmDamage, ListsThatCannotBeLeadToAWalk) {
  using Change = std::function<void(RegionTrailer&, std::vector<std::uint32_t> & offsets)>;
  const std::vector<Change> changes = {
      [](RegionTrailer&, auto& offsets) { std::swap(offsets[3], offsets[9]); },
      [](RegionTrailer&, auto& offsets) { offsets[7] = offsets[6]; },
      [](RegionTrailer&, auto& offsets) { offsets[7] = offsets[6] + 1; },
      [](RegionTrailer&, auto& offsets) { offsets[0] = 0; },
      [](RegionTrailer&, auto& offsets) { offsets.back() = kRegionBytes / 8 - 1; },
      [](RegionTrailer&, auto& offsets) { offsets.back() = kRegionBytes / 8 + 100; },
      [](RegionTrailer&, auto& offsets) { offsets.back() = ~0U; },
      [](RegionTrailer& trailer, auto&) { trailer.used_bytes = kRegionBytes; },
      [](RegionTrailer& trailer, auto&) { trailer.used_bytes = ~0U; },
      [](RegionTrailer& trailer, auto&) { trailer.used_bytes = 0; },
      [](RegionTrailer& trailer, auto&) { trailer.records = ~0U; },
      [](RegionTrailer& trailer, auto&) { ++trailer.generation; },
      [](RegionTrailer& trailer, auto&) { trailer.magic = nvm::kHeaderMagic; },
  };
  fill(0, 4000);
  ASSERT_TRUE(items_add_up(0, 4000));
  Image image(*fault_);
  std::vector<OnDevice> regions = regions_of(image, kRegions);
  ASSERT_GE(regions.size(), changes.size());
  double listed = 0;
  for (std::size_t i = 0; i < changes.size(); ++i) {
    OnDevice& region = regions[i];
    listed += static_cast<double>(region.list.size());
    std::vector<std::uint32_t> offsets(region.list.size());
    std::memcpy(offsets.data(), image.at(region.offsets_begin()), offsets.size() * 4);
    changes[i](region.trailer, offsets);
    std::memcpy(image.at(region.offsets_begin()), offsets.data(), offsets.size() * 4);
    region.trailer.list_checksum =
        XXH3_64bits_withSeed(image.at(region.hashes_begin()), nvm::list_bytes(region.list.size()),
                             region.trailer.generation);
    region.trailer.checksum = region.trailer.sum();
    std::memcpy(image.at(region.trailer_begin()), &region.trailer, sizeof(region.trailer));
    image.write(region.begin(), kRegionBytes);
  }
  EXPECT_EQ(check(0, 4000).missing, 0U) << "the records are whole";
  fill(10'000, 10'000 + 2 * kRound);
  EXPECT_TRUE(items_add_up(0, 10'000 + 2 * kRound)) << "entries were left behind";
  EXPECT_EQ(lost("device"), listed) << "what a walk found";
  expect_counters_add_up();
}

}  // namespace
}  // namespace fc::testing
