#include "eviction/policy.hpp"

#include "eviction/fifo.hpp"
#include "eviction/s3fifo.hpp"
#include "eviction/tinylfu.hpp"

namespace fc {

std::unique_ptr<EvictionPolicy> EvictionPolicy::make(PolicyKind kind, std::uint64_t items) {
  switch (kind) {
    case PolicyKind::S3Fifo:
      return std::make_unique<S3FifoPolicy>(items);
    case PolicyKind::Lru:
      return std::make_unique<LruPolicy>();
    case PolicyKind::Fifo:
      return std::make_unique<FifoPolicy>();
    case PolicyKind::TinyLfu:
      return std::make_unique<TinyLfuPolicy>(items);
  }
  return nullptr;
}

}  // namespace fc
