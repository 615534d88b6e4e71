// How positions are encoded, in the keys of Hugging Face's configurations, old and new. Called by
// parse_job_spec() alone.
#pragma once

#include "comm/run/mapping_reader.h"
#include "comm/run/model_config.h"

namespace penstock {

// Reads rope_theta, rope_scaling and rope_parameters of the section `model`.
void read_rope(MappingReader& model_reader, SpecProblems& problems, ModelConfig& model);

}  // namespace penstock
