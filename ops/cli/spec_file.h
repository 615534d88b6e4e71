// A job spec file on its way to the coordinator.
#pragma once

#include <string>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/run/job_spec.h"

namespace penstock {

// A spec as it was written.
struct SpecSource {
  std::string origin;  // what messages call it: the path as it was given, or "<stdin>"
  std::string text;
  Path folder;  // where relative paths in it start; absolute
};

// Reads the file at `path`, or standard input when that is "-", whose relative paths start in the
// current folder. No more than a spec may have is read.
Result<SpecSource> read_spec(const std::string& path);

// Checks the spec, gives it the name `name` unless that is empty, and makes every path in it
// absolute. Errors name the origin, line and column.
Result<JobSpec> load_spec(const SpecSource& source, const std::string& name);
Result<JobSpec> load_spec_file(const std::string& path, const std::string& name);

// Opens every data set, the tokenizer and the model folder that the spec names, as its ranks will:
// what is missing, damaged or too short for one sequence is found before anything starts. Only
// sensible on the host (or shared file system) the ranks will run on. Errors begin with the place
// in the source; a file that is not there is kInvalidArgument, because the spec is wrong, and says
// what makes it.
Status check_spec_data(const SpecSource& source, const JobSpec& spec);

// "file:line:column: " of a top-level section, for refusals that name the section ("parallelism
// needs …"); "" when the message does not start with one.
std::string section_place(const SpecSource& source, const std::string& message);

}  // namespace penstock
