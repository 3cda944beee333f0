// Invariants. FC_CHECK is always on: it guards memory safety. FC_DCHECK is on in strict builds.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace fc::detail {
[[noreturn]] inline void check_failed(const char* what, const char* file, int line) noexcept {
  std::fprintf(stderr, "feature cache: invariant broken: %s (%s:%d)\n", what, file, line);
  std::abort();
}
}  // namespace fc::detail

#define FC_CHECK(condition)                                       \
  do {                                                            \
    if (!(condition)) [[unlikely]]                                \
      ::fc::detail::check_failed(#condition, __FILE__, __LINE__); \
  } while (false)

#if defined(FC_STRICT)
#define FC_DCHECK(condition) FC_CHECK(condition)
#else
#define FC_DCHECK(condition) \
  do {                       \
  } while (false)
#endif
