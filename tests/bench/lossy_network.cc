// Hosts on one machine and a network between them that loses packets, for ops/bench recovery.
//
//   penstock-lossy-network [--members N] [--loss SHARE] [--seed X]
//
// Prints {"members":[PID,…]}: /proc/PID/ns/net is the namespace of each, where member m, counted
// from 0, has the address 10.73.0.(m+1). A line "cut M" on stdin cuts member M off, "heal M" ends
// that; each is answered with the same line. Everything is gone when stdin ends.
#include <fmt/format.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <csignal>
#include <cstdio>
#include <iostream>

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
  CLI::App app("Network namespaces and a network between them that loses packets.",
               "penstock-lossy-network");
  ShapedNetworkOptions options{.member_count = 2, .bytes_per_second = 1e9, .loss = 0.2};
  app.add_option("--members", options.member_count, "hosts")->capture_default_str();
  app.add_option("--loss", options.loss, "share of packets that never arrive")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "which ones")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const auto network = ShapedNetwork::create(options);
  if (!network.ok()) {
    std::fprintf(stderr, "penstock-lossy-network: %s\n", network.status().message().c_str());
    return static_cast<int>(exit_code_of(network.status()));
  }
  std::vector<pid_t> members;
  for (int32_t member = 0; member < options.member_count; ++member) {
    members.push_back(hold(**network, member));
    if (members.back() == 0) return static_cast<int>(ExitCode::kFailure);
  }
  fmt::print("{{\"members\":[{}]}}\n", fmt::join(members, ","));
  std::fflush(stdout);
  std::string verb;
  int32_t member = 0;
  while (std::cin >> verb >> member) {
    if ((verb != "cut" && verb != "heal") || member < 0 || member >= options.member_count) {
      std::fprintf(stderr, "penstock-lossy-network: no such command: %s %d\n", verb.c_str(),
                   member);
      return static_cast<int>(ExitCode::kUsage);
    }
    (*network)->set_cut_off(member, verb == "cut");
    fmt::print("{} {}\n", verb, member);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  return penstock::run(argc, argv);
}
