// A tiny model on a tiny corpus, for tests that train for real.
#pragma once

#include <string>

#include "comm/base/file.h"
#include "comm/run/job_spec.h"
#include "worker/rank/standalone.h"

namespace penstock {

// A fresh directory, removed at the end.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  const Path& path() const { return path_; }

 private:
  Path path_;
};

struct TinyLayout {
  int64_t pipeline = 1;
  int64_t expert = 1;
  int64_t data = 1;
  Schedule schedule = Schedule::kOneForwardOneBackward;
  // Sequences of a step, over all replicas: equal for layouts that are compared.
  int64_t sequences_per_step = 32;
};
std::string to_string(const TinyLayout& layout);

// Writes <directory>/train.{bin,idx} and valid.{bin,idx}: a Markov chain over 40 tokens, so that
// there is something to learn.
void write_tiny_corpus(const Path& directory);

// Five layers (one dense), hidden size 32, 8 experts of which 2 are chosen. The corpus is in
// `directory`.
JobSpec tiny_spec(const Path& directory, const TinyLayout& layout, int64_t steps);

// tiny_spec() with its programs, checked.
StandaloneOptions tiny_run(const JobSpec& spec);

// run_standalone_threads(), whose failure fails the test.
StandaloneReport train_tiny(const StandaloneOptions& options);

// Where the checkpoint of `step` of job 1 is; none fails the test.
Path manifest_of_step(const Path& checkpoints, int64_t step);

}  // namespace penstock
