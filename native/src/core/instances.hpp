// What the config of a node and the parts for its instances have to say to one another.
#pragma once

#include <cstdint>
#include <string>

#include "feature_cache/config.hpp"

namespace fc {

// Said of numbers that are an instance's, where the reader has only seen the node's; empty for a
// node of one.
std::string in_each(const EngineConfig& part);

// The size of segments where a config leaves it open.
std::uint32_t automatic_segment_bytes(const EngineConfig& config) noexcept;

}  // namespace fc
