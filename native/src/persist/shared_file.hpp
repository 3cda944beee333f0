// Memory that outlives the process: a file on tmpfs or hugetlbfs, mapped shared.
//
// Ownership is a kernel lock (flock) on a file beside it, held while the owner lives however it
// ends; the pid written there is for messages only. All of a file's pages are reserved when it is
// made, after the mount's and the cgroup's free space were looked at: nobody meets a SIGBUS later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace fc {

// Held: nobody else uses what lies under `path`. Threads: one.
class OwnerLock {
 public:
  // Makes the lock file, mode 0600, where there is none; waits up to `wait_ms` for an owner that is
  // on its way out. Throws std::system_error: held by another process (its pid is in the message),
  // the directory is missing or not writable, the file is another user's or is no plain file.
  OwnerLock(const std::string& path, std::uint64_t wait_ms);
  ~OwnerLock();
  OwnerLock(const OwnerLock&) = delete;
  OwnerLock& operator=(const OwnerLock&) = delete;

  // The pid that the owner before left behind: it did not end in order. 0: there is none.
  int stale_owner() const noexcept { return stale_owner_; }

 private:
  int fd_ = -1;
  int stale_owner_ = 0;
};

class SharedFile {
 public:
  // Maps an existing file whole; null when there is none. Throws std::system_error when it cannot
  // be used: another user's, of a mode wider than 0600, no plain file (a symbolic link either), its
  // pages not all there.
  static std::unique_ptr<SharedFile> open(const std::string& path, bool huge_pages);
  // Makes a file of zeroes of `bytes`, rounded up to whole pages, mode 0600, all pages reserved; it
  // must not exist. Throws std::system_error: no such directory, no permission, or
  // not enough room, with what is needed, what there is and of what (mount or cgroup).
  static std::unique_ptr<SharedFile> create(const std::string& path, std::uint64_t bytes,
                                            bool huge_pages);
  // Takes a file out of the way: renamed to path + ".set-aside" (replacing an earlier one) where
  // the mount has room for `needed` bytes beside it, else removed. Says which of the two it did.
  static std::string set_aside(const std::string& path, std::uint64_t needed);
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  // The pages it lies on and why not larger ones: "2 MiB (hugetlbfs)", "2 MiB where free
  // (shmem_enabled: advise)", "4 KiB (shmem_enabled: never)".
  const std::string& pages() const noexcept { return pages_; }

 private:
  SharedFile() = default;

  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
  std::string pages_;
};

// This boot's id, 32 hexadecimal digits; empty where the kernel does not say.
std::string boot_id();

}  // namespace fc
