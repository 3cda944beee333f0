// Named places in the code where a test may stop a thread to force one interleaving.
//
// In production builds FC_SEQUENCE_POINT is nothing. Test builds define FC_SEQUENCE_POINTS and link
// testing/, which decides what happens there.
#pragma once

#if defined(FC_SEQUENCE_POINTS)
namespace fc::testing {
void reach_sequence_point(const char* name);
}
#define FC_SEQUENCE_POINT(name) ::fc::testing::reach_sequence_point(name)
#else
#define FC_SEQUENCE_POINT(name) \
  do {                          \
  } while (false)
#endif
