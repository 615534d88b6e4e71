#include "worker/agent/agent_metrics.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "comm/base/exit_codes.h"
#include "comm/run/job_spec.h"
#include "comm/run/layout.h"

namespace penstock {
namespace {

// The kinds of fatal_errors_total, a closed set.
constexpr std::array<const char*, 7> kErrorKinds = {
    "signal",   "out_of_memory",     "data_corrupt", "peer_lost",
    "diverged", "silent_corruption", "failure"};

// nullptr: no error.
const char* error_kind(const ExitStatus& status) {
  if (status.signal != 0) return "signal";
  switch (static_cast<ExitCode>(status.exit_code)) {
    case ExitCode::kOk:
    case ExitCode::kPreempted:  // asked to stop
      return nullptr;
    case ExitCode::kOutOfMemory:
      return "out_of_memory";
    case ExitCode::kDataCorrupt:
      return "data_corrupt";
    case ExitCode::kPeerLost:
      return "peer_lost";
    case ExitCode::kDiverged:
      return "diverged";
    case ExitCode::kMiscomputed:
      return "silent_corruption";
    default:
      return "failure";
  }
}

// In the order of Series::phase_seconds.
constexpr std::array<const char*, 6> kPhaseNames = {"compute",   "expert_wait", "pp_wait",
                                                    "dp_reduce", "optimizer",   "ckpt"};

// Resident memory; 0 when the process has gone.
double resident_bytes(int32_t pid) {
  std::ifstream statm("/proc/" + std::to_string(pid) + "/statm");
  double total_pages = 0;
  double resident_pages = 0;
  if (!(statm >> total_pages >> resident_pages)) return 0;
  return resident_pages * static_cast<double>(sysconf(_SC_PAGESIZE));
}

void raise_to(Counter& counter, uint64_t value) {
  const double increase = static_cast<double>(value) - counter.value();
  if (increase > 0) counter.increment(increase);
}

}  // namespace

AgentMetrics::AgentMetrics(std::string node)
    : node_(std::move(node)),
      registered_(registry_.gauge("penstock_worker_registered",
                                  "1 while this worker is registered with a coordinator",
                                  {{"node", node_}})),
      log_lines_dropped_(registry_.counter(
          "penstock_worker_log_lines_dropped_total",
          "Lines of rank output that did not reach the coordinator or the log file",
          {{"node", node_}})),
      reports_dropped_(registry_.counter(
          "penstock_worker_reports_dropped_total",
          "Reports of ranks dropped because the coordinator was away too long", {{"node", node_}})),
      copies_bytes_(registry_.gauge("penstock_worker_state_copies_bytes",
                                    "Memory that copies of ranks' state take, own and others'",
                                    {{"node", node_}})),
      copies_sent_bytes_(registry_.counter("penstock_worker_state_copies_sent_bytes_total",
                                           "Bytes of ranks' state sent to other workers to keep",
                                           {{"node", node_}})),
      copies_missed_(registry_.counter(
          "penstock_worker_state_copies_missed_total",
          "Copies of ranks' state given up because the rank overwrote it meanwhile",
          {{"node", node_}})) {
  for (const char* kind : kErrorKinds) {
    fatal_errors_.emplace(kind, registry_.counter("penstock_worker_fatal_errors_total",
                                                  "Rank processes that ended abnormally",
                                                  {{"node", node_}, {"kind", kind}}));
  }
}

AgentMetrics::Series AgentMetrics::make_series(const MetricLabels& labels) {
  const auto phase = [&](size_t index) {
    MetricLabels with_phase = labels;
    with_phase["phase"] = kPhaseNames[index];
    return registry_.counter("penstock_worker_phase_seconds_total",
                             "Time of steps by what the rank did in it", with_phase);
  };
  return {
      .step = registry_.gauge("penstock_worker_step", "Last finished step", labels),
      .steps = registry_.counter("penstock_worker_steps_total", "Steps finished", labels),
      .step_seconds =
          registry_.counter("penstock_worker_step_seconds_total", "Time in steps", labels),
      .phase_seconds = {phase(0), phase(1), phase(2), phase(3), phase(4), phase(5)},
      .bytes_sent = registry_.counter("penstock_worker_bytes_sent_total",
                                      "Bytes sent to other ranks", labels),
      .arena_bytes = registry_.gauge("penstock_worker_arena_bytes",
                                     "Size of the arena for activations and buffers", labels),
      .host_memory_bytes = registry_.gauge("penstock_worker_host_memory_bytes",
                                           "Resident memory of the rank process", labels),
      .out_of_memory = registry_.counter("penstock_worker_oom_total",
                                         "Rank processes that ran out of memory", labels),
      .epoch = {},
      .pid = 0,
      .bytes_sent_seen = 0,
      .ended_at_ns = std::nullopt,
  };
}

// The labels that say what a rank is; its place in the grid comes from the spec.
MetricLabels AgentMetrics::info_labels(const StartRank& start) const {
  MetricLabels labels = {{"run", std::to_string(start.job.value)},
                         {"rank", std::to_string(start.rank.value)},
                         {"node", node_},
                         {"device", std::to_string(start.device)}};
  const Result<JobSpec> spec = parse_job_spec(start.spec_json, "StartRank");
  if (!spec.ok()) return labels;  // the rank itself will say so, and end
  const GridPosition position = grid_position(spec->parallelism, start.rank);
  labels["pp"] = std::to_string(position.pipeline_index);
  labels["dp"] = std::to_string(position.data_index);
  labels["ep"] = std::to_string(position.expert_index);
  return labels;
}

void AgentMetrics::rank_started(const StartRank& start, int32_t pid) {
  const SeriesKey key = {start.job, start.rank};
  auto found = series_.find(key);
  if (found == series_.end()) {
    const MetricLabels labels = {{"run", std::to_string(start.job.value)},
                                 {"rank", std::to_string(start.rank.value)}};
    found = series_.emplace(key, make_series(labels)).first;
  }
  Series& series = found->second;
  series.epoch = start.epoch;
  series.pid = pid;
  series.bytes_sent_seen = 0;
  series.ended_at_ns.reset();
  series.step.set(static_cast<double>(start.restore_step));
  registry_
      .gauge("penstock_worker_rank_info", "1; where a rank runs and its place in the rank grid",
             info_labels(start))
      .set(1.0);
}

void AgentMetrics::rank_progressed(const RankProgress& progress) {
  const auto found = series_.find({progress.job, progress.rank});
  if (found == series_.end() || found->second.epoch != progress.epoch) return;
  Series& series = found->second;
  series.step.set(static_cast<double>(progress.step));
  series.steps.increment();
  series.step_seconds.increment(progress.step_seconds);
  const std::array<double, kPhases> seconds = {
      progress.compute_seconds, progress.expert_wait_seconds, progress.pipeline_wait_seconds,
      progress.reduce_seconds,  progress.optimizer_seconds,   progress.checkpoint_seconds};
  for (size_t i = 0; i < kPhases; ++i) series.phase_seconds[i].increment(seconds[i]);
  if (progress.bytes_sent > series.bytes_sent_seen) {
    series.bytes_sent.increment(static_cast<double>(progress.bytes_sent - series.bytes_sent_seen));
    series.bytes_sent_seen = progress.bytes_sent;
  }
  series.arena_bytes.set(static_cast<double>(progress.arena_bytes));
}

void AgentMetrics::rank_ended(int64_t now_ns, const RankKey& key, const ExitStatus& status) {
  if (const char* kind = error_kind(status)) fatal_errors_.at(kind).increment();
  const auto found = series_.find({key.job, key.rank});
  if (found == series_.end() || found->second.epoch != key.epoch) return;
  Series& series = found->second;
  series.pid = 0;
  series.ended_at_ns = now_ns;
  series.host_memory_bytes.set(0);
  if (status.exit_code == static_cast<int>(ExitCode::kOutOfMemory)) {
    series.out_of_memory.increment();
  }
}

void AgentMetrics::set_daemon(bool registered, uint64_t log_lines_dropped,
                              uint64_t reports_dropped) {
  registered_.set(registered ? 1.0 : 0.0);
  raise_to(log_lines_dropped_, log_lines_dropped);
  raise_to(reports_dropped_, reports_dropped);
}

void AgentMetrics::set_copies(uint64_t bytes, uint64_t bytes_sent, uint64_t missed) {
  copies_bytes_.set(static_cast<double>(bytes));
  raise_to(copies_sent_bytes_, bytes_sent);
  raise_to(copies_missed_, missed);
}

void AgentMetrics::remove_finished(int64_t now_ns) {
  std::map<JobId, bool> finished;
  for (const auto& [key, series] : series_) {
    const bool over = series.pid == 0 && series.ended_at_ns &&
                      now_ns - *series.ended_at_ns >= kSeriesGrace.count();
    const auto job = finished.emplace(key.first, true).first;
    job->second = job->second && over;
  }
  for (const auto& [job, over] : finished) {
    if (!over) continue;
    std::erase_if(series_, [id = job](const auto& entry) { return entry.first.first == id; });
    registry_.remove_series("run", std::to_string(job.value));
  }
}

std::string AgentMetrics::render(int64_t now_ns) {
  remove_finished(now_ns);
  for (auto& [key, series] : series_) {
    if (series.pid != 0) series.host_memory_bytes.set(resident_bytes(series.pid));
  }
  return registry_.render();
}

}  // namespace penstock
