// Kills ranks, daemons and the coordinator of real training runs at random, again and again, and
// compares each run's losses and final weights with those of a run that was left alone: they must
// be equal bit for bit.
//
//   kill_soak [--kills N] [--seconds S] [--seed X]
//
// Begins no new run after N kills or S seconds. Layouts, victims and pauses follow from the seed;
// what a process is doing when it dies does not, that is the point. Prints a table, one line a run;
// exits 1 at the first difference, with the seed.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "comm/base/clock.h"
#include "comm/base/random.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

struct Options {
  int64_t kills = 1000;
  int64_t seconds = 3600;
  uint64_t seed = 1;
};

struct Layout {
  int pipeline;
  int expert;
  int data;
  int microbatches;
};
constexpr Layout kLayouts[] = {{1, 1, 1, 4}, {2, 1, 1, 4}, {2, 2, 1, 4}, {1, 4, 1, 4},
                               {1, 2, 2, 4}, {2, 2, 2, 4}, {4, 2, 1, 8}, {4, 1, 2, 8}};
constexpr int kWorkers = 4;
constexpr int kDevicesPerWorker = 2;
constexpr int64_t kKillsPerRun = 30;
// For a run to end after its last kill, on a machine however busy.
constexpr seconds kRunLimit{3600};

struct Kills {
  int64_t ranks = 0;
  int64_t daemons = 0;
  int64_t coordinators = 0;
  int64_t total() const { return ranks + daemons + coordinators; }
};

class Soak {
 public:
  explicit Soak(const Options& options)
      : options_(options),
        random_(options.seed, 0),
        cluster_({.worker_count = kWorkers,
                  .devices_per_worker = kDevicesPerWorker,
                  .heartbeat_interval_ms = 500}) {}

  bool run() {
    fmt::print(
        " run pipeline expert data | killed: ranks daemons coordinators | kills seconds | end\n");
    const int64_t begun_ns = monotonic_ns();
    const auto elapsed = [&] { return (monotonic_ns() - begun_ns) / 1'000'000'000; };
    int64_t runs = 0;
    while (killed_.total() < options_.kills && elapsed() < options_.seconds) {
      const size_t layout = random_.below(std::size(kLayouts));
      if (!references_.contains(layout)) references_[layout] = train(layout, runs, /*kills=*/0);
      const Kills before = killed_;
      const int64_t kills = std::min(1 + static_cast<int64_t>(random_.below(kKillsPerRun)),
                                     options_.kills - before.total());
      const std::optional<Outcome> ended = train(layout, ++runs, kills);
      const bool equal = ended && ended == references_[layout];
      const Layout& shape = kLayouts[layout];
      fmt::print("{:4} {:8} {:6} {:4} | {:13} {:7} {:12} | {:5} {:7} | {}\n", runs, shape.pipeline,
                 shape.expert, shape.data, killed_.ranks - before.ranks,
                 killed_.daemons - before.daemons, killed_.coordinators - before.coordinators,
                 killed_.total(), elapsed(),
                 equal   ? "equal bit for bit"
                 : ended ? "DIFFERENT"
                         : "DID NOT SUCCEED");
      std::fflush(stdout);
      if (!equal) {
        fmt::print("failed with --kills {} --seed {}\n", options_.kills, options_.seed);
        return false;
      }
    }
    fmt::print(
        "{} kills ({} of ranks, {} of daemons, {} of coordinators) in {} runs and {} s, "
        "seed {}: every run ended bit-identical\n",
        killed_.total(), killed_.ranks, killed_.daemons, killed_.coordinators, runs, elapsed(),
        options_.seed);
    return true;
  }

 private:
  // Nothing when the run does not come to its end.
  std::optional<Outcome> train(size_t layout, int64_t number, int64_t kills) {
    const Layout& shape = kLayouts[layout];
    const TinyJob job{.name = fmt::format("soak-{}-{}", number, kills),
                      .pipeline = shape.pipeline,
                      .expert = shape.expert,
                      .data = shape.data,
                      .microbatches = shape.microbatches,
                      .steps = 300,
                      .max_restarts = 1000,
                      .from_memory = number % 4 != 3};
    const std::string id = cluster_.submit(tiny_job_yaml(cluster_.folder(), job));
    for (const int64_t last = killed_.total() + kills; killed_.total() < last;) {
      const std::chrono::milliseconds pause(100 + random_.below(2900));
      if (wait_until([&] { return ended(id); }, pause)) break;
      kill_something(id, shape.pipeline * shape.expert * shape.data);
    }
    if (!cluster_.wait_for_state(id, "SUCCEEDED", kRunLimit)) {
      fmt::print("{}\n", cluster_.describe(id));
      return std::nullopt;
    }
    return Outcome{cluster_.losses(id), cluster_.job(id).at("checkpoint").at("weights_digest")};
  }

  bool ended(const std::string& id) const {
    const auto job = cluster_.try_get("/api/v1/jobs/" + id);
    return job && (job->at("state") == "SUCCEEDED" || job->at("state") == "FAILED");
  }

  // Nothing, when the rank that was chosen is not running.
  void kill_something(const std::string& id, int rank_count) {
    const uint64_t die = random_.below(20);
    const std::string worker = fmt::format("worker-{}", random_.below(kWorkers));
    const int rank = static_cast<int>(random_.below(rank_count));
    if (die < 2) {
      cluster_.kill_coordinator();
      cluster_.start_coordinator();
      ++killed_.coordinators;
    } else if (die < 5) {
      cluster_.kill_worker(worker);
      cluster_.start_worker(worker);
      ++killed_.daemons;
    } else if (const pid_t pid = cluster_.rank_pid(id, rank); pid != 0) {
      killed_.ranks += ::kill(pid, SIGKILL) == 0;
    }
  }

  const Options options_;
  Random random_;
  Cluster cluster_;
  std::map<size_t, std::optional<Outcome>> references_;  // by layout
  Kills killed_;
};

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  penstock::Options options;
  CLI::App app("Kills at random what trains, and compares what comes of it.", "kill_soak");
  app.add_option("--kills", options.kills)->check(CLI::Range(0, 1'000'000'000));
  app.add_option("--seconds", options.seconds)->check(CLI::Range(0, 1'000'000'000));
  app.add_option("--seed", options.seed);
  CLI11_PARSE(app, argc, argv);
  return penstock::Soak(options).run() ? 0 : 1;
}
