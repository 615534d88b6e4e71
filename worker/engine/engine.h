// Executes one rank's program: the compute side of a training step. It knows instructions, not
// schedules.
//
//   create -> initialize() -> (transport connected) -> train_step(k) …, evaluate() …
//   create -> restore() -> (transport connected) -> complete_restore() -> train_step(k) …
//
// One thread calls everything: the rank's compute thread. Transfers move in the background
// (worker/engine/lane.h), token exchanges overlap with compute inside overlapped pairs
// (interleave.h). A failed call leaves the engine unusable: the rank exits and the coordinator
// recovers.
//
// Same spec, program and state: same bits, because every sum is taken in rank order
// (comm/data/reduce.h), micro- batches in program order, and data is a pure function of (seed,
// step, index). Steps allocate nothing.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/hash.h"
#include "comm/base/status.h"
#include "comm/data/expert_exchange.h"
#include "comm/data/reduce.h"
#include "comm/run/expert_seats.h"
#include "comm/run/job_spec.h"
#include "comm/run/program.h"
#include "kernels/kernels.h"
#include "worker/data/sampler.h"
#include "worker/engine/audited_transport.h"
#include "worker/engine/lane.h"
#include "worker/engine/measured_transport.h"
#include "worker/engine/numerical_guard.h"
#include "worker/engine/rank_layout.h"
#include "worker/engine/recorded_pass.h"
#include "worker/engine/recorder.h"
#include "worker/engine/training_state.h"
#include "worker/engine/weight_average.h"
#include "worker/model/stage.h"
#include "worker/optim/adamw.h"

namespace penstock {

// Where the wall time of a step went. What is left to the total is bookkeeping and reading data.
struct StepTimes {
  double total_seconds = 0.0;
  double compute_seconds = 0.0;        // sub-operations of passes, without their waiting
  double expert_wait_seconds = 0.0;    // for dispatch and combine, inside passes
  double pipeline_wait_seconds = 0.0;  // for neighbours
  double reduce_seconds = 0.0;         // gradients, totals and weight gathering
  double optimizer_seconds = 0.0;
};

// What a rank asks for: it travels with the sums of the step, so that all ranks hear of it in the
// same one.
struct StepWishes {
  bool save = false;   // the state after the step
  bool pause = false;  // train no other step
};

// Equal on every rank, but for the times.
struct StepResult {
  int64_t step = 0;
  double loss = 0.0;  // cross-entropy of the next token: mean over the global batch, nats
  // What training adds to it: multi-token prediction's cross-entropy, over the same tokens and
  // before its weight, and the balance loss, mean over sequences, summed over layers.
  double prediction_loss = 0.0;
  double balance_loss = 0.0;
  double grad_norm = 0.0;  // before clipping; every parameter of the model counted once
  double learning_rate = 0.0;
  int64_t tokens = 0;  // trained; none of a step that was left out
  GuardFinding guard = {};
  bool save = false;   // some rank asked for it
  bool pause = false;  // likewise
  double expert_load_max_ratio = 0.0;
  StepTimes times = {};
};

struct EvaluationResult {
  double loss = 0.0;
  int64_t tokens = 0;
};

// Makes one of an engine's stages; borrows as Stage does.
using StageFactory =
    std::function<std::unique_ptr<Stage>(const StageOptions&, Kernels&, ExpertExchange*)>;

// Whose state it is, and where it is kept: in `file` (StateMemory), or, empty, nowhere beyond the
// process.
struct StateHome {
  JobId job;
  Path file = {};
  // Called before the average's thread publishes the state after `step`. May be empty.
  std::function<void(int64_t step)> before_publish = {};
};

class Engine {
 public:
  // Takes all memory. Borrows `kernels` and the samplers (`validation` may be null: no evaluate()),
  // and `transport`, which must be connected by the first train_step() or evaluate(); null for a
  // world of one. kInvalidArgument when the program is not of this rank, `seats` not of the model.
  // `make_stage` makes every stage; empty: the model's own. `seats`: equal on every rank. Borrows
  // `flight`; null: it has one of its own.
  static Result<std::unique_ptr<Engine>> create(
      const JobSpec& spec, Rank rank, Program program, Kernels& kernels, Transport* transport,
      const Sampler& training, const Sampler* validation, const StageFactory& make_stage = {},
      ExpertSeats seats = {}, FlightRecorder* flight = nullptr, const StateHome& home = {});
  ~Engine();

