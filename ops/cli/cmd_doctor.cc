// penstock doctor.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "ops/cli/cli.h"
#include "ops/cli/dev_cluster.h"
#include "ops/cli/verdict.h"

namespace penstock {

namespace {

// Without a coordinator what it wrote can still be read, where that is on this host.
Status with_state_hint(const Cli& cli, const std::string& name, const Status& status) {
  const char* const named = std::getenv("PENSTOCK_SERVER");
  const bool other_asked = !cli.server.empty() || (named != nullptr && *named != '\0');
  if (status.code() != Code::kUnavailable || other_asked) return status;
  const Path folder = dev_state_dir(cli.state_dir);
  std::error_code error;
  if (!std::filesystem::exists(folder / "coordinator", error)) return status;
  return Status(status.code(),
                fmt::format("{}; or read what it wrote: penstock doctor {} --state {}",
                            status.message(), name, folder.string()));
}

void print_failures(Output& out, const Json& failures) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& failure : failures) {
    rows.push_back({field_text(failure, "time"), field_text(failure, "epoch"),
                    field_text(failure, "rank"), field_text(failure, "worker"),
                    field_text(failure, "code"), field_text(failure, "message")});
  }
  if (rows.empty()) return;
  out.text("\n");
  out.table({"TIME", "ATTEMPT", "RANK", "WORKER", "CODE", "FAILURE"}, rows);
}

Result<ExitCode> doctor(Cli& cli, const std::string& name, const std::string& state_dir) {
  const bool offline = !state_dir.empty();
  const auto history =
      offline ? read_history(Path(state_dir), name) : read_history(cli.client(), name);
  if (!history.ok()) {
    return offline ? history.status() : with_state_hint(cli, name, history.status());
  }
  const Json verdict = verdict_of(*history, offline);
  cli.out.document(verdict);
  cli.out.text(verdict_text(verdict, cli.out.coloured_state(field_string(verdict, "state"))));
  print_failures(cli.out, verdict.at("failures"));
  return ExitCode::kOk;
}

}  // namespace

void add_doctor_verb(CLI::App& app, Cli& cli) {
  struct Flags {
    std::string job, state_dir;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* verb =
      add_verb(app, "doctor", "Say what went wrong with a job, where, and what to type next",
               "penstock doctor quickstart\n"
               "penstock doctor quickstart --state /var/lib/penstock    # without a coordinator\n"
               "penstock doctor quickstart -o json | jq -r .command");
  verb->add_option("job", flags->job, "Name or id")->required();
  verb->add_option("--state", flags->state_dir,
                   "Read a coordinator's state directory instead of asking one; changes nothing "
                   "there, and it may run");
  verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return doctor(cli, flags->job, flags->state_dir); };
  });
}

}  // namespace penstock
