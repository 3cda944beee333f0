#include "persist/shared_file.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <sstream>
#include <system_error>

#include "core/sequence_point.hpp"
#include "persist/descriptor.hpp"
#include "persist/free_memory.hpp"

#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // kernel 5.14; older headers do not have it
#endif

namespace fc {
namespace {

constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;
constexpr std::uint64_t kStatBlockBytes = 512;  // the unit of st_blocks, whatever the file system's
// Pages are reserved in pieces: a signal makes the kernel undo the piece that it works on.
constexpr std::uint64_t kReserveBytes = std::uint64_t{64} << 20;

[[noreturn]] void fail(int error, const std::string& path, const std::string& what) {
  throw std::system_error(error, std::generic_category(), "persist: " + path + ": " + what);
}

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t to) noexcept {
  return (value + to - 1) / to * to;
}

std::string megabytes(std::uint64_t bytes) {
  return std::to_string(bytes >> 20) + " MiB";
}

std::string advice(int error) {
  switch (error) {
    case ENOENT:
      return "its directory does not exist; make it, or choose another persist.dir";
    case ENOTDIR:
      return "a part of the path is no directory; correct persist.dir";
    case EEXIST:
      return "it exists already";
    case EACCES:
    case EPERM:
      return "the daemon's user may not read and write it; change the owner or mode of it and its "
             "directory, or choose another persist.dir";
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
    case EMFILE:
    case ENFILE:
      return "too many files are open; raise the limit of open files";
    default:
      return "it cannot be opened for reading and writing";
  }
}

// The file system that memory is mapped from.
struct Mount {
  bool huge = false;  // hugetlbfs
  std::uint64_t page_bytes = 0;
};

Mount mount_of(const std::string& path) {
  const std::string directory = directory_of(path);
  struct statfs status {};
  if (statfs(directory.c_str(), &status) != 0) {
    const int error = errno;
    fail(error, path, advice(error));
  }
  Mount mount;
  const auto type = static_cast<std::uint32_t>(status.f_type);
  mount.huge = type == HUGETLBFS_MAGIC;
  if (!mount.huge && type != TMPFS_MAGIC) {
    fail(EINVAL, path,
         "the directory is neither on tmpfs nor on hugetlbfs, and a disk would be written all the "
         "time; choose a persist.dir such as /dev/shm");
  }
  mount.page_bytes =
      static_cast<std::uint64_t>(mount.huge ? status.f_bsize : sysconf(_SC_PAGESIZE));
  return mount;
}

// The "huge=" option of a tmpfs mount, which says whether its files get huge pages; empty: none.
std::string huge_option(int descriptor) {
  struct stat status {};
  if (fstat(descriptor, &status) != 0) return {};
  const std::string device =
      std::to_string(major(status.st_dev)) + ":" + std::to_string(minor(status.st_dev));
  std::istringstream mounts(small_file("/proc/self/mountinfo"));
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream words(line);
    std::string word;
    words >> word >> word >> word;
    if (word != device) continue;
    while (words >> word) {  // the last one is the options
    }
    std::string options(1, ',');
    options.append(word).push_back(',');
    const std::size_t at = options.find(",huge=");
    if (at == std::string::npos) return {};
    const std::size_t from = at + std::string_view(",huge=").size();
    return options.substr(from, options.find(',', from) - from);
  }
  return {};
}

struct Pages {
  std::string text;
  bool advised = false;  // huge pages come only where the mapping asks for them
};

Pages pages_of(const Mount& mount, int descriptor, bool huge_pages) {
  if (mount.huge) {
    const bool gigantic = mount.page_bytes >= std::uint64_t{1} << 30;
    std::string size =
        gigantic ? std::to_string(mount.page_bytes >> 30) + " GiB" : megabytes(mount.page_bytes);
    return {size.append(" (hugetlbfs)"), false};
  }
  const std::string small = std::to_string(mount.page_bytes >> 10) + " KiB";
  if (!huge_pages) return {small, false};
  // A mount's own option decides; the machine's setting overrules it only with these two.
  const std::string setting = small_file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  if (setting.empty()) return {small + " (the kernel has no transparent huge pages)", false};
  if (setting.find("[deny]") != std::string::npos) return {small + " (shmem_enabled: deny)", false};
  if (setting.find("[force]") != std::string::npos) {
    return {"2 MiB where free (shmem_enabled: force)", false};
  }
  const std::string option = huge_option(descriptor);
  if (option.empty() || option == "never") {
    return {small + " (mount option huge=never)", false};
  }
  return {"2 MiB where free (mount option huge=" + option + ")", option == "advise"};
}

