#include "request_log/encoder.hpp"

#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "core/check.hpp"

namespace fc::request_log {
namespace {

constexpr int kLevel = 1;  // entropy coding is what helps here; matches are few

void append(std::vector<std::uint8_t>& to, const void* from, std::size_t bytes) {
  const auto* const data = static_cast<const std::uint8_t*>(from);
  to.insert(to.end(), data, data + bytes);
}

}  // namespace

Encoder::Encoder(std::uint64_t file_id, std::uint32_t dictionary_keys)
    : file_id_(file_id),
      dictionary_keys_(std::min(dictionary_keys, kDictionaryKeysMax - kBlockKeysMax)),
      // A block may add to a dictionary that is nearly full.
      slots_(2 * (std::size_t{dictionary_keys_} + kBlockKeysMax)),
      compressor_(ZSTD_createCCtx()) {
  if (compressor_ == nullptr) throw std::bad_alloc();
  symbols_.reserve(kBlockKeysMax);
}

Encoder::~Encoder() {
  ZSTD_freeCCtx(compressor_);
}

std::uint64_t Encoder::hash_of(std::uint32_t kind, std::string_view key) noexcept {
  if (key.size() == sizeof(std::uint64_t)) {
    // A bijection of the id: no two ids of a kind meet.
    std::uint64_t id = 0;
    std::memcpy(&id, key.data(), sizeof(id));
    id = (id ^ (id >> 32)) * 0xD6E8FEB86659FD93ull;
    return (id ^ (id >> 32)) * (0x9E3779B97F4A7C15ull + (std::uint64_t{kind} << 33));
  }
  return XXH3_64bits_withSeed(key.data(), key.size(), kind);
}

Encoder::Slot& Encoder::slot_of(std::uint64_t hash) noexcept {
  std::size_t at = scale(hash, slots_.size());
  while (slots_[at].dictionary == dictionary_ && slots_[at].hash != hash) {
    if (++at == slots_.size()) at = 0;
  }
  return slots_[at];
}

void Encoder::begin_dictionary() noexcept {
  if (++dictionary_ == 0) {  // after four milliards of them
    std::fill(slots_.begin(), slots_.end(), Slot{});
    dictionary_ = 1;
  }
  places_ = 0;
  fresh_dictionary_ = true;
}

void Encoder::put_known(std::uint32_t place) {
  const auto exponent = static_cast<unsigned>(std::bit_width(place)) - 1;
  symbols_.push_back(static_cast<std::uint8_t>(exponent + 1));
  bit_buffer_ |= std::uint64_t{place ^ (1u << exponent)} << bit_count_;
  bit_count_ += exponent;
  while (bit_count_ >= 8) {
    bits_.push_back(static_cast<std::uint8_t>(bit_buffer_));
    bit_buffer_ >>= 8;
    bit_count_ -= 8;
  }
}

void Encoder::put_new(std::string_view key) {
  symbols_.push_back(kNewKey);
  if (new_keys_ == 0) key_length_ = key.size();
  one_length_ &= key.size() == key_length_;
  ++new_keys_;
  put_number(lengths_, key.size());
  append(key_bytes_, key.data(), key.size());
}

std::span<const std::uint8_t> Encoder::take(std::uint64_t dropped) {
  if (bit_count_ != 0) bits_.push_back(static_cast<std::uint8_t>(bit_buffer_));
  total_keys_ += keys_;
  total_requests_ += requests_;
  distinct_keys_ += new_keys_;
  last_ = {keys_, requests_, new_keys_};
  const std::span<const std::uint8_t> block =
      encode(fresh_dictionary_ ? std::uint32_t{BlockHeader::kNewDictionary} : 0, dropped);
  fresh_dictionary_ = false;
  if (places_ >= dictionary_keys_) begin_dictionary();
  keys_ = requests_ = new_keys_ = 0;
  bit_buffer_ = 0;
  bit_count_ = 0;
  one_length_ = true;
  for (std::vector<std::uint8_t>* each : {&runs_, &symbols_, &bits_, &lengths_, &key_bytes_}) {
    each->clear();
  }
  return block;
}

std::span<const std::uint8_t> Encoder::finish(std::uint64_t dropped) {
  FC_DCHECK(empty());
  return encode(BlockHeader::kLast, dropped);
}

void Encoder::lost() {
  total_keys_ -= last_.keys;
  total_requests_ -= last_.requests;
  distinct_keys_ -= last_.new_keys;
  last_ = {};
  --sequence_;
  begin_dictionary();
}

std::span<const std::uint8_t> Encoder::encode(std::uint32_t flags, std::uint64_t dropped) {
  const std::vector<std::uint8_t>* keys = &key_bytes_;
  if (one_length_ && new_keys_ > 1 && key_length_ > 1) {
    // Bytes of one place lie together: those of ids that are not random are alike.
    flags |= BlockHeader::kTransposedKeys;
    transposed_.resize(key_bytes_.size());
    for (std::size_t byte = 0; byte < key_length_; ++byte) {
      std::uint8_t* const to = transposed_.data() + byte * new_keys_;
      const std::uint8_t* const from = key_bytes_.data() + byte;
      for (std::size_t i = 0; i < new_keys_; ++i) to[i] = from[i * key_length_];
    }
    keys = &transposed_;
  }
  const std::vector<std::uint8_t>* const sections[kSections] = {&runs_, &symbols_, &bits_,
                                                                &lengths_, keys};
  BlockHeader header{};
  header.magic = kBlockMagic;
  header.flags = flags;
  header.sequence = sequence_++;
  header.keys = keys_;
  header.new_keys = new_keys_;
  header.requests = requests_;
  header.total_requests = total_requests_;
  header.total_keys = total_keys_;
  header.total_dropped = dropped;
  block_.resize(sizeof(header));
  for (unsigned s = 0; s < kSections; ++s) {
    const std::vector<std::uint8_t>& raw = *sections[s];
    FC_CHECK(raw.size() <= section_limit(s));
    const std::size_t at = block_.size();
    std::size_t stored = raw.size();
    if (s != kBits && raw.size() > 16) {  // bits behind exponents are as good as random
      block_.resize(at + ZSTD_compressBound(raw.size()));
      const std::size_t bytes = ZSTD_compressCCtx(
          compressor_, block_.data() + at, block_.size() - at, raw.data(), raw.size(), kLevel);
      if (!ZSTD_isError(bytes) && bytes < raw.size()) stored = bytes;
      block_.resize(at + (stored < raw.size() ? stored : 0));
    }
    if (stored == raw.size()) append(block_, raw.data(), raw.size());
    header.sections[s] = {static_cast<std::uint32_t>(raw.size()),
                          static_cast<std::uint32_t>(stored)};
  }
  header.checksum = header.sum(file_id_, block_.data() + sizeof(header));
  std::memcpy(block_.data(), &header, sizeof(header));
  return block_;
}

}  // namespace fc::request_log
