// Opening a device: what is made, locked, sized and refused, and what the kernel may refuse.
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "device_support.hpp"
#include "support.hpp"

namespace fc::testing {
namespace {

using ::testing::Test;

class DeviceOpen : public Test {
 protected:
  // Opens with io_uring if it may, and says in a line what it got.
  static std::string got(const std::string& path, const DeviceOptions& options = {}) {
    const auto device = open_device(path, kMiB, options);
    const auto queue = device->make_queue(4);
    const AlignedBytes data(kBlock, 0x77);
    const AlignedBytes back(kBlock);
    if (run_request(*queue, write_of(0, data)) != kBlock ||
        run_request(*queue, read_of(0, back)) != kBlock || !(back == data)) {
      return "it does not work";
    }
    return std::string(device->io()) + (device->direct() ? " direct" : " buffered") + " [" +
           device->fallback() + "]";
  }
  static struct stat status_of(const std::string& path) {
    struct stat status {};
    EXPECT_EQ(stat(path.c_str(), &status), 0) << path;
    return status;
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_.file();
};

TEST_F(DeviceOpen, MakesAFileThatNobodyElseReads) {
  EXPECT_EQ(open_device(path_, kMiB + 1000, {})->bytes(), kMiB);
  const struct stat status = status_of(path_);
  EXPECT_EQ(status.st_mode & 07777, 0600U);
  EXPECT_EQ(status.st_size, static_cast<off_t>(kMiB));
  EXPECT_GE(status.st_blocks * 512, static_cast<off_t>(kMiB)) << "its space is reserved";
}

TEST_F(DeviceOpen, BringsAFileToItsSize) {
  const AlignedBytes data(kBlock, 0x11);
  const auto written = [&](std::uint64_t bytes, bool write) {
    const auto device = open_device(path_, bytes, {});
    EXPECT_EQ(device->bytes(), bytes);
    EXPECT_EQ(status_of(path_).st_size, static_cast<off_t>(bytes));
    const auto queue = device->make_queue(1);
    const AlignedBytes got(kBlock);
    if (write) {
      EXPECT_EQ(run_request(*queue, write_of(0, data)), std::int64_t{kBlock});
    }
    EXPECT_EQ(run_request(*queue, read_of(0, got)), std::int64_t{kBlock});
    EXPECT_TRUE(got == data) << "what fits in stays";
  };
  written(kMiB, true);
  written(2 * kMiB, false);
  written(2 * kMiB, false);
  written(kMiB / 2, false);
}

TEST_F(DeviceOpen, ReservesTheSpaceOfASparseFile) {
  std::ofstream(path_).close();
  ASSERT_EQ(truncate(path_.c_str(), kMiB), 0);
  open_device(path_, kMiB, {});
  EXPECT_GE(status_of(path_).st_blocks * 512, static_cast<off_t>(kMiB));
}

TEST_F(DeviceOpen, IsLockedAgainstThisProcess) {
  const auto device = open_device(path_, kMiB, {});
  const std::string error = open_error(path_, 2 * kMiB);
  EXPECT_NE(error.find(path_), std::string::npos) << error;
  EXPECT_NE(error.find("in use by another process"), std::string::npos) << error;
  EXPECT_EQ(status_of(path_).st_size, static_cast<off_t>(kMiB)) << "it was left alone";
}

TEST_F(DeviceOpen, IsLockedAgainstOtherProcesses) {
  {
    const auto device = open_device(path_, kMiB, {});
    const std::string error = in_child([&] { return open_error(path_, kMiB); });
    EXPECT_NE(error.find("in use by another process"), std::string::npos) << error;
  }
  EXPECT_EQ(in_child([&] { return open_error(path_, kMiB); }), "") << "the lock went with it";
}

// A forked child that is not replaced yet shares the open file, and would go on holding its lock.
TEST_F(DeviceOpen, AChildDoesNotInheritTheLock) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  auto device = open_device(path_, kMiB, {});
  const pid_t child = fork();
  if (child == 0) {
    close(ends[1]);
    char end = 0;
    _exit(read(ends[0], &end, 1) == 0 ? 0 : 1);
  }
  device.reset();
  EXPECT_EQ(open_error(path_, kMiB), "");
  close(ends[0]);
  close(ends[1]);
  int status = 0;
  waitpid(child, &status, 0);
}

TEST_F(DeviceOpen, SaysWhatIsWrongWithAPath) {
  const std::string socket_path = directory_.file("socket");
  const int socket_descriptor = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, socket_path.c_str(), sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(socket_descriptor, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  close(socket_descriptor);
  const std::string pipe_path = directory_.file("pipe");
  ASSERT_EQ(mkfifo(pipe_path.c_str(), 0600), 0);
  std::ofstream(path_).close();

  const std::pair<std::string, std::string> cases[] = {
      {directory_.file("missing/device"), "its directory does not exist"},
      {path_ + "/device", "a part of the path is no directory"},
      {directory_.file(""), "it is a directory"},
      {socket_path, "it is neither a file nor a block device"},
      {pipe_path, "it is neither a file nor a block device"},
      {"/dev/null", "it is neither a file nor a block device"},
  };
  for (const auto& [path, what] : cases) {
    const std::string error = open_error(path, kMiB);
    EXPECT_NE(error.find(path), std::string::npos) << error;
    EXPECT_NE(error.find(what), std::string::npos) << path << ": " << error;
    EXPECT_THROW(open_device(path, kMiB, {}), std::system_error) << path;
  }
  EXPECT_NE(open_error("", kMiB).find("its path is empty"), std::string::npos);
}

TEST_F(DeviceOpen, SaysWhenItMayNotWrite) {
  std::ofstream(path_).close();
  ASSERT_EQ(chmod(path_.c_str(), 0444), 0);
  const std::string error = in_child([&] {
    if (geteuid() == 0 && setuid(65534) != 0) return std::string("cannot become nobody");
    return open_error(path_, kMiB) + "\n" + open_error(directory_.file("new"), kMiB);
  });
  const std::size_t second = error.find('\n');
  EXPECT_LT(error.find("the daemon's user may not read and write it"), second) << error;
  // Whoever owns the directory may make files in it.
  if (geteuid() == 0) {
    EXPECT_NE(error.find("the daemon's user may not", second), std::string::npos) << error;
  }
}

TEST_F(DeviceOpen, RefusesSizesThatMakeNoSense) {
  EXPECT_THROW(open_device(path_, 0, {}), std::invalid_argument);
  EXPECT_THROW(open_device(path_, kBlock - 1, {}), std::invalid_argument);
  EXPECT_NE(open_error(path_, kForever), "");
  DeviceOptions options;
  options.io_threads = 0;
  EXPECT_THROW(open_device(path_, kMiB, options), std::invalid_argument);
  EXPECT_FALSE(std::filesystem::exists(path_)) << "a file was left behind";
}

TEST_F(DeviceOpen, SaysWhenThereIsNoRoom) {
  constexpr std::uint64_t kPebibyte = std::uint64_t{1} << 50;
  const std::string error = open_error(path_, kPebibyte);
  EXPECT_NE(error.find("no room for 1073741824 MiB"), std::string::npos) << error;
  EXPECT_FALSE(std::filesystem::exists(path_)) << "a file was left behind";
  open_device(path_, kMiB, {});
  EXPECT_NE(open_error(path_, kPebibyte), "");
  EXPECT_EQ(status_of(path_).st_size, static_cast<off_t>(kMiB)) << "it was somebody's";
}

// The limit of the process stands for a reservation that fails on the way.
TEST_F(DeviceOpen, LeavesNothingBehindWhenTheReservationFails) {
  const std::string answer = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{kMiB, kMiB};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return std::string("no limit");
    std::string error = open_error(path_, 2 * kMiB);
    if (std::filesystem::exists(path_)) error += " and left a file behind";
    open_device(path_, kMiB, {});
    if (open_error(path_, 2 * kMiB).empty()) error += " and then grew it";
    return error;
  });
  EXPECT_NE(answer.find("a file of 2 MiB is more than"), std::string::npos) << answer;
  EXPECT_EQ(answer.find(" and left a file"), std::string::npos) << answer;
  EXPECT_EQ(answer.find(" and then grew it"), std::string::npos) << answer;
  EXPECT_EQ(status_of(path_).st_size, static_cast<off_t>(kMiB));
}

TEST_F(DeviceOpen, ReservesBySizeAloneWhereThereIsNoReservation) {
  const std::string answer = in_child([&] {
    refuse(SYS_fallocate, EOPNOTSUPP);
    return got(path_);
  });
  EXPECT_TRUE(answer.starts_with("io_uring ")) << answer;
  EXPECT_EQ(status_of(path_).st_size, static_cast<off_t>(kMiB));
  EXPECT_EQ(in_child([&] {
              refuse(SYS_fallocate, ENOSPC);
              const std::string error = open_error(directory_.file("full"), kMiB);
              return error.substr(error.find("no room"), 18);
            }),
            "no room for 1 MiB;");
  EXPECT_FALSE(std::filesystem::exists(directory_.file("full")));
}

TEST_F(DeviceOpen, FallsBackWhereIoUringIsRefused) {
  const std::string direct = open_device(path_, kMiB, {})->direct() ? "direct" : "buffered";
  for (const auto& [call, error] : {std::pair{SYS_io_uring_setup, EPERM},
                                    {SYS_io_uring_setup, ENOSYS},
                                    {SYS_io_uring_enter, EPERM}}) {
    const std::string why = std::generic_category().message(error);
    const std::string answer = in_child([&, refused = call, with = error] {
      refuse(refused, with);
      return got(path_);
    });
    EXPECT_TRUE(answer.starts_with("threads " + direct)) << answer;
    EXPECT_NE(answer.find("io_uring: " + why), std::string::npos) << answer;

    const std::string insisting = in_child([&, refused = call, with = error] {
      refuse(refused, with);
      DeviceOptions options;
      options.io = IoKind::Uring;
      return open_error(path_, kMiB, options);
    });
    EXPECT_NE(insisting.find("io_uring is refused"), std::string::npos) << insisting;
    EXPECT_NE(insisting.find(path_), std::string::npos) << insisting;
    EXPECT_NE(insisting.find(why), std::string::npos) << insisting;
  }
}

TEST_F(DeviceOpen, FallsBackWhereDirectIoIsRefused) {
  EXPECT_EQ(in_child([&] {
              refuse(SYS_fcntl, EINVAL, RefusedArgument{1, F_SETFL});
              return got(path_);
            }),
            "io_uring buffered [O_DIRECT: Invalid argument]");
  // The flag is taken, the read is not.
  EXPECT_EQ(in_child([&] {
              refuse(SYS_pread64, EINVAL);
              return got(path_);
            }),
            "io_uring buffered [O_DIRECT: Invalid argument]");
  EXPECT_EQ(in_child([&] {
              refuse(SYS_fcntl, EINVAL, RefusedArgument{1, F_SETFL});
              refuse(SYS_io_uring_setup, EPERM);
              return got(path_);
            }),
            "threads buffered [O_DIRECT: Invalid argument; io_uring: Operation not permitted]");
}

TEST_F(DeviceOpen, ABadFirstBlockIsSaid) {
  const std::string error = in_child([&] {
    refuse(SYS_pread64, EIO);
    return open_error(path_, kMiB);
  });
  EXPECT_NE(error.find("its first block cannot be read"), std::string::npos) << error;
}

// Newer kernels take O_DIRECT on tmpfs: then there is nothing to fall back from.
TEST_F(DeviceOpen, WorksOnTmpfs) {
  const std::string path = "/dev/shm/fc-device-test-" + std::to_string(getpid());
  const std::string answer = got(path);
  unlink(path.c_str());
  EXPECT_TRUE(answer == "io_uring direct []" ||
              answer == "io_uring buffered [O_DIRECT: Invalid argument]")
      << answer;
}

// A disk that is really full, where this process may mount one.
TEST_F(DeviceOpen, SaysWhenADiskIsFull) {
  const std::string disk = directory_.file("disk");
  ASSERT_EQ(mkdir(disk.c_str(), 0755), 0);
  if (mount("none", disk.c_str(), "tmpfs", 0, "size=1m") != 0) {
    std::cout << "no right to mount: " << std::strerror(errno) << std::endl;
    return;
  }
  const std::string error = open_error(disk + "/device", 2 * kMiB);
  const bool left = std::filesystem::exists(disk + "/device");
  EXPECT_EQ(umount2(disk.c_str(), MNT_DETACH), 0);
  EXPECT_NE(error.find("no room for 2 MiB; free some or make it smaller (1 MiB are free)"),
            std::string::npos)
      << error;
  EXPECT_FALSE(left);
}

// A loop device, where this process may have one.
class LoopDevice {
 public:
  explicit LoopDevice(const std::string& file) {
    const int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    const int number = control < 0 ? -1 : ioctl(control, LOOP_CTL_GET_FREE);
    if (control >= 0) close(control);
    if (number < 0) return;
    path_ = "/dev/loop" + std::to_string(number);
    const int backing = open(file.c_str(), O_RDWR | O_CLOEXEC);
    const int loop = open(path_.c_str(), O_RDWR | O_CLOEXEC);
    there_ = loop >= 0 && ioctl(loop, LOOP_SET_FD, backing) == 0;
    if (loop >= 0) close(loop);
    close(backing);
  }
  ~LoopDevice() {
    if (!there_) return;
    const int loop = open(path_.c_str(), O_RDWR | O_CLOEXEC);
    ioctl(loop, LOOP_CLR_FD);
    close(loop);
  }
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;

