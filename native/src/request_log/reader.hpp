// Reads files of the request log, whose bytes may be anybody's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "feature_cache/request_log.hpp"
#include "request_log/format.hpp"

typedef struct ZSTD_DCtx_s ZSTD_DCtx;

namespace fc::request_log {

// A kind of keys: a namespace and a domain hint.
struct Kind {
  std::uint32_t ns = 0;
  std::string domain;  // empty: no hint
};

// What stands in front of the blocks.
struct Description {
  struct Namespace {
    std::string name;
    KeyPrivacy privacy = KeyPrivacy::Plain;
  };
  std::string host;
  double sample = 0;
  SampleBy by = SampleBy::Requests;
  std::vector<Namespace> namespaces;
  std::vector<Kind> kinds;
};
// What a header's checksum covers; the reverse of decode().
std::vector<std::uint8_t> encode(const Description& description);
[[nodiscard]] bool decode(std::span<const std::uint8_t> bytes, Description& to);

// One block, decoded. Views are into the reader and end with the next one.
struct Block {
  struct Run {
    std::uint32_t kind;
    std::uint32_t keys;
    bool begins_request;
  };
  bool new_dictionary = false;
  std::vector<Run> runs;
  // One a key, run after run: its place in the dictionary, from 0. A place that is as large as the
  // dictionary so far is the next of `new_keys`, and is added to it.
  std::vector<std::uint32_t> places;
  std::vector<std::string_view> new_keys;
  std::uint32_t requests = 0;
};

class Reader {
 public:
  Reader();
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Begins a file; the bytes must outlive the reading of it.
  [[nodiscard]] LogFault open(std::span<const std::uint8_t> file);
  // The next block. Ok with `more` false: the file ends; is_complete() tells whether as it should.
  [[nodiscard]] LogFault next(Block& block, bool& more);

  const FileHeader& header() const noexcept { return header_; }
  const Description& description() const noexcept { return description_; }
  bool is_complete() const noexcept { return complete_; }
  // As the last block that was read says.
  std::uint64_t dropped_keys() const noexcept { return dropped_; }
  // Bytes of whole blocks that were read, the file's header included.
  std::size_t good_bytes() const noexcept { return at_; }

 private:
  LogFault read_sections(const BlockHeader& header, const std::uint8_t* stored);
  LogFault decode_block(const BlockHeader& header, Block& block);

  std::span<const std::uint8_t> file_;
  FileHeader header_{};
  Description description_;
  std::size_t at_ = 0;
  std::uint32_t sequence_ = 0;
  std::uint32_t dictionary_size_ = 0;
  std::uint64_t dropped_ = 0;
  bool complete_ = false;
  std::vector<std::uint8_t> sections_[kSections];
  std::vector<std::uint8_t> transposed_;
  ZSTD_DCtx* const decompressor_;
};

}  // namespace fc::request_log
