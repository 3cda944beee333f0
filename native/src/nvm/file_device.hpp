// The file or block device under a device's queues: opened, locked, sized.
#pragma once

#include <cstdint>
#include <string>

namespace fc {

// An open file and the kernel's lock on it. The device and all of its queues share one.
//
// Threads: any; constant after construction.
class DeviceFile {
 public:
  // Opens `path`, locks it and brings it to `bytes` (rounded down to whole blocks; 0: all of a
  // block device). Throws as open_device() does, and then leaves no file behind that it made.
  DeviceFile(const std::string& path, std::uint64_t bytes, bool direct);
  ~DeviceFile();
  DeviceFile(const DeviceFile&) = delete;
  DeviceFile& operator=(const DeviceFile&) = delete;

  int descriptor() const noexcept { return descriptor_; }
  const std::string& path() const noexcept { return path_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  bool direct() const noexcept { return direct_; }
  // Why direct I/O was asked for and not got; else empty.
  const std::string& direct_refused() const noexcept { return direct_refused_; }

 private:
  bool open_and_lock();
  int lock() const noexcept;
  void open_path(bool block_device);
  void prepare(std::uint64_t bytes, bool direct);
  void take_block_device(std::uint64_t bytes);
  void size_file(std::uint64_t bytes);
  void reserve(std::uint64_t bytes, std::uint64_t old_bytes, std::uint64_t reserved_bytes);
  void try_direct();
  void close() noexcept;
  [[noreturn]] void fail(int error, const std::string& what) const;

  std::string path_;
  int descriptor_ = -1;
  bool made_ = false;  // by us, just now
  std::uint64_t bytes_ = 0;
  bool direct_ = false;
  std::string direct_refused_;
};

}  // namespace fc
