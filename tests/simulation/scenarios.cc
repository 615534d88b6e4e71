#include "tests/simulation/scenarios.h"

#include <algorithm>

#include "tests/simulation/agent_cluster.h"
#include "tests/simulation/sim_cluster.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

Scenario agents(std::string_view name, std::string_view what, AgentClusterOptions options,
                double share = 1.0) {
  return {name, what, share, [options](uint64_t seed) {
            AgentClusterOptions seeded = options;
            seeded.seed = seed;
            return std::make_unique<AgentCluster>(seeded);
          }};
}

Scenario model(std::string_view name, std::string_view what, SimOptions options) {
  return {name, what, 1.0, [options](uint64_t seed) {
            SimOptions seeded = options;
            seeded.seed = seed;
            return std::make_unique<SimCluster>(seeded);
          }};
}

// Nothing happens to these but what is set beside.
AgentClusterOptions calm() {
  return {.rank_kills = 0,
          .rank_crashes = 0,
          .rank_slowness = 0,
          .failed_spawns = 0,
          .daemon_kills = 0,
          .cuts = 0,
          .link_stalls = 0,
          .coordinator = {.crashes = 0, .crashes_in_event = 0}};
}

AgentClusterOptions lost_daemons() {
  AgentClusterOptions options;
  options.worker_count = 5;
  options.job_count = 4;
  options.rank_kills = 0.0005;
  options.rank_crashes = 0.0005;
  options.daemon_kills = 0.004;
  options.cuts = 0.003;
  options.mirrors = true;
  return options;
}

AgentClusterOptions short_disturbances() {
  AgentClusterOptions options = calm();
  options.cuts = 0.005;
  options.longest_cut = milliseconds(500);
  options.link_stalls = 0.005;
  options.daemon_stalls = 0.003;
  options.longest_stall = milliseconds(1200);
  options.rank_slowness = 0.002;
  options.longest_slow = seconds(3);
  options.hang_timeout = 5;
  options.coordinator = {.stalls = 0.002, .longest_stall = seconds(4)};
  options.restarts_nothing = true;
  return options;
}

AgentClusterOptions cuts_within_the_lease() {
  AgentClusterOptions options = calm();
  options.cuts = 0.01;
  options.longest_cut = seconds(10);
  options.restarts_nothing = true;
  return options;
}

AgentClusterOptions gangs_cut_off_whole() {
  AgentClusterOptions options;
  options.worker_count = 3;
  options.devices_per_worker = 4;  // a gang has one to itself
  options.daemon_kills = 0;
  options.cancels = 0.001;
  options.longest_cut = seconds(40);
  return options;
}

AgentClusterOptions calm_suspensions() {
  AgentClusterOptions options = calm();
  options.suspensions = 0.01;
  options.restarts_nothing = true;
  return options;
}

AgentClusterOptions calm_departures() {
  AgentClusterOptions options = calm();
  options.worker_count = 5;
  options.departures = 0.001;
  options.restarts_nothing = true;
  return options;
}

AgentClusterOptions moving_experts() {
  AgentClusterOptions options = calm();
  options.rebalance_threshold = 1.1;
  options.restarts_nothing = true;
  return options;
}

