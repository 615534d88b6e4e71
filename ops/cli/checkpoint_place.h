// Where the checkpoints are that a verb is asked about: a directory, one manifest in it, or a job
// that the coordinator knows. Paths need no coordinator.
#pragma once

#include <optional>
#include <string>

#include "checkpoint/manifest.h"
#include "ops/cli/cli.h"

namespace penstock {

// The arguments of a verb about one place: what it is asked about, and --step.
void add_place_options(CLI::App& verb, std::string& what, std::optional<int64_t>& step,
                       const std::string& step_help = "Of this step (default: the newest)");

struct CheckpointPlace {
  Path directory;
  JobId job;                           // by its newest readable manifest; 0: none can be read
  std::optional<uint64_t> commit_seq;  // one manifest was named
};

// `word` is a path when it names a manifest or a directory with files of a checkpoint store, or
// holds a '/'; a job's name or id otherwise.
Result<CheckpointPlace> find_checkpoint_place(const Cli& cli, const std::string& word);

struct ChosenCheckpoint {
  Path directory;
  StoredManifest stored;
};

// The manifest that was named, else the newest of `step`, else the newest that is listed. Its
// segments are not looked at. kNotFound when there is none.
Result<ChosenCheckpoint> choose_checkpoint(const CheckpointPlace& place,
                                           std::optional<int64_t> step);
// "WHAT" or "WHAT@STEP".
Result<ChosenCheckpoint> choose_checkpoint(const Cli& cli, const std::string& what);

// Text of a file as it may be shown on a terminal: control characters become '?'.
std::string shown(std::string text);

}  // namespace penstock
