#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <system_error>
#include <thread>

#include "persist/shared_file.hpp"

namespace fc {
namespace {

constexpr std::chrono::milliseconds kLockRetry{20};
// Longer waits make no sense, and the clock's arithmetic cannot overflow.
constexpr std::uint64_t kLockWaitMsMax = 3'600'000;

[[noreturn]] void fail(int error, const std::string& path, const std::string& what) {
  throw std::system_error(error, std::generic_category(), "persist: " + path + ": " + what);
}

std::string advice(int error) {
  switch (error) {
    case ENOENT:
      return "its directory does not exist; make it, or choose another persist.dir";
    case ENOTDIR:
      return "a part of the path is no directory; correct persist.dir";
    case EACCES:
    case EPERM:
      return "the daemon's user may not open it; change the owner or mode of it and its directory, "
             "or choose another persist.dir";
    case EROFS:
      return "the file system is mounted read-only; choose another persist.dir";
    case ENOSPC:
    case EDQUOT:
      return "no room left to make it; free some";
    case ELOOP:
      return "it is a symbolic link, which is not followed; remove it";
    case EISDIR:
    case ENXIO:
      return "it is no plain file; remove it, or choose another persist.name";
    default:
      return "it cannot be opened for reading and writing";
  }
}

// Not O_CREAT at once: in a directory of everybody's the kernel then refuses a file of another
// user without saying whose it is.
int open_lock(const std::string& path) {
  constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK;
  int descriptor = open(path.c_str(), kFlags);
  if (descriptor < 0 && errno == ENOENT) {
    descriptor = open(path.c_str(), kFlags | O_CREAT | O_EXCL, 0600);
    // Another process was faster; its file is then opened as any other.
    if (descriptor < 0 && errno == EEXIST) descriptor = open(path.c_str(), kFlags);
  }
  if (descriptor < 0) {
    const int error = errno;
    fail(error, path, advice(error));
  }
  return descriptor;
}

// The pid is the file's text, or where files hold no text its size: hugetlbfs has no write(), and
// growing a file there takes no page.
std::uint64_t size_unit(int descriptor) {
  struct statfs mount {};
  const bool huge = fstatfs(descriptor, &mount) == 0 &&
                    static_cast<std::uint32_t>(mount.f_type) == HUGETLBFS_MAGIC;
  return huge ? static_cast<std::uint64_t>(mount.f_bsize) : 0;
}

// 0: there is none that can be read.
int pid_in(int descriptor) {
  if (const std::uint64_t unit = size_unit(descriptor); unit != 0) {
    struct stat status {};
    if (fstat(descriptor, &status) != 0) return 0;
    return static_cast<int>(static_cast<std::uint64_t>(status.st_size) / unit);
  }
  char text[16];
  const ssize_t got = pread(descriptor, text, sizeof(text), 0);
  int pid = 0;
  if (got <= 0 || std::from_chars(text, text + got, pid).ec != std::errc{} || pid < 0) return 0;
  return pid;
}

// In this order: what stops half-way leaves a pid, never an orderly end.
bool write_pid(int descriptor, int pid) {
  if (const std::uint64_t unit = size_unit(descriptor); unit != 0) {
    return ftruncate(descriptor, static_cast<off_t>(unit * static_cast<std::uint64_t>(pid))) == 0;
  }
  const std::string text = std::to_string(pid) + "\n";
  return pwrite(descriptor, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()) &&
         ftruncate(descriptor, static_cast<off_t>(text.size())) == 0;
}

void check_ours(int descriptor, const std::string& path) {
  struct stat status {};
  if (fstat(descriptor, &status) != 0) fail(errno, path, "its state cannot be read");
  if (!S_ISREG(status.st_mode)) {
    fail(ENODEV, path, "it is no plain file; remove it, or choose another persist.name");
  }
  if (status.st_uid != geteuid()) {
    fail(EPERM, path,
         "it is the file of user " + std::to_string(status.st_uid) +
             "; run the daemon as that user, remove it, or choose another persist.name");
  }
  // Whoever may open it may lock it, and keep us out.
  if ((status.st_mode & 0077) != 0 && fchmod(descriptor, 0600) != 0) {
    fail(errno, path, "its mode cannot be made 0600");
  }
}

// Whether the path still names the file that was locked: somebody may have removed it before.
bool still_named(int descriptor, const std::string& path) {
  struct stat locked {};
  struct stat named {};
  return fstat(descriptor, &locked) == 0 && lstat(path.c_str(), &named) == 0 &&
         locked.st_ino == named.st_ino && locked.st_dev == named.st_dev;
}

}  // namespace

OwnerLock::OwnerLock(const std::string& path, std::uint64_t wait_ms) : owner_(getpid()) {
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::milliseconds(std::min(wait_ms, kLockWaitMsMax));
  for (;;) {
    fd_ = open_lock(path);
    int error = 0;
    try {
      check_ours(fd_, path);
      for (;;) {
        error = flock(fd_, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
        if (error == EINTR) continue;
        if (error != EWOULDBLOCK || std::chrono::steady_clock::now() >= until) break;
        std::this_thread::sleep_for(kLockRetry);
      }
      if (error == EWOULDBLOCK) {
        const int pid = pid_in(fd_);
        throw std::system_error(error, std::generic_category(),
                                "persist: another daemon" +
                                    (pid > 0 ? " (pid " + std::to_string(pid) + ")" : "") +
                                    " owns " + path + ": stop it, or choose another persist.name");
      }
      if (error != 0) fail(error, path, "it cannot be locked");
      if (still_named(fd_, path)) break;
      if (std::chrono::steady_clock::now() >= until) {
        fail(ENOENT, path, "it vanishes while it is locked; who removes it?");
      }
    } catch (...) {
      close(fd_);
      throw;
    }
    close(fd_);
  }
  stale_owner_ = pid_in(fd_);
  if (!write_pid(fd_, owner_)) {
    const int error = errno;
    close(fd_);
    fail(error, path, "the pid cannot be written; free some room on the mount");
  }
}

OwnerLock::~OwnerLock() {
  // A forked child has the file too; the lock is not its own to give back.
  if (getpid() == owner_) {
    (void)!ftruncate(fd_, 0);
    flock(fd_, LOCK_UN);
  }
  close(fd_);
}

}  // namespace fc
