#include "ops/cli/checkpoint_source.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "checkpoint/loader.h"
#include "checkpoint/names.h"
#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "worker/model/generator.h"

namespace penstock {

namespace {

Result<CheckpointSource> open_manifest(const Path& path) {
  PENSTOCK_TRY_ASSIGN(StoredManifest stored, read_manifest(path));
  CheckpointSource source{
      .directory = path.parent_path(), .manifest = std::move(stored.manifest), .spec = {}};
  if (source.directory.empty()) source.directory = ".";
  PENSTOCK_TRY(check_segments(source.directory, source.manifest));
  PENSTOCK_TRY_ASSIGN(source.spec,
                      parse_job_spec(source.manifest.spec_json, "the spec in " + path.string()));
  return source;
}

Result<CheckpointSource> newest_in(Output& out, const Path& directory, JobId job) {
  const NewestWhole newest = newest_whole(directory, job);
  for (const RefusedCheckpoint& refused : newest.refused) {
    out.note(fmt::format("passed over {}: {}", refused.manifest_file, refused.reason.message()));
  }
  if (!newest.checkpoint) {
    return not_found(
        fmt::format("job {} has no whole checkpoint in {} yet; penstock describe {} says when one "
                    "is due",
                    job, directory.string(), job));
  }
  return open_manifest(directory / newest.checkpoint->manifest_file);
}

Result<CheckpointSource> choose(Output& out, const Path& directory, JobId job,
                                std::optional<int64_t> step) {
  if (!step) return newest_in(out, directory, job);
  for (const CheckpointInfo& info : list_checkpoints(directory, job).checkpoints) {
    if (info.step == *step) return open_manifest(directory / info.manifest_file);
  }
  return not_found(
      fmt::format("job {} has no checkpoint of step {} in {}; penstock checkpoint ls {} lists them",
                  job, *step, directory.string(), job));
}

}  // namespace

Result<CheckpointSource> checkpoint_of_job(Cli& cli, const std::string& job,
                                           std::optional<int64_t> step) {
  PENSTOCK_TRY_ASSIGN(const Json facts, cli.client().job(job));
  const JobId id = {static_cast<uint64_t>(field_number(facts, "id"))};
  return choose(cli.out, field_string(facts, "checkpoint_dir"), id, step);
}

Result<CheckpointSource> checkpoint_at(Cli& cli, const Path& path, std::optional<int64_t> step) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) {
    PENSTOCK_TRY_ASSIGN(CheckpointSource source, open_manifest(path));
    if (!step || *step == source.manifest.step) return source;
    return not_found(
        fmt::format("{} is of step {}, not {}", path.string(), source.manifest.step, *step));
  }
  // Whose directory it is, any readable manifest says.
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(path));
  for (const std::string& name : names) {
    if (!parse_manifest_file_name(name).ok()) continue;
    if (const auto stored = read_manifest(path / name); stored.ok()) {
      return choose(cli.out, path, stored->manifest.job, step);
    }
  }
  return not_found(path.string() + " holds no readable manifest of a checkpoint");
}

Status load_weights(const CheckpointSource& source, const Generator& generator, bool average) {
  std::vector<LoadTarget> targets;
  for (const Generator::Weight& weight : generator.weights()) {
    const bool averaged = average && !weight.name.ends_with(".e_score_correction_bias");
    const TensorKind kind = averaged ? TensorKind::kEma : TensorKind::kWeight;
    targets.push_back({whole_tensor(logical_name(weight.name, kind), DType::kF32, weight.shape),
                       std::as_writable_bytes(weight.values),
                       {}});
  }
  return load_slices(source.directory, source.manifest, targets).status();
}

}  // namespace penstock