  // Weights of spec.checkpoint.init_from, or from the seed; fresh optimizer state.
  Status initialize();
  // From a checkpoint, and from what StateHome::file holds of `step` (kNotFound: nothing). Either
  // restores what this rank owns; the model is whole after complete_restore(), which needs the
  // transport and in which replicas send each other theirs.
  Result<LoadReport> restore(const Path& manifest_path, JobId job, int64_t step) {
    return state_->restore(manifest_path, job, step);
  }
  Status restore_held(int64_t step) { return state_->restore_held(step); }
  Status complete_restore() { return gather_weights(); }

  // Runs step `step`, which is the one after the state's. Whether loss and gradient norm let it
  // change the model is found on every rank, since every rank has the sums over all, and before the
  // optimizer, so that neither weights nor a checkpoint ever hold anything of a step that may not:
  // it is left out (StepResult::guard), or is an error and diverged().
  Result<StepResult> train_step(int64_t step, StepWishes wishes = {});
  // The step's number is used up, and nothing else changes. REQUIRES: as train_step().
  StepResult leave_out(int64_t step);
  // Mean loss over spec.training.evaluation_batches held-out batches, the same ones every time; of
  // the averaged weights when spec.optimizer.ema_evaluation. Changes no state. An error, and
  // diverged(), when it is not finite.
  Result<EvaluationResult> evaluate();
  // The last call failed because the model did, not the machine: a replay ends the same way.
  bool diverged() const { return diverged_; }
  // The last call failed because this rank's results or weights are not what they must be: a
  // processor, memory or network changes bits.
  bool miscomputed() const { return miscomputed_; }
  // What the last training step's guards found.
  const GuardFinding& finding() const { return finding_; }
  // Tokens that chose each expert in a step, a moving average over recent training steps: of the
  // layers that this rank is the first replica of. Over all ranks each layer once.
  ExpertLoads expert_loads() const;
  // Finishes what a step leaves running in the background. To be called before the state is saved.
  void settle();
  // Tells the recorder how far this rank's clock is from rank 0's. Every rank calls it, once the
  // transport is connected.
  Status align_clock();
  // Returns when every rank has called it: after it nobody needs this rank any more.
  Status barrier();

  TrainingState& state() { return *state_; }
  const TrainingState& state() const { return *state_; }
  std::span<const std::unique_ptr<Stage>> stages() const { return stages_; }  // by direction
  const RankLayout& layout() const { return layout_; }
  // What the last training steps did, and when.
  Recorder& recorder() { return recorder_; }
  const Recorder& recorder() const { return recorder_; }
  FlightRecorder& flight() { return recorder_.flight(); }
  uint64_t memory_bytes() const;
  uint64_t bytes_sent() const { return transport_ ? transport_->bytes_sent() : 0; }

 private:
  struct Totals {  // this rank's sums over a step
    double loss = 0.0;
    double prediction_loss = 0.0;
    double balance_loss = 0.0;
    double tokens = 0.0;
  };
  struct PendingWeight {
    uint8_t direction;
    int32_t microbatch;
  };
  // What one direction needs beside its lane.
  struct Feed {
    std::vector<int32_t> tokens;   // entry: [slots, micro-batch tokens]
    std::vector<int32_t> targets;  // exit: the same
  };

  // The steps of one size; a batch-size ramp has several.
  struct StepPlan {
    ParallelismSpec parallelism;  // with their micro-batches, and no ramp
    int64_t tokens = 0;           // of all ranks
    double magnification = 1.0;   // of gradients on their way through FP8 layers
    const std::vector<Instruction>* training = nullptr;
  };

  struct Parts {
    const JobSpec& spec;
    Rank rank;
    Program program;
    Kernels& kernels;
    Transport* transport;
    const Sampler& training;
    const Sampler* validation;
    ExpertSeats seats;
    FlightRecorder* flight;
  };
  explicit Engine(Parts parts);
  Status make_stages(const StageFactory& make_stage);
  HeldStateIdentity state_identity(JobId job) const;
  void make_lane(const LocalStage& local, int32_t slot_count);
  Status make_state(const StateHome& home);
  std::optional<Rank> neighbour(int32_t pipeline_index) const;

  // Places in the vector of totals that all ranks add up. Behind them, one for each stage.
  enum Sum : size_t {
    kLossSum,
    kTokenSum,
    kSquareSum,
    kPredictionSum,
    kBalanceSum,
    kSaveSum,
    kPauseSum,
    kDifferenceSum,  // ranks that received something else in the second pass
    kStageImbalance
  };

