// Two jobs train on one cluster with a spare worker while, every 5 to 20 seconds, something happens
// to it: a rank is killed or stopped, a daemon is killed or cut off from the coordinator, the
// coordinator is killed or stopped. Both must end with the losses and weights, bit for bit, of runs
// that were left alone.
//
//   chaos_soak [--minutes M] [--seed X]
//
// First the two run undisturbed for about a third of that time, then disturbed, again and again
// until the time is over. Victims, faults and pauses follow from the seed; what a process is doing
// when it dies does not. Prints what was done by kind, what the coordinator made of it, and the
// goodput: the time of the steps that counted, each once, over the time from submission to the end.
// Exits 1 at the first difference.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>

#include "comm/base/clock.h"
#include "comm/base/random.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

struct Options {
  double minutes = 30;
  uint64_t seed = 1;
};

struct Shape {
  int pipeline;
  int expert;
  int data;
};
constexpr std::array<Shape, 2> kShapes = {{{2, 2, 1}, {2, 1, 2}}};
constexpr int kRanks = 4;    // of each job
constexpr int kWorkers = 5;  // of two devices: one is the spare
// For the jobs to end after the last fault, on a machine however busy.
constexpr seconds kRunLimit{3600};

enum class Kind {
  kRankKill,
  kRankStop,
  kDaemonKill,
  kDaemonCut,
  kCoordinatorKill,
  kCoordinatorStop
};
constexpr std::array<const char*, 6> kKindNames = {"rank killed",        "rank stopped",
                                                   "daemon killed",      "daemon cut off",
                                                   "coordinator killed", "coordinator stopped"};

struct JobEnd {
  Outcome outcome;
  double useful_seconds = 0.0;  // of the steps that counted
  double wall_seconds = 0.0;

  double goodput() const { return wall_seconds > 0 ? useful_seconds / wall_seconds : 0.0; }
};
using Pair = std::array<JobEnd, 2>;

class Soak {
 public:
  explicit Soak(const Options& options)
      : options_(options),
        random_(options.seed, 0),
        cluster_({.worker_count = kWorkers,
                  .devices_per_worker = 2,
                  .heartbeat_interval_ms = 500,
                  .allow_chaos = true}) {}

  bool run() {
    const std::optional<Pair> trial = train("trial", kTrialSteps, /*disturbed=*/false);
    if (!trial) return false;
    const double rate = kTrialSteps / std::max((*trial)[0].wall_seconds, (*trial)[1].wall_seconds);
    const int steps = std::max(100, static_cast<int>(rate * options_.minutes * 60.0 / 3.0));
    fmt::print("two jobs of {} ranks and {} steps; {} workers of 2 devices\n", kRanks, steps,
               kWorkers);
    const std::optional<Pair> alone = train("alone", steps, /*disturbed=*/false);
    if (!alone) return false;
    print_round("undisturbed", *alone);
    end_ns_ = monotonic_ns() + static_cast<int64_t>(options_.minutes * 60e9);
    const int64_t begun_ns = monotonic_ns();
    plan_next_fault();
    for (int round = 1; round == 1 || monotonic_ns() < end_ns_; ++round) {
      const std::optional<Pair> pair =
          train(fmt::format("round{}", round), steps, /*disturbed=*/true);
      if (!pair) return false;
      print_round(fmt::format("round {}", round), *pair);
      for (size_t job = 0; job < pair->size(); ++job) {
        if ((*pair)[job].outcome == (*alone)[job].outcome) continue;
        fmt::print("job {} of round {} is DIFFERENT from its undisturbed run; seed {}\n", job,
                   round, options_.seed);
        return false;
      }
    }
    print_counts(static_cast<double>(monotonic_ns() - begun_ns) / 60e9);
    return true;
  }

 private:
  static constexpr int kTrialSteps = 200;

  // Nothing when one of them does not come to its end.
  std::optional<Pair> train(const std::string& name, int steps, bool disturbed) {
    const int64_t begun_ns = monotonic_ns();
    std::array<std::string, 2> ids;
    for (size_t job = 0; job < ids.size(); ++job) {
      const Shape& shape = kShapes[job];
      ids[job] =
          cluster_.submit(tiny_job_yaml(cluster_.folder(), {.name = fmt::format("{}-{}", name, job),
                                                            .pipeline = shape.pipeline,
                                                            .expert = shape.expert,
                                                            .data = shape.data,
                                                            .microbatches = 4,
                                                            .steps = steps,
                                                            .checkpoint_interval = 25,
                                                            .hidden_size = 64,
                                                            .seq_length = 128,
                                                            .max_restarts = 1'000'000,
                                                            .hang_timeout = 5}));
    }
    std::array<int64_t, 2> ended_ns = {};
    const auto both_ended = [&] {
      for (size_t job = 0; job < ids.size(); ++job) {
        if (ended_ns[job] == 0 && ended(ids[job])) ended_ns[job] = monotonic_ns();
      }
      return ended_ns[0] != 0 && ended_ns[1] != 0;
    };
    while (disturbed && monotonic_ns() < end_ns_) {
      if (wait_until(both_ended, milliseconds((next_fault_ns_ - monotonic_ns()) / 1'000'000)))
        break;
      disturb(ids);
      plan_next_fault();
    }
    wait_until(both_ended, kRunLimit);
    Pair pair;
    for (size_t job = 0; job < ids.size(); ++job) {
      if (!cluster_.wait_for_state(ids[job], "SUCCEEDED", seconds(10))) {
        fmt::print("job {} did not succeed; seed {}\n{}\n", ids[job], options_.seed,
                   cluster_.describe(ids[job]));
        return std::nullopt;
      }
      pair[job] = end_of(ids[job]);
      pair[job].wall_seconds = static_cast<double>(ended_ns[job] - begun_ns) / 1e9;
      if (disturbed) count_verdicts(ids[job]);
    }
    return pair;
  }

