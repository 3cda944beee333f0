// What an engine does with the devices that it is started on: with those that cannot be used, with
// files that are somebody else's, with what an earlier life or a killed process left behind.
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>
#include <sys/wait.h>

#include <csignal>
#include <fstream>
#include <system_error>

#include "nvm/format.hpp"
#include "nvm_support.hpp"

namespace fc::testing {
namespace {

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.flush()) << path;
}

// The `content` labels of feature_cache_nvm_device_info.
class Contents final : public CounterVisitor {
 public:
  static std::vector<std::string> of(const Engine& engine) {
    Contents contents;
    engine.visit(contents);
    return contents.found_;
  }
  void counter(std::string_view, std::string_view, Labels, std::uint64_t) override {}
  void gauge(std::string_view name, std::string_view, Labels labels, double) override {
    if (name != "feature_cache_nvm_device_info") return;
    for (const Label& label : labels) {
      if (label.name == "content") found_.emplace_back(label.value);
    }
  }
  void histogram(std::string_view, std::string_view, Labels, std::span<const double>,
                 std::span<const std::uint64_t>, double) override {}

 private:
  std::vector<std::string> found_;
};

class NvmStart : public NvmTest {
 protected:
  static constexpr std::size_t kItems = 3000;

  EngineConfig config() const { return small_config(path_); }
  EngineConfig two_devices() const {
    EngineConfig both = small_config(path_);
    both.nvm.devices.push_back(both.nvm.devices.front());
    both.nvm.devices.back().path = other_path_;
    return both;
  }
  // How a start fails; empty when it does not.
  std::string error_of(const EngineConfig& config) {
    try {
      make_engine(config, clock_, false);
      return {};
    } catch (const std::system_error& error) {
      return std::string("system: ") + error.what();
    } catch (const std::invalid_argument& error) {
      return std::string("config: ") + error.what();
    }
  }
  std::string error_of(const std::string& path) { return error_of(small_config(path)); }
  std::string content() const { return Contents::of(*engine_).front(); }
  // Nothing from before is served, and the engine does its work.
  void expect_empty_and_well() {
    EXPECT_EQ(check(0, kItems).missing, kItems) << "something of an earlier life is served";
    EXPECT_EQ(pin_counter("items"), 0);
    fill(0, kItems, pin_, kNoDomain, 2);
    ASSERT_TRUE(settled());
    const Found found = check(0, kItems, pin_, 2);
    EXPECT_EQ(found.missing, 0U);
    EXPECT_GT(found.nvm, kItems / 2);
  }
  // A file that an engine has used.
  void use_file(const EngineConfig& config) {
    start_plainly(config);
    fill(0, kItems);
    ASSERT_TRUE(settled());
    EXPECT_EQ(check(0, kItems).missing, 0U);
    stop();
  }
  // Changes the superblock of the file; `sealed`: with a checksum that is right again.
  void change_superblock(const std::function<void(nvm::Superblock&)>& change, bool sealed = true) {
    std::string bytes = bytes_of(path_);
    nvm::Superblock superblock;
    ASSERT_GT(bytes.size(), sizeof(superblock));
    std::memcpy(&superblock, bytes.data(), sizeof(superblock));
    ASSERT_EQ(superblock.checksum, superblock.sum());
    change(superblock);
    if (sealed) superblock.checksum = superblock.sum();
    std::memcpy(bytes.data(), &superblock, sizeof(superblock));
    write_bytes(path_, bytes);
  }

  const std::string path_ = folder_.file("nvm");
  const std::string other_path_ = folder_.file("other");
};

TEST_F(NvmStart, PathsThatCannotBeUsedSayWhy) {
  const std::string file = folder_.file("file");
  write_bytes(file, "");
  const std::string directory = folder_.file("directory");
  std::filesystem::create_directory(directory);
  const std::string link = folder_.file("link");
  std::filesystem::create_symlink(folder_.file("nowhere/nvm"), link);
  const struct {
    std::string path;
    const char* says;
  } cases[] = {
      {folder_.file("missing/nvm"), "its directory does not exist"},
      {link, "its directory does not exist"},
      {directory, "it is a directory"},
      {file + "/nvm", "a part of the path is no directory"},
      {"/sys/feature-cache-nvm", "may not read and write it"},  // refused to root, too
      {"/dev/null", "neither a file nor a block device"},
  };
  for (const auto& bad : cases) {
    const std::string error = error_of(bad.path);
    EXPECT_TRUE(error.starts_with("system: ")) << bad.path << ": " << error;
    EXPECT_NE(error.find(bad.path), std::string::npos) << error;
    EXPECT_NE(error.find(bad.says), std::string::npos) << error;
  }
  EXPECT_FALSE(std::filesystem::exists(folder_.file("missing")));
  EXPECT_TRUE(std::filesystem::is_empty(directory));
}