  static std::vector<StepPlan> plans_of(const JobSpec& spec, const Program& program);
  const StepPlan& plan_of(int64_t step) const;
  Status execute(const StepPlan& plan, bool training, int64_t step);
  Status run_pass(std::span<const Instruction> instructions);
  void clear_sums();
  Status execute_one(const Instruction& instruction);
  Status forward(const Instruction& instruction);
  Status backward(const Instruction& instruction);
  Status backward_input(const Instruction& instruction);
  Status backward_weight(const Instruction& instruction);
  Status overlapped(const Instruction& instruction);
  Result<Pass> begin_forward(uint8_t direction, int32_t microbatch, int32_t* slot);
  void end_forward(uint8_t direction, int32_t microbatch, int32_t slot);
  Result<MicroBatch> micro_batch(uint8_t direction, int32_t microbatch, int32_t slot);
  RecordedPass recorded(Pass pass, uint8_t direction, int32_t microbatch);
  template <typename Work>
  Status compute(const Instruction& instruction, const Work& work);
  template <typename Call>
  Status collective(Collective what, int64_t stage, const Call& call);
  void record_span(Op op, int64_t begin_ns, int64_t end_ns);

  Status all_reduce(Collective what, int64_t stage, std::span<const Rank> ranks, Tag tag,
                    std::span<double> values);
  Status reduce_gradients();
  Status reduce_stage(const LocalStage& local, Stage& stage);
  Status reduce_totals();
  Status judge(double loss, double grad_norm);
  Status optimizer_step();
  Status gather_weights();
  Result<EvaluationResult> evaluate_weights();

  // engine_audit.cc
  bool duplicates(int64_t step) const;
  std::vector<Digest> results_of_pass();
  Status compute_twice(std::span<const Instruction> instructions);
  Status compare_replicas();
  Status compare_copies(int64_t stage, ParameterKind kind, std::span<const Rank> replicas,
                        std::span<const float> values);
  Status miscomputed(std::string_view what);

  const JobSpec spec_;
  const Program program_;
  const std::vector<StepPlan> plans_;  // the first: of step 1, and of every evaluation
  const RankLayout layout_;
  const ExpertSeats seats_;
  Kernels& kernels_;
  Transport* const transport_;
  const Sampler& training_data_;
  const Sampler* const validation_data_;
  const int64_t microbatch_tokens_;

  // One view of the transport per purpose, to tell waits apart; null in a world of one.
  std::unique_ptr<AuditedTransport> audit_;  // below the first two; null: no step is duplicated
  std::unique_ptr<MeasuredTransport> expert_transport_;
  std::unique_ptr<MeasuredTransport> pipeline_transport_;
  std::unique_ptr<MeasuredTransport> reduce_transport_;
  Recorder recorder_;
  std::unique_ptr<Reducer> reducer_;
  std::vector<std::unique_ptr<ExpertExchange>>
      exchanges_;                               // by direction; null where none is needed
  std::vector<std::unique_ptr<Stage>> stages_;  // by direction
  std::vector<std::unique_ptr<Lane>> lanes_;    // by direction
  std::vector<Feed> feeds_;                     // by direction
  NumericalGuard guard_;
  std::unique_ptr<StateLayout> state_places_;
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<TrainingState> state_;
  std::unique_ptr<WeightAverage> average_;  // null: none is kept; its thread publishes the state

  // Of the step under way.
  bool training_ = true;
  bool diverged_ = false;
  bool miscomputed_ = false;
  std::string received_otherwise_;  // by the second pass, and nobody knows yet why
  GuardFinding finding_;
  StepWishes wishes_;
  int64_t step_ = 0;  // of training; the batch's number in an evaluation
  const StepPlan* plan_ = nullptr;
  StepTimes times_;
  Totals totals_;
  std::vector<PendingWeight> weight_queue_;  // oldest first, from weight_queue_head_
  size_t weight_queue_head_ = 0;
  std::vector<int32_t> sequence_;                  // one sequence and the token after it
  std::vector<std::vector<double>> load_sums_;     // by direction: for the reduction
  std::vector<std::vector<int64_t>> loads_;        // by direction: over the global batch
  std::vector<std::vector<double>> recent_loads_;  // by direction: of expert_loads(), unscaled
  double recent_weight_ = 0.0;                     // that its sums have
  std::vector<double> sums_;                       // of all ranks, by Sum
};

}  // namespace penstock
