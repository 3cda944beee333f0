#include "restart_bench.hpp"

namespace fc::bench {
void run_nvm_rebuild(const RestartOptions&) {}
}  // namespace fc::bench
