// penstock dev up, down, status, kill-rank: a cluster on this host.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "ops/cli/cli.h"
#include "ops/cli/dev_cluster.h"

namespace penstock {

namespace {

struct DevFlags {
  std::optional<int> worker_count;
  std::optional<int> devices_per_worker;
  std::optional<int> port;
  std::string job;
  int64_t rank = 0;
};

Json cluster_document(const Path& state_dir, const DevState& state) {
  const bool running = dev_coordinator_runs(state);
  Json processes = Json::array();
  for (const DevProcess& p : state.processes) {
    processes.push_back(
        {{"name", p.name}, {"pid", p.process.pid}, {"alive", is_alive(p.process)}, {"log", p.log}});
  }
  return {{"apiVersion", "penstock/v1"},
          {"kind", "DevCluster"},
          {"running", running},
          {"server", running ? Json(state.server()) : Json()},
          {"state_dir", state_dir.string()},
          {"processes", processes}};
}

void print_cluster(Output& out, const DevState& state) {
  std::vector<std::vector<std::string>> rows;
  for (const DevProcess& p : state.processes) {
    rows.push_back({p.name, std::to_string(p.process.pid),
                    out.coloured_state(is_alive(p.process) ? "up" : "lost"), p.log});
  }
  if (!rows.empty()) out.table({"PROCESS", "PID", "STATE", "LOG"}, rows);
}

Result<ExitCode> up(Cli& cli, const DevFlags& flags) {
  const DevOptions options = {.state_dir = dev_state_dir(cli.state_dir),
                              .worker_count = flags.worker_count,
                              .devices_per_worker = flags.devices_per_worker,
                              .port = flags.port};
  bool started_any = false;
  PENSTOCK_TRY_ASSIGN(const DevState state, dev_up(options, [&](std::string line) {
                        started_any = true;
                        cli.out.note(line);
                      }));
  if (!started_any) cli.out.note("the cluster runs already");
  cli.out.document(cluster_document(options.state_dir, state));
  cli.out.answer(state.server());
  cli.out.note(fmt::format("page     {0}/\nmetrics  {0}/metrics\nlogs     {1}", state.server(),
                           options.state_dir.string()));
  cli.out.note(
      "next: ops/corpus; penstock submit docs/examples/quickstart.yaml; penstock ps; "
      "penstock wait quickstart; penstock dev down");
  return ExitCode::kOk;
}

// Jobs that have not ended are stopped with the cluster, and do not end by that.
void say_what_goes_on(Output& out, const Client& client) {
  const Result<Json> jobs = client.get("/api/v1/jobs?limit=10000");
  if (!jobs.ok()) return;
  for (const Json& job : jobs->value("items", Json::array())) {
    const std::string state = field_string(job, "state");
    if (state_is_final(state)) continue;
    out.note(fmt::format("job {} \"{}\" was {}: it goes on after the next penstock dev up",
                         field_text(job, "id"), field_string(job, "name"), state));
  }
}

Result<ExitCode> down(Cli& cli) {
  const Path state_dir = dev_state_dir(cli.state_dir);
  const Result<DevState> state = load_dev_state(state_dir);
  if (state.ok() && dev_coordinator_runs(*state))
    say_what_goes_on(cli.out, Client(state->server()));
  PENSTOCK_TRY_ASSIGN(const auto stopped, dev_down(state_dir));
  for (const std::string& name : stopped) cli.out.note("stopped " + name);
  if (stopped.empty()) cli.out.note(fmt::format("no cluster runs in {}", state_dir.string()));
  cli.out.document(
      {{"apiVersion", "penstock/v1"}, {"kind", "DevClusterStopped"}, {"stopped", stopped}});
  return ExitCode::kOk;
}

Result<ExitCode> status(Cli& cli) {
  const Path state_dir = dev_state_dir(cli.state_dir);
  PENSTOCK_TRY_ASSIGN(const DevState state, load_dev_state(state_dir));
  cli.out.document(cluster_document(state_dir, state));
  print_cluster(cli.out, state);
  if (dev_coordinator_runs(state)) {
    if (!cli.out.json()) cli.out.note("server  " + state.server());
    return ExitCode::kOk;
  }
  const bool any_alive = std::any_of(state.processes.begin(), state.processes.end(),
                                     [](const DevProcess& p) { return is_alive(p.process); });
  cli.out.note(any_alive ? "its coordinator does not run; penstock dev up starts it"
                         : fmt::format("no cluster runs in {}; start one with: penstock dev up",
                                       state_dir.string()));
  return ExitCode::kNotFound;
}

Result<ExitCode> kill_rank(Cli& cli, const DevFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const DevState state, load_dev_state(dev_state_dir(cli.state_dir)));
  PENSTOCK_TRY_ASSIGN(const Json job, cli.client().job(flags.job));
  const std::string id = field_text(job, "id");
  PENSTOCK_TRY_ASSIGN(const LocalProcess process, find_dev_rank(state, id, flags.rank));
  PENSTOCK_TRY(send_signal(process, SIGKILL));
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "KilledRank"},
                    {"job", job.value("id", Json())},
                    {"rank", flags.rank},
                    {"pid", process.pid},
                    {"step", job.value("step", Json())}});
  cli.out.answer(std::to_string(process.pid));
  cli.out.note(fmt::format("killed rank {} of job {} \"{}\" (process {}, SIGKILL) after step {}",
                           flags.rank, id, field_text(job, "name"), process.pid,
                           field_text(job, "step")));
  return ExitCode::kOk;
}

}  // namespace

