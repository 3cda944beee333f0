// Memory that outlives the process: a file on tmpfs or hugetlbfs, mapped shared.
//
// Ownership is a kernel lock (flock) on a file beside it, held while the owner lives however it
// ends; the pid written there is for messages only. All of a file's pages are reserved when it is
// made, after the free space of the mount, the cgroup and the machine was looked at: nobody meets a
// SIGBUS later.
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

  // The pid that the owner before left behind: it did not end in order. 0: there is none. It may
  // equal one's own: in a container every daemon is process 1.
  int stale_owner() const noexcept { return stale_owner_; }

 private:
  const int owner_;  // the process that took it: a forked child gives nothing back
  int fd_ = -1;
  int stale_owner_ = 0;
};

class SharedFile {
 public:
  // Maps an existing file whole, in no time: nothing is read in. Null when there is none. Throws
  // std::system_error when it cannot be used: another user's, of a mode wider than 0600, no plain
  // file (a symbolic link either), its pages not all there, not on tmpfs or hugetlbfs.
  static std::unique_ptr<SharedFile> open(const std::string& path, bool huge_pages);
  // Makes a file of zeroes of `bytes`, rounded up to whole pages, mode 0600, all pages reserved; it
  // must not exist. It comes under another name first (path + ".new"): what is found at `path` is
  // whole. Throws std::system_error: no such directory, no permission, or
  // not enough room, with what is needed, what there is and of what (mount or cgroup).
  static std::unique_ptr<SharedFile> create(const std::string& path, std::uint64_t bytes,
                                            bool huge_pages);
  // Takes a file out of the way: renamed to path + ".set-aside" (replacing an earlier one) where
  // there is room for `needed` bytes beside it, else removed. Says which of the two it did and why.
  // Throws std::system_error when neither can be done.
  static std::string set_aside(const std::string& path, std::uint64_t needed);
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;

  // Begins at a boundary of 2 MiB.
  std::byte* data() const noexcept { return data_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  // The pages it lies on and why not larger ones: "2 MiB (hugetlbfs)", "2 MiB where free (mount
  // option huge=advise)", "4 KiB (mount option huge=never)", "4 KiB (shmem_enabled: deny)"; without
  // `huge_pages` "4 KiB".
  const std::string& pages() const noexcept { return pages_; }

 private:
  SharedFile() = default;

  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
  std::uint64_t mapped_bytes_ = 0;  // up to the end of the last page
  std::string pages_;
};

// This boot's id, 32 hexadecimal digits; empty where the kernel does not say.
std::string boot_id();

}  // namespace fc
