// A range cut into parts, one a thread, for work that is done before there are other threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace fc {

// Calls part(begin, end) for parts of [0, count), of at least `least` each, in as many threads as
// the machine has processors, at most 8; returns when all are done. `part` does not throw.
template <class Part>
void in_parallel(std::uint64_t count, std::uint64_t least, Part&& part) {
  constexpr unsigned kMost = 8;
  const auto most = std::clamp(std::thread::hardware_concurrency(), 1u, kMost);
  const auto threads = std::clamp<std::uint64_t>(count / least, 1, most);
  std::vector<std::thread> others;
  for (std::uint64_t t = 1; t < threads; ++t) {
    others.emplace_back([&, t] { part(count * t / threads, count * (t + 1) / threads); });
  }
  part(std::uint64_t{0}, count / threads);
  for (std::thread& other : others) other.join();
}

}  // namespace fc