std::vector<Scenario> make_scenarios() {
  return {
      agents("faults", "every kind of fault but hangs, two jobs on three workers", {}),
      agents("copies", "workers keep copies of each other's ranks, and daemons are killed",
             lost_daemons()),
      agents("hangs", "ranks that are stopped or stuck beside them",
             {.rank_hangs = 0.004, .daemon_stalls = 0.001, .hang_timeout = 5}),
      agents("short", "short cuts, short stops and coordinator crashes: no attempt may end",
             short_disturbances()),
      agents("long-cuts", "two workers whose connections stay away for up to half a minute",
             {.worker_count = 2, .cuts = 0.02, .longest_cut = seconds(30)}),
      agents("long-stalls",
             "connections that are held up for up to half a minute, and hand it over",
             {.rank_hangs = 0.002,
              .cuts = 0.003,
              .link_stalls = 0.005,
              .longest_stall = seconds(30),
              .hang_timeout = 5}),
      agents("whole-gangs",
             "workers with a gang each whose connections stay away beyond their lease",
             gangs_cut_off_whole()),
      agents("within-lease", "cuts shorter than the lease: no attempt may end",
             cuts_within_the_lease()),
      agents("suspensions", "jobs are suspended and resumed through every fault",
             {.suspensions = 0.005}),
      agents("suspensions-calm", "jobs are suspended and resumed, which is no failure",
             calm_suspensions()),
      agents("experts", "experts move through every fault", {.rebalance_threshold = 1.1}),
      agents("experts-calm", "experts move, which is no failure", moving_experts()),
      agents("departures", "daemons are asked to end, through every fault", {.departures = 0.002}),
      agents("departures-calm", "daemons are asked to end, which is no failure", calm_departures()),
      agents("overtaking", "orders that later ones overtake, and that take up to 10 s",
             {.rank_hangs = 0.001, .overtaking = 0.05, .cancels = 0.002, .hang_timeout = 5}),
      agents("rollbacks", "loss spikes that rollbacks leave out, through every fault",
             {.spikes = {3, 7, 10}}),
      agents("sick-host", "a host on which ranks crash, and which fails some of its checks",
             {.worker_count = 4, .sick_worker = true}),
      agents("users", "users cancel jobs and resume them",
             {.daemon_stalls = 0.001, .cancels = 0.003}),
      agents("large", "1,200 workers and 60 jobs through every fault",
             {.worker_count = 1200,
              .devices_per_worker = 1,
              .job_count = 60,
              .rank_kills = 0.001,
              .rank_hangs = 0.0002,
              .daemon_kills = 0.0001,
              .daemon_stalls = 0.0001,
              .cuts = 0.0003,
              .link_stalls = 0.0002,
              .hang_timeout = 10,
              .fault_time = seconds(30)},
             0.001),
      model("messages", "single messages lost, repeated and overtaken; jobs cancelled, resumed",
            {.removals = 0.002}),
      model("message-suspensions", "jobs suspended and resumed while single messages are lost",
            {.suspensions = 0.02}),
      model("drains", "workers are drained and undrained", {.drains = 0.01, .suspensions = 0.005}),
      model("widths", "jobs change their data-parallel width",
            {.worker_count = 5, .drains = 0.003, .scalings = 0.01, .suspensions = 0.005}),
      model("half-lost", "half of all messages lost, a fifth repeated",
            {.loss = 0.5, .repetition = 0.2}),
      model("connected", "the same without partitions", {.partitions = 0}),
      model("narrow", "three jobs queue for one worker",
            {.worker_count = 1, .devices_per_worker = 4, .job_count = 3}),
      model("budget", "jobs that may fail three times", {.removals = 0.002, .max_restarts = 3}),
      model("strange-data", "one worker's copy of the data is another one",
            {.worker_count = 4, .strange_data = true}),
      model("message-rollbacks", "loss spikes while single messages are lost",
            {.spikes = {3, 7, 10}}),
  };
}

}  // namespace

const std::vector<Scenario>& scenarios() {
  static const std::vector<Scenario> kScenarios = make_scenarios();
  return kScenarios;
}

const Scenario* find_scenario(std::string_view name) {
  const auto found = std::find_if(scenarios().begin(), scenarios().end(),
                                  [&](const Scenario& known) { return known.name == name; });
  return found == scenarios().end() ? nullptr : &*found;
}

SeedOutcome run_seed(const Scenario& scenario, uint64_t seed) {
  const auto cluster = scenario.make(seed);
  std::string violation = cluster->run();
  return {std::move(violation), cluster->counts()};
}

std::string replay_command(const Scenario& scenario, uint64_t seed) {
  return fmt::format("{}/simulate --scenario {} --seed {}", PENSTOCK_BINARY_DIR, scenario.name,
                     seed);
}

std::string report_of(const Scenario& scenario, uint64_t seed, size_t lines_max) {
  const auto cluster = scenario.make(seed);
  cluster->keep_transcript();
  const std::string violation = cluster->run();
  std::string report = fmt::format("scenario {}, seed {}: {}\nagain: {}\n", scenario.name, seed,
                                   violation.empty() ? "nothing is violated" : violation,
                                   replay_command(scenario, seed));
  const std::vector<std::string>& lines = cluster->transcript();
  const size_t first = lines.size() > lines_max ? lines.size() - lines_max : 0;
  if (first > 0) report += fmt::format("  ({} lines before these)\n", first);
  for (size_t i = first; i < lines.size(); ++i) report += "  " + lines[i] + "\n";
  return report;
}

}  // namespace penstock
