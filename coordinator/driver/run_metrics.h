// The coordinator's Prometheus series, kept up to date from what the core decides. Names:
// docs/metrics.md.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>

#include "comm/control/metrics.h"
#include "coordinator/core/coordinator.h"

namespace penstock {

// Series of an ended job stay this long, so that a last scrape sees how it ended.
inline constexpr Duration kSeriesGrace = std::chrono::minutes(15);

// Loop thread only. Borrows the registry and the core.
class RunMetrics {
 public:
  RunMetrics(MetricRegistry& registry, const Coordinator& core);

  // After the effects of a step were written.
  void observe(Instant now, const Effects& effects);
  // Gauges of the whole cluster, right before a scrape; drops series of jobs long ended.
  void refresh(Instant now);
  void observe_write(Duration took);
  void observe_commit(JobId job, Duration took);
  // The background reading of a job's checkpoints; nothing when it has no series any more.
  void observe_scrub(JobId job, uint64_t bytes);
  void observe_scrub_pass(JobId job, Instant now);
  void observe_finished_scrub_pass(Instant now);
  void frame_rejected(const std::string& kind);  // "frame" or "connection"

 private:
  // Makes every series of a job, counters at 0.
  void create(const Job& job);
  void observe_event(Instant now, const JobEvent& event);
  void observe_transition(Instant now, const JobEvent& event);
  void observe_step(const StepRecord& step);
  void forget(JobId job);
  void show_slow_ranks();
  void refresh_workers();
  void forget_slow(JobId job);
  void set_state(const JobRecord& job);

  MetricRegistry& registry_;
  const Coordinator& core_;
  std::map<JobId, Digest> created_;  // jobs that have series, and the spec these say
  std::set<std::tuple<JobId, Rank, std::string>> slow_shown_;  // that have a series
  std::map<JobId, Instant> recovering_since_;
  std::map<JobId, Instant> queued_since_;
};

}  // namespace penstock
