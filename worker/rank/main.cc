// penstock-rank: one device's share of a job. Started by penstock-worker, one process per rank and
// attempt.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <new>
#include <string_view>

#include "comm/base/log.h"
#include "worker/rank/host_check.h"
#include "worker/rank/rank_process.h"

namespace {

using penstock::ExitCode;

// "penstock-rank check-host": one line for each check; a problem is an error in the log.
int check_host(int argc, char** argv) {
  CLI::App app("Checks this host for penstock-worker, which starts it.",
               "penstock-rank check-host");
  penstock::Path directory;
  bool thorough = false;
  bool report = false;
  app.add_option("--directory", directory, "where the disk is checked")->required();
  app.add_flag("--thorough", thorough, "half of the free memory, every processor for 30 s");
  app.add_flag("--report", report, "print what failed, or else everything, and log nothing");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  const auto effort = thorough ? penstock::CheckEffort::kThorough : penstock::CheckEffort::kQuick;
  penstock::start_logging("host check");
  ExitCode code = ExitCode::kOk;
  const auto checks = penstock::check_host(effort, directory);
  if (report) {
    const bool passed = std::all_of(checks.begin(), checks.end(),
                                    [](const penstock::HostCheck& one) { return one.passed(); });
    for (const penstock::HostCheck& check : checks) {
      if (!passed && check.passed()) continue;
      std::printf("%s: %s\n", check.name.c_str(),
                  (passed ? check.measured : check.problem).c_str());
    }
    return static_cast<int>(passed ? ExitCode::kOk : ExitCode::kUnhealthy);
  }
  for (const penstock::HostCheck& check : checks) {
    if (!check.passed()) {
      penstock::log_error("{}: {}", check.name, check.problem);
      code = ExitCode::kUnhealthy;
    } else if (thorough) {
      std::printf("%-12s%s\n", check.name.c_str(), check.measured.c_str());
    } else {  // to the daemon's log
      penstock::log_info("{}: {}", check.name, check.measured);
    }
  }
  return static_cast<int>(code);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "check-host") return check_host(argc - 1, argv + 1);
  CLI::App app(
      "One rank of a Penstock job. penstock-worker starts it; there is no reason to run it by "
      "hand.");
  penstock::RankProcessOptions options;
  app.add_option("--daemon", options.daemon_endpoint, "ZeroMQ endpoint of the worker daemon")
      ->required();
  app.add_option("--job", options.job.value, "job id")->required()->check(CLI::PositiveNumber);
  app.add_option("--epoch", options.epoch.value, "attempt of the job")
      ->required()
      ->check(CLI::PositiveNumber);
  app.add_option("--rank", options.rank.value, "position in the job's rank grid")
      ->required()
      ->check(CLI::NonNegativeNumber);
  app.add_option("--trace-file", options.trace_file, "keep the trace of the last steps there");
  app.add_option("--state-file", options.state_file, "keep the training state there");
  app.add_option("--lease-file", options.lease_file,
                 "end when the lease that is kept there is over");
  app.add_option("--flight-file", options.flight_file, "keep what the rank does now there");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  penstock::start_logging(fmt::format("rank {}", options.rank));
  try {
    return static_cast<int>(penstock::run_rank_process(options));
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "penstock-rank: out of memory\n");
    return static_cast<int>(ExitCode::kOutOfMemory);
  }
}
