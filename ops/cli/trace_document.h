// A job's trace as files and tables: Chrome's JSON, which Perfetto opens, and the summary.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/trace_file.h"
#include "comm/run/trace_summary.h"

namespace penstock {

// One process per rank with one track per queue: compute (steps, instructions, sub-operations and
// what they waited for, nested), exchanges (one for the forward's, one for the backward's; a pass
// has one under way), sends, receives (while they are waited for) and collectives; tracks whose
// events overlap are split. Microseconds since the first event, on rank 0's clock.
std::string chrome_trace(std::span<const Trace> traces);

// In gzip's format.
Result<std::string> gzip(std::string_view text);

// {"steps", "ranks", "seconds": {...}, "communications": [...]}: seconds per rank and step.
nlohmann::json summary_document(std::span<const StepSummary> summaries);
// The same for people.
std::vector<std::vector<std::string>> seconds_rows(const StepSummary& sum, size_t count);
std::vector<std::vector<std::string>> communication_rows(const StepSummary& sum, size_t count);

}  // namespace penstock
