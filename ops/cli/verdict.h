// What went wrong with a job, where, what it kept, what happens next and what to type: from its
// record and its events. Pure.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "ops/cli/job_history_json.h"

namespace penstock {

// The document `Verdict` of docs/cli.md. `offline`: nobody was asked, so that what is recorded as
// running may not run.
Json verdict_of(const JobHistory& history, bool offline);

// The same for people, but for the table of all failures. REQUIRES: made by verdict_of.
std::string verdict_text(const Json& verdict, const std::string& state_in_colour);

// One event for each attempt that failed, the first first, with its cause.
std::vector<Json> failures_in(const std::vector<Json>& events);

// "the checkpoint of step 60", out of the event that says from what an attempt starts.
std::string start_source(const std::string& message);

// What a rank was doing, out of the sentence that says how it failed; "" where that does not say.
std::string operation_in(const std::string& message);

}  // namespace penstock
