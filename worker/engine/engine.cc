// Making an engine: sizes, memory, and who talks to whom. The steps are in engine_step.cc and
// engine_reduce.cc.
#include "worker/engine/engine.h"

#include <algorithm>
#include <cmath>

#include "checkpoint/hf_folder.h"
#include "comm/base/check.h"
#include "comm/base/version.h"
#include "worker/engine/clock_alignment.h"
#include "worker/engine/slot_needs.h"

namespace penstock {
namespace {

// Whether the instruction names only what this rank has: a program comes over the wire.
bool fits(const RankLayout& layout, const Instruction& i, int64_t microbatch_count) {
  const auto in_range = [&](uint8_t direction, int32_t microbatch) {
    return direction < layout.stages.size() && microbatch >= 0 && microbatch < microbatch_count;
  };
  if (i.direction >= layout.stages.size()) return false;
  const bool known = in_range(i.direction, i.microbatch);
  const auto is_remote = [&](int32_t Neighbours::*end) {
    const int32_t neighbour = layout.stages[i.direction].neighbours.*end;
    return neighbour >= 0 && neighbour != layout.position.pipeline_index && neighbour == i.peer;
  };
  switch (i.op) {
    case Op::kReceiveForward:
    case Op::kSendBackward:
      return known && is_remote(&Neighbours::previous);
    case Op::kSendForward:
    case Op::kReceiveBackward:
      return known && is_remote(&Neighbours::next);
    case Op::kForward:
    case Op::kBackward:
    case Op::kBackwardInput:
      return known;
    case Op::kOverlapped:
      return known && i.direction != i.backward_direction &&
             in_range(i.backward_direction, i.backward_microbatch);
    case Op::kBackwardWeight:
    case Op::kReduceGradients:
    case Op::kOptimizerStep:
      return true;
  }
  return false;
}

// Every step that the spec's batch-size ramp asks for is there, and no other.
Status check_sizes(const ParallelismSpec& parallelism, const Program& program) {
  const auto has = [&](int64_t microbatches) {
    return microbatches == parallelism.microbatches ||
           std::any_of(program.resized.begin(), program.resized.end(),
                       [&](const auto& resized) { return resized.microbatches == microbatches; });
  };
  const std::vector<StepLevel<int64_t>>& levels = parallelism.microbatch_levels;
  for (const StepLevel<int64_t>& level : levels) {
    if (has(level.value)) continue;
    return invalid_argument(fmt::format(
        "the program has no step of {} micro-batches, which the spec asks for from step {} on",
        level.value, level.from_step));
  }
  for (const ResizedTraining& resized : program.resized) {
    if (std::any_of(levels.begin(), levels.end(),
                    [&](const auto& level) { return level.value == resized.microbatches; })) {
      continue;
    }
    return invalid_argument(
        fmt::format("the program has a step of {} micro-batches, which the spec never asks for",
                    resized.microbatches));
  }
  return {};
}

Status check_program(const JobSpec& spec, const RankLayout& layout, const Program& program) {
  if (program.pipeline_index != layout.position.pipeline_index) {
    return invalid_argument(
        fmt::format("rank {} is at pipeline index {} but got the program of index {}", layout.rank,
                    layout.position.pipeline_index, program.pipeline_index));
  }
  PENSTOCK_TRY(check_sizes(spec.parallelism, program));
  std::vector<std::pair<const std::vector<Instruction>*, int64_t>> lists;  // with their sizes
  lists.push_back({&program.training, spec.parallelism.microbatches});
  lists.push_back({&program.evaluation, spec.parallelism.microbatches});
  for (const ResizedTraining& resized : program.resized) {
    lists.push_back({&resized.training, resized.microbatches});
  }
  for (const auto& [list, microbatches] : lists) {
    const int64_t count =
        microbatches_per_direction(spec.parallelism.with_microbatches(microbatches));
    for (const Instruction& i : *list) {
      if (!fits(layout, i, count)) {
        return invalid_argument(
            fmt::format("instruction {} does not fit the layout", to_string(i)));
      }
    }
  }
  return {};
}

// Whether another stage of the rank has the embedding that the last one needs for predicting ahead.
bool embedding_elsewhere(const JobSpec& spec, const RankLayout& layout, int64_t stage) {
  const int64_t last = stage_count(spec.parallelism) - 1;
  return spec.model.num_nextn_predict_layers > 0 && last > 0 && stage == last &&
         layout.stages[layout.by_stage.front()].stage == 0;
}

std::unique_ptr<Stage> model_stage(const StageOptions& options, Kernels& kernels,
                                   ExpertExchange* exchange) {
  return std::make_unique<Stage>(options, kernels, exchange);
}

// What gradients are multiplied by while they pass through FP8 layers: a power of two, so that
// taking it out again changes no bit. It undoes the division by the tokens of a step, which would
// push them below the smallest scale that a tile can have (1e-4 / 448).
double magnification(Precision precision, int64_t step_tokens) {
  if (precision == Precision::kFp32) return 1.0;
  return std::exp2(std::ceil(std::log2(static_cast<double>(step_tokens))));
}

int64_t layers_max(const JobSpec& spec) {
  return stage_layers(spec.model.num_hidden_layers, stage_count(spec.parallelism), 0).size();
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::create(const JobSpec& spec, Rank rank, Program program,
                                               Kernels& kernels, Transport* transport,
                                               const Sampler& training, const Sampler* validation,
                                               const StageFactory& make_stage, ExpertSeats seats,
                                               FlightRecorder* flight, const StateHome& home) {
  if (rank.value < 0 || rank.value >= spec.parallelism.world_size()) {
    return invalid_argument(fmt::format("rank {} of {}", rank, spec.parallelism.world_size()));
  }
  PENSTOCK_TRY(check_program(spec, make_rank_layout(spec, rank), program));
  PENSTOCK_TRY(check_expert_seats(seats, spec.model));
  Parts parts{spec,     rank,       std::move(program), kernels, transport,
              training, validation, std::move(seats),   flight};
  std::unique_ptr<Engine> engine(new Engine(std::move(parts)));
  PENSTOCK_TRY(engine->make_stages(make_stage ? make_stage : model_stage));
  PENSTOCK_TRY(engine->make_state(home));
  return engine;
}

Engine::Engine(Parts parts)
    : spec_(parts.spec),
      program_(std::move(parts.program)),
      plans_(plans_of(spec_, program_)),
      layout_(make_rank_layout(spec_, parts.rank)),
      seats_(std::move(parts.seats)),
      kernels_(parts.kernels),
      transport_(parts.transport),
      training_data_(parts.training),
      validation_data_(parts.validation),
      microbatch_tokens_(spec_.parallelism.micro_batch_size * spec_.data.seq_length),
      recorder_(Recorder::kStepsKept * records_per_step(program_, layers_max(spec_)), parts.flight),
      guard_(spec_.guards),
      sequence_(static_cast<size_t>(spec_.data.seq_length) + 1) {
  PENSTOCK_CHECK(transport_ != nullptr || spec_.parallelism.world_size() == 1);
  if (transport_ != nullptr) {
    if (spec_.guards.duplicate_every > 0) {
      audit_ = std::make_unique<AuditedTransport>(*transport_);
    }
    Transport& exchanged = audit_ ? *audit_ : *transport_;
    expert_transport_ = std::make_unique<MeasuredTransport>(exchanged, recorder_.flight());
    pipeline_transport_ = std::make_unique<MeasuredTransport>(exchanged, recorder_.flight());
    reduce_transport_ = std::make_unique<MeasuredTransport>(*transport_, recorder_.flight());
  }
  reducer_ = std::make_unique<Reducer>(reduce_transport_.get());
  for (const StepPlan& plan : plans_) {
    weight_queue_.reserve(static_cast<size_t>(plan.parallelism.microbatches));
  }
  sums_.resize(kStageImbalance + static_cast<size_t>(stage_count(spec_.parallelism)));
}

Engine::~Engine() = default;

std::vector<Engine::StepPlan> Engine::plans_of(const JobSpec& spec, const Program& program) {
  std::vector<StepPlan> plans;
  const auto add = [&](int64_t microbatches, const std::vector<Instruction>& training) {
    const int64_t tokens = spec.tokens_per_microbatch() * microbatches;
    plans.push_back({spec.parallelism.with_microbatches(microbatches), tokens,
                     magnification(spec.training.precision, tokens), &training});
  };
  add(spec.parallelism.microbatches, program.training);
  for (const ResizedTraining& resized : program.resized) {
    add(resized.microbatches, resized.training);
  }
  return plans;
}

Status Engine::make_stages(const StageFactory& make_stage) {
  const std::array<SlotNeeds, 2> needs = slot_needs(program_);
  for (const LocalStage& local : layout_.stages) {
    const SlotNeeds& need = needs[local.direction];
    StageOptions options{.model = spec_.model,
                         .stage_index = local.stage,
                         .stage_count = stage_count(spec_.parallelism),
                         .expert_count = spec_.parallelism.expert,
                         .expert_index = layout_.position.expert_index,
                         .seats = seats_,
                         .sequences_max = spec_.parallelism.micro_batch_size,
                         .sequence_length_max = spec_.data.seq_length,
                         .slot_count = need.activations,
                         .gradient_slot_count = need.gradients,
                         .embedding_elsewhere = embedding_elsewhere(spec_, layout_, local.stage),
                         .tag_base = local.direction * kExchangeTagsPerStage,
                         .precision = spec_.training.precision,
                         .recompute = spec_.training.recompute};
    const bool joins = local.neighbours.previous == layout_.position.pipeline_index;
    if (joins) {
      options.slot_count = stages_.back()->options().slot_count;
    } else if (local.neighbours.previous >= 0) {
      // One more, so that the next input can arrive while all slots are in use.
      options.slot_count += 1;
    }
    std::unique_ptr<ExpertExchange> exchange;
    if (has_moe_layer(options)) {
      PENSTOCK_CHECK(expert_tag_count(options) <= kExchangeTagsPerStage);
      PENSTOCK_TRY_ASSIGN(
          exchange, ExpertExchange::create(expert_transport_.get(),
                                           expert_exchange_config(options, layout_.expert_group)));
    }
    exchanges_.push_back(std::move(exchange));
    stages_.push_back(make_stage(options, kernels_, exchanges_.back().get()));
    make_lane(local, options.slot_count);
    if (joins) {
      stages_.back()->join(*stages_.front());
      lanes_.back()->follow(*lanes_.front());
    }
  }
  // With multi-token prediction the last stage uses the first one's embedding.
  const auto here = [&](bool (Stage::*is_end)() const) {
    const auto found = std::find_if(stages_.begin(), stages_.end(),
                                    [&](const auto& stage) { return ((*stage).*is_end)(); });
    return found == stages_.end() ? nullptr : found->get();
  };
  Stage* const last = here(&Stage::is_last);
  if (last != nullptr && last->options().embedding_elsewhere) {
    last->use_embedding_of(*here(&Stage::is_first));
  }
  return {};
}

// Absent where the direction ends, and where this rank is its own neighbour.
std::optional<Rank> Engine::neighbour(int32_t pipeline_index) const {
  if (pipeline_index < 0 || pipeline_index == layout_.position.pipeline_index) return std::nullopt;
  return layout_.pipeline_peer(spec_.parallelism, pipeline_index);
}

void Engine::make_lane(const LocalStage& local, int32_t slot_count) {
  int64_t microbatches_max = 0;
  for (const StepPlan& plan : plans_) {
    microbatches_max = std::max(microbatches_max, microbatches_per_direction(plan.parallelism));
  }
  const LaneOptions options{.direction = local.direction,
                            .previous = neighbour(local.neighbours.previous),
                            .next = neighbour(local.neighbours.next),
                            .slot_count = slot_count,
                            .microbatch_count = microbatches_max,
                            .boundary_floats = microbatch_tokens_ * spec_.model.hidden_size};
  Stage& stage = *stages_.back();
  lanes_.push_back(std::make_unique<Lane>(options, stage, pipeline_transport_.get(), recorder_));
  const auto tokens = static_cast<size_t>(slot_count * microbatch_tokens_);
  Feed feed;
  if (stage.is_first()) feed.tokens.resize(tokens);
  if (stage.is_last()) feed.targets.resize(tokens);
  feeds_.push_back(std::move(feed));
  load_sums_.emplace_back(stage.expert_loads().size());
  loads_.emplace_back(stage.expert_loads().size());
  recent_loads_.emplace_back(stage.expert_loads().size());
}

Status Engine::make_state(const StateHome& home) {
  std::vector<OptimizerShard> shards;
  for (const size_t d : layout_.by_stage) {
    const LocalStage& local = layout_.stages[d];
    ParameterSet& parameters = stages_[d]->parameters();
    for (const ParameterKind kind : kParameterKinds) {
      if (parameters.values(kind).empty()) continue;
      const std::vector<Rank>& replicas = local.replicas_of(kind);
      const ShardRange owned =
          shard_range(static_cast<int64_t>(parameters.values(kind).size()),
                      static_cast<int64_t>(replicas.size()), index_in(replicas, layout_.rank));
      shards.push_back({&parameters, kind, {owned.begin, owned.end}});
    }
  }
  state_places_ = std::make_unique<StateLayout>(spec_.optimizer, shards);
  optimizer_ = std::make_unique<AdamW>(spec_.optimizer, *state_places_, kernels_);
  if (spec_.optimizer.ema_decay > 0.0) {
    average_ = std::make_unique<WeightAverage>(spec_.optimizer.ema_decay, *state_places_,
                                               [this, before = home.before_publish] {
                                                 if (before) before(state_->step());
                                                 state_->publish();
                                               });
  }
  const std::span<double> guard = spec_.guards.remembers() ? guard_.state() : std::span<double>();
  PENSTOCK_TRY_ASSIGN(
      state_, TrainingState::create(layout_, stages_, *state_places_, *optimizer_, average_.get(),
                                    guard, state_identity(home.job), home.file));
  return {};
}

HeldStateIdentity Engine::state_identity(JobId job) const {
  std::string contents = fmt::format("{}\n{}\n", kVersion, to_json(spec_));
  for (const auto& [layer, seats] : seats_.layers) {
    contents += fmt::format("{}: {}\n", layer, fmt::join(seats, " "));
  }
  return {job, layout_.rank, digest_of(as_bytes(contents))};
}

Status Engine::initialize() {
  for (const std::unique_ptr<Stage>& stage : stages_) stage->initialize(spec_.training.seed);
  if (!spec_.checkpoint.init_from.empty()) {
    PENSTOCK_TRY_ASSIGN(const HfFolder folder, HfFolder::open(spec_.checkpoint.init_from));
    PENSTOCK_TRY(state_->load_weights(folder));
  }
  state_->start_from_model();
  if (average_) average_->reset(state_->current());
  state_->publish();
  return {};
}

ExpertLoads Engine::expert_loads() const {
  ExpertLoads loads;
  if (recent_weight_ == 0.0) return loads;
  for (const LocalStage& local : layout_.stages) {
    if (local.dense_replicas.front() != layout_.rank) continue;
    const std::vector<double>& recent = recent_loads_[local.direction];
    size_t begin = 0;
    for (const Router& router : stages_[local.direction]->routers()) {
      std::vector<double>& layer = loads[router.layer];
      for (size_t e = 0; e < router.load.size(); ++e) {
        layer.push_back(recent[begin + e] / recent_weight_);
      }
      begin += router.load.size();
    }
  }
  return loads;
}

void Engine::settle() {
  if (average_) average_->wait();
}

uint64_t Engine::memory_bytes() const {
  uint64_t bytes = 0;
  for (const std::unique_ptr<Stage>& stage : stages_) bytes += stage->memory_bytes();
  return bytes;
}

Status Engine::align_clock() {
  if (transport_ == nullptr) return {};
  PENSTOCK_TRY_ASSIGN(const ClockOffset clock,
                      penstock::align_clock(*transport_, tag_of(Channel::kClock)));
  recorder_.set_clock(clock.offset_ns, clock.uncertainty_ns);
  return {};
}

Status Engine::barrier() {
  return reducer_->barrier(layout_.world, tag_of(Channel::kFinish));
}

}  // namespace penstock