// Maps all of a file at a huge page's boundary; null: errno says why not.
std::byte* map(int descriptor, std::uint64_t bytes, std::uint64_t page_bytes) {
  const std::uint64_t alignment = std::max(kHugePage, page_bytes);
  const std::uint64_t length = round_up(bytes, page_bytes);
  const std::uint64_t reserved = length + alignment;
  void* const room =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  auto* const base = static_cast<std::byte*>(room);
  const std::uint64_t before = round_up(reinterpret_cast<std::uint64_t>(base), alignment) -
                               reinterpret_cast<std::uint64_t>(base);
  void* const mapped =
      mmap(base + before, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    munmap(room, reserved);
    errno = error;
    return nullptr;
  }
  if (before != 0) munmap(room, before);
  if (before + length != reserved) munmap(base + before + length, reserved - before - length);
  return base + before;
}

// 0, or why not.
int reserve(int descriptor, std::uint64_t bytes) {
  for (std::uint64_t at = 0; at < bytes;) {
    const std::uint64_t piece = std::min(kReserveBytes, bytes - at);
    if (fallocate(descriptor, 0, static_cast<off_t>(at), static_cast<off_t>(piece)) == 0) {
      at += piece;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

// What files that are being made have been promised and may not have taken yet: a node's instances
// make theirs at the same time, and each must leave the others what they were told was free.
class Promises {
 public:
  // Promises `bytes` of a directory's memory, waiting for others to have taken theirs where only
  // then can be said whether they are there. False: they are not; `room` says what is.
  bool promise(const std::string& directory, std::uint64_t bytes, FreeMemory& room) {
    std::unique_lock lock(mutex_);
    for (;;) {
      room = free_memory(directory);
      if (bytes <= room.bytes && promised_ <= room.bytes - bytes) {
        promised_ += bytes;
        return true;
      }
      if (promised_ == 0) return false;
      taken_.wait(lock);
    }
  }
  void taken(std::uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    promised_ -= bytes;
    taken_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable taken_;
  std::uint64_t promised_ = 0;  // guarded by mutex_
};

Promises& promises() {
  static Promises of_process;
  return of_process;
}

// Holds a promise until the pages are there, or will not be.
class Promise {
 public:
  explicit Promise(std::uint64_t bytes) : bytes_(bytes) {}
  ~Promise() { promises().taken(bytes_); }
  Promise(const Promise&) = delete;
  Promise& operator=(const Promise&) = delete;

 private:
  const std::uint64_t bytes_;
};

}  // namespace

std::unique_ptr<SharedFile> SharedFile::open(const std::string& path, bool huge_pages) {
  const Mount mount = mount_of(path);
  const Descriptor file(
      ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK));
  if (file.get() < 0) {
    const int error = errno;
    if (error == ENOENT) return nullptr;
    fail(error, path, advice(error));
  }
  struct stat status {};
  if (fstat(file.get(), &status) != 0) fail(errno, path, "its state cannot be read");
  if (!S_ISREG(status.st_mode)) fail(ENODEV, path, "it is no plain file; remove it");
  if (status.st_uid != geteuid()) {
    fail(EPERM, path,
         "it is the file of user " + std::to_string(status.st_uid) +
             "; run the daemon as that user, remove it, or choose another persist.name");
  }
  if ((status.st_mode & 0077) != 0) {
    fail(EPERM, path,
         "its mode lets other users read or change it, so it is not trusted; remove it");
  }
  const auto bytes = static_cast<std::uint64_t>(status.st_size);
  if (bytes < mount.page_bytes) fail(EINVAL, path, "it is shorter than a page; remove it");
  if (static_cast<std::uint64_t>(status.st_blocks) * kStatBlockBytes < bytes) {
    fail(EINVAL, path, "its pages are not all there: it was not made to its end; remove it");
  }
  std::unique_ptr<SharedFile> mapped(new SharedFile());
  const Pages pages = pages_of(mount, file.get(), huge_pages);
  mapped->data_ = map(file.get(), bytes, mount.page_bytes);
  if (mapped->data_ == nullptr) fail(errno, path, "it cannot be mapped (" + megabytes(bytes) + ")");
  mapped->bytes_ = bytes;
  mapped->mapped_bytes_ = round_up(bytes, mount.page_bytes);
  mapped->pages_ = pages.text;
  // Advice only, and nothing is read in yet: however large, the file is there at once.
  if (huge_pages && !mount.huge) (void)madvise(mapped->data_, bytes, MADV_HUGEPAGE);
  return mapped;
}

std::unique_ptr<SharedFile> SharedFile::create(const std::string& path, std::uint64_t bytes,
                                               bool huge_pages) {
  const Mount mount = mount_of(path);
  const auto largest = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (bytes == 0 || bytes > largest - mount.page_bytes) {
    fail(EINVAL, path, "a file of " + std::to_string(bytes) + " bytes cannot be made");
  }
  bytes = round_up(bytes, mount.page_bytes);
  struct stat there {};
  if (lstat(path.c_str(), &there) == 0) fail(EEXIST, path, advice(EEXIST));
  // Under its own name when all of it is there: who is killed while the pages are reserved leaves
  // no file that the next start would have to refuse.
  const std::string made = path + ".new";
  unlink(made.c_str());
  const Descriptor file(
      ::open(made.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (file.get() < 0) {
    const int error = errno;
    fail(error, path, advice(error));
  }
  try {
    // Asked first: short of memory the kernel would end processes, not this call.
    FreeMemory room;
    if (!promises().promise(directory_of(path), bytes, room)) {
      fail(ENOSPC, path, not_enough(room, bytes));
    }
    const Promise promised(bytes);
    if (ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) {
      fail(errno, path,
           "it cannot be made " + megabytes(bytes) +
               " long; check the limits of "
               "file sizes");
    }
    const Pages pages = pages_of(mount, file.get(), huge_pages);
    std::unique_ptr<SharedFile> mapped(new SharedFile());
    mapped->data_ = map(file.get(), bytes, mount.page_bytes);
    if (mapped->data_ == nullptr) {
      const int error = errno;
      fail(error, path,
           "it cannot be mapped (" + megabytes(bytes) +
               (mount.huge ? "); are there enough huge pages (sysctl vm.nr_hugepages)?"
                           : "); check the limit of address space"));
    }
    mapped->bytes_ = bytes;
    mapped->mapped_bytes_ = bytes;
    mapped->pages_ = pages.text;
    if (huge_pages && !mount.huge) {
      (void)madvise(mapped->data_, bytes, MADV_HUGEPAGE);
      // Pages that are reserved by the file alone come small where huge ones want to be asked for.
      if (pages.advised) (void)madvise(mapped->data_, bytes, MADV_POPULATE_WRITE);
    }
    if (const int error = reserve(file.get(), bytes); error != 0) {
      const FreeMemory left = free_memory(directory_of(path));
      fail(error, path,
           error == ENOSPC || error == EDQUOT || error == ENOMEM
               ? "no room to reserve it: " + not_enough(left, bytes)
               : "its pages cannot be reserved");
    }
    FC_SEQUENCE_POINT("shared_file:reserved");
    if (rename(made.c_str(), path.c_str()) != 0) fail(errno, path, "it cannot be renamed to this");
    return mapped;
  } catch (...) {
    unlink(made.c_str());
    throw;
  }
}

std::string SharedFile::set_aside(const std::string& path, std::uint64_t needed) {
  const std::string aside = path + ".set-aside";
  FreeMemory room = free_memory(directory_of(path));
  // An earlier one is replaced, or goes where a new file needs its room.
  struct stat earlier {};
  const bool had_one = lstat(aside.c_str(), &earlier) == 0 && S_ISREG(earlier.st_mode);
  const std::uint64_t given_back =
      had_one ? static_cast<std::uint64_t>(earlier.st_blocks) * kStatBlockBytes : 0;
  const bool fits = needed <= room.bytes || needed - room.bytes <= given_back;
  if (fits && rename(path.c_str(), aside.c_str()) == 0) return "kept as " + aside;
  const std::string why =
      fits ? "it cannot be renamed: " + std::generic_category().message(errno)
           : "beside it there is no room for a new one, " + not_enough(room, needed);
  if (unlink(path.c_str()) != 0) {
    const int error = errno;
    if (error == ENOENT) return "was not there";
    fail(error, path, "it can neither be kept aside nor removed; remove it");
  }
  if (had_one && needed > free_memory(directory_of(path)).bytes) (void)unlink(aside.c_str());
  return "removed (" + why + ")";
}

SharedFile::~SharedFile() {
  if (data_ != nullptr) munmap(data_, mapped_bytes_);
}

std::string boot_id() {
  std::string id = small_file("/proc/sys/kernel/random/boot_id");
  std::erase_if(id, [](unsigned char c) { return std::isxdigit(c) == 0; });
  return id.size() == 32 ? id : std::string();
}

}  // namespace fc
