// Reads NVM cells and waits for them: what a get() does that has no list for them.
#pragma once

#include <vector>

#include "feature_cache/engine.hpp"

namespace fc {

// Reads `cells` of a lookup that has just filled `column`, waits for all, and puts the answers in,
// in key order with what is there.
void read_and_wait(Engine& engine, GetColumn& column, std::vector<NvmCell> cells);

}  // namespace fc
