#include "nvm/file_device.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>

#include "core/check.hpp"
#include "nvm/device.hpp"
#include "nvm/thread_queue.hpp"
#include "nvm/uring_queue.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kStatBlockBytes = 512;  // the unit of st_blocks, whatever the file system's
// How often a file that vanishes between its opening and its locking is opened anew.
constexpr int kOpenTriesMax = 3;
// How long a lock is waited for. When a process is killed, the kernel keeps its file open, and so
// its lock, until its requests to the device have ended: whoever starts in its place must bear
// that.
constexpr std::uint64_t kLockPatienceUs = 1'000'000;
constexpr useconds_t kLockRetryUs = 5000;
// Of the ring that io_uring is tried out with: as large as the default queue's.
constexpr std::uint32_t kProbeDepth = 128;
// Rings beyond this the kernel refuses.
constexpr std::uint32_t kDepthMax = 16384;

std::string cause(int error) {
  return std::generic_category().message(error);
}

std::string megabytes(std::uint64_t bytes) {
  return std::to_string(bytes >> 20) + " MiB";
}

// What to do about a path that cannot be opened.
std::string advice(int error, bool block_device) {
  switch (error) {
    case ENOENT:
      return "its directory does not exist; make it first";
    case ENOTDIR:
      return "a part of the path is no directory; correct the path";
    case EACCES:
    case EPERM:
      return "the daemon's user may not read and write it; change its owner or mode";
    case EROFS:
      return "the file system is mounted read-only; choose a writable one";
    case EBUSY:
      return block_device ? "the block device is mounted or in use by another process; free it"
                          : "it is in use by another process; give each daemon a path of its own";
    case EDQUOT:
    case ENOSPC:
      return "no room left to make it; free some";
    case EMFILE:
    case ENFILE:
      return "too many files are open; raise the limit of open files";
    default:
      return "it cannot be opened for reading and writing";
  }
}

}  // namespace

DeviceFile::DeviceFile(const std::string& path, std::uint64_t bytes, bool direct) : path_(path) {
  if (path.empty()) throw std::invalid_argument("NVM device: its path is empty; give one");
  bool locked = false;
  for (int tries = 0; !locked && tries < kOpenTriesMax; ++tries) locked = open_and_lock();
  if (!locked) fail(ENOENT, "it vanishes while it is opened; who removes it?");
  try {
    prepare(bytes, direct);
  } catch (...) {
    // Before the lock goes: whoever gets it next must not find its file removed.
    if (made_) unlink(path_.c_str());
    close();
    throw;
  }
}

DeviceFile::~DeviceFile() {
  close();
}

void DeviceFile::close() noexcept {
  if (descriptor_ < 0) return;
  // Said aloud: a child that was forked and not yet replaced would go on holding the lock.
  flock(descriptor_, LOCK_UN);
  ::close(descriptor_);
  descriptor_ = -1;
}

void DeviceFile::fail(int error, const std::string& what) const {
  throw std::system_error(error, std::generic_category(), "NVM device " + path_ + ": " + what);
}

// False: somebody removed the file before we had its lock; try again.
bool DeviceFile::open_and_lock() {
  struct stat named {};
  const bool there = stat(path_.c_str(), &named) == 0;
  if (there && S_ISDIR(named.st_mode)) {
    fail(EISDIR, "it is a directory; give the path of a file in it");
  }
  // Asked before it is opened: opening a pipe or a tape does things.
  if (there && !S_ISREG(named.st_mode) && !S_ISBLK(named.st_mode)) {
    fail(ENODEV, "it is neither a file nor a block device; give the path of one");
  }
  open_path(there && S_ISBLK(named.st_mode));
  struct stat opened {};
  if (const int error = lock(); error != 0) {
    close();
    if (error == EWOULDBLOCK) {
      fail(EBUSY, "it is in use by another process; give each daemon a path of its own");
    }
    fail(error, "it cannot be locked; choose a file system that has file locks");
  }
  if (fstat(descriptor_, &opened) != 0 || stat(path_.c_str(), &named) != 0 ||
      opened.st_ino != named.st_ino || opened.st_dev != named.st_dev) {
    close();
    made_ = false;
    return false;
  }
  return true;
}

// 0, or why not.
int DeviceFile::lock() const noexcept {
  for (std::uint64_t waited_us = 0;; waited_us += kLockRetryUs) {
    if (flock(descriptor_, LOCK_EX | LOCK_NB) == 0) return 0;
    if (errno != EWOULDBLOCK || waited_us >= kLockPatienceUs) return errno;
    usleep(kLockRetryUs);
  }
}

