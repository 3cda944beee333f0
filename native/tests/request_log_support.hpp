// What tests of the request log share: what was logged, read back.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "feature_cache/request_log.hpp"
#include "request_log/reader.hpp"
#include "support.hpp"

namespace fc::testing {

// One column as it was logged.
struct Logged {
  std::string ns;
  std::string domain;
  bool begins = false;
  std::vector<std::string> keys;
  friend bool operator==(const Logged&, const Logged&) = default;
};

inline std::string id_key(std::uint64_t id) {
  return {reinterpret_cast<const char*>(&id), sizeof(id)};
}

// Reads all; runs of one column that were split over blocks are put together by `keys` alone.
inline LogFault read(std::span<const std::uint8_t> bytes, std::vector<Logged>& columns,
                     bool* complete = nullptr) {
  request_log::Reader reader;
  if (const LogFault fault = reader.open(bytes); fault != LogFault::None) return fault;
  std::vector<std::string> dictionary;
  request_log::Block block;
  for (;;) {
    bool more = false;
    if (const LogFault fault = reader.next(block, more); fault != LogFault::None) return fault;
    if (!more) break;
    if (block.new_dictionary) dictionary.clear();
    std::size_t next = 0;
    std::size_t at = 0;
    for (const request_log::Block::Run& run : block.runs) {
      const auto& kind = reader.description().kinds.at(run.kind);
      Logged column{
          reader.description().namespaces.at(kind.ns).name, kind.domain, run.begins_request, {}};
      for (std::uint32_t i = 0; i < run.keys; ++i, ++at) {
        const std::uint32_t place = block.places.at(at);
        if (place == dictionary.size()) dictionary.emplace_back(block.new_keys.at(next++));
        column.keys.push_back(dictionary.at(place));
      }
      columns.push_back(std::move(column));
    }
    EXPECT_EQ(next, block.new_keys.size());
  }
  if (complete != nullptr) *complete = reader.is_complete();
  return LogFault::None;
}

}  // namespace fc::testing
