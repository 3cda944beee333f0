#include "nvm/thread_queue.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>

#include "core/check.hpp"
#include "nvm/transfer.hpp"

namespace fc {
namespace {

// A wait longer than this ends by an event anyway, and time points cannot overflow.
constexpr std::uint64_t kLongestWaitNs = std::uint64_t{3600} * 1'000'000'000;

}  // namespace

ThreadPool::ThreadPool(std::shared_ptr<const DeviceFile> file, std::uint32_t threads)
    : file_(std::move(file)) {
  // Signals are for the daemon's own threads: one that lands here would cut a transfer short.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  try {
    threads_.reserve(threads);
    for (std::uint32_t i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { work(); });
      pthread_setname_np(threads_.back().native_handle(), "fc-nvm-io");
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);
    FC_CHECK(jobs_.empty());
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(ThreadQueue* queue, std::span<IoRequest* const> requests) {
  std::size_t to_rouse = 0;
  {
    const std::lock_guard lock(mutex_);
    for (IoRequest* request : requests) jobs_.push_back({request, queue});
    to_rouse = std::min<std::size_t>(idle_, requests.size());
  }
  for (; to_rouse > 0; --to_rouse) changed_.notify_one();
}

void ThreadPool::work() {
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      ++idle_;
      changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      --idle_;
      if (jobs_.empty()) return;
      job = jobs_.front();
      jobs_.pop_front();
    }
    carry_out(*job.request);
    job.queue->end(job.request);
  }
}

void ThreadPool::carry_out(IoRequest& request) const {
  const int descriptor = file_->descriptor();
  Transfer transfer(&request);
  std::int64_t outcome = 0;
  do {
    const auto offset = static_cast<off_t>(transfer.offset());
    switch (request.kind) {
      case IoRequest::Kind::Read:
        outcome = pread(descriptor, transfer.data(), transfer.bytes(), offset);
        break;
      case IoRequest::Kind::Write:
        outcome = pwrite(descriptor, transfer.data(), transfer.bytes(), offset);
        break;
      case IoRequest::Kind::Sync:
        outcome = fdatasync(descriptor);
        break;
    }
    if (outcome < 0) outcome = -errno;
  } while (transfer.goes_on(outcome));
}

ThreadQueue::ThreadQueue(std::shared_ptr<ThreadPool> pool, std::uint32_t depth)
    : pool_(std::move(pool)), depth_(std::max(depth, 1U)) {
  ended_.reserve(depth_);
}

ThreadQueue::~ThreadQueue() {
  std::unique_lock lock(mutex_);
  waiting_ = true;
  changed_.wait(lock, [this] { return ended_.size() == under_way_; });
}

void ThreadQueue::submit(std::span<IoRequest* const> requests) {
  FC_CHECK(requests.size() <= depth_ - under_way_);
  under_way_ += requests.size();
  pool_->run(this, requests);
}

std::size_t ThreadQueue::wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) {
  FC_CHECK(!ended.empty());
  std::unique_lock lock(mutex_);
  if (timeout_ns != 0 && ended_.empty() && !woken_) {
    waiting_ = true;
    changed_.wait_for(lock, std::chrono::nanoseconds(std::min(timeout_ns, kLongestWaitNs)),
                      [this] { return woken_ || !ended_.empty(); });
    waiting_ = false;
  }
  woken_ = false;
  const std::size_t count = std::min(ended.size(), ended_.size());
  std::copy_n(ended_.begin(), count, ended.begin());
  ended_.erase(ended_.begin(), ended_.begin() + static_cast<std::ptrdiff_t>(count));
  under_way_ -= count;
  return count;
}

void ThreadQueue::end(IoRequest* request) {
  const std::lock_guard lock(mutex_);
  ended_.push_back(request);
  // Under the lock: once it is free the queue's thread may take the request and end the queue.
  if (waiting_) changed_.notify_one();
}

void ThreadQueue::wake() noexcept {
  const std::lock_guard lock(mutex_);
  woken_ = true;
  if (waiting_) changed_.notify_one();
}

}  // namespace fc
