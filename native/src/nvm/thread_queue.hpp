// Requests through a pool of threads with pread and pwrite, for where io_uring is refused.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "nvm/device.hpp"
#include "nvm/file_device.hpp"

namespace fc {

class ThreadQueue;

// The threads of one device; its queues share them. Threads: any.
class ThreadPool {
 public:
  // Throws std::system_error when the system has no threads left.
  ThreadPool(std::shared_ptr<const DeviceFile> file, std::uint32_t threads);
  ~ThreadPool();  // no queue is left
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // At most the sum of the queues' depths wait here.
  void run(ThreadQueue* queue, std::span<IoRequest* const> requests);

 private:
  struct Job {
    IoRequest* request = nullptr;
    ThreadQueue* queue = nullptr;
  };

  void work();
  void stop() noexcept;
  void carry_out(IoRequest& request) const;

  const std::shared_ptr<const DeviceFile> file_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;    // guarded by mutex_
  std::uint32_t idle_ = 0;  // guarded by mutex_: threads that wait for a job
  bool stopping_ = false;   // guarded by mutex_
  std::vector<std::thread> threads_;
};

// Threads: as IoQueue; the pool's threads call end().
class ThreadQueue final : public IoQueue {
 public:
  ThreadQueue(std::shared_ptr<ThreadPool> pool, std::uint32_t depth);
  ~ThreadQueue() override;
  ThreadQueue(const ThreadQueue&) = delete;
  ThreadQueue& operator=(const ThreadQueue&) = delete;

  void submit(std::span<IoRequest* const> requests) override;
  std::size_t wait(std::span<IoRequest*> ended, std::uint64_t timeout_ns) override;
  void wake() noexcept override;

  void end(IoRequest* request);

 private:
  const std::shared_ptr<ThreadPool> pool_;
  const std::size_t depth_;
  std::size_t under_way_ = 0;  // not yet returned by wait(); the queue's thread only
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<IoRequest*> ended_;  // guarded by mutex_; oldest first
  bool woken_ = false;             // guarded by mutex_
  bool waiting_ = false;           // guarded by mutex_
};

}  // namespace fc
