#include "request_log/reader.hpp"

#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "core/layout.hpp"

namespace fc {

const char* fault_name(LogFault fault) noexcept {
  switch (fault) {
    case LogFault::None:
      return "none";
    case LogFault::Truncated:
      return "truncated";
    case LogFault::BadChecksum:
      return "bad_checksum";
    case LogFault::NewerVersion:
      return "newer_version";
    case LogFault::BadFormat:
      return "bad_format";
  }
  return "?";
}

const char* describe(LogFault fault) noexcept {
  switch (fault) {
    case LogFault::None:
      return "the request log is whole";
    case LogFault::Truncated:
      return "the request log ends in the middle of a block: it was cut off";
    case LogFault::BadChecksum:
      return "a checksum of the request log does not fit: bits of it have changed";
    case LogFault::NewerVersion:
      return "the request log is of a newer release than this one: update this node";
    case LogFault::BadFormat:
      return "this is no request log, or one that contradicts itself";
  }
  return "?";
}

namespace request_log {
namespace {

constexpr std::size_t kNameBytesMax = 1024;
constexpr std::size_t kKindsMax = layout::kMaxNamespaces * (layout::kMaxDomainsOfNamespace + 1);

void put_text(std::vector<std::uint8_t>& to, std::string_view text) {
  put_number(to, text.size());
  to.insert(to.end(), text.begin(), text.end());
}

bool take_text(Cursor& from, std::string& to) {
  const std::uint64_t size = from.number();
  if (size > kNameBytesMax) return false;
  to = from.bytes(size);
  return !from.failed();
}

}  // namespace

std::vector<std::uint8_t> encode(const Description& description) {
  std::vector<std::uint8_t> bytes;
  put_text(bytes, description.host);
  std::uint64_t sample = 0;
  std::memcpy(&sample, &description.sample, sizeof(sample));
  put_number(bytes, sample);
  put_number(bytes, static_cast<std::uint64_t>(description.by));
  put_number(bytes, description.namespaces.size());
  for (const Description::Namespace& ns : description.namespaces) {
    put_text(bytes, ns.name);
    put_number(bytes, static_cast<std::uint64_t>(ns.privacy));
  }
  put_number(bytes, description.kinds.size());
  for (const Kind& kind : description.kinds) {
    put_number(bytes, kind.ns);
    put_text(bytes, kind.domain);
  }
  return bytes;
}

bool decode(std::span<const std::uint8_t> bytes, Description& to) {
  Cursor from(bytes.data(), bytes.size());
  if (!take_text(from, to.host)) return false;
  const std::uint64_t sample = from.number();
  std::memcpy(&to.sample, &sample, sizeof(sample));
  if (!(to.sample > 0 && to.sample <= 1)) return false;
  const std::uint64_t by = from.number();
  if (by > static_cast<std::uint64_t>(SampleBy::Keys)) return false;
  to.by = static_cast<SampleBy>(by);
  const std::uint64_t namespaces = from.number();
  if (namespaces > layout::kMaxNamespaces) return false;
  for (std::uint64_t i = 0; i < namespaces; ++i) {
    Description::Namespace& ns = to.namespaces.emplace_back();
    if (!take_text(from, ns.name)) return false;
    const std::uint64_t privacy = from.number();
    if (privacy > static_cast<std::uint64_t>(KeyPrivacy::Excluded)) return false;
    ns.privacy = static_cast<KeyPrivacy>(privacy);
  }
  const std::uint64_t kinds = from.number();
  if (kinds > kKindsMax) return false;
  for (std::uint64_t i = 0; i < kinds; ++i) {
    Kind& kind = to.kinds.emplace_back();
    const std::uint64_t ns = from.number();
    if (ns >= namespaces || !take_text(from, kind.domain)) return false;
    kind.ns = static_cast<std::uint32_t>(ns);
  }
  return !from.failed() && from.left() == 0;
}

Reader::Reader() : decompressor_(ZSTD_createDCtx()) {
  if (decompressor_ == nullptr) throw std::bad_alloc();
}

Reader::~Reader() {
  ZSTD_freeDCtx(decompressor_);
}

LogFault Reader::open(std::span<const std::uint8_t> file) {
  file_ = file;
  at_ = 0;
  sequence_ = 0;
  dictionary_size_ = 0;
  dropped_ = 0;
  complete_ = false;
  description_ = {};
  header_ = {};
  if (file.empty()) return LogFault::Truncated;
  if (file.size() < sizeof(header_)) {  // the beginning of one, or something else
    const bool begins =
        std::memcmp(file.data(), &kMagic, std::min(file.size(), sizeof(kMagic))) == 0;
    return begins ? LogFault::Truncated : LogFault::BadFormat;
  }
  std::memcpy(&header_, file.data(), sizeof(header_));
  if (header_.magic != kMagic) return LogFault::BadFormat;
  // Of a later version nothing more is known, not even where its checksum lies.
  if (header_.version > kVersion) return LogFault::NewerVersion;
  if (header_.version != kVersion || header_.description_bytes > kDescriptionBytesMax) {
    return LogFault::BadFormat;
  }
  if (file.size() - sizeof(header_) < header_.description_bytes) return LogFault::Truncated;
  const std::uint8_t* const description = file.data() + sizeof(header_);
  if (header_.sum(description) != header_.checksum) return LogFault::BadChecksum;
  if (header_.window_ms == 0 || !decode({description, header_.description_bytes}, description_)) {
    return LogFault::BadFormat;
  }
  at_ = sizeof(header_) + header_.description_bytes;
  return LogFault::None;
}

LogFault Reader::next(Block& block, bool& more) {
  more = false;
  if (at_ == file_.size()) return LogFault::None;
  BlockHeader header;
  if (file_.size() - at_ < sizeof(header)) return LogFault::Truncated;
  std::memcpy(&header, file_.data() + at_, sizeof(header));
  if (header.magic != kBlockMagic) return LogFault::BadChecksum;
  for (unsigned s = 0; s < kSections; ++s) {
    const SectionSize& size = header.sections[s];
    if (size.raw > section_limit(s) || size.stored > size.raw) return LogFault::BadChecksum;
  }
  if (file_.size() - at_ - sizeof(header) < header.stored_bytes()) return LogFault::Truncated;
  const std::uint8_t* const stored = file_.data() + at_ + sizeof(header);
  if (header.sum(header_.file_id, stored) != header.checksum) return LogFault::BadChecksum;
  // From here on the bytes are what somebody wrote, by intent or not.
  if (header.sequence != sequence_) return LogFault::BadFormat;
  if ((header.flags & BlockHeader::kLast) != 0) {
    if (header.keys != 0) return LogFault::BadFormat;
    // Something behind the last block?
    if (file_.size() - at_ - sizeof(header) != header.stored_bytes()) return LogFault::BadFormat;
    complete_ = true;
  } else {
    if (const LogFault fault = read_sections(header, stored); fault != LogFault::None) return fault;
    if (const LogFault fault = decode_block(header, block); fault != LogFault::None) return fault;
    more = true;
  }
  ++sequence_;
  dropped_ = header.total_dropped;
  at_ += sizeof(header) + header.stored_bytes();
  return LogFault::None;
}

LogFault Reader::read_sections(const BlockHeader& header, const std::uint8_t* stored) {
  for (unsigned s = 0; s < kSections; ++s) {
    const SectionSize& size = header.sections[s];
    std::vector<std::uint8_t>& to = sections_[s];
    to.resize(size.raw);
    if (size.stored == size.raw) {
      if (size.raw != 0) std::memcpy(to.data(), stored, size.raw);
    } else if (ZSTD_decompressDCtx(decompressor_, to.data(), to.size(), stored, size.stored) !=
               size.raw) {
      return LogFault::BadFormat;
    }
    stored += size.stored;
  }
  return LogFault::None;
}

LogFault Reader::decode_block(const BlockHeader& header, Block& block) {
  if (header.keys == 0 || header.keys > kBlockKeysMax || header.new_keys > header.keys ||
      header.sections[kSymbols].raw != header.keys) {
    return LogFault::BadFormat;
  }
  block.new_dictionary = (header.flags & BlockHeader::kNewDictionary) != 0;
  if (block.new_dictionary) dictionary_size_ = 0;
  if (dictionary_size_ > kDictionaryKeysMax - header.new_keys) return LogFault::BadFormat;
  block.requests = header.requests;

  block.runs.clear();
  Cursor runs(sections_[kRuns].data(), sections_[kRuns].size());
  for (std::uint64_t keys = 0; keys < header.keys;) {
    const std::uint64_t kind = runs.number();
    const std::uint64_t count = runs.number();
    if (runs.failed() || (kind >> 1) >= description_.kinds.size() || count == 0 ||
        count > header.keys - keys) {
      return LogFault::BadFormat;
    }
    block.runs.push_back({static_cast<std::uint32_t>(kind >> 1), static_cast<std::uint32_t>(count),
                          (kind & 1) != 0});
    keys += count;
  }
  if (runs.left() != 0) return LogFault::BadFormat;

  const std::vector<std::uint8_t>& symbols = sections_[kSymbols];
  const std::vector<std::uint8_t>& bits = sections_[kBits];
  block.places.resize(header.keys);
  std::uint32_t places = dictionary_size_;
  std::uint64_t buffer = 0;
  unsigned filled = 0;
  std::size_t next_bits = 0;
  for (std::uint32_t i = 0; i < header.keys; ++i) {
    const std::uint8_t symbol = symbols[i];
    if (symbol == kNewKey) {
      block.places[i] = places++;
      continue;
    }
    const unsigned exponent = symbol - 1u;
    if (exponent >= kExponents) return LogFault::BadFormat;
    while (filled < exponent) {
      if (next_bits == bits.size()) return LogFault::BadFormat;
      buffer |= std::uint64_t{bits[next_bits++]} << filled;
      filled += 8;
    }
    const std::uint32_t one = 1u << exponent;
    const std::uint32_t place = one | (static_cast<std::uint32_t>(buffer) & (one - 1));
    buffer >>= exponent;
    filled -= exponent;
    if (place > places) return LogFault::BadFormat;
    block.places[i] = place - 1;
  }
  if (places - dictionary_size_ != header.new_keys || next_bits != bits.size()) {
    return LogFault::BadFormat;
  }

  block.new_keys.clear();
  Cursor lengths(sections_[kLengths].data(), sections_[kLengths].size());
  const std::vector<std::uint8_t>& keys = sections_[kKeys];
  const bool transposed = (header.flags & BlockHeader::kTransposedKeys) != 0;
  const std::uint8_t* from = keys.data();
  std::size_t left = keys.size();
  std::size_t first_length = 0;
  if (transposed) transposed_.resize(keys.size());
  for (std::uint32_t i = 0; i < header.new_keys; ++i) {
    const std::uint64_t length = lengths.number();
    if (lengths.failed() || length == 0 || length > kMaxKeyBytes || length > left) {
      return LogFault::BadFormat;
    }
    if (i == 0) first_length = length;
    if (transposed && length != first_length) return LogFault::BadFormat;
    const std::uint8_t* const data = transposed ? transposed_.data() + i * first_length : from;
    block.new_keys.emplace_back(reinterpret_cast<const char*>(data), length);
    from += length;
    left -= length;
  }
  if (left != 0 || lengths.left() != 0) return LogFault::BadFormat;
  if (transposed) {
    for (std::size_t byte = 0; byte < first_length; ++byte) {
      const std::uint8_t* const plane = keys.data() + byte * header.new_keys;
      std::uint8_t* const to = transposed_.data() + byte;
      for (std::size_t i = 0; i < header.new_keys; ++i) to[i * first_length] = plane[i];
    }
  }
  dictionary_size_ = places;
  return LogFault::None;
}

}  // namespace request_log

LogFault inspect_log(std::span<const std::uint8_t> file, LogInfo& info) {
  request_log::Reader reader;
  info = {};
  LogFault fault = reader.open(file);
  info.version = reader.header().version;
  if (fault != LogFault::None) return fault;
  info.host = reader.description().host;
  info.window_start_ms = reader.header().window_start_ms;
  info.window_ms = reader.header().window_ms;
  info.sample = reader.description().sample;
  info.by = reader.description().by;
  for (const request_log::Description::Namespace& ns : reader.description().namespaces) {
    info.namespaces.push_back({ns.name, ns.privacy, 0, 0});
  }
  request_log::Block block;
  std::uint32_t dictionary_size = 0;
  for (bool more = true; more;) {
    fault = reader.next(block, more);
    if (fault != LogFault::None || !more) break;
    if (block.new_dictionary) dictionary_size = 0;
    info.requests += block.requests;
    info.keys += block.places.size();
    info.distinct_keys += block.new_keys.size();
    const std::uint32_t* place = block.places.data();
    for (const request_log::Block::Run& run : block.runs) {
      LogInfo::Namespace& ns = info.namespaces[reader.description().kinds[run.kind].ns];
      ns.keys += run.keys;
      for (std::uint32_t i = 0; i < run.keys; ++i, ++place) {
        if (*place != dictionary_size) continue;
        ++dictionary_size;
        ++ns.distinct_keys;
      }
    }
  }
  info.dropped_keys = reader.dropped_keys();
  info.complete = fault == LogFault::None && reader.is_complete();
  return fault;
}

}  // namespace fc
