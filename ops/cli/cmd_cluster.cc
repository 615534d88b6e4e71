// penstock workers, drain, undrain, quarantine, release, version.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "comm/base/counted.h"
#include "comm/base/version.h"
#include "comm/control/http_client.h"
#include "comm/run/nearest_word.h"
#include "ops/cli/cli.h"
#include "ops/cli/follow.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

bool is_drained(const Json& worker) {
  return worker.value("drain_reason", Json()).is_string();
}

bool in_quarantine(const Json& worker) {
  return worker.value("quarantine", Json()).is_object();
}

// It has been released, and its host is yet to pass a check.
bool is_releasing(const Json& worker) {
  return in_quarantine(worker) && worker.at("quarantine").value("releasing", false);
}

// Why the worker gets no ranks.
std::string off_for(const Json& worker) {
  const std::string drained = field_string(worker, "drain_reason");
  if (!in_quarantine(worker)) return drained;
  const std::string reason = field_string(worker.at("quarantine"), "reason");
  if (!is_drained(worker)) return reason;
  return fmt::format("drained{}; in quarantine: {}", drained.empty() ? "" : ": " + drained, reason);
}

Result<ExitCode> list_workers(Cli& cli) {
  PENSTOCK_TRY_ASSIGN(const Json list, cli.client().get("/api/v1/workers"));
  cli.out.document(list);
  std::vector<std::vector<std::string>> rows;
  for (const Json& worker : list.value("items", Json::array())) {
    rows.push_back(
        {field_text(worker, "id"), field_text(worker, "name"), field_text(worker, "host"),
         cli.out.coloured_state(field_text(worker, "state")),
         fmt::format("{}/{}", field_text(worker, "free_devices"), field_text(worker, "devices")),
         field_text(worker, "device_kind"), field_text(worker, "http_address"),
         field_age(worker, "last_heartbeat"), off_for(worker)});
  }
  cli.out.table({"ID", "NAME", "HOST", "STATE", "FREE", "KIND", "METRICS", "HEARD", "OFF FOR"},
                rows);
  return ExitCode::kOk;
}

Result<Json> find_worker(const Client& client, const std::string& name) {
  PENSTOCK_TRY_ASSIGN(const Json list, client.get("/api/v1/workers"));
  std::vector<std::string> names;
  for (const Json& worker : list.value("items", Json::array())) {
    names.push_back(field_string(worker, "name"));
    if (names.back() == name) return worker;
  }
  const std::string hint = did_you_mean(name, names);
  return not_found(fmt::format("no worker is named \"{}\"{}", name,
                               hint.empty() ? "; penstock workers lists them" : hint));
}

// Until nothing runs there any more.
Result<Json> wait_until_drained(Cli& cli, const std::string& name) {
  const Client client = cli.client();
  PatientClient patient(client, cli.out);
  int64_t after = 0;
  while (true) {
    PENSTOCK_TRY_ASSIGN(const Json list, patient.get("/api/v1/workers"));
    for (const Json& worker : list.value("items", Json::array())) {
      if (field_string(worker, "name") != name) continue;
      const std::string state = field_string(worker, "state");
      if (state != "draining") return worker;
    }
    constexpr std::chrono::milliseconds kHoldBack{2000};
    PENSTOCK_TRY_ASSIGN(const Json events,
                        patient.get(fmt::format("/api/v1/events?after={}&limit=10000&wait_ms={}",
                                                after, kHoldBack.count()),
                                    kHoldBack));
    after = static_cast<int64_t>(field_number(events, "next_after", static_cast<double>(after)));
  }
}

struct DrainFlags {
  std::string worker, reason;
  bool wait = false;
};

Result<ExitCode> drain(Cli& cli, const DrainFlags& flags) {
  const Client client = cli.client();
  PENSTOCK_TRY(find_worker(client, flags.worker).status());
  PENSTOCK_TRY_ASSIGN(Json worker,
                      client.post(fmt::format("/api/v1/workers/{}/drain?reason={}", flags.worker,
                                              percent_encode(flags.reason))));
  const size_t ranks = worker.value("ranks", Json::array()).size();
  if (flags.wait) {
    PENSTOCK_TRY_ASSIGN(worker, wait_until_drained(cli, flags.worker));
  }
  cli.out.document(worker);
  cli.out.answer(flags.worker);
  const std::string state = field_string(worker, "state");
  if (state == "drained" || ranks == 0) {
    cli.out.note(fmt::format("worker {} is idle and takes no ranks", flags.worker));
  } else {
    cli.out.note(fmt::format(
        "worker {} takes no new ranks; its {} finish their step, save, and go on elsewhere as soon "
        "as there is room",
        flags.worker, counted(static_cast<int64_t>(ranks), "rank")));
  }
  cli.out.note("next: penstock workers; penstock undrain " + flags.worker);
  if (flags.wait && state != "drained") {
    return failed_precondition(fmt::format("worker {} is {}, not drained", flags.worker, state));
  }
  return ExitCode::kOk;
}

