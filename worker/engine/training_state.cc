#include "worker/engine/training_state.h"

#include "checkpoint/manifest.h"
#include "checkpoint/names.h"
#include "comm/base/check.h"

namespace penstock {
namespace {

MutableBytes bytes_of(std::span<float> values) {
  return std::as_writable_bytes(values);
}

}  // namespace

TrainingState::TrainingState(const RankLayout& layout,
                             std::span<const std::unique_ptr<Stage>> stages, AdamW& optimizer,
                             WeightAverage* average)
    : layout_(layout) {
  add_owned(optimizer.state());
  if (average != nullptr) add_owned(average->state());
  for (size_t i = 0; i < stages.size(); ++i) add_stage(layout.stages[i], *stages[i]);
  const TensorSlice step = whole_tensor(state_name("step"), DType::kI64, {});
  const std::span<int64_t> value(&step_, 1);
  if (layout.rank.value == 0) to_save_.push_back({step, std::as_bytes(value)});
  to_load_.push_back({step, std::as_writable_bytes(value), {}, true});
}

void TrainingState::add_owned(const std::vector<StateSlice>& slices) {
  for (const StateSlice& state : slices) {
    to_save_.push_back({state.slice, state.bytes});
    // Weights are loaded whole, below: every rank needs those its replicas own, too.
    if (parse_logical_name(state.slice.name).kind == TensorKind::kWeight) continue;
    to_load_.push_back({state.slice, state.bytes, {}});
  }
}

void TrainingState::add_stage(const LocalStage& local, Stage& stage) {
  for (const Parameter& parameter : stage.parameters().all()) {
    const std::span<float> values(parameter.value, static_cast<size_t>(parameter.size));
    const std::vector<Rank>& replicas = local.replicas_of(parameter.kind);
    to_load_.push_back({whole_tensor(weight_name(parameter.name), DType::kF32, parameter.shape),
                        bytes_of(values),
                        {},
                        replicas.size() > 1});
    if (replicas.front() == layout_.rank) first_held_.push_back({parameter.name, values});
  }
  const std::span<Router> routers = stage.routers();
  for (size_t i = 0; i < routers.size(); ++i) {
    const Router& router = routers[i];
    const TensorSlice slice = whole_tensor(weight_name(router.bias_name), DType::kF32,
                                           {static_cast<int64_t>(router.bias.size())});
    to_load_.push_back({slice, bytes_of(router.bias), {}, local.dense_replicas.size() > 1});
    const Rank elected = local.dense_replicas[i % local.dense_replicas.size()];
    if (elected == layout_.rank) to_save_.push_back({slice, bytes_of(router.bias)});
    if (local.dense_replicas.front() == layout_.rank) {
      first_held_.push_back({router.bias_name, router.bias});
    }
  }
}

uint64_t TrainingState::save_bytes() const {
  uint64_t bytes = 0;
  for (const SliceSource& source : to_save_) bytes += source.bytes.size();
  return bytes;
}

Result<LoadReport> TrainingState::restore(const Path& manifest_path, JobId job, int64_t step) {
  PENSTOCK_TRY_ASSIGN(const StoredManifest stored, read_manifest(manifest_path));
  const Manifest& manifest = stored.manifest;
  if (manifest.job != job || manifest.step != step) {
    return failed_precondition(fmt::format("{} is of job {} at step {}, not of job {} at step {}",
                                           manifest_path.string(), manifest.job, manifest.step, job,
                                           step));
  }
  PENSTOCK_TRY_ASSIGN(const LoadReport report,
                      load_slices(manifest_path.parent_path(), manifest, to_load_));
  if (step_ != step) {
    return data_loss(fmt::format("{} says step {} but holds the state of step {}",
                                 manifest_path.string(), step, step_));
  }
  return report;
}

Status TrainingState::load_weights(const HfFolder& folder) {
  for (const LoadTarget& target : to_load_) {
    if (parse_logical_name(target.slice.name).kind != TensorKind::kWeight) continue;
    const std::span<float> values(reinterpret_cast<float*>(target.bytes.data()),
                                  target.bytes.size() / sizeof(float));
    PENSTOCK_TRY(folder.read(target.slice.name, target.slice.shape, values));
  }
  return {};
}

std::vector<TrainingState::TensorDigest> TrainingState::weight_digests() const {
  std::vector<TensorDigest> digests;
  for (const Held& held : first_held_) {
    digests.push_back({held.name, digest_of(std::as_bytes(held.values))});
  }
  return digests;
}

}  // namespace penstock
