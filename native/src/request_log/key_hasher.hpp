// The keyed hash of a key that must not stand in the log: HMAC-SHA256 (RFC 2104), its first bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "request_log/format.hpp"

namespace fc::request_log {

class KeyHasher {
 public:
  explicit KeyHasher(std::string secret) : secret_(std::move(secret)) {}
  ~KeyHasher();  // wipes the secret
  KeyHasher(const KeyHasher&) = delete;
  KeyHasher& operator=(const KeyHasher&) = delete;

  struct Hashed {
    std::uint8_t bytes[kHashedKeyBytes];
    std::string_view view() const noexcept {
      return {reinterpret_cast<const char*>(bytes), kHashedKeyBytes};
    }
  };
  // The namespace is part of what is hashed: one id of two namespaces cannot be told to be one.
  Hashed hash(std::string_view ns, std::string_view key) const;

 private:
  std::string secret_;
};

}  // namespace fc::request_log
