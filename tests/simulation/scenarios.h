// The scenarios of the simulation: what kind of cluster lives through which faults. One seed of one
// scenario is one cluster's whole life, and the same every time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tests/simulation/simulated_coordinator.h"

namespace penstock {

struct Scenario {
  std::string_view name;  // lower case, for command lines
  std::string_view what;  // one line
  double share = 1.0;     // of seeds
  std::function<std::unique_ptr<SimulatedCoordinator>(uint64_t seed)> make;
};

const std::vector<Scenario>& scenarios();
// nullptr: there is none of that name.
const Scenario* find_scenario(std::string_view name);

struct SeedOutcome {
  std::string violation;  // empty: none
  SimCounts counts;
};
SeedOutcome run_seed(const Scenario& scenario, uint64_t seed);
// Of a seed that was violated: what, how to run it again, and the last lines of what led to it.
std::string report_of(const Scenario& scenario, uint64_t seed, size_t lines_max);
// `build/release/bin/simulate --scenario NAME --seed N`, for wherever this was built.
std::string replay_command(const Scenario& scenario, uint64_t seed);

}  // namespace penstock
