// penstock export: a checkpoint as a Hugging Face model folder.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "comm/base/counted.h"
#include "ops/cli/cli.h"
#include "ops/cli/hf_export.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

struct ExportFlags {
  std::string job;
  std::string checkpoint;
  std::optional<int64_t> step;
  std::string format = "hf";
  std::vector<std::string> outputs;
  std::string dtype = "bf16";
  uint64_t shard_bytes = HfWeightsOptions().shard_bytes_max;
  bool no_logits = false;
  std::string logits_file;
};

Result<ExitCode> run_export(Cli& cli, const ExportFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const std::optional<std::string> output,
                      take_output_path(cli, flags.outputs));
  if (!output) return invalid_argument("name the folder to write: penstock export JOB -o DIR");
  Path folder = Path(*output).lexically_normal();
  if (!folder.has_filename()) folder = folder.parent_path();  // "DIR/" is DIR
  if (flags.job.empty() == flags.checkpoint.empty()) {
    return invalid_argument("name a job, or --checkpoint PATH; one of them");
  }
  PENSTOCK_TRY_ASSIGN(const CheckpointSource source,
                      flags.job.empty() ? checkpoint_at(cli, flags.checkpoint, flags.step)
                                        : checkpoint_of_job(cli, flags.job, flags.step));
  cli.out.note(fmt::format("exporting job {} \"{}\" after step {} to {}", source.manifest.job,
                           source.spec.name, source.manifest.step, folder.string()));
  const HfExportOptions options{
      .weights = {.dtype = flags.dtype == "fp32" ? DType::kF32 : DType::kBf16,
                  .shard_bytes_max = flags.shard_bytes},
      .compare_logits = !flags.no_logits,
      .logits_file = flags.logits_file};
  PENSTOCK_TRY_ASSIGN(const HfExport report, export_hf(source, folder, options));
  const Json difference = report.logit_difference ? Json(*report.logit_difference) : Json(nullptr);
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "Export"},
                    {"job", source.manifest.job.value},
                    {"step", source.manifest.step},
                    {"format", flags.format},
                    {"path", folder.string()},
                    {"dtype", flags.dtype},
                    {"tensors", report.tensor_count},
                    {"files", report.file_count},
                    {"bytes", report.byte_count},
                    {"largest_logit_difference", difference}});
  cli.out.text(folder.string() + "\n");
  cli.out.note(fmt::format(
      "{}, {} in {}, read back byte for byte; {}", counted(report.tensor_count, "tensor"),
      format_bytes(static_cast<double>(report.byte_count)), counted(report.file_count, "file"),
      report.logit_difference
          ? fmt::format("logits are those of the weights in {}{}", flags.dtype,
                        flags.dtype == "fp32"
                            ? ""
                            : fmt::format(", at most {:.3g} from fp32's (--dtype fp32: 0)",
                                          *report.logit_difference))
          : "logits not compared"));
  return ExitCode::kOk;
}

}  // namespace

void add_export_verb(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<ExportFlags>();
  CLI::App* verb =
      add_verb(app, "export", "Write a checkpoint as a Hugging Face model folder",
               "penstock export quickstart --format hf -o model\n"
               "penstock export quickstart --dtype fp32 --step 120 -o model -o json\n"
               "penstock export --checkpoint checkpoints/7 -o model    # without a coordinator");
  verb->add_option("job", flags->job, "Name or id");
  verb->add_option("--checkpoint", flags->checkpoint,
                   "Instead of a job: its checkpoint directory, or one manifest in it");
  verb->add_option("--step", flags->step, "Of this step (default: the newest)")
      ->check(CLI::Range(int64_t{0}, int64_t{1'000'000'000}));
  verb->add_option("--format", flags->format, "hf: safetensors, config.json and tokenizer")
      ->check(one_of({"hf"}))
      ->capture_default_str();
  add_output_path_option(*verb, flags->outputs, "The folder to write, which must not exist");
  verb->add_option("--dtype", flags->dtype, "bf16, or fp32: exactly what was trained")
      ->check(one_of({"bf16", "fp32"}))
      ->capture_default_str();
  verb->add_option("--shard-size", flags->shard_bytes, "Largest file, such as 500MB or 5GB")
      ->transform(CLI::AsSizeValue(true))
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 50))
      ->capture_default_str();
  verb->add_flag("--no-logits", flags->no_logits,
                 "Skip the comparison of logits, which needs the model in memory");
  verb->add_option("--logits", flags->logits_file,
                   "Also write the compared tokens and logits there, as a safetensors file")
      ->excludes("--no-logits");
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return run_export(cli, *flags); }; });
}

}  // namespace penstock
