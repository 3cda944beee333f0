// Memory that outlives its process: who owns it, what is refused, and that there is room.
#include "persist/shared_file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <thread>

#include "persist/free_memory.hpp"
#include "persist_support.hpp"
#include "testing/sequence_point.hpp"

namespace fc {
namespace {

using testing::Child;
using testing::error_of;
using testing::Folder;
using testing::Mounted;
using testing::read_file;
using testing::write_file;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

std::string lock_error(const std::string& path) {
  return error_of([&path] { const OwnerLock lock(path, 0); });
}
std::string open_error(const std::string& path) {
  return error_of([&path] { (void)SharedFile::open(path, false); });
}
std::string create_error(const std::string& path, std::uint64_t bytes) {
  return error_of([&] { (void)SharedFile::create(path, bytes, false); });
}
bool exists(const std::string& path) {
  struct stat status {};
  return lstat(path.c_str(), &status) == 0;
}

TEST(OwnerLock, IsHeldByOneAndLeavesNoPidInOrder) {
  const Folder folder;
  const std::string path = folder.file("x.lock");
  {
    const OwnerLock lock(path, 0);
    EXPECT_EQ(0, lock.stale_owner());
    EXPECT_EQ(std::to_string(getpid()) + "\n", read_file(path));
    struct stat status {};
    ASSERT_EQ(0, stat(path.c_str(), &status));
    EXPECT_EQ(0600u, status.st_mode & 07777);
    // Two of one process exclude each other as well: an embedded cache may be started twice.
    const std::string error = lock_error(path);
    EXPECT_SAYS(error, "another daemon (pid " + std::to_string(getpid()) + ") owns " + path +
                           ": stop it, or choose another persist.name");
  }
  EXPECT_EQ("", read_file(path));
  EXPECT_EQ(0, OwnerLock(path, 0).stale_owner());
}

TEST(OwnerLock, OutlivesNoProcessAndNamesTheOneThatWasKilled) {
  const Folder folder;
  const std::string path = folder.file("x.lock");
  Child owner([&path](int) { new OwnerLock(path, 0); });
  owner.expect_done();
  const pid_t pid = owner.pid();
  EXPECT_SAYS(lock_error(path), "(pid " + std::to_string(pid) + ")");
  owner.kill_hard();
  EXPECT_EQ(pid, OwnerLock(path, 10'000).stale_owner());
  EXPECT_EQ(0, OwnerLock(path, 0).stale_owner()) << "the last one ended in order";
}

TEST(OwnerLock, WaitsForAnOwnerOnItsWayOut) {
  const Folder folder;
  const std::string path = folder.file("x.lock");
  auto first = std::make_unique<OwnerLock>(path, 0);
  std::thread ending([&first] {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    first.reset();
  });
  const OwnerLock second(path, 60'000);
  ending.join();
  EXPECT_EQ(0, second.stale_owner());
  EXPECT_EQ(std::to_string(getpid()) + "\n", read_file(path));
}

// A worker that was forked from the owner and ends must not give the owner's lock away.
TEST(OwnerLock, IsNotGivenBackByAForkedChild) {
  const Folder folder;
  const std::string path = folder.file("x.lock");
  auto lock = std::make_unique<OwnerLock>(path, 0);
  Child child([&lock](int) { lock.reset(); });
  child.expect_done();
  EXPECT_EQ(std::to_string(getpid()) + "\n", read_file(path));
  EXPECT_SAYS(lock_error(path), "another daemon");
  // And one that lives on holds nothing once the owner has ended.
  lock.reset();
  EXPECT_EQ(0, OwnerLock(path, 0).stale_owner());
}

TEST(OwnerLock, FollowsAFileThatIsRemovedWhileItWaits) {
  const Folder folder;
  const std::string path = folder.file("x.lock");
  auto first = std::make_unique<OwnerLock>(path, 0);
  std::unique_ptr<OwnerLock> second;
  std::thread waiting([&] { second = std::make_unique<OwnerLock>(path, 60'000); });
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  std::filesystem::remove(path);
  first.reset();
  waiting.join();
  EXPECT_EQ(std::to_string(getpid()) + "\n", read_file(path)) << "what is named is what is locked";
  EXPECT_SAYS(lock_error(path), "another daemon");
}

TEST(OwnerLock, SaysWhatIsWrongWithItsFile) {
  const Folder folder;
  EXPECT_SAYS(lock_error(folder.file("none/x.lock")), "directory does not exist; make it");
  write_file(folder.file("plain"), "x");
  EXPECT_SAYS(lock_error(folder.file("plain/x.lock")), "no directory");
  ASSERT_EQ(0, symlink(folder.file("plain").c_str(), folder.file("link").c_str()));
  EXPECT_SAYS(lock_error(folder.file("link")), "symbolic link");
  ASSERT_EQ(0, mkfifo(folder.file("pipe").c_str(), 0600));
  EXPECT_SAYS(lock_error(folder.file("pipe")), "no plain file");
  EXPECT_SAYS(lock_error(folder.path()), "no plain file");
  write_file(folder.file("theirs"), "17\n");
  ASSERT_EQ(0, chown(folder.file("theirs").c_str(), 4242, 4242));
  EXPECT_SAYS(lock_error(folder.file("theirs")), "file of user 4242");
  EXPECT_EQ("17\n", read_file(folder.file("theirs")));
  write_file(folder.file("wide"), "no number");
  ASSERT_EQ(0, chmod(folder.file("wide").c_str(), 0666));
  EXPECT_EQ(0, OwnerLock(folder.file("wide"), 0).stale_owner());
  struct stat status {};
  ASSERT_EQ(0, stat(folder.file("wide").c_str(), &status));
  EXPECT_EQ(0600u, status.st_mode & 07777);
}

// There files hold no text.
TEST(OwnerLock, WorksOnHugetlbfs) {
  const Mounted mount("hugetlbfs", "");
  const std::string path = mount.file("x.lock");
  Child owner([&path](int) { new OwnerLock(path, 0); });
  owner.expect_done();
  const pid_t pid = owner.pid();
  EXPECT_SAYS(lock_error(path), "(pid " + std::to_string(pid) + ")");
  owner.kill_hard();
  EXPECT_EQ(pid, OwnerLock(path, 10'000).stale_owner());
  EXPECT_EQ(0, OwnerLock(path, 0).stale_owner());
}

TEST(SharedFile, IsMadeOfZeroesWithAllPagesAndFoundAgain) {
  const Folder folder;
  const std::string path = folder.file();
  EXPECT_EQ(nullptr, SharedFile::open(path, true));
  {
    const auto file = SharedFile::create(path, 3 * kMiB + 1, false);
    ASSERT_NE(nullptr, file);
    EXPECT_EQ(3 * kMiB + 4096, file->bytes());
    EXPECT_EQ("4 KiB", file->pages());
    EXPECT_EQ(0u, reinterpret_cast<std::uintptr_t>(file->data()) % (2 * kMiB));
    struct stat status {};
    ASSERT_EQ(0, stat(path.c_str(), &status));
    EXPECT_EQ(0600u, status.st_mode & 07777);
    EXPECT_GE(static_cast<std::uint64_t>(status.st_blocks) * 512, file->bytes());
    for (std::uint64_t at = 0; at < file->bytes(); at += 4093) {
      ASSERT_EQ(std::byte{0}, file->data()[at]);
    }
    std::memset(file->data(), 0x5a, file->bytes());
  }
  EXPECT_SAYS(create_error(path, kMiB), "exists already");
  const auto again = SharedFile::open(path, true);
  ASSERT_NE(nullptr, again);
  EXPECT_EQ(3 * kMiB + 4096, again->bytes());
  EXPECT_EQ(0u, reinterpret_cast<std::uintptr_t>(again->data()) % (2 * kMiB));
  EXPECT_EQ(std::byte{0x5a}, again->data()[again->bytes() - 1]);
}

TEST(SharedFile, KeepsWhatAKilledProcessWrote) {
  const Folder folder;
  Child writer([&folder](int) {
    static const auto file = SharedFile::create(folder.file(), 4 * kMiB, true);
    std::memset(file->data(), 0x21, file->bytes());
  });
  writer.expect_done();
  writer.kill_hard();
  const auto file = SharedFile::open(folder.file(), true);
  ASSERT_NE(nullptr, file);
  for (std::uint64_t at = 0; at < file->bytes(); at += 4096) {
    ASSERT_EQ(std::byte{0x21}, file->data()[at]);
  }
}

TEST(SharedFile, IsNotThereBeforeItIsWhole) {
  const Folder folder;
  Child maker([&folder](int) {
    static fc::testing::SequencePoints points;
    points.block("shared_file:reserved");
    static const std::thread making(
        [&folder] { (void)SharedFile::create(folder.file(), kMiB, false); });
    if (!points.wait_blocked("shared_file:reserved")) _exit(1);
  });
  maker.expect_done();
  maker.kill_hard();
  EXPECT_EQ(nullptr, SharedFile::open(folder.file(), false));
  // What it left is in nobody's way.
  EXPECT_NE(nullptr, SharedFile::create(folder.file(), kMiB, false));
  EXPECT_NE(nullptr, SharedFile::open(folder.file(), false));
}

TEST(SharedFile, TakesNoFileThatItCannotTrust) {
  const Folder folder;
  const std::string path = folder.file();
  const auto made = [&path] {
    std::filesystem::remove(path);
    (void)SharedFile::create(path, kMiB, false);
  };
  made();
  ASSERT_EQ(0, chown(path.c_str(), 4242, 0));
  EXPECT_SAYS(open_error(path), "file of user 4242");
  made();
  for (const mode_t mode : {0640u, 0604u, 0660u, 0610u}) {
    ASSERT_EQ(0, chmod(path.c_str(), mode));
    EXPECT_SAYS(open_error(path), "mode lets other users");
  }
  made();
  ASSERT_EQ(0, truncate(path.c_str(), 2 * kMiB));
  EXPECT_SAYS(open_error(path), "pages are not all there");
  made();
  ASSERT_EQ(0, truncate(path.c_str(), 4095));
  EXPECT_SAYS(open_error(path), "shorter than a page");
  ASSERT_EQ(0, truncate(path.c_str(), 0));
  EXPECT_SAYS(open_error(path), "shorter than a page");
  made();
  ASSERT_EQ(0, symlink(path.c_str(), folder.file("link").c_str()));
  EXPECT_SAYS(open_error(folder.file("link")), "symbolic link");
  EXPECT_SAYS(create_error(folder.file("link"), kMiB), "exists already");
  ASSERT_EQ(0, mkfifo(folder.file("pipe").c_str(), 0600));
  EXPECT_SAYS(open_error(folder.file("pipe")), "no plain file");
  EXPECT_SAYS(open_error(folder.path()), "no plain file");
}

TEST(SharedFile, WantsADirectoryInMemory) {
  const Folder folder;
  EXPECT_SAYS(create_error(folder.file("none/x"), kMiB), "directory does not exist; make it");
  EXPECT_SAYS(open_error(folder.file("none/x")), "directory does not exist; make it");
  const std::string elsewhere = "/proc/self/x";
  EXPECT_SAYS(create_error(elsewhere, kMiB), "neither on tmpfs nor on hugetlbfs");
  EXPECT_SAYS(open_error(elsewhere), "neither on tmpfs nor on hugetlbfs");
  EXPECT_SAYS(create_error(folder.file(), 0), "cannot be made");
  EXPECT_SAYS(create_error(folder.file(), ~std::uint64_t{0}), "cannot be made");
}

TEST(SharedFile, SaysWhatIsFullBeforeItIs) {
  const Mounted mount("tmpfs", "size=1m,mode=0700");
  const std::string error = create_error(mount.file(), 4 * kMiB);
  EXPECT_SAYS(error, "4 MiB are needed and the mount of " + mount.path() + " has 1 MiB free");
  EXPECT_FALSE(exists(mount.file()));
  EXPECT_NE(nullptr, SharedFile::create(mount.file(), kMiB / 2, false));
  // More than the machine has, where the mount allows anything.
  const Mounted vast("tmpfs", "size=0,mode=0700");
  EXPECT_SAYS(create_error(vast.file(), std::uint64_t{1} << 50), "has");
  EXPECT_FALSE(exists(vast.file()));
}

TEST(SharedFile, SaysThatAMountIsReadOnly) {
  const Mounted mount("tmpfs", "size=1m,mode=0700");
  ASSERT_EQ(0, ::mount("none", mount.path().c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr));
  EXPECT_SAYS(create_error(mount.file(), 4096), "mounted read-only");
  EXPECT_SAYS(lock_error(mount.file()), "mounted read-only");
}

TEST(SharedFile, UsesHugePagesOfTheMountOrSaysWhyNot) {
  {
    const Mounted mount("tmpfs", "size=8m,mode=0700,huge=advise");
    const auto file = SharedFile::create(mount.file(), 4 * kMiB, true);
    EXPECT_SAYS(file->pages(), "MiB where free (mount option huge=advise)");
    std::memset(file->data(), 1, file->bytes());
    EXPECT_EQ("4 KiB", SharedFile::open(mount.file(), false)->pages());
  }
  {
    const Mounted mount("tmpfs", "size=8m,mode=0700,huge=never");
    const auto file = SharedFile::create(mount.file(), 4 * kMiB, true);
    EXPECT_SAYS(file->pages(), "4 KiB (mount option huge=never)");
  }
  const Mounted mount("hugetlbfs", "pagesize=2M");
  const std::string error = create_error(mount.file(), std::uint64_t{1} << 44);
  EXPECT_SAYS(error, "huge pages (sysctl vm.nr_hugepages) has");
  EXPECT_FALSE(exists(mount.file()));
  if (free_memory(mount.path()).bytes >= 4 * kMiB) {
    const auto file = SharedFile::create(mount.file(), 2 * kMiB + 1, true);
    EXPECT_EQ(4 * kMiB, file->bytes());
    EXPECT_EQ("2 MiB (hugetlbfs)", file->pages());
    std::memset(file->data(), 1, file->bytes());
    EXPECT_EQ(std::byte{1}, SharedFile::open(mount.file(), true)->data()[4 * kMiB - 1]);
  } else {
    EXPECT_SAYS(create_error(mount.file(), 2 * kMiB), "2 MiB are needed and");
  }
}

TEST(SharedFile, IsSetAsideWhereThereIsRoomElseRemoved) {
  const Mounted mount("tmpfs", "size=4m,mode=0700");
  const std::string path = mount.file();
  const std::string aside = path + ".set-aside";
  EXPECT_EQ("was not there", SharedFile::set_aside(path, kMiB).substr(0, 13));
  (void)SharedFile::create(path, kMiB, false);
  EXPECT_EQ("kept as " + aside, SharedFile::set_aside(path, kMiB));
  EXPECT_TRUE(exists(aside));
  EXPECT_FALSE(exists(path));
  // An earlier one's room counts: it is replaced.
  (void)SharedFile::create(path, kMiB + kMiB / 2, false);
  EXPECT_EQ("kept as " + aside, SharedFile::set_aside(path, 2 * kMiB));
  EXPECT_EQ(kMiB + kMiB / 2, std::filesystem::file_size(aside));
  (void)SharedFile::create(path, kMiB, false);
  const std::string removed = SharedFile::set_aside(path, 4 * kMiB);
  EXPECT_SAYS(removed, "removed (beside it there is no room for a new one");
  EXPECT_FALSE(exists(path));
  EXPECT_FALSE(exists(aside)) << "the new file needs its room";
  std::filesystem::create_directory(path);
  std::filesystem::create_directory(path + "/x");
  EXPECT_SAYS(error_of([&path] { (void)SharedFile::set_aside(path, 64 * kMiB); }), "remove it");
}

// 4 GiB would take the test's time; what takes long is what is done for each page, and none is.
TEST(SharedFile, IsOpenedWithoutTouchingItsPages) {
  const Folder folder;
  constexpr std::uint64_t kBytes = 256 * kMiB;
  (void)SharedFile::create(folder.file(), kBytes, false);
  const auto from = std::chrono::steady_clock::now();
  const auto file = SharedFile::open(folder.file(), false);
  const auto took = std::chrono::steady_clock::now() - from;
  EXPECT_LT(took, std::chrono::milliseconds(200));
  EXPECT_EQ(kBytes, file->bytes());
}

TEST(FreeMemory, IsTheLeastOfTheCgroupsAbove) {
  const Folder folder;
  const std::string& root = folder.path();
  const auto cgroup = [&root](const std::string& path, const std::string& limit, int used,
                              int cached) {
    std::filesystem::create_directories(root + path);
    write_file(root + path + "/memory.max", limit + "\n");
    write_file(root + path + "/memory.current", std::to_string(used) + "\n");
    write_file(root + path + "/memory.stat",
               "anon 5\ninactive_file " + std::to_string(cached) + "\nactive_file 1\n");
  };
  cgroup("/a/b/c", "max", 10, 0);
  cgroup("/a/b", "1000", 600, 99);
  cgroup("/a", "900", 100, 0);
  const FreeMemory room = free_cgroup_memory("4:cpu:/z\n0::/a/b/c\n", root);
  EXPECT_EQ(500u, room.bytes) << "cached files give way";
  EXPECT_EQ("the cgroup " + root + "/a/b", room.of);
  EXPECT_EQ(801u, free_cgroup_memory("0::/a/none/here\n", root).bytes);
  cgroup("/a", "900", 1000, 0);
  EXPECT_EQ(0u, free_cgroup_memory("0::/a/b/c", root).bytes) << "above its limit";
  // Version 1, and a container that sees its own cgroup as the root.
  std::filesystem::create_directories(root + "/memory");
  write_file(root + "/memory/memory.limit_in_bytes", "5000\n");
  write_file(root + "/memory/memory.usage_in_bytes", "2000\n");
  write_file(root + "/memory/memory.stat", "total_inactive_file 500\ntotal_active_file 500\n");
  EXPECT_EQ(4000u, free_cgroup_memory("4:cpuset,memory:/docker/0123\n", root).bytes);
  for (const char* nothing : {"", "\n", ":", "::", "0::", "0::/\n", "x\ny:z\n", "0:memoryx:/a"}) {
    EXPECT_EQ(std::numeric_limits<std::uint64_t>::max(), free_cgroup_memory(nothing, root).bytes)
        << nothing;
  }
}

TEST(BootId, IsTheSameAllTheTime) {
  EXPECT_EQ(32u, boot_id().size());
  EXPECT_EQ(boot_id(), boot_id());
}

}  // namespace
}  // namespace fc
