// Everything of one rank that must survive it, as slices of logical tensors: what it saves, and
// what it loads back, in whatever layout the checkpoint was saved.
//
// Saved, each element by exactly one rank of the job: the weights and Adam moments of the ranges
// this rank's optimizer owns (ZeRO-1 spreads them evenly), their average if one is kept, the router
// biases it is elected for, and on rank 0 the step. The election is a pure function of the layout.
// Loaded: every weight and bias of its stages, the moments it owns. Nothing else is state: data,
// learning rate and initial weights are pure functions of seed and step.
#pragma once

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
#include "worker/engine/weight_average.h"
#include "worker/model/stage.h"
#include "worker/optim/adamw.h"

namespace penstock {

class TrainingState {
 public:
  // Borrows all; pointers into them are kept. `average` may be null.
  TrainingState(const RankLayout& layout, std::span<const std::unique_ptr<Stage>> stages,
                AdamW& optimizer, WeightAverage* average);
  TrainingState(const TrainingState&) = delete;
  TrainingState& operator=(const TrainingState&) = delete;

  // Last finished step: part of the state.
  int64_t step() const { return step_; }
  void set_step(int64_t step) { step_ = step; }

  // Addresses are stable; bytes change with every optimizer step and set_step().
  std::span<const SliceSource> to_save() const { return to_save_; }
  uint64_t save_bytes() const;

  // Fills everything from the checkpoint whose manifest is at `manifest_path`. kFailedPrecondition
  // when that is of another job or not of `step`; else as load_slices().
  Result<LoadReport> restore(const Path& manifest_path, JobId job, int64_t step);

  // Fills every weight and router bias from a Hugging Face folder; the step and the optimizer's
  // state stay. Errors as HfFolder::read().
  Status load_weights(const HfFolder& folder);

  // Digests of the tensors this rank is the first to hold (weights and router biases). Over all
  // ranks: each tensor once, whatever the layout.
  struct TensorDigest {
    std::string name;
    Digest digest;
  };
  std::vector<TensorDigest> weight_digests() const;

 private:
  void add_owned(const std::vector<StateSlice>& slices);
  void add_stage(const LocalStage& local, Stage& stage);

  struct Held {  // for weight_digests()
    std::string name;
    std::span<const float> values;
  };
  const RankLayout& layout_;
  int64_t step_ = 0;
  std::vector<SliceSource> to_save_;
  std::vector<LoadTarget> to_load_;
  std::vector<Held> first_held_;
};

}  // namespace penstock
