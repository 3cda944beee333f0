// The parsers of what lies on a device: they read nothing outside of the bytes that they are given,
// and take nothing for good that was not written at that place, in that generation, whole.
#include "nvm/format.hpp"

#include "index/entry.hpp"
#include "nvm_support.hpp"

namespace fc::testing {
namespace {

using nvm::ListedRecord;
using nvm::RecordHeader;
using nvm::RecordView;
using nvm::RegionHeader;
using nvm::RegionTrailer;

// Bytes with nothing behind them that may be read: the address sanitizer sees to that.
class Exact {
 public:
  explicit Exact(std::size_t bytes) : bytes_(bytes), data_(std::make_unique<std::byte[]>(bytes)) {}
  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return bytes_; }
  void randomize(std::mt19937_64& random) const {
    for (std::size_t i = 0; i < bytes_; ++i) data_[i] = static_cast<std::byte>(random());
  }

 private:
  std::size_t bytes_;
  std::unique_ptr<std::byte[]> data_;
};

Exact record_of(std::size_t key_bytes, std::size_t value_bytes, std::uint64_t generation,
                std::uint64_t location, std::mt19937_64& random) {
  const std::size_t payload = key_bytes + value_bytes;
  Exact bytes(sizeof(RecordHeader) + payload);
  bytes.randomize(random);
  RecordHeader header{};
  header.size_and_domain =
      static_cast<std::uint32_t>(value_bytes | (random() % 32 << RecordHeader::kSizeBits));
  header.expiry = static_cast<Tick>(random());
  header.key_bytes = static_cast<std::uint16_t>(key_bytes);
  header.incarnation = static_cast<std::uint16_t>(random());
  std::memcpy(bytes.data(), &header, sizeof(header));
  header.checksum = nvm::record_checksum(bytes.data(), payload, generation, location);
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

TEST(NvmParsers, ARecordIsReadAtItsPlaceAndTimeOnly) {
  std::mt19937_64 random(seed_of(61));
  constexpr std::size_t kMostValue =
      layout::kMaxNvmRecordBytes - sizeof(RecordHeader) - kMaxKeyBytes;
  const std::pair<std::size_t, std::size_t> sizes[] = {{1, 0},
                                                       {1, 1},
                                                       {7, 9},
                                                       {16, 284},
                                                       {kMaxKeyBytes, 0},
                                                       {kMaxKeyBytes, 5000},
                                                       {1, 65'536},
                                                       {kMaxKeyBytes, kMostValue}};
  for (const auto& [key_bytes, value_bytes] : sizes) {
    const std::uint64_t generation = random();
    const std::uint64_t location = random() >> 27;
    const Exact record = record_of(key_bytes, value_bytes, generation, location, random);
    RecordView view;
    ASSERT_TRUE(nvm::read_record(record.data(), record.size(), generation, location, view));
    EXPECT_EQ(view.key.size(), key_bytes);
    EXPECT_EQ(view.header.value_bytes(), value_bytes);
    EXPECT_EQ(view.value + value_bytes,
              reinterpret_cast<std::uint8_t*>(record.data()) + record.size());
    for (const std::uint64_t other : {generation + 1, generation - 1, std::uint64_t{0}, random()}) {
      EXPECT_FALSE(nvm::read_record(record.data(), record.size(), other, location, view));
    }
    for (unsigned bit = 0; bit < Entry::kNvmTagShift; ++bit) {
      EXPECT_FALSE(nvm::read_record(record.data(), record.size(), generation,
                                    location ^ std::uint64_t{1} << bit, view));
    }
  }
}

TEST(NvmParsers, ARecordCutShortIsNone) {
  std::mt19937_64 random(seed_of(62));
  for (const auto& [key_bytes, value_bytes] :
       {std::pair<std::size_t, std::size_t>{1, 0}, {16, 40}, {300, 300}}) {
    const Exact record = record_of(key_bytes, value_bytes, 5, 6, random);
    for (std::size_t bytes = 0; bytes < record.size(); ++bytes) {
      const Exact part(bytes);
      std::memcpy(part.data(), record.data(), bytes);
      RecordView view;
      ASSERT_FALSE(nvm::read_record(part.data(), bytes, 5, 6, view)) << bytes;
    }
  }
}

TEST(NvmParsers, ARecordWithAFlippedBitIsNone) {
  std::mt19937_64 random(seed_of(63));
  for (int round = 0; round < 20; ++round) {
    const Exact record = record_of(1 + random() % 40, random() % 200, 7, 8, random);
    RecordView view;
    for (std::size_t bit = 0; bit < 8 * record.size(); ++bit) {
      record.data()[bit / 8] ^= std::byte{1} << (bit % 8);
      ASSERT_FALSE(nvm::read_record(record.data(), record.size(), 7, 8, view)) << bit;
      record.data()[bit / 8] ^= std::byte{1} << (bit % 8);
    }
    ASSERT_TRUE(nvm::read_record(record.data(), record.size(), 7, 8, view));
  }
}

TEST(NvmParsers, SizesAtTheirLimitsAreNotFollowed) {
  std::mt19937_64 random(seed_of(64));
  constexpr std::uint32_t kLimits[] = {0,
                                       1,
                                       15,
                                       16,
                                       17,
                                       1023,
                                       1024,
                                       1025,
                                       0x7fff,
                                       0xffff,
                                       65536,
                                       RecordHeader::kSizeMask,
                                       RecordHeader::kSizeMask - 1,
                                       ~0u,
                                       0x80000000u};
  for (const std::uint32_t size : kLimits) {
    for (const std::uint32_t key_bytes : kLimits) {
      for (const std::size_t available :
           {std::size_t{16}, std::size_t{17}, std::size_t{80}, std::size_t{1040}}) {
        const Exact bytes(available);
        bytes.randomize(random);
        RecordHeader header{};
        header.size_and_domain = size;
        header.key_bytes = static_cast<std::uint16_t>(key_bytes);
        std::memcpy(bytes.data(), &header, sizeof(header));
        const std::size_t payload = std::size_t{header.key_bytes} + header.value_bytes();
        const bool there = payload <= available - sizeof(header);
        if (there) {
          // Even with the right checksum: a key of no bytes or of too many is no key.
          header.checksum = nvm::record_checksum(bytes.data(), payload, 1, 2);
          std::memcpy(bytes.data(), &header, sizeof(header));
        }
        RecordView view;
        EXPECT_EQ(nvm::read_record(bytes.data(), available, 1, 2, view),
                  there && header.key_bytes != 0 && header.key_bytes <= kMaxKeyBytes)
            << size << ' ' << key_bytes << ' ' << available;
      }
    }
  }
}

TEST(NvmParsers, RandomBytesAreNoRecord) {
  std::mt19937_64 random(seed_of(65));
  for (std::size_t round = 0; round < scaled(200'000); ++round) {
    const Exact bytes(random() % 200);
    bytes.randomize(random);
    if (bytes.size() >= sizeof(RecordHeader) && round % 2 == 0) {
      // Sizes that fit, so that the checksum has to tell.
      RecordHeader header;
      std::memcpy(&header, bytes.data(), sizeof(header));
      header.key_bytes = static_cast<std::uint16_t>(1 + random() % 16);
      header.size_and_domain = static_cast<std::uint32_t>(random() % 64);
      std::memcpy(bytes.data(), &header, sizeof(header));
    }
    RecordView view;
    ASSERT_FALSE(nvm::read_record(bytes.data(), bytes.size(), random() % 8, random() % 1024, view));
  }
}

// A list of `records` records of which each takes `bytes`, and its trailer.
struct MadeList {
  MadeList(std::uint32_t records, std::uint32_t bytes, std::mt19937_64& random)
      : data(nvm::list_bytes(records)) {
    std::memset(data.data(), 0, data.size());
    for (std::uint32_t i = 0; i < records; ++i) {
      const std::uint64_t hash = random();
      const std::uint32_t units = (sizeof(RegionHeader) + i * bytes) / 8;
      std::memcpy(data.data() + std::size_t{i} * 8, &hash, 8);
      std::memcpy(data.data() + std::size_t{records} * 8 + std::size_t{i} * 4, &units, 4);
    }
    trailer.magic = nvm::kTrailerMagic;
    trailer.generation = 9;
    trailer.records = records;
    trailer.used_bytes = static_cast<std::uint32_t>(sizeof(RegionHeader)) + records * bytes;
    seal();
  }
  void seal() {
    trailer.list_checksum = XXH3_64bits_withSeed(data.data(), data.size(), trailer.generation);
    trailer.checksum = trailer.sum();
  }
  bool good(std::size_t region_bytes = kRegionBytes) const {
    RegionTrailer found{};
    std::vector<ListedRecord> list;
    return nvm::read_trailer(reinterpret_cast<const std::byte*>(&trailer), region_bytes, 9,
                             found) &&
           found.records == trailer.records && nvm::read_list(data.data(), found, list) &&
           list.size() == trailer.records;
  }
  Exact data;
  RegionTrailer trailer{};
};

TEST(NvmParsers, AListIsReadWhenItIsWholeOnly) {
  std::mt19937_64 random(seed_of(66));
  for (const std::uint32_t records : {0u, 1u, 2u, 3u, 195u}) {
    MadeList made(records, 320, random);
    EXPECT_TRUE(made.good()) << records;
    // As many as just fit, and one byte too few for them.
    const std::size_t least = made.trailer.used_bytes + made.data.size() + sizeof(RegionTrailer);
    EXPECT_TRUE(made.good(least));
    EXPECT_FALSE(made.good(least - 1));
    for (std::size_t bit = 0; bit < 8 * made.data.size(); ++bit) {
      made.data.data()[bit / 8] ^= std::byte{1} << (bit % 8);
      ASSERT_FALSE(made.good()) << bit;
      made.data.data()[bit / 8] ^= std::byte{1} << (bit % 8);
    }
    for (std::size_t bit = 0; bit < 8 * sizeof(RegionTrailer); ++bit) {
      auto* bytes = reinterpret_cast<unsigned char*>(&made.trailer);
      bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ 1u << (bit % 8));
      RegionTrailer found{};
      ASSERT_FALSE(nvm::read_trailer(reinterpret_cast<const std::byte*>(&made.trailer),
                                     kRegionBytes, 9, found))
          << bit;
      bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ 1u << (bit % 8));
    }
  }
}

TEST(NvmParsers, AListedPlaceIsWithinItsRegionAndRises) {
  std::mt19937_64 random(seed_of(67));
  std::size_t good = 0;
  for (std::size_t round = 0; round < scaled(50'000); ++round) {
    // With checksums that are right, whatever it says.
    MadeList made(static_cast<std::uint32_t>(1 + random() % 20), 24, random);
    std::byte* offsets = made.data.data() + std::size_t{made.trailer.records} * 8;
    for (int changes = static_cast<int>(random() % 3); changes > 0; --changes) {
      const auto units = static_cast<std::uint32_t>(
          random() % 4 == 0 ? random() : random() % (made.trailer.used_bytes / 8 + 4));
      std::memcpy(offsets + random() % made.trailer.records * 4, &units, 4);
    }
    if (random() % 4 == 0) made.trailer.used_bytes += static_cast<std::uint32_t>(random() % 64);
    made.seal();
    bool right = true;
    std::uint64_t least = sizeof(RegionHeader);
    for (std::uint32_t i = 0; i < made.trailer.records; ++i) {
      std::uint32_t units = 0;
      std::memcpy(&units, offsets + std::size_t{i} * 4, 4);
      right = right && units * 8ull >= least && units * 8ull + 24 <= made.trailer.used_bytes;
      least = units * 8ull + 24;
    }
    ASSERT_EQ(made.good(), right) << round;
    good += right ? 1 : 0;
  }
  EXPECT_GT(good, 100U);
}

}  // namespace
}  // namespace fc::testing
