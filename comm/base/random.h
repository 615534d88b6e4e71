// Counter-based random numbers: a pure function of (seed, stream, counter), so nothing that draws
// has state to save, and the same draw gives the same bits on every rank. Philox4x32-10 (Salmon et
// al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).
#pragma once

#include <array>
#include <cstdint>

namespace penstock {

// Four independent 32-bit words for one (seed, stream, counter).
std::array<uint32_t, 4> philox(uint64_t seed, uint64_t stream, uint64_t counter);

// Sequential draws from one stream. Copyable; equal state gives equal draws.
class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}
  uint64_t next();                 // uniform over all 64-bit values
  uint64_t below(uint64_t bound);  // uniform over [0, bound); REQUIRES: bound > 0
  double uniform();                // [0, 1)
  double normal();                 // mean 0, variance 1 (Box-Muller, one of the pair)

 private:
  uint64_t seed_;
  uint64_t stream_;
  uint64_t counter_ = 0;
};

}  // namespace penstock
