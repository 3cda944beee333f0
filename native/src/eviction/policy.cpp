#include "eviction/policy.hpp"

#include "eviction/fifo.hpp"
#include "eviction/s3fifo.hpp"
#include "eviction/tinylfu.hpp"

namespace fc {

std::unique_ptr<EvictionPolicy> EvictionPolicy::make(PolicyKind kind, std::uint64_t items,
                                                     std::span<std::byte> hints) {
  switch (kind) {
    case PolicyKind::S3Fifo:
      return std::make_unique<S3FifoPolicy>(items, hints);
    case PolicyKind::Lru:
      return std::make_unique<LruPolicy>();
    case PolicyKind::Fifo:
      return std::make_unique<FifoPolicy>();
    case PolicyKind::TinyLfu:
      return std::make_unique<TinyLfuPolicy>(items, hints);
  }
  return nullptr;
}

std::size_t EvictionPolicy::hint_bytes(PolicyKind kind, std::uint64_t items) noexcept {
  switch (kind) {
    case PolicyKind::S3Fifo:
      return S3FifoPolicy::hint_bytes(items);
    case PolicyKind::TinyLfu:
      return TinyLfuPolicy::hint_bytes(items);
    case PolicyKind::Lru:
    case PolicyKind::Fifo:
      break;
  }
  return 0;
}

}  // namespace fc
