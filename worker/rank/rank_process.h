// One rank of a job, from hello to exit: the body of penstock-rank.
#pragma once

#include <string>

#include "comm/base/exit_codes.h"
#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace penstock {

struct RankProcessOptions {
  std::string daemon_endpoint;
  JobId job;
  Epoch epoch;
  Rank rank;
  Path trace_file;   // the trace of the last steps is kept there; empty: in memory
  Path state_file;   // memory of the daemon's, for the training state; empty: the rank's own
  Path flight_file;  // what the rank does now is kept there; empty: in memory
  Path lease_file;   // of the daemon's (comm/control/lease_file.h); empty: it may run for ever
};

// Runs to the end; when that was no success, one line on stderr says why. Returns the exit code, or
// ends the process with it.
ExitCode run_rank_process(const RankProcessOptions& options);

// The exit code for a failure: what its status says, unless the rank was asked to stop, whose peers
// then fail first.
ExitCode exit_code_of(const Status& status, bool stop_requested);

}  // namespace penstock