Result<ExitCode> undrain(Cli& cli, const std::string& name) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json known, find_worker(client, name));
  if (!is_drained(known)) {
    return failed_precondition(
        fmt::format("worker {} is not drained{}", name,
                    in_quarantine(known) ? ", but in quarantine: penstock release " + name : ""));
  }
  PENSTOCK_TRY_ASSIGN(const Json worker,
                      client.post(fmt::format("/api/v1/workers/{}/undrain", name)));
  cli.out.document(worker);
  cli.out.answer(name);
  if (is_releasing(worker)) {
    cli.out.note(fmt::format(
        "worker {} is drained no more, and takes ranks again as soon as its host has passed a "
        "check: penstock workers",
        name));
  } else if (in_quarantine(worker)) {
    cli.out.note(fmt::format("worker {} is drained no more, but in quarantine: penstock release {}",
                             name, name));
  } else {
    cli.out.note(fmt::format("worker {} takes ranks again", name));
  }
  return ExitCode::kOk;
}

Result<ExitCode> quarantine(Cli& cli, const std::string& name, const std::string& reason) {
  const Client client = cli.client();
  PENSTOCK_TRY(find_worker(client, name).status());
  PENSTOCK_TRY_ASSIGN(const Json worker,
                      client.post(fmt::format("/api/v1/workers/{}/quarantine?reason={}", name,
                                              percent_encode(reason))));
  cli.out.document(worker);
  cli.out.answer(name);
  cli.out.note(
      fmt::format("worker {} gets no ranks; those it has finish their step, save, and go "
                  "on elsewhere as soon as there is room",
                  name));
  cli.out.note("next: penstock workers; penstock release " + name);
  return ExitCode::kOk;
}

Result<ExitCode> release(Cli& cli, const std::string& name) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json known, find_worker(client, name));
  if (!in_quarantine(known)) {
    return failed_precondition(
        fmt::format("worker {} is not in quarantine{}", name,
                    is_drained(known) ? ", but drained: penstock undrain " + name : ""));
  }
  PENSTOCK_TRY_ASSIGN(const Json worker,
                      client.post(fmt::format("/api/v1/workers/{}/release", name)));
  cli.out.document(worker);
  cli.out.answer(name);
  if (is_drained(worker)) {
    cli.out.note(
        fmt::format("worker {} leaves quarantine as soon as its host has passed a check, but is "
                    "drained: penstock undrain {}",
                    name, name));
  } else {
    cli.out.note(
        fmt::format("worker {} takes ranks again as soon as its host has passed a check: "
                    "penstock workers",
                    name));
  }
  return ExitCode::kOk;
}

void add_drain_verbs(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<DrainFlags>();
  CLI::App* drain_verb =
      add_verb(app, "drain", "Clear a worker for maintenance: its jobs save and move elsewhere",
               "penstock drain gpu-07 --reason \"fan\" --wait && ssh gpu-07 reboot");
  drain_verb->add_option("worker", flags->worker, "Its name")->required();
  drain_verb->add_option("--reason", flags->reason, "Why, for people");
  drain_verb->add_flag("--wait", flags->wait, "Until nothing runs there");
  drain_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return drain(cli, *flags); }; });

  CLI::App* undrain_verb =
      add_verb(app, "undrain", "Let a drained worker take ranks again", "penstock undrain gpu-07");
  undrain_verb->add_option("worker", flags->worker, "Its name")->required();
  undrain_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return undrain(cli, flags->worker); }; });
}

void add_quarantine_verbs(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<DrainFlags>();
  CLI::App* quarantine_verb = add_verb(
      app, "quarantine", "Trust a worker's host with no ranks: its jobs save and move elsewhere",
      "penstock quarantine gpu-07 --reason \"ECC errors since Monday\"");
  quarantine_verb->add_option("worker", flags->worker, "Its name")->required();
  quarantine_verb->add_option("--reason", flags->reason, "What speaks against it")->required();
  quarantine_verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return quarantine(cli, flags->worker, flags->reason); };
  });

  CLI::App* release_verb =
      add_verb(app, "release", "Take a worker out of quarantine", "penstock release gpu-07");
  release_verb->add_option("worker", flags->worker, "Its name")->required();
  release_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return release(cli, flags->worker); }; });
}

// Answers without a coordinator too: the server's version is then null.
Result<ExitCode> version(Cli& cli) {
  const Client client = cli.client();
  const auto server = client.get("/api/v1/version");
  Json document = {{"apiVersion", "penstock/v1"},
                   {"kind", "ClientVersion"},
                   {"client", {{"version", kVersion}}},
                   {"server", nullptr}};
  if (server.ok()) document["server"] = *server;
  cli.out.document(document);
  cli.out.text(fmt::format("client       {}\n", kVersion));
  cli.out.text(fmt::format(
      "coordinator  {}\n",
      server.ok() ? fmt::format("{} at {}", field_text(*server, "version"), client.server())
                  : fmt::format("none at {}", client.server())));
  return ExitCode::kOk;
}

}  // namespace

void add_cluster_verbs(CLI::App& app, Cli& cli) {
  CLI::App* workers =
      add_verb(app, "workers", "List worker daemons and their devices", "penstock workers");
  workers->callback([&cli] { cli.action = [&cli] { return list_workers(cli); }; });

  add_drain_verbs(app, cli);
  add_quarantine_verbs(app, cli);

  CLI::App* version_verb =
      add_verb(app, "version", "Print the versions of this program and the coordinator",
               "penstock version -o json");
  version_verb->callback([&cli] { cli.action = [&cli] { return version(cli); }; });
}

}  // namespace penstock
