// Counts heap allocations made through operator new, so that a test can show there were none. Link
// allocation_counter.cc into the test: it replaces the global operators.
#pragma once

#include <cstdint>

namespace penstock {

uint64_t allocations_of_this_thread();

}  // namespace penstock
