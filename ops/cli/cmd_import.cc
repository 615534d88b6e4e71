// penstock import: checks a Hugging Face model folder and writes the spec of a run that starts from
// it.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "checkpoint/file_system.h"
#include "comm/base/counted.h"
#include "ops/cli/cli.h"
#include "ops/cli/hf_import.h"
#include "ops/cli/spec_file.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

struct ImportFlags {
  std::string folder;
  std::string like;
  std::vector<std::string> outputs;
};

// The spec to write: a starting point, or the one in the file --like with this folder in it.
Result<std::string> spec_text(const ImportFlags& flags, const HfImport& import,
                              const Path& folder) {
  if (flags.like.empty()) {
    std::string text = starting_spec(import.model, folder, hf_folder_tokenizer(folder));
    PENSTOCK_TRY(parse_job_spec(text, "the spec made from " + folder.string()).status());
    return text;
  }
  PENSTOCK_TRY_ASSIGN(JobSpec spec, load_spec_file(flags.like, ""));
  spec.checkpoint.init_from = folder.string();
  if (const Status same = check_init_from(spec); !same.ok()) return same.with_context(flags.like);
  return to_json(spec) + "\n";
}

Result<ExitCode> run_import(Cli& cli, const ImportFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const std::optional<std::string> output,
                      take_output_path(cli, flags.outputs));
  std::error_code error;
  const Path folder = std::filesystem::absolute(flags.folder, error).lexically_normal();
  if (error) return errno_status(error.value(), "find " + flags.folder);
  PENSTOCK_TRY_ASSIGN(const HfImport import, read_hf_folder(folder));
  for (size_t i = 0; i < import.ignored.size() && i < 5; ++i) {
    cli.out.note(
        fmt::format("ignored tensor {}: the model has no place for it", import.ignored[i]));
  }
  if (import.ignored.size() > 5) {
    cli.out.note(fmt::format("and {} more", counted(std::ssize(import.ignored) - 5, "tensor")));
  }
  if (output) {
    PENSTOCK_TRY_ASSIGN(const std::string spec, spec_text(flags, import, folder));
    PENSTOCK_TRY(write_new_file(real_file_system(), *output, as_bytes(spec)));
  }
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "Import"},
                    {"path", folder.string()},
                    {"spec", output ? Json(*output) : Json(nullptr)},
                    {"tensors", import.weight_count},
                    {"parameters", import.parameter_count},
                    {"ignored_tensors", import.ignored.size()}});
  if (output) cli.out.text(*output + "\n");
  cli.out.note(fmt::format("{} is whole: {}, {} parameters, all finite", folder.string(),
                           counted(import.weight_count, "tensor"),
                           format_quantity(static_cast<double>(import.parameter_count))));
  if (output) {
    cli.out.note(fmt::format("next: look at {0}, then penstock submit {0} --follow", *output));
  }
  return ExitCode::kOk;
}

}  // namespace

void add_import_verb(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<ImportFlags>();
  CLI::App* verb =
      add_verb(app, "import", "Check a Hugging Face model folder; start a run from it",
               "penstock import model                                # only check\n"
               "penstock import model -o job.yaml                    # a spec to adapt\n"
               "penstock import model --like other.yaml -o job.yaml  # ready to submit");
  verb->add_option("folder", flags->folder, "With config.json and safetensors files")->required();
  verb->add_option(
      "--like", flags->like,
      "Take everything but the start from this job spec, whose model must be the same");
  add_output_path_option(*verb, flags->outputs, "The job spec to write, which must not exist");
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return run_import(cli, *flags); }; });
}

}  // namespace penstock
