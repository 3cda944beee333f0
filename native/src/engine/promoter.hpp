// Brings items that were read from NVM up to DRAM, off the read's way: an install may evict, and a
// read's thread has the device to keep busy. Bounded; what finds no room is promoted at its next
// hit.
//
// What comes up gives up its place below, and what DRAM evicts for it needs a write buffer: while
// all of these are on their way to the device nothing comes up, or reads that are faster than
// writes would drain both tiers.
//
// Threads: any may offer(); with a thread of its own that does the work, else drain() does it.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "memory/dram_tier.hpp"
#include "nvm/nvm_tier.hpp"

namespace fc {

class Promoter {
 public:
  Promoter(DramTier& dram, nvm::NvmTier& tier, bool background) : dram_(dram), tier_(tier) {
    if (background) thread_ = std::thread([this] { run(); });
  }
  ~Promoter() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    filled_.notify_all();
    if (thread_.joinable()) thread_.join();
  }
  Promoter(const Promoter&) = delete;
  Promoter& operator=(const Promoter&) = delete;

  void offer(const nvm::ReadResult& result) {
    const std::size_t bytes = result.record.header.value_bytes();
    auto item = std::make_unique<Item>();
    item->ns = result.cell.ns;
    item->hash = result.cell.hash;
    item->entry = result.cell.entry;
    item->generation = result.generation;
    item->domain = result.record.header.domain();
    item->expiry = result.record.header.expiry;
    item->incarnation = result.record.header.incarnation;
    item->key = result.record.key;
    item->value.assign(reinterpret_cast<const char*>(result.record.value), bytes);
    const std::lock_guard lock(mutex_);
    if (bytes_ + bytes > kMostBytes || items_.size() >= kMostItems) return;
    bytes_ += bytes;
    items_.push_back(std::move(item));
    if (items_.size() == 1) filled_.notify_one();
  }
  void drain() {
    std::unique_lock lock(mutex_);
    while (!items_.empty() && !stop_) {
      const std::unique_ptr<Item> item = std::move(items_.front());
      items_.pop_front();
      bytes_ -= item->value.size();
      if (tier_.pressed()) continue;
      lock.unlock();
      if (dram_.promote(item->ns, {.hash = item->hash,
                                   .entry = item->entry,
                                   .generation = item->generation,
                                   .key = item->key,
                                   .value = item->value,
                                   .domain = item->domain,
                                   .expiry = item->expiry,
                                   .incarnation = item->incarnation})) {
        tier_.ns(item->ns).promoted.add();
      }
      lock.lock();
    }
  }

 private:
  static constexpr std::size_t kMostItems = 16384;
  static constexpr std::size_t kMostBytes = std::size_t{8} << 20;

  struct Item {
    NamespaceIndex ns;
    std::uint64_t hash;
    std::uint64_t entry;
    std::uint64_t generation;
    unsigned domain;
    Tick expiry;
    std::uint16_t incarnation;
    std::string key;
    std::string value;
  };

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      filled_.wait(lock, [this] { return stop_ || !items_.empty(); });
      if (stop_) return;
      lock.unlock();
      drain();
      lock.lock();
    }
  }

  DramTier& dram_;
  nvm::NvmTier& tier_;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::deque<std::unique_ptr<Item>> items_;  // guarded by mutex_
  std::size_t bytes_ = 0;                    // guarded by mutex_
  bool stop_ = false;                        // guarded by mutex_
  std::thread thread_;                       // last: it uses the rest
};

}  // namespace fc
