// Everything of one rank that must survive it, as slices of logical tensors: what it saves, and
// what it loads back, in whatever layout the checkpoint was saved.
//
// Saved, each element by exactly one rank of the job: the weights and Adam moments of the ranges
// this rank's optimizer owns (ZeRO-1 spreads them evenly), their average if one is kept, the router
// biases it is elected for, and on rank 0 the step. The election is a pure function of the layout.
// Loaded: the same ranges and every bias of its stages; the other weights are its replicas', which
// send them. Nothing else is state but what guards remember, which all ranks have and rank 0 saves:
// data, learning rate and initial weights are pure functions of seed and step.
//
// What a rank saves lies in generations (worker/engine/state_memory.h); the model computes with
// copies of its weights and biases. A training step goes
//
//   begin_step() -> the optimizer writes next() from current() -> finish_step() -> publish()
//
// and until publish() the generation before it is the newest whole one. hold() keeps the newest as
// it is while it is written to a checkpoint and steps go on.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/hf_folder.h"
#include "checkpoint/loader.h"
#include "checkpoint/segment_writer.h"
#include "comm/base/file.h"
#include "comm/base/hash.h"
#include "worker/engine/rank_layout.h"
#include "worker/engine/state_memory.h"
#include "worker/engine/weight_average.h"
#include "worker/model/stage.h"
#include "worker/optim/adamw.h"

namespace penstock {

class TrainingState {
 public:
  // Takes all memory: kStateGenerations of what `places` holds and this adds to it. Borrows all;
  // pointers into them are kept. `average` may be null, `guard` empty. `identity`, `file`: as
  // StateMemory::make().
  static Result<std::unique_ptr<TrainingState>> create(
      const RankLayout& layout, std::span<const std::unique_ptr<Stage>> stages, StateLayout& places,
      const AdamW& optimizer, const WeightAverage* average, std::span<double> guard,
      const HeldStateIdentity& identity, const Path& file);
  // What lives outside the generations and is copied to each: router biases, the guards' memory.
  struct Mirrored {
    MutableBytes live;
    uint64_t offset = 0;  // in a generation
    TensorSlice slice;
    bool saved = false;  // by this rank
  };
  // For create().
  TrainingState(const RankLayout& layout, const AdamW& optimizer, StateMemory memory,
                std::vector<Mirrored> mirrored, uint64_t step_offset);
  TrainingState(const TrainingState&) = delete;
  TrainingState& operator=(const TrainingState&) = delete;

  // Last finished step: part of the state.
  int64_t step() const { return step_; }

  std::byte* current() const { return memory_.generation(current_); }
  std::byte* next() const { return memory_.generation(next_); }
  // The generation that the step may write: neither the newest nor the one held. REQUIRES: the
  // newest is published.
  void begin_step();
  // A step that changes nothing of the model: begin_step() to publish().
  void repeat_step(int64_t step);
  // The step is done but for what runs in the background: next() is current(), with the model's
  // router biases and the guards' memory.
  void finish_step(int64_t step);
  // current() is whole. On any thread, before the next begin_step().
  void publish();
  // current() as it is before any step: weights and biases of the model, moments of 0. The average
  // is the caller's.
  void start_from_model();

  // What to save of current(). Changes with every step, but not between hold() and release().
  std::span<const SliceSource> to_save() const { return to_save_[current_]; }
  // to_save(), which stays as it is until release(). REQUIRES: nothing is held, the newest is
  // published.
  std::span<const SliceSource> hold();
  void release();  // on any thread
  uint64_t save_bytes() const;

  // Both fill what this rank owns; what it does not, its replicas have: the model is whole when all
  // weights were gathered.
  //
  // From the checkpoint whose manifest is at `manifest_path`. kFailedPrecondition when that is of
  // another job or not of `step`; else as load_slices().
  Result<LoadReport> restore(const Path& manifest_path, JobId job, int64_t step);
  // From the generation of `step` that the memory already held. kNotFound: there is none.
  Status restore_held(int64_t step);

  // Fills every weight and router bias of the model from a Hugging Face folder. Errors as
  // HfFolder::read().
  Status load_weights(const HfFolder& folder);
  // The model's owned weights and its router biases are, bit for bit, those of current().
  bool matches_model() const;
  // The model's owned weights are those of current() again.
  void put_back_weights() const { optimizer_.put_weights(current()); }

  // Digests of the tensors this rank is the first to hold (weights and router biases). Over all
  // ranks: each tensor once, whatever the layout.
  struct TensorDigest {
    std::string name;
    Digest digest;
  };
  std::vector<TensorDigest> weight_digests() const;

 private:
  struct Weight {  // or router bias, of the model
    std::string name;
    std::vector<int64_t> shape;
    std::span<float> values;
    bool first_held = false;  // this rank is the first to hold it
  };
  static constexpr size_t kNone = kStateGenerations;

  static std::vector<Mirrored> place_mirrored(const RankLayout& layout,
                                              std::span<const std::unique_ptr<Stage>> stages,
                                              std::span<double> guard, StateLayout& places);
  void list_sources(const WeightAverage* average);
  void list_targets(const WeightAverage* average, std::span<const std::unique_ptr<Stage>> stages,
                    std::span<double> guard);
  void forget_generations();
  void copy_mirrored_to(std::byte* generation) const;
  std::span<int64_t> step_in(std::byte* generation) const;
  ptrdiff_t generation_bytes() const { return memory_.generation(1) - memory_.generation(0); }

  const RankLayout& layout_;
  const AdamW& optimizer_;
  StateMemory memory_;
  const std::vector<Mirrored> mirrored_;
  const uint64_t step_offset_;
  int64_t step_ = 0;
  size_t current_ = 0;
  size_t next_ = kNone;
  std::atomic<size_t> held_ = kNone;
  std::array<std::vector<SliceSource>, kStateGenerations> to_save_;  // by generation
  std::vector<LoadTarget> to_load_;  // into generation 0 and the model's router biases
  std::vector<LoadTarget> to_load_where_saved_;
  std::vector<Weight> weights_;
};

}  // namespace penstock
