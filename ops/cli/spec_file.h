// A job spec file on its way to the coordinator.
#pragma once

#include <string>

#include "comm/base/status.h"
#include "comm/run/job_spec.h"

namespace penstock {

// Reads and checks the file at `path`, gives it the name `name` unless that is empty, and makes
// every path in it absolute, taking relative ones from the file's own folder. Errors name the file,
// line and column.
Result<JobSpec> load_spec_file(const std::string& path, const std::string& name);

// Opens every data set, the tokenizer and the model folder that the spec names, as its ranks will:
// what is missing, damaged or too short for one sequence is found before anything starts. Only
// sensible on the host (or shared file system) the ranks will run on.
Status check_spec_data(const JobSpec& spec);

// "file:line:column: " of a top-level section, for refusals that name the section ("parallelism
// needs …"); "" when the message does not start with one.
std::string section_place(const std::string& path, const std::string& message);

}  // namespace penstock
