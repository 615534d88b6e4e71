// penstock rebalance.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "ops/cli/cli.h"

namespace penstock {

namespace {

std::string ratio_text(const Json& object, const char* key) {
  return fmt::format("{:.3f}", field_number(object, key));
}

Result<ExitCode> rebalance(Cli& cli, const std::string& name, bool dry_run) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(name));
  const std::string path = job_path(field_text(job, "id"), "/rebalance");
  PENSTOCK_TRY_ASSIGN(const Json plan, dry_run ? client.get(path) : client.post(path));
  cli.out.document(plan);
  const Json layers = plan.value("items", Json::array());
  std::vector<std::vector<std::string>> rows;
  for (const Json& layer : layers) {
    rows.push_back({field_text(layer, "layer"), ratio_text(layer, "imbalance_before"),
                    ratio_text(layer, "imbalance_after"), field_text(layer, "moved")});
  }
  cli.out.table({"LAYER", "BEFORE", "AFTER", "MOVED"}, rows);
  cli.out.note(fmt::format(
      "job {} \"{}\": {} of {} experts {}, by the load measured up to step {}; {:.1f}% of the time "
      "in experts is saved",
      field_text(job, "id"), field_text(job, "name"), field_text(plan, "moved"),
      field_text(plan, "experts"), dry_run ? "would move" : "move at the next checkpoint",
      field_text(plan, "measured_step"), 100.0 * field_number(plan, "gain")));
  return ExitCode::kOk;
}

}  // namespace

void add_rebalance_verb(CLI::App& app, Cli& cli) {
  struct Flags {
    std::string job;
    bool dry_run = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = add_verb(app, "rebalance", "Move experts between ranks by their measured load",
                            "penstock rebalance quickstart --dry-run\n"
                            "penstock rebalance quickstart -o json | jq .imbalance_after");
  verb->add_option("job", flags->job, "Name or id")->required();
  verb->add_flag("--dry-run", flags->dry_run, "Only show what would move");
  verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return rebalance(cli, flags->job, flags->dry_run); };
  });
}

}  // namespace penstock
