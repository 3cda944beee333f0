// The native half of `python -m benchmarks run nvm`: the NVM tier on a real file, its peers on the
// same file in alternating rounds. Prints one JSON object a round; medians are taken in Python.
//
//   fc_nvm_bench FOLDER [--data-mib N] [--seconds S] [--rounds R] [--outage-seconds S] METRIC...

#include "nvm_bench.hpp"

#include <cstdio>
#include <cstdlib>
#include <exception>

int main(int argc, char** argv) {
  fc::bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto next = [&]() -> const char* { return i + 1 < argc ? argv[++i] : "0"; };
    if (word == "--data-mib") {
      options.data_mib = std::strtoull(next(), nullptr, 10);
    } else if (word == "--seconds") {
      options.seconds = std::strtod(next(), nullptr);
    } else if (word == "--rounds") {
      options.rounds = static_cast<unsigned>(std::strtoul(next(), nullptr, 10));
    } else if (word == "--outage-seconds") {
      options.outage_seconds = std::strtod(next(), nullptr);
    } else if (options.folder.empty()) {
      options.folder = word;
    } else {
      options.metrics.push_back(word);
    }
  }
  try {
    fc::bench::run_on_full_tier(options);
    fc::bench::run_amplification_4_kib(options);
    fc::bench::run_late_reads(options);
    fc::bench::run_hybrid(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fc_nvm_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
