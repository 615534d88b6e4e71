// A job as a user writes it: YAML in, checked values out, and the canonical JSON that is stored
// with the job, sent to workers and put into every checkpoint. JSON is a subset of YAML, so one
// parser reads both.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/hash.h"
#include "comm/base/status.h"
#include "comm/run/guards.h"
#include "comm/run/model_config.h"
#include "comm/run/step_levels.h"

namespace penstock {

enum class Schedule { kDualPipe, kDualPipeV, kOneForwardOneBackward, kZeroBubble };
inline constexpr Schedule kSchedules[] = {Schedule::kDualPipe, Schedule::kDualPipeV,
                                          Schedule::kOneForwardOneBackward, Schedule::kZeroBubble};
std::string_view to_string(Schedule schedule);  // "dualpipe", "dualpipev", "1f1b", "zb1p"

// What linear layers are computed in (DeepSeek-V3 report §3.3); everything else is fp32 either way.
enum class Precision : uint8_t {
  kFp32,
  kFp8,
  kFp8Hopper,  // kFp8 with a model of the tensor core's short accumulator, on CPUs
};
inline constexpr Precision kPrecisions[] = {Precision::kFp32, Precision::kFp8,
                                            Precision::kFp8Hopper};
std::string_view to_string(Precision precision);  // "fp32", "fp8", "fp8_hopper"

struct DataSource {
  std::string path;     // Megatron prefix: <path>.bin and <path>.idx
  double weight = 1.0;  // share of sampled sequences, relative to the other sources; > 0
  bool operator==(const DataSource&) const = default;
};

struct DataSpec {
  std::vector<DataSource> train;       // at least one
  std::vector<DataSource> validation;  // may be empty: no evaluation
  std::string tokenizer;               // "bytes", or the path of a SentencePiece model
  int64_t seq_length = 0;              // tokens per sequence
  bool operator==(const DataSpec&) const = default;
};

// When a job moves experts between its ranks by itself (expert_placement.h): after every so many
// checkpoints, if the most loaded rank of some layer has `threshold` times the mean load or more.
struct RebalanceSpec {
  double threshold = 0.0;  // 0: only when asked to; else at least 1
  int64_t every_checkpoints = 1;
  bool operator==(const RebalanceSpec&) const = default;
};

// The data-parallel widths that a job may take by itself: fewer when devices are missing, more when
// they are free. 0, 0: it keeps the one it has.
struct ElasticSpec {
  int64_t min_data = 0;
  int64_t max_data = 0;
  bool operator==(const ElasticSpec&) const = default;
};

// World size = pipeline · expert · data. Each of the expert · data replicas of the pipeline trains
// its own `microbatches` micro-batches of `micro_batch_size` sequences per step (both DualPipe
// directions together). How many stages `pipeline` ranks hold: stage_count() in layout.h.
struct ParallelismSpec {
  int64_t pipeline = 1;
  int64_t expert = 1;
  int64_t data = 1;
  Schedule schedule = Schedule::kDualPipe;
  int64_t microbatches = 1;
  int64_t micro_batch_size = 1;
  // Micro-batches from given steps on: a batch-size ramp.
  std::vector<StepLevel<int64_t>> microbatch_levels = {};
  RebalanceSpec rebalance = {};
  ElasticSpec elastic = {};
  int64_t world_size() const { return pipeline * expert * data; }
  // The same with other micro-batches and no ramp: the layout of the steps that have so many.
  ParallelismSpec with_microbatches(int64_t count) const {
    return {pipeline, expert, data, schedule, count, micro_batch_size, {}, rebalance, elastic};
  }
  bool operator==(const ParallelismSpec&) const = default;
};

enum class MomentType { kFp32, kBf16 };  // "fp32", "bf16": rounded to nearest even

// Matrices that weight decay leaves alone. Norm weights and biases it always does.
struct NoDecay {
  bool embedding = false;
  bool head = false;
  bool router = false;
  bool operator==(const NoDecay&) const = default;
};

struct OptimizerSpec {  // AdamW (Loshchilov & Hutter, 2019)
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double clip_grad_norm = 1.0;       // global L2 norm; 0 turns clipping off
  int64_t warmup_steps = 0;          // linear 0 -> lr
  double min_lr_ratio = 0.1;         // cosine from lr to min_lr_ratio · lr
  double bias_update_speed = 0.001;  // gamma of the router's balance rule; 0 turns it off
  int64_t hold_steps = 0;            // at lr, between warm-up and cosine
  int64_t decay_steps = 0;  // of the cosine; 0: up to the first of lr_levels, or the last step
  std::vector<StepLevel<double>> lr_levels = {};           // shares of lr, after the cosine
  std::vector<StepLevel<double>> bias_update_levels = {};  // gamma from given steps on
  double mtp_loss_weight = 0.3;                            // lambda of multi-token prediction
  std::vector<StepLevel<double>> mtp_loss_levels = {};     // the same from given steps on
  NoDecay no_decay = {};
  MomentType moments = MomentType::kFp32;
  double ema_decay = 0.0;       // of the average of the weights; 0: none is kept
  bool ema_evaluation = false;  // held-out loss of the average instead of the weights
  bool operator==(const OptimizerSpec&) const = default;
};

// What the backward computes again instead of keeping it from the forward. SwiGLU outputs always
// are.
struct Recompute {
  bool norms = false;   // outputs of the norms inside layers
  bool mla_up = false;  // queries, keys and values: the outputs of q_b_proj and kv_b_proj
  bool operator==(const Recompute&) const = default;
};

struct TrainingSpec {
  int64_t steps = 0;
  uint64_t seed = 0;
  Precision precision = Precision::kFp32;
  int64_t evaluation_interval = 0;  // steps between held-out evaluations; 0: only before and after
  int64_t evaluation_batches = 4;   // step-sized batches per evaluation
  Recompute recompute = {};
  bool operator==(const TrainingSpec&) const = default;
};

struct CheckpointSpec {
  std::string dir;       // empty: the coordinator chooses one under its state directory
  int64_t interval = 0;  // steps; 0: only after the last step
  // "auto": the coordinator chooses the interval while the job runs (coordinator/plan/
  // save_interval.h), from the two numbers below and what it measures. `interval` is 0 then.
  bool automatic = false;
  double max_overhead = 0.01;         // share of training time that saving may cost
  double device_mtbf_hours = 50'000;  // between failures of one device, until the job has had some
  int64_t keep_last = 3;              // committed checkpoints kept
  int64_t keep_every = 0;             // those of steps divisible by this are kept too; 0: none
  // Hugging Face model folder whose weights a run without a checkpoint starts with; empty: random
  // ones, from the seed.
  std::string init_from;
  bool saves_on_the_way() const { return automatic || interval > 0; }
  bool operator==(const CheckpointSpec&) const = default;
};

// Phases that take longer than a step may: loading, the first step, evaluating, saving.
inline constexpr int kSlowPhaseFactor = 10;

struct RecoverySpec {
  int64_t max_restarts = 5;  // over the job's life; the next failure is final
  // Seconds in which no rank begins or ends an operation, at least, before one counts as hung; in
  // slow phases kSlowPhaseFactor times as many. 0: none ever does.
  int64_t hang_timeout = 60;
  // After a failure of processes, go on from the state that the daemons of the hosts that are left
  // hold in memory, when they hold all of it.
  bool from_memory = true;
  // Move off the host of a rank that the others wait for, when another has room.
  bool replace_slow = false;
  // Steps from one whose state is copied into the memory of other workers to the next, at least; 0:
  // none is. "auto": as often as the rate allows; `mirror` is 0 then.
  int64_t mirror = 0;
  bool mirror_automatic = false;
  int64_t mirror_rate = 256;  // MiB/s, at most, that each worker sends for it
  bool mirrors() const { return mirror_automatic || mirror > 0; }
  bool operator==(const RecoverySpec&) const = default;
};

struct JobSpec {
  std::string name;
  ModelConfig model;
  DataSpec data;
  ParallelismSpec parallelism;
  OptimizerSpec optimizer;
  TrainingSpec training;
  CheckpointSpec checkpoint;
  RecoverySpec recovery;
  GuardsSpec guards;
  bool operator==(const JobSpec&) const = default;

