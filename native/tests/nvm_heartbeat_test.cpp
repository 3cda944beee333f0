// What devices say of the time and of themselves when nothing else is left: heartbeats that are
// torn, of other devices, of another boot, of a clock that was set back.
#include "nvm/heartbeat.hpp"

#include "core/layout.hpp"
#include "core/ticks.hpp"
#include "memory_device.hpp"
#include "support.hpp"
#include "testing/fault_device.hpp"

namespace fc::testing {
namespace {

using nvm::Heartbeat;
using nvm::SetState;

constexpr std::uint64_t kSetId = 0x5E7;
constexpr std::uint32_t kRegionBytes = 64 * 1024;
constexpr std::uint64_t kDeviceBytes = layout::kNvmDataOffset + 4 * kRegionBytes;

class NvmHeartbeat : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kWall = 1'700'000'000'000;
  static constexpr std::uint64_t kBoot = 5'000'000;
  static constexpr Tick kTick = 50'000;

  NvmHeartbeat() {
    for (std::uint32_t d = 0; d < 2; ++d) {
      nvm::Superblock superblock{};
      superblock.magic = nvm::kSuperblockMagic;
      superblock.version = nvm::kFormatVersion;
      superblock.region_bytes = kRegionBytes;
      superblock.device_bytes = devices_[d]->bytes();
      superblock.set_id = kSetId;
      superblock.device = d;
      superblock.devices = 2;
      put_superblock(d, superblock);
    }
  }
  nvm::Superblock superblock(std::uint32_t device) {
    nvm::Superblock found{};
    std::memcpy(&found, devices_[device]->data().data(), sizeof(found));
    return found;
  }
  void put_superblock(std::uint32_t device, nvm::Superblock superblock) {
    superblock.checksum = superblock.sum();
    std::memcpy(devices_[device]->data().data(), &superblock, sizeof(superblock));
  }
  static Heartbeat heartbeat(std::uint64_t sequence, SetState state, Tick tick = kTick) {
    Heartbeat made;
    made.set_id = kSetId;
    made.sequence = sequence;
    made.state = state;
    made.tick = tick;
    made.wall_ms = kWall;
    made.boot_ms = kBoot;
    made.boot_id.fill('a');
    made.checksum = made.sum();
    return made;
  }
  void beat(std::uint32_t device, const Heartbeat& heartbeat) {
    ASSERT_TRUE(nvm::write_heartbeat(*devices_[device]->make_queue(1), heartbeat));
  }
  void beat(std::uint64_t sequence, SetState state, Tick tick = kTick) {
    for (std::uint32_t d = 0; d < 2; ++d) beat(d, heartbeat(sequence, state, tick));
  }
  std::optional<nvm::FoundSet> find(std::uint64_t wall, std::uint64_t boot, char boot_id) {
    why_.clear();
    return nvm::find_set({devices_.begin(), devices_.end()}, wall, boot, std::string(32, boot_id),
                         why_);
  }
  std::optional<nvm::FoundSet> find() { return find(kWall + 3200, 0, 'b'); }