void DeviceFile::open_path(bool block_device) {
  // O_EXCL on a block device refuses one that is mounted.
  const int flags = O_RDWR | O_CLOEXEC | O_NOCTTY;
  descriptor_ = open(path_.c_str(), flags | (block_device ? O_EXCL : 0));
  if (descriptor_ < 0 && errno == ENOENT) {
    descriptor_ = open(path_.c_str(), flags | O_CREAT | O_EXCL, 0600);
    made_ = descriptor_ >= 0;
    // Another process was faster; its file is then opened as any other.
    if (descriptor_ < 0 && errno == EEXIST) descriptor_ = open(path_.c_str(), flags);
  }
  if (descriptor_ < 0) {
    const int error = errno;
    fail(error, advice(error, block_device));
  }
}

void DeviceFile::prepare(std::uint64_t bytes, bool direct) {
  struct stat status {};
  if (fstat(descriptor_, &status) != 0) fail(errno, "its state cannot be read");
  if (S_ISBLK(status.st_mode)) {
    take_block_device(bytes);
  } else if (S_ISREG(status.st_mode)) {
    size_file(bytes);
  } else {
    fail(ENODEV, "it is neither a file nor a block device; give the path of one");
  }
  if (direct) try_direct();
}

void DeviceFile::take_block_device(std::uint64_t bytes) {
  std::uint64_t there = 0;
  int sector_bytes = 0;
  if (ioctl(descriptor_, BLKGETSIZE64, &there) != 0 ||
      ioctl(descriptor_, BLKSSZGET, &sector_bytes) != 0) {
    fail(errno, "its size cannot be read");
  }
  if (sector_bytes > static_cast<int>(kBlockBytes)) {
    throw std::invalid_argument("NVM device " + path_ + ": its sectors have " +
                                std::to_string(sector_bytes) + " bytes, at most " +
                                std::to_string(kBlockBytes) + " are supported");
  }
  if (bytes > there) {
    throw std::invalid_argument("NVM device " + path_ + ": " + std::to_string(bytes) +
                                " bytes are asked for and the block device has " +
                                std::to_string(there) + "; ask for fewer, or 0 for all of it");
  }
  bytes_ = (bytes == 0 ? there : bytes) / kBlockBytes * kBlockBytes;
  if (bytes_ == 0) {
    throw std::invalid_argument("NVM device " + path_ + ": less than one block of " +
                                std::to_string(kBlockBytes) + " bytes");
  }
}

void DeviceFile::size_file(std::uint64_t bytes) {
  if (bytes < kBlockBytes) {
    throw std::invalid_argument("NVM device " + path_ + ": " + std::to_string(bytes) +
                                " bytes are too few; a file needs at least one block of " +
                                std::to_string(kBlockBytes));
  }
  bytes_ = bytes / kBlockBytes * kBlockBytes;
  if (bytes_ > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) {
    fail(EFBIG, "no file can be so large; make it smaller");
  }
  struct stat status {};
  if (fstat(descriptor_, &status) != 0) fail(errno, "its state cannot be read");
  const auto old_bytes = static_cast<std::uint64_t>(status.st_size);
  const auto reserved_bytes = static_cast<std::uint64_t>(status.st_blocks) * kStatBlockBytes;
  if (reserved_bytes < bytes_ || old_bytes < bytes_) reserve(bytes_, old_bytes, reserved_bytes);
  if (old_bytes > bytes_ && ftruncate(descriptor_, static_cast<off_t>(bytes_)) != 0) {
    fail(errno, "it cannot be cut to " + megabytes(bytes_));
  }
}