TEST_F(NvmStart, SomebodyElsesFileIsLeftAlone) {
  const std::uint64_t device_bytes = config().nvm.devices[0].bytes;
  for (const std::uint64_t bytes :
       {std::uint64_t{5}, 4096 + 17ul, device_bytes - 1, device_bytes, 2 * device_bytes + 4096}) {
    const std::string theirs = patterned("theirs", bytes, bytes);
    write_bytes(path_, theirs);
    const std::string error = error_of(config());
    EXPECT_TRUE(error.starts_with("system: ")) << error;
    EXPECT_NE(error.find("holds data that is not this cache's"), std::string::npos) << error;
    EXPECT_TRUE(bytes_of(path_) == theirs) << "a file of " << bytes << " bytes was touched";
  }
}

// Some file systems sign a device at its 64th KiB and leave what comes before it blank.
TEST_F(NvmStart, ASignatureBehindABlankBeginningIsSeen) {
  std::string theirs(config().nvm.devices[0].bytes, '\0');
  theirs.replace((64u << 10) + 64, 8, "_BHRfS_M");
  write_bytes(path_, theirs);
  EXPECT_NE(error_of(config()).find("holds data that is not this cache's"), std::string::npos);
  EXPECT_TRUE(bytes_of(path_) == theirs);
}

TEST_F(NvmStart, ASecondDeviceOfSomebodyElseIsLeftAlone) {
  const std::string theirs = patterned("theirs", 1, 3 * kMiB);
  write_bytes(other_path_, theirs);
  EXPECT_NE(error_of(two_devices()).find(other_path_), std::string::npos);
  EXPECT_TRUE(bytes_of(other_path_) == theirs);
  EXPECT_EQ(bytes_of(path_).find_first_not_of('\0'), std::string::npos)
      << "the first device was written to before the second was looked at";
}

TEST_F(NvmStart, ANewFileIsNewAndAUsedOneStartsAnew) {
  start_plainly(config());
  EXPECT_EQ(content(), "new");
  use_file(config());
  start_plainly(config());
  EXPECT_EQ(content(), "started anew");
  expect_empty_and_well();
}

TEST_F(NvmStart, AFileOfZerosIsNew) {
  write_bytes(path_, std::string(700, '\0'));
  start_plainly(config());
  EXPECT_EQ(content(), "new");
  expect_empty_and_well();
}

TEST_F(NvmStart, AnotherFormatIsSetAside) {
  use_file(config());
  change_superblock([](nvm::Superblock& superblock) { ++superblock.version; });
  start_plainly(config());
  EXPECT_EQ(content(), "set aside: format version " + std::to_string(nvm::kFormatVersion + 1) +
                           ", this is version " + std::to_string(nvm::kFormatVersion));
  expect_empty_and_well();
  stop();
  // A format that shares nothing but the magic's name.
  change_superblock([](nvm::Superblock& superblock) { ++superblock.magic; }, false);
  start_plainly(config());
  EXPECT_TRUE(content().starts_with("set aside: format version")) << content();
  expect_empty_and_well();
  stop();
  start_plainly(config());
  EXPECT_EQ(content(), "started anew") << "it was not made this format's";
}

TEST_F(NvmStart, ADamagedSuperblockIsSetAside) {
  use_file(config());
  // Any byte behind magic and version.
  for (std::size_t at = 12; at < sizeof(nvm::Superblock); at += 7) {
    change_superblock(
        [&](nvm::Superblock& superblock) {
          reinterpret_cast<unsigned char*>(&superblock)[at] ^= 0x10;
        },
        false);
    start_plainly(config());
    EXPECT_EQ(content(), "set aside: its superblock is damaged") << at;
    EXPECT_EQ(check(0, kItems).missing, kItems);
    stop();
  }
  start_plainly(config());
  expect_empty_and_well();
}

TEST_F(NvmStart, AnotherRegionSizeIsSetAside) {
  use_file(config());
  EngineConfig other = config();
  other.nvm.region_bytes = 2 * kRegionBytes;
  start_plainly(other);
  EXPECT_EQ(content(), "set aside: made with another size");
  expect_empty_and_well();
}

