// Checkpoints as verbs read them: a job's newest, one of a given step, or one that is found without
// a coordinator.
#pragma once

#include <optional>
#include <string>

#include "checkpoint/manifest.h"
#include "comm/base/file.h"
#include "comm/run/job_spec.h"
#include "ops/cli/cli.h"

namespace penstock {

class Generator;

struct CheckpointSource {
  Path directory;
  Manifest manifest;
  JobSpec spec;  // the manifest's
};

// Of a job the coordinator knows, by name or id: the newest checkpoint whose segments pass their
// checks (newer ones that do not are named on stderr), or exactly that of `step`. kNotFound when
// there is none.
Result<CheckpointSource> checkpoint_of_job(Cli& cli, const std::string& job,
                                           std::optional<int64_t> step = std::nullopt);
// `path` is a manifest, or a job's checkpoint directory, of which the newest is taken as above.
Result<CheckpointSource> checkpoint_at(Cli& cli, const Path& path,
                                       std::optional<int64_t> step = std::nullopt);

// Fills every weight of the generator. `average`: with the moving average of the parameters; router
// biases have none.
Status load_weights(const CheckpointSource& source, const Generator& generator,
                    bool average = false);

}  // namespace penstock
