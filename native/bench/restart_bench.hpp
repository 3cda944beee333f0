// What the parts of fc_restart_bench share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fc::bench {

struct RestartOptions {
  std::vector<std::string> metrics;
  std::string dir = "/dev/shm";  // for memory that outlives a process
  std::string folder;            // for files on a device
  std::uint64_t items = 10'000'000;
  std::uint64_t data_mib = 2048;
  double seconds = 1.0;
  unsigned rounds = 7;
  bool huge_pages = false;  // both sides ask for them

  bool wants(const std::string& metric) const {
    for (const std::string& wanted : metrics) {
      if (wanted == metric) return true;
    }
    return false;
  }
};

// Rates of the engine with memory that outlives it, against the same engine without.
void run_persist_cost(const RestartOptions& options);
// Rebuilding the NVM tier's index from the regions' lists, against a bare loop over them.
void run_nvm_rebuild(const RestartOptions& options);

}  // namespace fc::bench