// Reserved, not sparse: a disk that others fill must not make writes fail months later.
void DeviceFile::reserve(std::uint64_t bytes, std::uint64_t old_bytes,
                         std::uint64_t reserved_bytes) {
  const std::string advice = "no room for " + megabytes(bytes) + "; free some or make it smaller";
  // Asked first: fallocate would fill the disk to the brim before it fails, under everybody's feet.
  struct statvfs room {};
  if (fstatvfs(descriptor_, &room) == 0) {
    const auto free_bytes = static_cast<std::uint64_t>(room.f_bavail) * room.f_frsize;
    if (bytes > reserved_bytes && bytes - reserved_bytes > free_bytes) {
      fail(ENOSPC, advice + " (" + megabytes(free_bytes) + " are free)");
    }
  }
  int error = 0;
  do {
    error = fallocate(descriptor_, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == EOPNOTSUPP || error == ENOSYS) {
    if (old_bytes >= bytes) return;
    error = ftruncate(descriptor_, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  }
  if (error == 0) return;
  // A reservation that failed half-way leaves the file longer.
  (void)!ftruncate(descriptor_, static_cast<off_t>(old_bytes));
  if (error == EFBIG) {
    fail(error, "a file of " + megabytes(bytes) +
                    " is more than the file system or the process's limit allows; make it smaller");
  }
  fail(error, error == ENOSPC || error == EDQUOT ? advice : "its space cannot be reserved");
}

void DeviceFile::try_direct() {
  // Set on the open file, not by a second opening: the lock stays held.
  const int flags = fcntl(descriptor_, F_GETFL);
  if (flags < 0) fail(errno, "its flags cannot be read");
  if (fcntl(descriptor_, F_SETFL, flags | O_DIRECT) != 0) {
    direct_refused_ = "O_DIRECT: " + cause(errno);
    return;
  }
  // Some file systems take the flag and refuse the reads.
  const std::unique_ptr<void, decltype(&std::free)> block(
      std::aligned_alloc(kBlockBytes, kBlockBytes), &std::free);
  if (block == nullptr) throw std::bad_alloc();
  ssize_t outcome = 0;
  do {
    outcome = pread(descriptor_, block.get(), kBlockBytes, 0);
  } while (outcome < 0 && errno == EINTR);
  if (outcome == static_cast<ssize_t>(kBlockBytes)) {
    direct_ = true;
    return;
  }
  const int error = outcome < 0 ? errno : EIO;
  if (error != EINVAL && error != EOPNOTSUPP) {
    fail(error, "its first block cannot be read; check the disk");
  }
  direct_refused_ = "O_DIRECT: " + cause(error);
  if (fcntl(descriptor_, F_SETFL, flags) != 0) fail(errno, "O_DIRECT cannot be taken back");
}

namespace {

// A file or block device and its queues. Threads: any.
class FileDevice final : public NvmDevice {
 public:
  FileDevice(const std::string& path, std::uint64_t bytes, const DeviceOptions& options)
      : file_(std::make_shared<const DeviceFile>(path, bytes, options.direct)),
        io_threads_(options.io_threads),
        fallback_(file_->direct_refused()) {
    if (options.io == IoKind::Threads) return;
    try {
      // By a real read: kernels before 5.6 have rings without it.
      UringQueue queue(file_, kProbeDepth);
      const std::unique_ptr<void, decltype(&std::free)> block(
          std::aligned_alloc(kBlockBytes, kBlockBytes), &std::free);
      if (block == nullptr) throw std::bad_alloc();
      IoRequest request;
      request.data = static_cast<std::byte*>(block.get());
      request.bytes = kBlockBytes;
      const std::int64_t result = run_request(queue, request);
      if (result < 0) {
        throw std::system_error(static_cast<int>(-result), std::generic_category(), "io_uring");
      }
      uring_ = true;
    } catch (const std::system_error& error) {
      if (options.io == IoKind::Uring) {
        throw std::system_error(
            error.code(),
            "NVM device " + path +
                ": io_uring is refused; allow it (seccomp filter, sysctl kernel.io_uring_disabled, "
                "locked memory) or set io to auto or threads");
      }
      fallback_.append(fallback_.empty() ? "" : "; ").append("io_uring: ");
      fallback_.append(cause(error.code().value()));
    }
  }

  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override {
    if (depth == 0 || depth > kDepthMax) {
      throw std::invalid_argument("NVM device " + file_->path() +
                                  ": the queue's depth must be from 1 to " +
                                  std::to_string(kDepthMax));
    }
    if (uring_) return std::make_unique<UringQueue>(file_, depth);
    const std::lock_guard lock(mutex_);
    if (pool_ == nullptr) pool_ = std::make_shared<ThreadPool>(file_, io_threads_);
    return std::make_unique<ThreadQueue>(pool_, depth);
  }

  const std::string& path() const noexcept override { return file_->path(); }
  std::uint64_t bytes() const noexcept override { return file_->bytes(); }
  const char* io() const noexcept override { return uring_ ? "io_uring" : "threads"; }
  bool direct() const noexcept override { return file_->direct(); }
  const std::string& fallback() const noexcept override { return fallback_; }

 private:
  // Constant after construction. The queues share the file: it outlives the device if they do.
  const std::shared_ptr<const DeviceFile> file_;
  const std::uint32_t io_threads_;
  bool uring_ = false;
  std::string fallback_;

  std::mutex mutex_;
  std::shared_ptr<ThreadPool> pool_;  // guarded by mutex_; made with the first queue
};

}  // namespace

std::shared_ptr<NvmDevice> open_device(const std::string& path, std::uint64_t bytes,
                                       const DeviceOptions& options) {
  if (options.io_threads == 0) {
    throw std::invalid_argument("NVM device " + path + ": io_threads must be at least 1");
  }
  return std::make_shared<FileDevice>(path, bytes, options);
}

std::int64_t run_request(IoQueue& queue, IoRequest request) {
  IoRequest* pending = &request;
  queue.submit({&pending, 1});
  IoRequest* ended = nullptr;
  while (queue.wait({&ended, 1}, std::numeric_limits<std::uint64_t>::max()) == 0) {
  }
  FC_CHECK(ended == &request);  // nothing else was under way
  return request.result;
}

}  // namespace fc
