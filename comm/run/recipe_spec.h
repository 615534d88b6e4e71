// The training recipe in a job spec: optimizer, and what changes over the steps. Called by
// parse_job_spec() alone.
#pragma once

#include <string>

#include "comm/run/job_spec.h"
#include "comm/run/mapping_reader.h"
#include "comm/run/step_levels.h"

namespace penstock {

// The levels of `key`, integers.
void read_levels(MappingReader& reader, const std::string& key, SpecProblems& problems, int64_t max,
                 std::vector<StepLevel<int64_t>>& levels);
void read_optimizer(MappingReader reader, SpecProblems& problems, OptimizerSpec& optimizer);
void read_schedule(MappingReader reader, SpecProblems& problems, OptimizerSpec& optimizer);

// Rules between the keys of these sections and training.steps.
void check_recipe(const JobSpec& spec, SpecProblems& problems);

}  // namespace penstock
