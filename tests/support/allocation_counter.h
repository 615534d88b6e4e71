// Counts heap allocations made through operator new, so that a test can show there were none.
// Linking penstock::test_allocation_counter replaces the global operators of the binary.
#pragma once

#include <cstdint>

namespace penstock {

uint64_t allocations_of_this_thread();
// Of all threads, those that have ended included.
uint64_t allocations_of_this_process();

}  // namespace penstock
