// Reading one rank's log, piece by piece, as whole lines.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/cli/follow.h"

namespace penstock {

// Where reading stands, and the end of a line that has not come whole.
struct RankLog {
  int64_t rank = 0;
  int64_t offset = 0;
  bool terminal = false;
  std::string partial;
  std::vector<std::string> lines;  // whole ones; the caller may take them out
};

// Reads what there is; whole lines go to `lines`, and what is left when the job has ended, too.
// Returns whether anything came.
Result<bool> read_more(PatientClient& client, const std::string& job_id, RankLog& log,
                       std::chrono::milliseconds wait);

}  // namespace penstock