  void plan_next_fault() {
    const auto pause_ms = static_cast<int64_t>(5'000 + random_.below(15'000));
    next_fault_ns_ = monotonic_ns() + pause_ms * 1'000'000;
  }

  bool ended(const std::string& id) const {
    const auto job = cluster_.try_get("/api/v1/jobs/" + id);
    return job && (job->at("state") == "SUCCEEDED" || job->at("state") == "FAILED");
  }

  JobEnd end_of(const std::string& id) const {
    JobEnd ended;
    std::map<int64_t, double> seconds_of;  // the newest attempt's; what was trained before is lost
    for (int64_t after = 0;;) {
      const Json page =
          cluster_.get(fmt::format("/api/v1/jobs/{}/steps?after={}&limit=10000", id, after));
      if (page.at("items").empty()) break;
      for (const Json& step : page.at("items")) {
        ended.outcome.losses[step.at("step")] = step.at("loss");
        seconds_of[step.at("step")] = step.at("step_seconds");
      }
      after = page.at("next_after");
    }
    for (const auto& [step, took] : seconds_of) ended.useful_seconds += took;
    ended.outcome.weights_digest = cluster_.job(id).at("checkpoint").at("weights_digest");
    return ended;
  }

  void count_verdicts(const std::string& id) {
    const Json events = cluster_.get("/api/v1/jobs/" + id + "/events?limit=10000");
    for (const Json& event : events.at("items")) {
      const bool ended_attempt = event.at("state") == "RECOVERING" && !event.at("from").is_null();
      if (ended_attempt) ++verdicts_[event.at("code")];
    }
  }

  void disturb(const std::array<std::string, 2>& ids) {
    const auto kind = static_cast<Kind>(random_.below(kKindNames.size()));
    const std::string worker = fmt::format("worker-{}", random_.below(kWorkers));
    const std::string& id = ids[random_.below(ids.size())];
    const int rank = static_cast<int>(random_.below(kRanks));
    const milliseconds pause(random_.below(8'000));
    bool done = true;
    switch (kind) {
      case Kind::kRankKill:
        done = signal_rank(id, rank, SIGKILL);
        break;
      case Kind::kRankStop:
        done = signal_rank(id, rank, SIGSTOP);  // until it is found, or fenced for another reason
        break;
      case Kind::kDaemonKill:
        cluster_.kill_worker(worker);
        let_pass(pause);
        cluster_.start_worker(worker);
        break;
      case Kind::kDaemonCut:
        done = cut_off(worker, 2 * pause + milliseconds(1'000));
        break;
      case Kind::kCoordinatorKill:
        cluster_.kill_coordinator();
        let_pass(pause);
        cluster_.start_coordinator();
        break;
      case Kind::kCoordinatorStop:
        cluster_.signal_coordinator(SIGSTOP);
        let_pass(pause + milliseconds(1'000));
        cluster_.signal_coordinator(SIGCONT);
        break;
    }
    counts_[static_cast<size_t>(kind)] += done;
  }

  static void let_pass(milliseconds time) {
    wait_until([] { return false; }, time);
  }

  // False when there is no such process now.
  bool signal_rank(const std::string& id, int rank, int signal) const {
    const pid_t pid = cluster_.rank_pid(id, rank);
    return pid != 0 && ::kill(pid, signal) == 0;
  }

  // False when the coordinator does not know where it listens now.
  bool cut_off(const std::string& worker, milliseconds time) const {
    const auto workers = cluster_.try_get("/api/v1/workers");
    if (!workers) return false;
    for (const Json& item : workers->at("items")) {
      if (item.at("name") != worker) continue;
      const auto reply =
          http_call({.method = "POST",
                     .url = fmt::format("http://{}/chaos/partition?for_ms={}",
                                        item.at("http_address").get<std::string>(), time.count()),
                     .body = {}});
      return reply.ok() && reply->status == 200;
    }
    return false;
  }

  static void print_round(const std::string& name, const Pair& pair) {
    for (size_t job = 0; job < pair.size(); ++job) {
      fmt::print("{:<12} job {}: {:7.1f} s, goodput {:5.1f}%, weights {}\n", name, job,
                 pair[job].wall_seconds, 100.0 * pair[job].goodput(),
                 pair[job].outcome.weights_digest.substr(0, 16));
    }
    std::fflush(stdout);
  }

  void print_counts(double minutes) const {
    int64_t total = 0;
    for (size_t kind = 0; kind < counts_.size(); ++kind) {
      fmt::print("{:<20} {:5}\n", kKindNames[kind], counts_[kind]);
      total += counts_[kind];
    }
    std::string verdicts;
    for (const auto& [code, count] : verdicts_) verdicts += fmt::format(" {} {}", code, count);
    fmt::print("attempts ended:{}\n", verdicts);
    fmt::print("{} faults in {:.1f} minutes, seed {}: every job ended bit-identical\n", total,
               minutes, options_.seed);
  }

  const Options options_;
  Random random_;
  Cluster cluster_;
  int64_t end_ns_ = 0;
  int64_t next_fault_ns_ = 0;
  std::array<int64_t, kKindNames.size()> counts_ = {};
  std::map<std::string, int64_t> verdicts_;
};

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  penstock::Options options;
  CLI::App app("Disturbs two jobs at random, and compares what comes of them.", "chaos_soak");
  app.add_option("--minutes", options.minutes)->check(CLI::Range(0.01, 1e6));
  app.add_option("--seed", options.seed);
  CLI11_PARSE(app, argc, argv);
  return penstock::Soak(options).run() ? 0 : 1;
}
