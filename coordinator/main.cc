// penstock-coordinator: accepts jobs, places them on workers, recovers them, commits their
// checkpoints.
#include <CLI/CLI.hpp>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "comm/base/ip_address.h"
#include "comm/base/log.h"
#include "comm/base/version.h"
#include "coordinator/core/records.h"
#include "coordinator/driver/driver.h"

namespace penstock {
namespace {

// For checkpoints being committed when asked to stop.
constexpr Duration kFinishLimit = std::chrono::seconds(5);

std::string address_error(const std::string& address) {
  return is_ip_address(address) ? "" : "not an IP address such as 127.0.0.1, 0.0.0.0 or ::1";
}

int fail(const Status& status) {
  std::fprintf(stderr, "penstock-coordinator: %s\n", status.message().c_str());
  return static_cast<int>(exit_code_of(status));
}

void add_health_options(CLI::App& app, DriverOptions& options) {
  app.add_option("--quarantine-failures", options.quarantine_failures,
                 "so many failures that point to one host put its worker in quarantine; 0: never")
      ->capture_default_str()
      ->check(CLI::Range(0, static_cast<int>(kHostEvidenceMax)));
  app.add_option("--quarantine-seconds", options.quarantine_seconds,
                 "within that time, and it stays there as long")
      ->capture_default_str()
      ->check(CLI::Range(1, 100 * 24 * 3600));
  app.add_option("--slow-ratio", options.slow_ratio,
                 "a rank that computes so many times as long as those that do the same is slow; 0: "
                 "none is")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1000.0));
}

int run(int argc, char** argv) {
  CLI::App app(
      "Accepts training jobs over HTTP, runs them on worker daemons and keeps them alive. Jobs go "
      "on while it is down; started again on the same state directory it takes them up.",
      "penstock-coordinator");
  DriverOptions options;
  app.add_option("--state-dir", options.state_dir,
                 "records, logs and checkpoints; default $XDG_STATE_HOME/penstock/coordinator");
  app.add_option("--bind", options.bind,
                 "IPv4 or IPv6 address to listen on, for HTTP and for workers")
      ->capture_default_str()
      ->check(address_error);
  app.add_option("--http-port", options.http_port, "port of API, page and metrics; 0: any free one")
      ->capture_default_str();
  app.add_option("--control-port", options.control_port,
                 "port workers connect to, over TCP and UDP; 0: any free one")
      ->capture_default_str();
  app.add_option("--heartbeat-interval-ms", options.heartbeat_interval_ms,
                 "between heartbeats of a worker; one that has missed three gets no new ranks")
      ->capture_default_str()
      ->check(CLI::Range(20, 60'000));
  app.add_option("--lease-ms", options.lease_ms,
                 "how long ranks go on whose worker cannot be reached, before they end and their "
                 "job moves elsewhere; default 15 heartbeats, at least 3 s")
      ->check(CLI::Range(kLeaseMsMin, int64_t{3'600'000}));
  add_health_options(app, options);
  app.add_option("--scrub-rate", options.scrub_bytes_per_second,
                 "bytes a second, such as 20MiB, at which each running job's checkpoints are read "
                 "over in the background, and those of all ended jobs together; 0: not at all")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(true))
      ->check(CLI::Range(uint64_t{0}, uint64_t{1} << 50));
  app.add_option("--scrub-pause-seconds", options.scrub_pause_seconds,
                 "from the end of one such reading to the next")
      ->capture_default_str()
      ->check(CLI::Range(1, 100 * 24 * 3600));
  app.set_version_flag("--version", std::string("penstock-coordinator ") + kVersion);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  constexpr int kBeatsMin = 4;  // silent is who has missed three
  if (options.lease_ms != 0 && options.lease_ms < kBeatsMin * options.heartbeat_interval_ms) {
    std::fprintf(stderr,
                 "penstock-coordinator: --lease-ms %" PRId64
                 " is less than four times --heartbeat-interval-ms %" PRId64 "\n",
                 options.lease_ms, options.heartbeat_interval_ms);
    return static_cast<int>(ExitCode::kUsage);
  }
  if (options.slow_ratio != 0.0 && options.slow_ratio <= 1.0) {
    std::fprintf(stderr,
                 "penstock-coordinator: --slow-ratio %g: above 1, or 0 for none to be slow\n",
                 options.slow_ratio);
    return static_cast<int>(ExitCode::kUsage);
  }
  if (options.state_dir.empty()) options.state_dir = default_state_dir("coordinator");
  start_logging("coordinator");
  const Result<std::unique_ptr<Driver>> driver = Driver::start(std::move(options));
  if (!driver.ok()) return fail(driver.status());
  const ExitCode code = (*driver)->run();
  if (!(*driver)->finish(kFinishLimit)) std::_Exit(static_cast<int>(code));
  return static_cast<int>(code);
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  return penstock::run(argc, argv);
}