TEST_F(NvmStart, AnotherDeviceSizeIsSetAside) {
  use_file(config());
  for (const int regions : {8, -8}) {
    EngineConfig other = config();
    other.nvm.devices[0].bytes += static_cast<std::uint64_t>(regions * int{kRegionBytes});
    other.namespaces[0].nvm.budget_bytes = 12 * kRegionBytes;
    start_plainly(other);
    EXPECT_EQ(content(), "set aside: made with another size");
    EXPECT_EQ(check(0, kItems).missing, kItems);
    fill(0, 1500, pin_, kNoDomain, 2);
    ASSERT_TRUE(settled());
    EXPECT_EQ(check(0, 1500, pin_, 2).missing, 0U);
    EXPECT_EQ(std::filesystem::file_size(path_), other.nvm.devices[0].bytes);
    stop();
  }
}

TEST_F(NvmStart, ADeviceOfAnotherSetIsSetAside) {
  use_file(two_devices());
  EngineConfig swapped = two_devices();
  std::swap(swapped.nvm.devices[0], swapped.nvm.devices[1]);
  start_plainly(swapped);
  const std::string expected = "set aside: it was another one of several devices";
  EXPECT_EQ(Contents::of(*engine_), (std::vector<std::string>{expected, expected}));
  expect_empty_and_well();
  stop();
  start_plainly(config());  // one of the two alone
  EXPECT_EQ(content(), expected);
  expect_empty_and_well();
}

