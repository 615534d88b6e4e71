// Runs seeds of the simulation's scenarios on all cores and says what happened.
//
//   simulate --seeds 100000                 of all scenarios, in turn
//   simulate --scenario hangs --seed 7      one seed, with everything that happened in it
//
// Exit codes: 0 nothing was violated, 1 something was (the seed, how to run it again and what led
// to it are on stderr), 2 wrong use. With --json one document on stdout.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "tests/simulation/scenarios.h"

namespace penstock {
namespace {

constexpr size_t kLines = 60;
constexpr int kViolated = 1;
constexpr int kWrongUse = 2;

struct Item {
  const Scenario* scenario = nullptr;
  uint64_t seed = 0;
};

struct Violation {
  size_t item = 0;
  std::string what;
};

// What the thread runs, for a check that ends the process.
thread_local Item running;
thread_local size_t running_number = 0;

void on_abort(int) {
  const std::string text = fmt::format(
      "aborted in seed {} of scenario {}, after {} seeds\nagain: {}\n", running.seed,
      running.scenario->name, running_number + 1, replay_command(*running.scenario, running.seed));
  if (::write(STDERR_FILENO, text.data(), text.size()) < 0) ::_exit(kViolated);
  ::_exit(kViolated);
}

// Seeds of all scenarios, each as often as its share says, mixed evenly.
std::vector<Item> items_of(uint64_t seeds, uint64_t first_seed, const Scenario* only) {
  double shares = 0;
  for (const Scenario& scenario : scenarios()) {
    if (only == nullptr || only == &scenario) shares += scenario.share;
  }
  std::vector<std::pair<double, Item>> placed;
  double wanted = 0;
  uint64_t given = 0;
  for (const Scenario& scenario : scenarios()) {
    if (only != nullptr && only != &scenario) continue;
    // Rounded so that all of them are `seeds`.
    wanted += static_cast<double>(seeds) * scenario.share / shares;
    const auto due = static_cast<uint64_t>(std::llround(wanted));
    const uint64_t count = due > given ? due - given : 1;
    given += count;
    for (uint64_t i = 0; i < count; ++i) {
      const double at = (static_cast<double>(i) + 0.5) / static_cast<double>(count);
      placed.emplace_back(at, Item{&scenario, first_seed + i});
    }
  }
  std::stable_sort(placed.begin(), placed.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Item> items;
  for (const auto& [at, item] : placed) items.push_back(item);
  return items;
}

class Runner {
 public:
  Runner(std::vector<Item> items, bool stop_at_first)
      : items_(std::move(items)), stop_at_first_(stop_at_first) {}

  void run(unsigned thread_count) {
    const int64_t begun_ns = monotonic_ns();
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < thread_count; ++i) threads.emplace_back([this] { work(); });
    for (std::thread& thread : threads) thread.join();
    seconds_ = to_seconds(Duration(monotonic_ns() - begun_ns));
    std::sort(violations_.begin(), violations_.end(),
              [](const Violation& a, const Violation& b) { return a.item < b.item; });
  }

  bool violated() const { return !violations_.empty(); }

  void report_violations() const {
    constexpr size_t kReportedMax = 3;
    for (size_t i = 0; i < std::min(kReportedMax, violations_.size()); ++i) {
      const Item& item = items_[violations_[i].item];
      fmt::print(stderr, "scenario {}, seed {}, after {} seeds: {}\n", item.scenario->name,
                 item.seed, violations_[i].item + 1, violations_[i].what);
      std::fputs(report_of(*item.scenario, item.seed, kLines).c_str(), stderr);
    }
  }

  nlohmann::ordered_json document() const {
    nlohmann::ordered_json faults;
    for (size_t i = 0; i < kFaultNames.size(); ++i) {
      faults[std::string(kFaultNames[i])] = total_.faults[i];
    }
    nlohmann::ordered_json by_scenario = nlohmann::json::array();
    for (const Scenario& scenario : scenarios()) {
      const auto ran = seeds_run_.find(scenario.name);
      if (ran == seeds_run_.end()) continue;
      by_scenario.push_back(
          {{"name", scenario.name}, {"what", scenario.what}, {"seeds", ran->second}});
    }
    nlohmann::ordered_json violations = nlohmann::json::array();
    for (const Violation& violation : violations_) {
      const Item& item = items_[violation.item];
      violations.push_back({{"scenario", item.scenario->name},
                            {"seed", item.seed},
                            {"after_seeds", violation.item + 1},
                            {"what", violation.what},
                            {"again", replay_command(*item.scenario, item.seed)}});
    }
    return {{"seeds", finished_.load()},
            {"seconds", seconds_},
            {"core_events", total_.core_events},
            {"worker_events", total_.worker_events},
            {"restarts", total_.restarts},
            {"memory_starts", total_.memory_starts},
            {"copy_starts", total_.fetched},
            {"rebalances", total_.rebalances},
            {"suspensions", total_.suspensions},
            {"faults", faults},
            {"scenarios", by_scenario},
            {"violations", violations}};
  }

 private:
  void work() {
    while (true) {
      const size_t number = next_++;
      if (number >= items_.size() || number > last_) return;
      running = items_[number];
      running_number = number;
      SeedOutcome outcome = run_seed(*running.scenario, running.seed);
      ++finished_;
      const std::lock_guard lock(mutex_);
      total_ += outcome.counts;
      ++seeds_run_[running.scenario->name];
      if (outcome.violation.empty()) continue;
      violations_.push_back({number, std::move(outcome.violation)});
      if (stop_at_first_) last_ = std::min(last_.load(), number);
    }
  }

  const std::vector<Item> items_;
  const bool stop_at_first_;
  std::atomic<size_t> next_ = 0;
  std::atomic<size_t> last_ = SIZE_MAX;  // none after this one is begun
  std::atomic<size_t> finished_ = 0;
  double seconds_ = 0;
  std::mutex mutex_;  // of what follows
  SimCounts total_;
  std::map<std::string_view, uint64_t> seeds_run_;
  std::vector<Violation> violations_;
};

void print(const nlohmann::ordered_json& result) {
  const auto number = [&](const char* name) { return result[name].get<int64_t>(); };
  fmt::print("{} seeds in {:.1f} s, {:.0f} a second\n", number("seeds"),
             result["seconds"].get<double>(),
             static_cast<double>(number("seeds")) / result["seconds"].get<double>());
  fmt::print(
      "{} events of the coordinator, {} of workers; {} restarts, {} ranks restored from "
      "memory, {} times experts moved, {} resumptions of suspended jobs\n",
      number("core_events"), number("worker_events"), number("restarts"), number("memory_starts"),
      number("rebalances"), number("suspensions"));
  for (const auto& [name, times] : result["faults"].items()) {
    fmt::print("{:>12}  {}\n", times.get<int64_t>(), name);
  }
  fmt::print("{} violations\n", result["violations"].size());
}

int run_main(int argc, char** argv) {
  CLI::App app("Runs seeds of the control plane's simulation.");
  uint64_t seeds = 5000;
  uint64_t first_seed = 1;
  std::optional<uint64_t> seed;
  std::string scenario_name;
  unsigned thread_count = std::max(1U, std::thread::hardware_concurrency());
  bool as_json = false;
  bool stop_at_first = false;
  app.add_option("--seeds", seeds, "how many, over all scenarios")->check(CLI::PositiveNumber);
  app.add_option("--first", first_seed, "the first seed of each scenario");
  app.add_option("--scenario", scenario_name, "only this one");
  app.add_option("--seed", seed, "only this seed of --scenario, with everything that happens");
  app.add_option("--threads", thread_count)->check(CLI::Range(1, 256));
  app.add_flag("--json", as_json, "one document on stdout");
  app.add_flag("--stop", stop_at_first, "at the first violation");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kWrongUse;
  }
  const Scenario* const only = find_scenario(scenario_name);
  if ((only == nullptr && !scenario_name.empty()) || (seed && only == nullptr)) {
    fmt::print(stderr, "simulate: --scenario is one of:\n");
    for (const Scenario& known : scenarios()) {
      fmt::print(stderr, "  {:<18} {}\n", known.name, known.what);
    }
    return kWrongUse;
  }
  ::setenv("PENSTOCK_LOG", "off", 1);
  start_logging("simulate");
  ::signal(SIGABRT, on_abort);
  if (seed) {
    running = {only, *seed};
    fmt::print("{}", report_of(*only, *seed, SIZE_MAX));
    return run_seed(*only, *seed).violation.empty() ? 0 : kViolated;
  }
  Runner runner(items_of(seeds, first_seed, only), stop_at_first);
  runner.run(thread_count);
  const nlohmann::ordered_json result = runner.document();
  if (as_json) {
    fmt::print("{}\n", result.dump(1));
  } else {
    print(result);
  }
  runner.report_violations();
  return runner.violated() ? kViolated : 0;
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  return penstock::run_main(argc, argv);
}
