// penstock workers, version.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "comm/base/version.h"
#include "ops/cli/cli.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

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
         field_age(worker, "last_heartbeat")});
  }
  cli.out.table({"ID", "NAME", "HOST", "STATE", "FREE", "KIND", "METRICS", "HEARD"}, rows);
  return ExitCode::kOk;
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

  CLI::App* version_verb =
      add_verb(app, "version", "Print the versions of this program and the coordinator",
               "penstock version -o json");
  version_verb->callback([&cli] { cli.action = [&cli] { return version(cli); }; });
}

}  // namespace penstock