  // Of the first step, and of every batch of an evaluation.
  int64_t sequences_per_step() const {
    return parallelism.microbatches * parallelism.micro_batch_size * parallelism.expert *
           parallelism.data;
  }
  int64_t tokens_per_step() const { return sequences_per_step() * data.seq_length; }
  // Of one micro-batch of every replica.
  int64_t tokens_per_microbatch() const { return tokens_per_step() / parallelism.microbatches; }
  int64_t microbatches_at(int64_t step) const {
    return value_at(parallelism.microbatch_levels, parallelism.microbatches, step);
  }
  int64_t tokens_at(int64_t step) const { return tokens_per_microbatch() * microbatches_at(step); }
  // Of steps 1 to `step`.
  int64_t microbatches_through(int64_t step) const {
    return total_before(parallelism.microbatch_levels, parallelism.microbatches, step + 1);
  }
  int64_t tokens_through(int64_t step) const {
    return tokens_per_microbatch() * microbatches_through(step);
  }
};

// Parses and checks a job spec. `origin` names the source in errors ("quickstart.yaml"). The first
// error is kInvalidArgument and reads "origin:line:column: what is wrong; the nearest valid key or
// the rule".
Result<JobSpec> parse_job_spec(std::string_view yaml, std::string_view origin);

// Checks a Hugging Face `deepseek_v3` config.json: what may stand under `model:` in a job spec.
Result<ModelConfig> parse_model_config(std::string_view json, std::string_view origin);
// The model's keys as the canonical JSON of a spec has them.
std::string to_json(const ModelConfig& model);

// The canonical JSON of a spec, every default written out: parse_job_spec(to_json(s)) == s.
std::string to_json(const JobSpec& spec);

// Names the spec in checkpoints and listings: digest of to_json().
Digest spec_digest(const JobSpec& spec);

}  // namespace penstock
