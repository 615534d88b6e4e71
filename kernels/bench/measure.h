// Timing for kernel benchmarks on shared machines. Candidates alternate round by round, each round
// beside a probe of what one core can do at that moment; results are medians, and ratios are
// medians of the ratios inside a round. Time is the thread's processor time, so being scheduled out
// is not counted.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace penstock::bench {

// Fused multiply-adds per second times 2, of independent chains in registers, in GFLOP/s.
double peak_gflops();

struct Candidate {
  std::string name;
  std::function<void()> run;  // one call of the operation
};
struct Measured {
  double seconds = 0;      // median of one call
  double speed_ratio = 0;  // median over rounds of first candidate's time / this one's
};

// One Measured per candidate, in order. Each round repeats a call until it took about
// `round_seconds`.
std::vector<Measured> alternate(const std::vector<Candidate>& candidates, int round_count,
                                double round_seconds);

}  // namespace penstock::bench
