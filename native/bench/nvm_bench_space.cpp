// What the tier writes for what it admits, and what it brings: hits of the hybrid beside those of
// DRAM alone.

#include "nvm_bench.hpp"

namespace fc::bench {

void print_amplification(const std::string& metric, const Counters& counters) {
  const double admitted = counters["feature_cache_namespace_nvm_demoted_bytes_total"];
  print_round(metric,
              {{"value", counters["feature_cache_nvm_device_written_bytes_total"] / admitted},
               {"admitted_mib", admitted / kMiB},
               {"reinserted", counters["feature_cache_namespace_nvm_reinserted_total"]},
               {"not_admitted", counters["feature_cache_namespace_nvm_not_admitted_total"]}});
}

void run_amplification_4_kib(const Options& options) {
  const std::string metric = "write_amplification_4_kib";
  if (!options.wants(metric)) return;
  NvmEngine tier({.path = options.folder + "/large.nvm",
                  .memory_bytes = 256 * kMiB,
                  .nvm_bytes = options.data_mib / 4 * kMiB,
                  .value_bytes = 4096 - kKeyBytes});
  tier.fill_up();
  print_amplification(metric, tier.counters());
}

}  // namespace fc::bench
