// Requests through io_uring: a whole batch is one system call, and so is waiting.
#pragma once

#include <liburing.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "nvm/device.hpp"
#include "nvm/file_device.hpp"
#include "nvm/transfer.hpp"

namespace fc {

// One ring. Threads: as IoQueue; the constructor may run on another thread than the rest, one after
// the other. The thread that submitted should live until its requests ended: the kernel may cancel
// what a dead thread left, which then ends with -ECANCELED.
class UringQueue final : public IoQueue {
 public:
  // Throws std::system_error when the kernel refuses the ring.
  UringQueue(std::shared_ptr<const DeviceFile> file, std::uint32_t depth);
  ~UringQueue() override;
  UringQueue(const UringQueue&) = delete;
  UringQueue& operator=(const UringQueue&) = delete;

  void submit(std::span<IoRequest* const> requests) override;
  std::size_t wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) override;
  void wake() noexcept override;

 private:
  int try_out();
  void prepare(std::uint32_t slot);
  void submit_prepared();
  void arm_wake();
  bool take_wake();
  std::size_t reap(std::span<IoRequest*> ended);
  void sleep(std::uint64_t timeout_ns);

  const std::shared_ptr<const DeviceFile> file_;
  io_uring ring_{};
  int wake_event_ = -1;
  std::vector<Transfer> slots_;      // by the number that the kernel hands back
  std::vector<std::uint32_t> free_;  // slots
  bool wake_armed_ = false;          // the ring watches wake_event_

  // wake() sets `woken_` and then asks `asleep_`; wait() sets `asleep_` and then asks `woken_`.
  // Sequentially consistent, so that one of the two sees the other: a wake is never lost, and a
  // thread that is busy costs its wakers no system call.
  std::atomic<bool> woken_{false};
  std::atomic<bool> asleep_{false};
};

}  // namespace fc
