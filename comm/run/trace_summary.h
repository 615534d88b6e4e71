// What a step's trace says: where the seconds of a rank went, and how much of each communication
// was hidden behind its compute. One pure function for the CLI's summary and for benchmarks.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "comm/run/trace_record.h"

namespace penstock {

// One kind of communication on one rank.
struct CommunicationSummary {
  std::string name;  // trace_name()
  int64_t count = 0;
  int64_t bytes = 0;
  double issue_seconds = 0.0;  // exchanges: packing and posting, on the compute thread
  double flight_seconds =
      0.0;  // from posted to there. Of a receive, which is posted long before it
            // is sent: only while it was waited for
  double hidden_seconds = 0.0;   // of those, while the compute thread computed
  double exposed_seconds = 0.0;  // the rest of flight_seconds
  double waited_seconds = 0.0;   // the compute thread stood still for it, waking up included
};

// The parts add up to total_seconds, in the terms of DeepSeek's table (Insights into DeepSeek-V3,
// table 4).
struct StepSummary {
  int32_t rank = 0;
  int32_t step = 0;
  double total_seconds = 0.0;
  double forward_seconds = 0.0;         // F alone
  double backward_seconds = 0.0;        // B alone, both parts
  double backward_input_seconds = 0.0;  // Bi
  double weight_seconds = 0.0;          // W
  double pair_seconds = 0.0;            // F&B
  double reduce_seconds = 0.0;          // gradients, totals, weights
  double optimizer_seconds = 0.0;
  double bubble_seconds = 0.0;                       // waiting for pipeline neighbours
  double other_seconds = 0.0;                        // data, bookkeeping
  std::vector<CommunicationSummary> communications = {};  // by name
};

// `records`: of one rank, any steps, in any order. One summary per training step that has its kStep
// record, ascending. A communication belongs to the step it was waited for in.
std::vector<StepSummary> summarize(int32_t rank, std::span<const TraceRecord> records);

// The seconds of all, added; rank and step of the first. REQUIRES: !summaries.empty().
StepSummary total(std::span<const StepSummary> summaries);

}  // namespace penstock