void add_dev_verbs(CLI::App& app, Cli& cli) {
  CLI::App* dev = add_verb(app, "dev", "Run a cluster on this host",
                           "penstock dev up --workers 4\npenstock dev down");
  dev->require_subcommand(1);
  dev->add_option("--state-dir", cli.state_dir,
                  "Folder of the cluster (default: $PENSTOCK_DEV_STATE_DIR, else "
                  "~/.local/state/penstock/dev)");
  auto flags = std::make_shared<DevFlags>();

  CLI::App* up_verb =
      add_verb(*dev, "up", "Start a coordinator and workers, or what is missing of them",
               "penstock dev up\npenstock dev up --workers 2 --devices-per-worker 4 --port 0");
  up_verb
      ->add_option("--workers", flags->worker_count, "Worker daemons (default: as before, else 4)")
      ->check(CLI::Range(1, 256));
  up_verb
      ->add_option("--devices-per-worker", flags->devices_per_worker,
                   "Ranks each can run (default: as before, else 1)")
      ->check(CLI::Range(1, 1024));
  up_verb
      ->add_option("--port", flags->port,
                   "HTTP port (default: as before, else 7070); 0: any free one")
      ->check(CLI::Range(0, 65535));
  up_verb->callback([&cli, flags] { cli.action = [&cli, flags] { return up(cli, *flags); }; });

  CLI::App* down_verb = add_verb(
      *dev, "down", "Stop what dev up started; jobs and checkpoints stay", "penstock dev down");
  down_verb->callback([&cli] { cli.action = [&cli] { return down(cli); }; });

  CLI::App* status_verb = add_verb(*dev, "status", "Show the cluster's processes and address",
                                   "penstock dev status -o json | jq -r .server");
  status_verb->callback([&cli] { cli.action = [&cli] { return status(cli); }; });

  CLI::App* kill_verb =
      add_verb(*dev, "kill-rank", "Kill one rank of a job with SIGKILL, to watch it recover",
               "penstock dev kill-rank quickstart --rank 2");
  kill_verb->add_option("job", flags->job, "Name or id")->required();
  kill_verb->add_option("--rank", flags->rank, "Which")->required()->check(rank_number());
  kill_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return kill_rank(cli, *flags); }; });
}

}  // namespace penstock