  std::vector<std::shared_ptr<MemoryDevice>> devices_{
      std::make_shared<MemoryDevice>("first", kDeviceBytes),
      std::make_shared<MemoryDevice>("second", kDeviceBytes)};
  std::string why_;
};

TEST_F(NvmHeartbeat, TimeGoesOnByTheClockThatLasted) {
  beat(7, SetState::Clean);
  const auto same = find(1, kBoot + 3200, 'a');
  ASSERT_TRUE(same);
  EXPECT_EQ(same->tick, kTick + 100);
  EXPECT_FALSE(same->clock_doubt);
  EXPECT_EQ(same->set_id, kSetId);
  EXPECT_EQ(same->sequence, 7U);
  EXPECT_EQ(same->state, SetState::Clean);
  const auto later = find(kWall + 6400, 10, 'b');
  ASSERT_TRUE(later);
  EXPECT_EQ(later->tick, kTick + 200);
  EXPECT_FALSE(later->clock_doubt);
  const auto earlier = find(kWall - 1, 10, 'b');
  ASSERT_TRUE(earlier);
  EXPECT_EQ(earlier->tick, kTick);
  EXPECT_TRUE(earlier->clock_doubt);
}

TEST_F(NvmHeartbeat, AClockThatHasRunOutIsNone) {
  beat(7, SetState::Clean, Ticks::kLast);
  EXPECT_TRUE(find(kWall, 0, 'b'));
  EXPECT_FALSE(find(kWall + 32, 0, 'b'));
  EXPECT_NE(why_, "");
  EXPECT_FALSE(find(~std::uint64_t{0}, 0, 'b'));
}

TEST_F(NvmHeartbeat, ATornOneLeavesTheOneBefore) {
  beat(6, SetState::Serving, kTick);
  beat(7, SetState::Clean, kTick + 10);
  for (std::size_t i = 0; i < sizeof(Heartbeat); ++i) {
    beat(7, SetState::Clean, kTick + 10);
    ASSERT_EQ(nvm::read_heartbeat(*devices_[0])->sequence, 7U);
    devices_[0]->data()[nvm::kHeartbeatOffset + kBlockBytes + i] ^= std::byte{1};
    const auto left = nvm::read_heartbeat(*devices_[0]);
    ASSERT_TRUE(left);
    EXPECT_EQ(left->sequence, 6U);
    // The other device says Clean; that alone is not enough.
    EXPECT_EQ(find()->state, SetState::Serving);
  }
  devices_[0]->data()[nvm::kHeartbeatOffset] ^= std::byte{1};
  EXPECT_FALSE(nvm::read_heartbeat(*devices_[0]));
  EXPECT_FALSE(find());
}

TEST_F(NvmHeartbeat, CleanAreAllDevicesOrNone) {
  beat(7, SetState::Clean);
  EXPECT_EQ(find()->state, SetState::Clean);
  beat(1, heartbeat(8, SetState::Clean));
  EXPECT_EQ(find()->state, SetState::Serving);
  EXPECT_EQ(find()->sequence, 8U);
  beat(0, heartbeat(8, SetState::Journaled));
  EXPECT_EQ(find()->state, SetState::Serving);
  // One that was ahead of the other still has what its journal says.
  beat(1, heartbeat(9, SetState::Journaled));
  EXPECT_EQ(find()->state, SetState::Journaled);
  EXPECT_EQ(find()->sequence, 9U);
}

TEST_F(NvmHeartbeat, OneSetOfThisFormatOrNone) {
  beat(7, SetState::Clean);
  ASSERT_TRUE(find());
  const auto refused = [&](auto&& change, bool found_before = true) {
    const nvm::Superblock before = superblock(1);
    nvm::Superblock changed = before;
    change(changed);
    put_superblock(1, changed);
    const bool none = !find();
    put_superblock(1, before);
    return none && find().has_value() == found_before;
  };
  EXPECT_TRUE(refused([](nvm::Superblock& of) { of.version = 1; }));
  EXPECT_TRUE(refused([](nvm::Superblock& of) { of.set_id = kSetId + 1; }));
  EXPECT_TRUE(refused([](nvm::Superblock& of) { of.device = 0; }));
  EXPECT_TRUE(refused([](nvm::Superblock& of) { of.devices = 3; }));
  EXPECT_TRUE(refused([](nvm::Superblock& of) { of.device_bytes += kBlockBytes; }));
  std::swap(devices_[0], devices_[1]);
  EXPECT_FALSE(find());
  std::swap(devices_[0], devices_[1]);
  // Whole, but of another set; and a heartbeat alone that an earlier set left.
  Heartbeat other = heartbeat(8, SetState::Clean);
  other.set_id = kSetId + 1;
  other.checksum = other.sum();
  beat(1, other);
  EXPECT_FALSE(find());
  EXPECT_TRUE(refused([](nvm::Superblock& of) { of.set_id = kSetId + 1; }, false));
  beat(1, heartbeat(8, SetState::Clean));
  auto faults = std::make_shared<FaultDevice>(devices_[1]);
  faults->add(FaultRule::fail(EIO).reads());
  EXPECT_FALSE(nvm::find_set({devices_[0], faults}, kWall, 0, std::string(32, 'b'), why_));
  EXPECT_NE(why_, "");
}

TEST_F(NvmHeartbeat, IsWrittenBetweenTwoSyncs) {
  const auto faults = std::make_shared<FaultDevice>(devices_[0]);
  const auto syncs = faults->add(FaultRule::delay(1).syncs());
  EXPECT_TRUE(nvm::write_heartbeat(*faults->make_queue(1), heartbeat(4, SetState::Clean)));
  EXPECT_EQ(faults->hits(syncs), 2U);
  faults->clear();
  faults->add(FaultRule::fail(EIO).syncs());
  EXPECT_FALSE(nvm::write_heartbeat(*faults->make_queue(1), heartbeat(6, SetState::Clean)));
  // The sync before failed: what it would say of the regions may not be so.
  EXPECT_EQ(nvm::read_heartbeat(*devices_[0])->sequence, 4U);
}

}  // namespace
}  // namespace fc::testing
