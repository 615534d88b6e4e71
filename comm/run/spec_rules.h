// The conditions between keys of a job spec: what one key's range cannot say.
#pragma once

#include "comm/run/job_spec.h"
#include "comm/run/mapping_reader.h"

namespace penstock {

// Those of the model alone. REQUIRES: every key of spec.model is in its own range.
void check_model_rules(const JobSpec& spec, SpecProblems& problems);
// All. REQUIRES: every key of `spec` is in its own range.
void check_spec_rules(const JobSpec& spec, SpecProblems& problems);

}  // namespace penstock
