// Two hosts on one machine and a link between them that loses packets, for ops/bench recovery.
//
//   penstock-lossy-network [--loss SHARE] [--seed X]
//
// Prints {"members":[PID,PID]}: /proc/PID/ns/net is the namespace of each, where this network's
// addresses are 10.73.0.1 and 10.73.0.2. Everything is gone when stdin ends.
#include <fmt/format.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <csignal>
#include <cstdio>

#include "comm/base/exit_codes.h"
#include "tests/support/shaped_network.h"

namespace penstock {
namespace {

// A process that is in a member's namespace and does nothing; 0: it could not get there.
pid_t hold(const ShapedNetwork& network, int32_t member) {
  std::array<int, 2> entered{};
  if (::pipe(entered.data()) != 0) return 0;
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const Status status = network.enter(member);
    if (!status.ok()) {
      std::fprintf(stderr, "penstock-lossy-network: %s\n", status.message().c_str());
      ::_exit(1);
    }
    [[maybe_unused]] const ssize_t written = ::write(entered[1], "x", 1);
    while (true) ::pause();
  }
  ::close(entered[1]);
  char byte = 0;
  const bool there = pid > 0 && ::read(entered[0], &byte, 1) == 1;
  ::close(entered[0]);
  return there ? pid : 0;
}

int run(int argc, char** argv) {
  CLI::App app("Two network namespaces and a link between them that loses packets.",
               "penstock-lossy-network");
  ShapedNetworkOptions options{.member_count = 2, .bytes_per_second = 1e9, .loss = 0.2};
  app.add_option("--loss", options.loss, "share of packets that never arrive")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "which ones")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const auto network = ShapedNetwork::create(options);
  if (!network.ok()) {
    std::fprintf(stderr, "penstock-lossy-network: %s\n", network.status().message().c_str());
    return static_cast<int>(exit_code_of(network.status()));
  }
  const pid_t first = hold(**network, 0);
  const pid_t second = hold(**network, 1);
  if (first == 0 || second == 0) return static_cast<int>(ExitCode::kFailure);
  fmt::print("{{\"members\":[{},{}]}}\n", first, second);
  std::fflush(stdout);
  char byte = 0;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
  return 0;
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  return penstock::run(argc, argv);
}
