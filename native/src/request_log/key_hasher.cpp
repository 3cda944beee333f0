#include "request_log/key_hasher.hpp"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <cstring>
#include <stdexcept>

namespace fc::request_log {

KeyHasher::~KeyHasher() {
  OPENSSL_cleanse(secret_.data(), secret_.size());
}

KeyHasher::Hashed KeyHasher::hash(std::string_view ns, std::string_view key) const {
  std::string message;
  message.reserve(ns.size() + 1 + key.size());
  message.append(ns).push_back('\0');
  message.append(key);
  std::uint8_t digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  if (HMAC(EVP_sha256(), secret_.data(), static_cast<int>(secret_.size()),
           reinterpret_cast<const unsigned char*>(message.data()), message.size(), digest,
           &size) == nullptr ||
      size < kHashedKeyBytes) {
    throw std::runtime_error("HMAC-SHA256 is not to be had");
  }
  Hashed hashed;
  std::memcpy(hashed.bytes, digest, kHashedKeyBytes);
  return hashed;
}

}  // namespace fc::request_log
