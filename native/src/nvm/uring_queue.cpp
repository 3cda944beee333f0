#include "nvm/uring_queue.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <mutex>
#include <system_error>

#include "core/check.hpp"
#include "core/clock.hpp"

namespace fc {
namespace {

constexpr std::uint64_t kWakeMark = ~std::uint64_t{0} - 1;
constexpr std::uint64_t kForever = std::numeric_limits<std::uint64_t>::max();
// How long requests that the kernel had no memory for wait until they are offered again.
constexpr std::uint64_t kOfferAgainNs = 1'000'000;

// Held while a ring is mapped or unmapped. The kernel may map one thread's ring where another's has
// just been; liburing asks for that by system calls of its own, so without the lock nothing tells a
// thread sanitizer that the one was gone before the other came.
std::mutex& mapping_mutex() {
  static std::mutex of_process;
  return of_process;
}

int map_ring(unsigned entries, io_uring* ring) {
  const std::lock_guard lock(mapping_mutex());
  return io_uring_queue_init(entries, ring, 0);
}

void unmap_ring(io_uring* ring) {
  const std::lock_guard lock(mapping_mutex());
  io_uring_queue_exit(ring);
}

}  // namespace

UringQueue::UringQueue(std::shared_ptr<const DeviceFile> file, std::uint32_t depth)
    : file_(std::move(file)), slots_(std::max(depth, 1U)) {
  free_.reserve(slots_.size());
  for (std::uint32_t i = static_cast<std::uint32_t>(slots_.size()); i-- > 0;) free_.push_back(i);
  wake_event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_event_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  // Two more than requests: the watch on wake_event_, and kernels before 5.11 wait with a timeout
  // by a request of its own. Neither SINGLE_ISSUER nor DEFER_TASKRUN: they tie the ring to one
  // thread, which a queue's maker and user are not.
  const auto entries = static_cast<unsigned>(slots_.size()) + 2;
  int outcome = map_ring(entries, &ring_);
  if (outcome == 0) {
    outcome = try_out();
    if (outcome < 0) unmap_ring(&ring_);
  }
  if (outcome < 0) {
    close(wake_event_);
    throw std::system_error(-outcome, std::generic_category(), "io_uring");
  }
}

// A filter may let a ring be made and refuse its use: does nothing once. 0, or -errno.
int UringQueue::try_out() {
  io_uring_prep_nop(io_uring_get_sqe(&ring_));
  int outcome = 0;
  do {
    outcome = io_uring_submit_and_wait(&ring_, 1);
  } while (outcome == -EINTR);
  io_uring_cqe* entry = nullptr;
  if (outcome >= 0) outcome = io_uring_peek_cqe(&ring_, &entry);
  if (outcome < 0) return outcome;
  io_uring_cqe_seen(&ring_, entry);
  return 0;
}

UringQueue::~UringQueue() {
  IoRequest* ended[64];
  while (free_.size() < slots_.size()) wait(ended, kForever);
  unmap_ring(&ring_);
  close(wake_event_);
}

void UringQueue::submit(std::span<IoRequest* const> requests) {
  FC_CHECK(requests.size() <= free_.size());
  for (IoRequest* request : requests) {
    const std::uint32_t slot = free_.back();
    free_.pop_back();
    slots_[slot] = Transfer(request);
    prepare(slot);
  }
  submit_prepared();
}

void UringQueue::prepare(std::uint32_t slot) {
  const Transfer& transfer = slots_[slot];
  io_uring_sqe* entry = io_uring_get_sqe(&ring_);
  FC_CHECK(entry != nullptr);  // the ring has room for all slots
  switch (transfer.kind()) {
    case IoRequest::Kind::Read:
      io_uring_prep_read(entry, file_->descriptor(), transfer.data(), transfer.bytes(),
                         transfer.offset());
      break;
    case IoRequest::Kind::Write:
      io_uring_prep_write(entry, file_->descriptor(), transfer.data(), transfer.bytes(),
                          transfer.offset());
      break;
    case IoRequest::Kind::Sync:
      io_uring_prep_fsync(entry, file_->descriptor(), IORING_FSYNC_DATASYNC);
      break;
  }
  io_uring_sqe_set_data64(entry, slot);
}

// What the kernel has no memory for just now stays prepared; wait() offers it again.
void UringQueue::submit_prepared() {
  while (io_uring_sq_ready(&ring_) != 0) {
    const int outcome = io_uring_submit(&ring_);
    if (outcome > 0 || outcome == -EINTR) continue;
    FC_CHECK(outcome == 0 || outcome == -EAGAIN || outcome == -EBUSY || outcome == -ENOMEM);
    return;
  }
}

void UringQueue::arm_wake() {
  if (wake_armed_) return;
  io_uring_sqe* entry = io_uring_get_sqe(&ring_);
  FC_CHECK(entry != nullptr);
  io_uring_prep_poll_add(entry, wake_event_, POLLIN);
  io_uring_sqe_set_data64(entry, kWakeMark);
  wake_armed_ = true;
}

bool UringQueue::take_wake() {
  return woken_.load(std::memory_order_relaxed) && woken_.exchange(false);
}

std::size_t UringQueue::reap(std::span<IoRequest*> ended) {
  std::size_t count = 0;
  bool more = false;
  io_uring_cqe* entry = nullptr;
  while (count < ended.size() && io_uring_peek_cqe(&ring_, &entry) == 0) {
    const std::uint64_t mark = entry->user_data;
    const int outcome = entry->res;
    io_uring_cqe_seen(&ring_, entry);
    if (mark == kWakeMark) {
      // Whether somebody wants us is what woken_ says: this may be the echo of a wake that was
      // taken without sleeping.
      wake_armed_ = false;
      eventfd_t value = 0;
      (void)eventfd_read(wake_event_, &value);
    } else if (mark < slots_.size()) {
      const auto slot = static_cast<std::uint32_t>(mark);
      if (slots_[slot].goes_on(outcome)) {
        prepare(slot);
        more = true;
      } else {
        ended[count++] = slots_[slot].request();
        free_.push_back(slot);
      }
    }  // else: a timeout of a kernel before 5.11
  }
  if (more) submit_prepared();
  return count;
}

void UringQueue::sleep(std::uint64_t timeout_ns) {
  arm_wake();
  submit_prepared();
  if (io_uring_sq_ready(&ring_) != 0) timeout_ns = std::min(timeout_ns, kOfferAgainNs);
  io_uring_cqe* entry = nullptr;
  int outcome = 0;
  if (timeout_ns == kForever) {
    outcome = io_uring_wait_cqe(&ring_, &entry);
  } else {
    __kernel_timespec timeout{};
    timeout.tv_sec = static_cast<std::int64_t>(timeout_ns / 1'000'000'000);
    timeout.tv_nsec = static_cast<std::int64_t>(timeout_ns % 1'000'000'000);
    outcome = io_uring_wait_cqes(&ring_, &entry, 1, &timeout, nullptr);
  }
  // Above zero on kernels before 5.11: the timeout was a request.
  FC_CHECK(outcome >= 0 || outcome == -ETIME || outcome == -EINTR || outcome == -EAGAIN ||
           outcome == -EBUSY || outcome == -ENOMEM);
}

std::size_t UringQueue::wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) {
  FC_CHECK(!ended.empty());
  if (std::size_t count = reap(ended); count != 0 || timeout_ns == 0) {
    take_wake();
    return count;
  }
  const std::uint64_t start = monotonic_ns();
  for (std::uint64_t passed = 0;;) {
    asleep_.store(true);
    const bool awake = woken_.load();
    if (!awake) sleep(timeout_ns == kForever ? kForever : timeout_ns - passed);
    asleep_.store(false);
    const std::size_t count = reap(ended);
    if (take_wake() || count != 0) return count;
    passed = monotonic_ns() - start;
    if (passed >= timeout_ns) return 0;
  }
}

void UringQueue::wake() noexcept {
  woken_.store(true);
  // At most one write a sleep, so the counter cannot fill up.
  if (asleep_.exchange(false)) (void)eventfd_write(wake_event_, 1);
}

}  // namespace fc
