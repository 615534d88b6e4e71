// penstock checkpoint export, import: the whole state as files of other programs, and back.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "checkpoint/state_files.h"
#include "checkpoint/store.h"
#include "comm/base/counted.h"
#include "ops/cli/checkpoint_place.h"
#include "ops/cli/partial_folder.h"
#include "ops/cli/state_import.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

constexpr uint64_t kFileBytes = 5'000'000'000;

struct ExportFlags {
  std::string what;
  std::optional<int64_t> step;
  std::string format = "safetensors";
  uint64_t file_bytes = kFileBytes;
  std::vector<std::string> outputs;
};

Result<Path> output_path(Cli& cli, const std::vector<std::string>& outputs,
                         const std::string& example) {
  PENSTOCK_TRY_ASSIGN(const std::optional<std::string> output, take_output_path(cli, outputs));
  if (!output) return invalid_argument("name the folder to write: " + example);
  const Path path = std::filesystem::absolute(*output).lexically_normal();
  return path.has_filename() ? path : path.parent_path();  // "DIR/" is DIR
}

Result<ExitCode> run_export(Cli& cli, const ExportFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Path folder,
                      output_path(cli, flags.outputs, "penstock checkpoint export WHERE -o DIR"));
  PENSTOCK_TRY_ASSIGN(const CheckpointPlace place, find_checkpoint_place(cli, flags.what));
  PENSTOCK_TRY_ASSIGN(const ChosenCheckpoint chosen, choose_checkpoint(cli, place, flags.step));
  const Manifest& manifest = chosen.stored.manifest;
  PENSTOCK_TRY(check_segments(chosen.directory, manifest));
  PENSTOCK_TRY_ASSIGN(PartialFolder partial, PartialFolder::create(folder));
  const StateFormat format = flags.format == "dcp" ? StateFormat::kDcp : StateFormat::kSafetensors;
  PENSTOCK_TRY_ASSIGN(
      const StateFiles report,
      write_state_files({chosen.directory, manifest}, format, flags.file_bytes, partial.path()));
  PENSTOCK_TRY(partial.publish());
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointExport"},
                    {"job", manifest.job.value},
                    {"step", manifest.step},
                    {"format", flags.format},
                    {"path", folder.string()},
                    {"tensors", report.tensor_count},
                    {"files", report.file_count},
                    {"bytes", report.byte_count}});
  cli.out.text(folder.string() + "\n");
  cli.out.note(fmt::format("{} of step {}, {} in {}, read back and equal to the checkpoint's",
                           counted(static_cast<int64_t>(report.tensor_count), "tensor"),
                           manifest.step, format_bytes(static_cast<double>(report.byte_count)),
                           counted(static_cast<int64_t>(report.file_count), "file")));
  return ExitCode::kOk;
}

struct ImportFlags {
  std::string folder;
  std::vector<std::string> outputs;
  std::optional<uint64_t> job;
};

Result<ExitCode> run_import(Cli& cli, const ImportFlags& flags) {
  PENSTOCK_TRY_ASSIGN(
      const Path directory,
      output_path(cli, flags.outputs, "penstock checkpoint import FOLDER -o DIRECTORY"));
  std::optional<JobId> job;
  if (flags.job) job = JobId{*flags.job};
  PENSTOCK_TRY_ASSIGN(const CheckpointInfo info, import_state(flags.folder, directory, job));
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointImport"},
                    {"job", info.job.value},
                    {"step", info.step},
                    {"directory", directory.string()},
                    {"manifest", info.manifest_file},
                    {"bytes", info.payload_bytes}});
  cli.out.text(directory.string() + "\n");
  cli.out.note(fmt::format("a checkpoint of step {} of job {}, {}", info.step, info.job,
                           format_bytes(static_cast<double>(info.payload_bytes))));
  return ExitCode::kOk;
}

}  // namespace

void add_checkpoint_files_verbs(CLI::App& checkpoint, Cli& cli) {
  auto flags = std::make_shared<ExportFlags>();
  CLI::App* export_verb = add_verb(
      checkpoint, "export", "Write everything a checkpoint holds as files of other programs",
      "penstock checkpoint export quickstart --step 120 -o state\n"
      "penstock checkpoint export checkpoints/7 --format dcp -o state    # for PyTorch");
  add_place_options(*export_verb, flags->what, flags->step);
  export_verb
      ->add_option("--format", flags->format, "safetensors, or dcp: what PyTorch's dcp.load reads")
      ->check(one_of({"safetensors", "dcp"}))
      ->capture_default_str();
  export_verb->add_option("--file-size", flags->file_bytes, "Largest file, such as 500MB or 5GB")
      ->transform(CLI::AsSizeValue(true))
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 50))
      ->capture_default_str();
  add_output_path_option(*export_verb, flags->outputs, "The folder to write, which must not exist");
  export_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return run_export(cli, *flags); }; });

  auto imported = std::make_shared<ImportFlags>();
  CLI::App* import_verb =
      add_verb(checkpoint, "import", "Make a checkpoint of exported safetensors again",
               "penstock checkpoint import state -o checkpoints/7");
  import_verb->add_option("folder", imported->folder, "What checkpoint export wrote")->required();
  import_verb->add_option("--job", imported->job, "Of this job (default: the one exported)")
      ->check(CLI::Range(uint64_t{1}, UINT64_MAX));
  add_output_path_option(*import_verb, imported->outputs, "The checkpoint directory to make");
  import_verb->callback(
      [&cli, imported] { cli.action = [&cli, imported] { return run_import(cli, *imported); }; });
}

}  // namespace penstock
