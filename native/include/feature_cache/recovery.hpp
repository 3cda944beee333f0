// What a start found, and how far it has come.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace fc {

// Read by other threads while an engine is made. `total` 0: not known yet.
//
// Instances that start at the same time have one each, and a whole that theirs add up in: what is
// done of all that has been begun.
struct RecoveryProgress {
  RecoveryProgress() = default;
  explicit RecoveryProgress(RecoveryProgress* of) noexcept : whole(of) {}

  std::atomic<const char*> phase{""};  // "memory", "nvm"; of a whole the last that was begun
  std::atomic<std::uint64_t> done{0};
  std::atomic<std::uint64_t> total{0};
  RecoveryProgress* const whole = nullptr;

  void begin(const char* name, std::uint64_t of) noexcept {
    phase.store(name, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    total.store(of, std::memory_order_relaxed);
    if (whole == nullptr) return;
    whole->phase.store(name, std::memory_order_relaxed);
    whole->total.fetch_add(of, std::memory_order_relaxed);
  }
  void add(std::uint64_t more) noexcept {
    done.fetch_add(more, std::memory_order_relaxed);
    if (whole != nullptr) whole->done.fetch_add(more, std::memory_order_relaxed);
  }
};

// How an engine started.
struct StartReport {
  // "off": memory ends with the process; "new": there was nothing; "clean": adopted as an orderly
  // stop left it; "checked": adopted after a check of every entry; "cold": what was there could not
  // be used.
  std::string memory = "off";
  std::string memory_reason;         // why it was checked or cold; empty otherwise
  std::string pages;                 // what the memory lies on, "2 MiB (hugetlbfs)"
  double memory_ms = 0;              // the adoption
  std::uint64_t memory_items = 0;    // kept
  std::uint64_t memory_dropped = 0;  // of removed namespaces and domains, or damaged
  // "off": no NVM tier; "new": nothing was there; "kept": adopted with the memory; "rebuilt": from
  // the regions' own lists; "empty": what was there could not be used.
  std::string nvm = "off";
  std::string nvm_reason;
  double nvm_ms = 0;
  std::uint64_t nvm_items = 0;
  std::uint64_t nvm_dropped = 0;
  std::uint64_t set_aside = 0;  // files of an unknown format
};

}  // namespace fc
