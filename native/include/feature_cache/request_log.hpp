// What can be learned of a file of the request log (docs/request_log.md). The bytes may be
// anybody's: every size is checked before it is believed.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "feature_cache/config.hpp"

namespace fc {

// Why the bytes of a log cannot be used.
enum class LogFault : std::uint8_t {
  None,
  Truncated,     // it ends within a block, or within its header
  BadChecksum,   // a bit is not what was written
  NewerVersion,  // of a later release
  BadFormat,     // no request log, or one that contradicts itself
};
const char* fault_name(LogFault fault) noexcept;  // "truncated", ...
const char* describe(LogFault fault) noexcept;    // for people

struct LogInfo {
  struct Namespace {
    std::string name;
    KeyPrivacy privacy = KeyPrivacy::Plain;
    std::uint64_t keys = 0;           // of all requests together
    std::uint64_t distinct_keys = 0;  // as often as a dictionary learned them
  };
  std::uint32_t version = 0;
  std::string host;
  std::uint64_t window_start_ms = 0;  // since 1970
  std::uint64_t window_ms = 0;
  double sample = 0;
  SampleBy by = SampleBy::Requests;
  bool complete = false;  // its last block is there
  std::uint64_t requests = 0;
  std::uint64_t keys = 0;
  std::uint64_t distinct_keys = 0;
  std::uint64_t dropped_keys = 0;  // sampled, and lost before they were written
  std::vector<Namespace> namespaces;
};

// Reads a whole file and checks all of it. `info` has what was found up to the fault.
[[nodiscard]] LogFault inspect_log(std::span<const std::uint8_t> file, LogInfo& info);

}  // namespace fc
