// Stops threads at named places of the code, so that a test decides which interleaving happens.
//
// FC_SEQUENCE_POINT(name) does nothing but a relaxed load while no test watches. Watching is
// process-wide: one SequencePoints lives at a time.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

#include "core/sequence_point.hpp"

namespace fc::testing {

// Watches points while it lives; its end releases every thread that it stopped.
//
// Threads: any. A thread that is stopped at a point holds whatever locks the code holds there; the
// test must not wait for those before it releases the thread.
class SequencePoints {
 public:
  static constexpr std::chrono::seconds kPatience{30};

  SequencePoints();
  ~SequencePoints();
  SequencePoints(const SequencePoints&) = delete;
  SequencePoints& operator=(const SequencePoints&) = delete;

  // The next `threads` threads to reach `name` stop there until release().
  void block(std::string_view name, std::uint32_t threads = 1);
  // Waits until `threads` are stopped at `name`; false when that takes longer than kPatience.
  [[nodiscard]] bool wait_blocked(std::string_view name, std::uint32_t threads = 1);
  // Lets all threads at `name` go and stops no more there.
  void release(std::string_view name);
  // The next thread to reach `name` finds no memory there: std::bad_alloc.
  void exhaust(std::string_view name);
  // How many threads came to `name` since it was first named here.
  std::uint64_t reached(std::string_view name);

 private:
  friend void reach_sequence_point(const char* name);
  void reach(const char* name);

  struct Point {
    std::uint32_t to_stop = 0;
    std::uint32_t stopped = 0;
    bool exhausted = false;
    std::uint64_t reached = 0;
    std::uint64_t released = 0;  // generation: who stopped under an older one goes on
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Point, std::less<>> points_;  // guarded by mutex_
  std::uint32_t inside_ = 0;                          // guarded by mutex_
};

}  // namespace fc::testing
