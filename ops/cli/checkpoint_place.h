// Where the checkpoints are that a verb is asked about: a directory, one manifest in it, or a job
// that the coordinator knows. Paths need no coordinator.
#pragma once

#include <optional>
#include <string>

#include "checkpoint/manifest.h"
#include "checkpoint/store.h"
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
// Nothing where it is no path.
Result<std::optional<CheckpointPlace>> checkpoint_place_at(const std::string& word);

// The job's directory, for changes: the lock is held, an interrupted removal is finished. Waits a
// moment for a coordinator that is committing. What a running coordinator's index knows of removed
// checkpoints it corrects when it next starts.
Result<CheckpointStore> open_store(const CheckpointPlace& place);

struct ChosenCheckpoint {
  Path directory;
  StoredManifest stored;
};

// The manifest that was named, else the newest of `step`, else the newest that is listed; newer
// ones that cannot be used are named on stderr. Its segments are not looked at. kNotFound when
// there is none.
Result<ChosenCheckpoint> choose_checkpoint(Cli& cli, const CheckpointPlace& place,
                                           std::optional<int64_t> step);
// "WHAT" or "WHAT@STEP".
Result<ChosenCheckpoint> choose_checkpoint(Cli& cli, const std::string& what);

// Text of a file as it may be shown on a terminal: control characters become '?'.
std::string shown(std::string text);

}  // namespace penstock
