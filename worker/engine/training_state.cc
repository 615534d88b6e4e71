#include "worker/engine/training_state.h"

#include <algorithm>

#include "checkpoint/manifest.h"
#include "checkpoint/names.h"
#include "comm/base/check.h"

namespace penstock {
namespace {

MutableBytes bytes_of(std::span<float> values) {
  return std::as_writable_bytes(values);
}

TensorSlice guard_slice(std::span<double> guard) {
  return whole_tensor(state_name("guards"), DType::kF64, {std::ssize(guard)});
}

}  // namespace

Result<std::unique_ptr<TrainingState>> TrainingState::create(
    const RankLayout& layout, std::span<const std::unique_ptr<Stage>> stages, StateLayout& places,
    const AdamW& optimizer, const WeightAverage* average, std::span<double> guard,
    const HeldStateIdentity& identity, const Path& file) {
  std::vector<Mirrored> mirrored = place_mirrored(layout, stages, guard, places);
  const uint64_t step_offset = places.add(sizeof(int64_t));
  PENSTOCK_TRY_ASSIGN(StateMemory memory, StateMemory::make(identity, places.byte_count(), file));
  auto state = std::make_unique<TrainingState>(layout, optimizer, std::move(memory),
                                               std::move(mirrored), step_offset);
  state->list_sources(average);
  state->list_targets(average, stages, guard);
  return state;
}

TrainingState::TrainingState(const RankLayout& layout, const AdamW& optimizer, StateMemory memory,
                             std::vector<Mirrored> mirrored, uint64_t step_offset)
    : layout_(layout),
      optimizer_(optimizer),
      memory_(std::move(memory)),
      mirrored_(std::move(mirrored)),
      step_offset_(step_offset) {}

std::vector<TrainingState::Mirrored> TrainingState::place_mirrored(
    const RankLayout& layout, std::span<const std::unique_ptr<Stage>> stages,
    std::span<double> guard, StateLayout& places) {
  std::vector<Mirrored> mirrored;
  const auto add = [&](MutableBytes live, TensorSlice slice, bool saved) {
    mirrored.push_back({live, places.add(live.size()), std::move(slice), saved});
  };
  for (size_t s = 0; s < stages.size(); ++s) {
    const std::vector<Rank>& replicas = layout.stages[s].dense_replicas;
    const std::span<Router> routers = stages[s]->routers();
    for (size_t i = 0; i < routers.size(); ++i) {
      add(bytes_of(routers[i].bias),
          whole_tensor(weight_name(routers[i].bias_name), DType::kF32,
                       {std::ssize(routers[i].bias)}),
          replicas[i % replicas.size()] == layout.rank);
    }
  }
  if (!guard.empty()) {
    add(std::as_writable_bytes(guard), guard_slice(guard), layout.rank.value == 0);
  }
  return mirrored;
}

void TrainingState::list_sources(const WeightAverage* average) {
  for (size_t g = 0; g < kStateGenerations; ++g) {
    std::byte* const generation = memory_.generation(g);
    std::vector<SliceSource>& sources = to_save_[g];
    const auto add = [&](const std::vector<StateSlice>& slices) {
      for (const StateSlice& state : slices) sources.push_back({state.slice, state.bytes});
    };
    add(optimizer_.state(generation));
    if (average != nullptr) add(average->state(generation));
    for (const Mirrored& mirrored : mirrored_) {
      const Bytes bytes(generation + mirrored.offset, mirrored.live.size());
      if (mirrored.saved) sources.push_back({mirrored.slice, bytes});
    }
    const TensorSlice step = whole_tensor(state_name("step"), DType::kI64, {});
    if (layout_.rank.value == 0) sources.push_back({step, std::as_bytes(step_in(generation))});
  }
}

void TrainingState::list_targets(const WeightAverage* average,
                                 std::span<const std::unique_ptr<Stage>> stages,
                                 std::span<double> guard) {
  std::byte* const generation = memory_.generation(0);
  const auto add = [&](const std::vector<StateSlice>& slices) {
    for (const StateSlice& state : slices) to_load_.push_back({state.slice, state.bytes, {}});
  };
  add(optimizer_.state(generation));
  if (average != nullptr) add(average->state(generation));
  for (size_t s = 0; s < stages.size(); ++s) {
    const LocalStage& local = layout_.stages[s];
    for (const Parameter& parameter : stages[s]->parameters().all()) {
      const std::span<float> values(parameter.value, static_cast<size_t>(parameter.size));
      weights_.push_back({parameter.name, parameter.shape, values,
                          local.replicas_of(parameter.kind).front() == layout_.rank});
    }
    for (const Router& router : stages[s]->routers()) {
      to_load_.push_back({whole_tensor(weight_name(router.bias_name), DType::kF32,
                                       {static_cast<int64_t>(router.bias.size())}),
                          bytes_of(router.bias),
                          {},
                          local.dense_replicas.size() > 1});
      weights_.push_back({router.bias_name,
                          {std::ssize(router.bias)},
                          router.bias,
                          local.dense_replicas.front() == layout_.rank});
    }
  }
  to_load_.push_back({whole_tensor(state_name("step"), DType::kI64, {}),
                      std::as_writable_bytes(step_in(generation)),
                      {},
                      true});
  if (!guard.empty()) {
    to_load_where_saved_.push_back({guard_slice(guard), std::as_writable_bytes(guard), {}, true});
  }
}

std::span<int64_t> TrainingState::step_in(std::byte* generation) const {
  return {reinterpret_cast<int64_t*>(generation + step_offset_), 1};
}

void TrainingState::copy_mirrored_to(std::byte* generation) const {
  for (const Mirrored& mirrored : mirrored_) {
    std::copy(mirrored.live.begin(), mirrored.live.end(), generation + mirrored.offset);
  }
}

void TrainingState::begin_step() {
  PENSTOCK_CHECK(memory_.step_of(current_) == step_, step_);  // or no step at all may be whole
  const size_t held = held_.load(std::memory_order_acquire);
  next_ = kNone;
  for (size_t g = 0; g < kStateGenerations; ++g) {
    if (g == current_ || g == held) continue;
    // Of two the older, so that the last two steps stay.
    if (next_ == kNone || memory_.step_of(g) < memory_.step_of(next_)) next_ = g;
  }
  memory_.begin_writing(next_);
}

void TrainingState::finish_step(int64_t step) {
  PENSTOCK_CHECK(next_ != kNone && step == step_ + 1, step, step_);
  copy_mirrored_to(next());
  step_in(next())[0] = step;
  step_ = step;
  current_ = std::exchange(next_, kNone);
}

void TrainingState::repeat_step(int64_t step) {
  begin_step();
  std::copy_n(current(), generation_bytes(), next());
  finish_step(step);
  publish();
}

void TrainingState::publish() {
  memory_.publish(current_, step_);
}

// What an earlier rank left is of no use to one that starts elsewhere.
void TrainingState::forget_generations() {
  for (size_t g = 0; g < kStateGenerations; ++g) memory_.begin_writing(g);
  current_ = 0;
}

void TrainingState::start_from_model() {
  forget_generations();
  std::fill_n(current(), generation_bytes(), std::byte{0});
  optimizer_.take_weights(current());
  copy_mirrored_to(current());
  step_ = 0;
}

std::span<const SliceSource> TrainingState::hold() {
  PENSTOCK_CHECK(held_.load(std::memory_order_acquire) == kNone);
  PENSTOCK_CHECK(memory_.step_of(current_) == step_, step_);
  held_.store(current_, std::memory_order_release);
  return to_save();
}

void TrainingState::release() {
  held_.store(kNone, std::memory_order_release);
}

uint64_t TrainingState::save_bytes() const {
  uint64_t bytes = 0;
  for (const SliceSource& source : to_save_[0]) bytes += source.bytes.size();
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
  forget_generations();
  std::vector<LoadTarget> targets = to_load_;
  for (const LoadTarget& target : to_load_where_saved_) {
    if (manifest.find(target.slice.name) != nullptr) targets.push_back(target);
  }
  PENSTOCK_TRY_ASSIGN(const LoadReport report,
                      load_slices(manifest_path.parent_path(), manifest, targets));
  if (step_in(current())[0] != step) {
    return data_loss(fmt::format("{} says step {} but holds the state of step {}",
                                 manifest_path.string(), step, step_in(current())[0]));
  }
  put_back_weights();
  copy_mirrored_to(current());
  step_ = step;
  publish();
  return report;
}

Status TrainingState::restore_held(int64_t step) {
  const std::optional<size_t> found = memory_.find(step);
  if (!found || step_in(memory_.generation(*found))[0] != step) {
    return not_found(fmt::format("no state of step {} is held in memory", step));
  }
  for (size_t g = 0; g < kStateGenerations; ++g) {
    if (memory_.step_of(g) > step) memory_.begin_writing(g);
  }
  current_ = *found;
  step_ = step;
  put_back_weights();
  for (const Mirrored& mirrored : mirrored_) {
    std::copy_n(current() + mirrored.offset, mirrored.live.size(), mirrored.live.begin());
  }
  return {};
}

bool TrainingState::matches_model() const {
  const auto is_as_stored = [&](const Mirrored& mirrored) {
    return std::ranges::equal(mirrored.live,
                              Bytes(current() + mirrored.offset, mirrored.live.size()));
  };
  return optimizer_.has_weights(current()) && std::ranges::all_of(mirrored_, is_as_stored);
}

Status TrainingState::load_weights(const HfFolder& folder) {
  for (const Weight& weight : weights_) {
    PENSTOCK_TRY(folder.read(weight_name(weight.name), weight.shape, weight.values));
  }
  return {};
}

std::vector<TrainingState::TensorDigest> TrainingState::weight_digests() const {
  std::vector<TensorDigest> digests;
  for (const Weight& weight : weights_) {
    if (!weight.first_held) continue;
    digests.push_back({weight.name, digest_of(std::as_bytes(weight.values))});
  }
  return digests;
}

}  // namespace penstock
