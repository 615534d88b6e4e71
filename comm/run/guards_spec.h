// The section `guards` of a job spec. Called by parse_job_spec() alone.
#pragma once

#include "comm/run/job_spec.h"
#include "comm/run/mapping_reader.h"

namespace penstock {

void read_guards(MappingReader reader, GuardsSpec& guards);

// Rules between the keys of the section and the rest.
void check_guards(const JobSpec& spec, SpecProblems& problems);

}  // namespace penstock
