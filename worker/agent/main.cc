// penstock-worker: the daemon that runs ranks on one host.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "comm/base/log.h"
#include "comm/base/version.h"
#include "comm/control/process.h"
#include "worker/agent/daemon.h"

namespace penstock {
namespace {

constexpr size_t kWorkerNameBytesMax = 200;

std::string default_name() {
  std::array<char, 128> name{};
  if (gethostname(name.data(), name.size() - 1) != 0 || name[0] == '\0') return "worker";
  return name.data();
}

std::string name_error(const std::string& name) {
  const bool sound = !name.empty() && name.size() <= kWorkerNameBytesMax &&
                     name.find_first_not_of(
                         "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                         "0123456789._-") == std::string::npos;
  return sound ? "" : "a name has 1 to 200 letters, digits, dots, underscores and dashes";
}

bool is_on_loopback(std::string_view endpoint) {
  return endpoint.starts_with("tcp://127.") || endpoint.starts_with("tcp://[::1]:") ||
         endpoint.starts_with("tcp://localhost:");
}

int fail(const Status& status) {
  std::fprintf(stderr, "penstock-worker: %s\n", status.message().c_str());
  return static_cast<int>(exit_code_of(status));
}

// Runs `penstock-rank check-host`, which has the kernels that ranks compute with and writes what it
// finds to our output. Its exit code.
int check_host(const DaemonOptions& options, bool thorough) {
  const Status made = create_directories_durably(options.state_dir);
  if (!made.ok()) return fail(made);
  SpawnOptions check;
  check.argv = {options.rank_binary.string(), "check-host", "--directory",
                options.state_dir.string()};
  if (thorough) check.argv.emplace_back("--thorough");
  check.capture_output = false;
  Result<ChildProcess> child = ChildProcess::spawn(check);
  if (!child.ok()) return fail(child.status());
  const ExitStatus ended = child->wait();
  if (ended.exit_code == static_cast<int>(ExitCode::kUnhealthy) && !thorough) {
    std::fprintf(stderr,
                 "penstock-worker: this host failed its check and takes no ranks; "
                 "penstock-worker --check looks longer, --no-check registers all the same\n");
  }
  if (ended.signal == 0) return ended.exit_code;
  return fail(internal_error("the check of this host was " + to_string(ended)));
}

int run(int argc, char** argv) {
  CLI::App app(
      "Runs ranks of training jobs on this host, as the coordinator orders. On SIGTERM its jobs "
      "finish their step, save and move; then it ends: exit code 0, or 12 when --grace was too "
      "short. A second SIGTERM ends everything at once.",
      "penstock-worker");
  DaemonOptions options;
  options.name = default_name();
  options.coordinator = "tcp://127.0.0.1:7071";
  app.add_option("--coordinator", options.coordinator, "the coordinator's control endpoint")
      ->capture_default_str();
  app.add_option("--name", options.name, "unique among workers, stable over restarts")
      ->capture_default_str()
      ->check(name_error);
  app.add_option("--devices", options.device_count, "ranks that may run here at a time")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  app.add_option("--state-dir", options.state_dir,
                 "logs of ranks; default $XDG_STATE_HOME/penstock/NAME");
  app.add_option("--http-bind", options.http_bind, "IPv4 or IPv6 address of /metrics")
      ->capture_default_str();
  app.add_option("--http-port", options.http_port, "port of /metrics; 0: any free one")
      ->capture_default_str();
  app.add_option("--rank-binary", options.rank_binary,
                 "program to run as a rank; default penstock-rank beside this one");
  app.add_option("--data-interface", options.data_interface,
                 "network interface of the ranks' data plane; default lo beside a coordinator on "
                 "loopback, else all");
  app.add_option("--grace", options.grace_seconds,
                 "seconds for ranks to save after SIGTERM; more than a step and a save take")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{86'400}));
  uint64_t copies_mib = 0;
  app.add_option("--copies-mib", copies_mib,
                 "memory for copies of ranks' state, of this host's and others' "
                 "(recovery.mirror of a job spec); default half of this host's")
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 40));
  app.add_flag("--allow-chaos", options.allow_chaos,
               "let penstock chaos cut this worker off from its coordinator; for dev clusters");
  bool check = false;
  bool check_first = true;
  app.add_flag("--check", check,
               "check this host's memory, processors, disk and network for a minute, and end");
  app.add_flag("!--no-check", check_first, "register without the quick check of the same");
  app.set_version_flag("--version", std::string("penstock-worker ") + kVersion);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  options.copies_bytes_max = copies_mib << 20;
  start_logging("worker " + options.name);
  if (options.state_dir.empty()) options.state_dir = default_state_dir(options.name);
  if (options.data_interface.empty() && is_on_loopback(options.coordinator)) {
    options.data_interface = "lo";
  }
  if (options.rank_binary.empty()) {
    Result<Path> sibling = sibling_binary("penstock-rank");
    if (!sibling.ok()) return fail(sibling.status());
    options.rank_binary = std::move(sibling).value();
  }
  if (check || check_first) {
    const int code = check_host(options, check);
    if (check || code != 0) return code;
  }
  const Result<std::unique_ptr<Daemon>> daemon = Daemon::start(options);
  if (!daemon.ok()) return fail(daemon.status());
  return static_cast<int>((*daemon)->run());
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  return penstock::run(argc, argv);
}