TEST_F(NvmStart, AFullDiskIsToldBeforeItIsFilled) {
  struct statvfs room {};
  ASSERT_EQ(statvfs(folder_.file("").c_str(), &room), 0);
  EngineConfig huge = config();
  huge.nvm.devices[0].bytes =
      static_cast<std::uint64_t>(room.f_bavail) * room.f_frsize + (std::uint64_t{1} << 30);
  const std::string error = error_of(huge);
  EXPECT_TRUE(error.starts_with("system: ")) << error;
  EXPECT_NE(error.find("no room for"), std::string::npos) << error;
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(NvmStart, TwoEnginesNeverShareAFile) {
  start_plainly(config());
  fill(0, kItems);
  ASSERT_TRUE(settled());
  const std::string error = error_of(config());
  EXPECT_NE(error.find("in use by another process"), std::string::npos) << error;
  EXPECT_EQ(check(0, kItems).missing, 0U) << "the first one was disturbed";
  stop();
  EXPECT_EQ(error_of(config()), "") << "the lock went with its engine";
}

TEST_F(NvmStart, BudgetsThatDoNotFitAreRefused) {
  const auto error_with = [&](const std::function<void(EngineConfig&)>& change) {
    EngineConfig changed = config();
    change(changed);
    return error_of(changed);
  };
  const auto expect = [](const std::string& error, const char* says) {
    EXPECT_TRUE(error.starts_with("config: ")) << error;
    EXPECT_NE(error.find(says), std::string::npos) << error;
  };
  expect(error_with([](EngineConfig& c) { c.namespaces[0].nvm.budget_bytes = 29 * kRegionBytes; }),
         "add up to 29 regions");
  expect(error_with([](EngineConfig& c) { c.namespaces[0].nvm.budget_bytes = 3 * kRegionBytes; }),
         "four regions");
  expect(error_with([](EngineConfig& c) { c.nvm.devices[0].bytes = 64 * kKiB; }),
         "the devices hold 0");
  expect(error_with([](EngineConfig& c) { c.nvm.devices.push_back(c.nvm.devices[0]); }), "twice");
  expect(error_with([](EngineConfig& c) { c.nvm.devices.clear(); }), "there is no nvm device");
  expect(error_with([](EngineConfig& c) { c.nvm.io_threads = 0; }), "io_threads");
  EXPECT_EQ(
      error_with([](EngineConfig& c) { c.namespaces[0].nvm.budget_bytes = 28 * kRegionBytes; }), "")
      << "exactly what there is";
}

// ---- both kinds of I/O, with and without O_DIRECT
// -------------------------------------------------

struct Kind {
  IoKind io;
  bool direct;
  std::uint32_t threads;
};

std::string name_of(const Kind& kind) {
  return std::string(kind.io == IoKind::Uring ? "uring" : "threads") +
         (kind.direct ? "_direct" : "_buffered") + "_" + std::to_string(kind.threads);
}

void PrintTo(const Kind& kind, std::ostream* out) {
  *out << name_of(kind);
}

class NvmKinds : public NvmTest, public ::testing::WithParamInterface<Kind> {};

TEST_P(NvmKinds, TheMainPathsWork) {
  EngineConfig config = small_config(folder_.file("nvm"));
  config.nvm.io = GetParam().io;
  config.nvm.direct = GetParam().direct;
  config.nvm.io_threads = GetParam().threads;
  config.namespaces[0].nvm.promotion = PromotionKind::SecondHit;
  start_plainly(config);
  fill(0, 3000);
  ASSERT_TRUE(settled());
  EXPECT_EQ(check(0, 3000).missing, 0U);
  EXPECT_GT(counter("feature_cache_nvm_device_reads_total"), 5);
  fill(500, 1500, pin_, kNoDomain, 2);
  for (std::size_t i = 0; i < 500; ++i) erase(*engine_, pin_, key(i));
  ASSERT_TRUE(settled());
  EXPECT_EQ(check(0, 500).missing, 500U);
  EXPECT_EQ(check(500, 1500, pin_, 2).missing, 0U);
  check(1500, 1600);
  EXPECT_TRUE(eventually([&] {
    engine_->maintain();
    return pin_counter("promoted_total") >= 100;
  })) << "asked twice: worth a place in DRAM";
  EXPECT_EQ(check(1500, 1600).dram, 100U);
  fill(10'000, 20'000);  // several times through the whole log
  EXPECT_TRUE(items_add_up(0, 20'000));
  EXPECT_EQ(counter("feature_cache_nvm_device_read_errors_total"), 0);
  EXPECT_EQ(counter("feature_cache_nvm_device_write_errors_total"), 0);
}

INSTANTIATE_TEST_SUITE_P(Io, NvmKinds,
                         ::testing::Values(Kind{IoKind::Uring, true, 1},
                                           Kind{IoKind::Uring, false, 1},
                                           Kind{IoKind::Threads, true, 1},
                                           Kind{IoKind::Threads, false, 8}),
                         [](const auto& given) { return name_of(given.param); });

// ---- killed while it writes
// -----------------------------------------------------------------------

class NvmKill : public NvmStart {
 protected:
  // A process that fills an engine until it is killed. It says 'r' when it has begun, and 's' when
  // a region's write stands between header and body, if it is to stand there.
  pid_t child_that_fills(bool stall) {
    int ends[2];
    if (pipe(ends) != 0) return -1;
    // No thread of this process lives now: the last engine is gone.
    const pid_t child = fork();
    if (child != 0) {
      close(ends[1]);
      heard_ = ends[0];
      return child;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    try {
      const EngineConfig config = small_config(path_);
      const auto device =
          std::make_shared<FaultDevice>(open_device(path_, config.nvm.devices[0].bytes, {}));
      FaultDevice::RuleId rule = 0;
      if (stall) {
        // The header is a block of its own; what touches the second one is the body.
        const std::uint64_t region = layout::kNvmDataOffset + std::uint64_t{7} * kRegionBytes;
        rule = device->add(FaultRule::stall().writes().range(region + kBlockBytes, kBlockBytes));
      }
      const auto engine = make_engine(config, clock_, false, {device});
      const NamespaceIndex pin = engine->find_namespace("pin");
      bool told = false;
      for (std::size_t i = 0;; ++i) {
        put(*engine, pin, key(i % 20'000), value(i % 20'000));
        if (i == 1500 && write(ends[1], "r", 1) != 1) break;
        if (stall && !told && device->hits(rule) != 0) {
          told = write(ends[1], "s", 1) == 1;
        }
      }
    } catch (const std::exception& error) {
      std::cerr << error.what() << std::endl;
    }
    _exit(1);
  }
  bool hear(char wanted) {
    char said = 0;
    return read(heard_, &said, 1) == 1 && said == wanted;
  }
  void kill_and_start(pid_t child) {
    ASSERT_EQ(kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status)) << "it ended by itself";
    close(heard_);
    start_plainly(small_config(path_));
    EXPECT_EQ(content(), "started anew");
    EXPECT_EQ(check(0, 20'000).missing, 20'000U) << "something of the killed one is served";
    fill(0, 1500, pin_, kNoDomain, 2);
    ASSERT_TRUE(settled());
    EXPECT_EQ(check(0, 1500, pin_, 2).missing, 0U);
    EXPECT_EQ(std::filesystem::file_size(path_), file_bytes_.at(path_));
    stop();
  }

  int heard_ = -1;
};

TEST_F(NvmKill, AtAnyMoment) {
  std::mt19937_64 random(seed_of(31));
  for (std::size_t kills = 0; kills < scaled(25); ++kills) {
    const pid_t child = child_that_fills(false);
    ASSERT_GT(child, 0);
    ASSERT_TRUE(hear('r'));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 20'000));
    kill_and_start(child);
    ASSERT_FALSE(HasFailure());
  }
}

TEST_F(NvmKill, BetweenHeaderAndBodyOfARegion) {
  for (int kills = 0; kills < 3; ++kills) {
    const pid_t child = child_that_fills(true);
    ASSERT_GT(child, 0);
    ASSERT_TRUE(hear('r'));
    ASSERT_TRUE(hear('s'));
    kill_and_start(child);
    ASSERT_FALSE(HasFailure());
  }
}

}  // namespace
}  // namespace fc::testing
