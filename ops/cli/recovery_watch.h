// What came of a fault: from the events and steps of the job after it. Pure.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "ops/cli/client.h"

namespace penstock {

struct Fault {
  Instant at;
  Duration lasts = {};        // 0: it happens at once
  bool ends_attempt = false;  // surely: a rank is dead
  int64_t epoch = 0;          // the job's then
  int64_t step = 0;           // the highest that was finished
};

// A job has recovered when it finished a step that no attempt up to the fault's had finished; it
// was not disturbed when the attempt itself finished a step after the fault was over.
class RecoveryWatch {
 public:
  explicit RecoveryWatch(const Fault& fault);
  ~RecoveryWatch();

  // In order, each once; of events only those after the fault.
  void add_event(const Json& event);
  void add_step(const Json& step);
  // Recovered, or not disturbed.
  bool done() const;

  // `outcome` ("recovered", "undisturbed", "pending"), `detected`, `resumed`, `attempts`,
  // `refused`, `next_step`, `recovery_seconds`, `steps_replayed`, `slowest_step_seconds`.
  Json document() const;

 private:
  void look(const Json& step);

  const Fault fault_;
  std::vector<Json> events_;
  int64_t highest_before_;
  bool recovered_ = false;
  bool trained_after_ = false;  // the attempt itself, when the fault was over
  int64_t next_step_ = 0;
  double next_step_seconds_ = 0.0;  // after the fault
  int64_t replayed_ = 0;
  int64_t epoch_ = 0;  // of the newest step
  double slowest_seconds_ = 0.0;
};

// For people. REQUIRES: made by document().
std::string recovery_text(const Json& document);

}  // namespace penstock
