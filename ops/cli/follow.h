// Following a job: live progress, log lines, events. A coordinator that goes away does not end it:
// the job goes on without it, so the follower says so once, asks again, and goes on where it was.
// Ctrl-C ends the follower, never the job.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "comm/base/clock.h"
#include "ops/cli/cli.h"

namespace penstock {

// Repeats `call` while there is no coordinator, noting once that it is away and once that it is
// back.
class PatientClient {
 public:
  // Gives up with kUnavailable after this long without an answer.
  static constexpr std::chrono::minutes kPatience{10};

  PatientClient(const Client& client, Output& out) : client_(client), out_(out) {}
  Result<Json> get(const std::string& path,
                   std::chrono::milliseconds wait = std::chrono::milliseconds(0));

 private:
  const Client& client_;
  Output& out_;
};

// From now on Ctrl-C prints that the job goes on and how to come back, and exits with kInterrupted.
void detach_on_interrupt(const std::string& job_name);

// One line of progress: "step 61/200  loss 4.1702  8.1k tokens/s  eta 1m10s  RUNNING".
std::string progress_line(const Json& job);
// The line that redraws on a terminal: progress_line, and the step of the newest checkpoint, whose
// events are no lines of their own there.
std::string live_line(const Json& job);
// Whether the live line shows what an event of this code says.
bool shown_by_live_line(const std::string& event_code);

// What wait_for_job waits for.
struct WaitCondition {
  std::string state;                // reached when the job is in it; empty: any final state
  std::optional<int64_t> step;      // reached when the job has finished this step
  std::optional<Duration> timeout;  // kDeadlineExceeded after it
};
// The job is where the condition wants it.
bool holds(const WaitCondition& condition, const Json& job);

// Whether a failed job may end otherwise when its last steps are replayed. A diverged one does not.
bool is_worth_resuming(const Json& job);

// Shows progress on stderr until the job is final: one redrawn line on a terminal, with a line of
// its own for what stays worth reading (a failure, a recovery, a held-out loss); elsewhere plain
// lines, one for every event and one per second with news. Lines are in the order in which things
// happened: a step stands before what came of it, and the end is last. Returns the final Job.
Result<Json> follow_job(const Client& client, Output& out, const std::string& id);

// Waits without showing progress. Returns the Job for which the condition holds, or the final one.
Result<Json> wait_for_job(const Client& client, Output& out, const std::string& id,
                          const WaitCondition& condition);

// After a FAILED job: what went wrong, the last lines of the rank it began with, and how to go on.
// Nothing after any other end.
void explain_failure(const Client& client, Output& out, const Json& job);

}  // namespace penstock
