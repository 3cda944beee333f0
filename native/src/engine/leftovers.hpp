// What instances have left that a node has no more.
//
// Their keys are on others now, which take writes for them. Were the node to have as many instances
// again, they would be taken over as if nothing had been: they know of no change since. So they go,
// and their room with them. Of block devices, which are a node's as a whole, nothing goes: wipe one
// that is taken out of a node before it comes back.
#pragma once

#include <cstdint>

#include "feature_cache/config.hpp"

namespace fc {

// Removes what instances from `instances` on left in shared memory and in device files; of others'
// files, and of what another process uses, nothing. Before the node's own are made.
void remove_leftovers(const EngineConfig& whole, std::uint32_t instances);

}  // namespace fc
