// A cluster on this host for development: one coordinator and some worker daemons as background
// processes.
//
// A state folder holds everything: what runs (dev.json), the coordinator's store (coordinator/), a
// folder per worker, and their logs. Starting is idempotent: what runs is kept, what has died is
// started again, so that history and checkpoints survive. Stopping ends only processes that this
// folder's cluster started.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "ops/cli/local_process.h"

namespace penstock {

struct DevProcess {
  std::string name;  // "coordinator", "worker-0", …
  LocalProcess process;
  std::string log;
};

struct DevState {
  int http_port = 0;
  int control_port = 0;
  // As last asked for; 0: never. Kept while the cluster is down, as the ports are.
  int worker_count_wanted = 0;
  int devices_per_worker = 0;
  std::vector<DevProcess> processes;  // the coordinator first

  std::string server() const;  // "http://127.0.0.1:<http_port>"
  const DevProcess* find(const std::string& name) const;
  int worker_count() const;
};

struct DevOptions {
  Path state_dir;
  // Empty: as it was before, else 4 workers of 1 device on port 7070.
  std::optional<int> worker_count = {};
  std::optional<int> devices_per_worker = {};
  std::optional<int> port = {};  // 0: any free one
};

// `flag`, else $PENSTOCK_DEV_STATE_DIR, else $XDG_STATE_HOME/penstock/dev, else
// ~/.local/state/penstock/dev.
Path dev_state_dir(const std::string& flag);

// What was started and not stopped, alive or not; an empty state when there is nothing. kDataLoss
// names a damaged file.
Result<DevState> load_dev_state(const Path& state_dir);
bool dev_coordinator_runs(const DevState& state);

// Starts what is missing and waits until every worker has registered, whether it takes ranks or
// not. `note` gets one line per thing started. When something dies first, or it takes too long,
// stops what this call started, but no worker that runs ranks, nor then the coordinator; the error
// holds the last lines of the log, or who is missing.
Result<DevState> dev_up(const DevOptions& options, const std::function<void(std::string)>& note);

// Stops everything, coordinator first, so that running jobs stay on record as running and go on at
// the next start. Returns the names of what was stopped.
Result<std::vector<std::string>> dev_down(const Path& state_dir);

// The process of a job's rank on this host, when one of the cluster's workers runs it.
Result<LocalProcess> find_dev_rank(const DevState& state, const std::string& job_id, int64_t rank);

}  // namespace penstock
