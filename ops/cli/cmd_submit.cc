// penstock submit: checks a spec here, sends it, says what to do next, and follows the run when
// asked.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "ops/cli/cli.h"
#include "ops/cli/follow.h"
#include "ops/cli/spec_file.h"

namespace penstock {

namespace {

struct SubmitFlags {
  std::string spec;
  std::string name;
  bool follow = false;
  bool dry_run = false;
};

// Ranks read the same files as this process.
bool is_this_host(const std::string& server) {
  return server.find("//127.0.0.1") != std::string::npos ||
         server.find("//localhost") != std::string::npos ||
         server.find("//[::1]") != std::string::npos;
}

void say_submitted(Output& out, const Json& job, bool followed) {
  const std::string name = field_string(job, "name");
  out.note(fmt::format("submitted job {} \"{}\" ({}, {})", field_text(job, "id"), name,
                       field_counted(job, "world_size", "rank"),
                       field_counted(job, "target_steps", "step")));
  if (followed) return;
  out.note(
      fmt::format("next: penstock wait {0}; penstock describe {0}; penstock logs {0} -f; "
                  "penstock cancel {0}",
                  name));
}

Result<ExitCode> submit(Cli& cli, const SubmitFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const SpecSource source, read_spec(flags.spec));
  PENSTOCK_TRY_ASSIGN(const JobSpec spec, load_spec(source, flags.name));
  const Client client = cli.client();
  if (is_this_host(client.server())) PENSTOCK_TRY(check_spec_data(source, spec));
  if (flags.dry_run) {
    cli.out.text(to_json(spec) + "\n");
    if (cli.out.json()) cli.out.document(Json::parse(to_json(spec)));
    cli.out.note("nothing was sent: --dry-run");
    return ExitCode::kOk;
  }
  const auto posted = client.post("/api/v1/jobs", to_json(spec));
  if (!posted.ok()) {
    const Status& refused = posted.status();
    return Status(refused.code(), section_place(source, refused.message()) + refused.message());
  }
  const std::string id = field_text(*posted, "id");
  cli.out.answer(id);
  say_submitted(cli.out, *posted, flags.follow);
  if (!flags.follow) {
    cli.out.document(*posted);
    return ExitCode::kOk;
  }
  detach_on_interrupt(spec.name);
  PENSTOCK_TRY_ASSIGN(const Json last, follow_job(client, cli.out, id));
  explain_failure(client, cli.out, last);
  if (field_string(last, "state") == "SUCCEEDED") {
    cli.out.note(
        fmt::format("next: penstock sample {0}; penstock checkpoint ls {0}; penstock export {0} -o "
                    "DIR",
                    spec.name));
  }
  cli.out.document(last);
  return exit_code_of_job(last);
}

}  // namespace

void add_submit_verb(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<SubmitFlags>();
  CLI::App* verb =
      add_verb(app, "submit", "Submit a job",
               "penstock submit docs/examples/quickstart.yaml --follow\n"
               "id=$(penstock submit job.yaml --name nightly)\n"
               "sed 's/lr: .*/lr: 1.0e-3/' job.yaml | penstock submit -\n"
               "penstock submit job.yaml --dry-run        # check it, print every default");
  verb->add_option("spec", flags->spec, "Job spec, YAML or JSON (docs/job-spec.md); -: read stdin")
      ->required();
  verb->add_option("--name", flags->name, "Name of the job, instead of the spec's metadata.name");
  verb->add_flag("-f,--follow", flags->follow,
                 "Show progress until the job ends; the exit code says how it ended");
  verb->add_flag("--dry-run", flags->dry_run, "Check the spec and its data, send nothing");
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return submit(cli, *flags); }; });
}

}  // namespace penstock
