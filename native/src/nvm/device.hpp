// The device layer: files or raw block devices, read and written in whole blocks.
//
// A device makes queues; a queue belongs to one thread, which hands it requests and waits for their
// completions in whatever order they come. Two kinds of queue: io_uring, and a pool of threads with
// pread and pwrite for where the kernel or a seccomp filter refuses io_uring. Direct I/O where the
// file system has it, else buffered.
//
// testing/fault_device.hpp wraps a device and makes it fail in every way that devices do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "feature_cache/config.hpp"

namespace fc {

// Offsets, sizes and buffers of every request are multiples of this: what direct I/O wants of any
// device in use.
inline constexpr std::size_t kBlockBytes = 4096;

struct IoRequest {
  enum class Kind : std::uint8_t { Read, Write, Sync };

  Kind kind = Kind::Read;
  std::uint64_t offset = 0;
  std::byte* data = nullptr;
  std::uint32_t bytes = 0;
  // Out: bytes moved, or -errno. Fewer bytes than asked is an error to the caller (IoQueue has
  // gone on after a short transfer that was not at the device's end).
  std::int64_t result = 0;
  void* owner = nullptr;  // the caller's

  bool ok() const noexcept { return result == static_cast<std::int64_t>(bytes); }
};

// Threads: one thread submits and waits; wake() from any.
class IoQueue {
 public:
  virtual ~IoQueue() = default;  // waits for what is under way
  // Starts the requests; they must live until wait() returned them. At most `depth` of make_queue()
  // are under way at a time: the caller keeps count.
  virtual void submit(std::span<IoRequest* const> requests) = 0;
  // Waits until a request has ended, wake() was called or `timeout_ns` are over (0: does not wait);
  // returns how many ended requests it wrote to `ended`.
  virtual std::size_t wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) = 0;
  // Ends the wait() that runs, or the next one.
  virtual void wake() noexcept = 0;
};

class NvmDevice {
 public:
  virtual ~NvmDevice() = default;
  virtual std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) = 0;
  virtual const std::string& path() const noexcept = 0;
  virtual std::uint64_t bytes() const noexcept = 0;  // whole blocks
  virtual const char* io() const noexcept = 0;       // "io_uring" or "threads"
  virtual bool direct() const noexcept = 0;
  // Why it is not what was asked for ("io_uring: Operation not permitted"); empty when it is.
  virtual const std::string& fallback() const noexcept = 0;
};

struct DeviceOptions {
  IoKind io = IoKind::Auto;
  bool direct = true;
  std::uint32_t io_threads = 64;
};

// Opens a device, making the file and reserving its space where there is none yet; a file of
// another size is brought to `bytes`. Holds a lock on it while it lives: two daemons never share
// one. Throws std::system_error with a message that says what to do: path missing, not writable, no
// room left, in use by another process; io_uring refused while IoKind::Uring insists.
std::shared_ptr<NvmDevice> open_device(const std::string& path, std::uint64_t bytes,
                                       const DeviceOptions& options);

// One request, waited for: for set-up, probes and tests. Returns its result.
std::int64_t run_request(IoQueue& queue, IoRequest request);

}  // namespace fc