  bool there() const { return there_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool there_ = false;
};

TEST_F(DeviceOpen, TakesABlockDevice) {
  std::ofstream(path_).close();
  ASSERT_EQ(truncate(path_.c_str(), 2 * kMiB), 0);
  const LoopDevice loop(path_);
  if (!loop.there()) {
    std::cout << "no right to make a loop device" << std::endl;
    return;
  }
  {
    const auto device = open_device(loop.path(), 0, {});
    EXPECT_EQ(device->bytes(), 2 * kMiB) << "all of it";
    EXPECT_NE(open_error(loop.path(), 0).find("in use by another process"), std::string::npos);
  }
  EXPECT_EQ(open_device(loop.path(), kMiB, {})->bytes(), kMiB);
  const std::string error = open_error(loop.path(), 4 * kMiB);
  EXPECT_NE(error.find("the block device has 2097152"), std::string::npos) << error;
  EXPECT_EQ(got(loop.path()).substr(0, 8), "io_uring");

  const int mounted = open(loop.path().c_str(), O_RDONLY | O_EXCL | O_CLOEXEC);
  ASSERT_GE(mounted, 0);
  const std::string busy = open_error(loop.path(), 0);
  EXPECT_NE(busy.find("is mounted or in use"), std::string::npos) << busy;
  close(mounted);
}

}  // namespace
}  // namespace fc::testing
