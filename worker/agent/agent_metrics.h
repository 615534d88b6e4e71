// What a worker daemon's /metrics shows: its ranks' steps, times and memory, and its own losses.
// The only place of worker/agent that names metrics; docs/metrics.md explains them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "comm/base/clock.h"
#include "comm/control/message.h"
#include "comm/control/metrics.h"
#include "comm/control/process.h"
#include "worker/agent/agent.h"

namespace penstock {

// Single-threaded: the daemon's loop. Series are labelled run = job id and rank; those of a job
// appear, counters at
// 0, when its first rank starts here and go kSeriesGrace after its last one ended.
class AgentMetrics {
 public:
  static constexpr Duration kSeriesGrace = std::chrono::minutes(15);

  explicit AgentMetrics(std::string node);

  void rank_started(const StartRank& start, int32_t pid);
  void rank_progressed(const RankProgress& progress);
  void rank_ended(int64_t now_ns, const RankKey& key, const ExitStatus& status);
  void set_daemon(bool registered, uint64_t log_lines_dropped, uint64_t reports_dropped);
  void set_copies(uint64_t bytes, uint64_t bytes_sent, uint64_t missed);

  // The page, memory figures fresh, series past their grace gone.
  std::string render(int64_t now_ns);

 private:
  static constexpr size_t kPhases = 6;
  struct Series {
    Gauge step;
    Counter steps;
    Counter step_seconds;
    std::array<Counter, kPhases> phase_seconds;
    Counter bytes_sent;
    Gauge arena_bytes;
    Gauge host_memory_bytes;
    Counter out_of_memory;
    Epoch epoch;
    int32_t pid = 0;  // 0: not running
    uint64_t bytes_sent_seen = 0;
    std::optional<int64_t> ended_at_ns;
  };
  using SeriesKey = std::pair<JobId, Rank>;

  Series make_series(const MetricLabels& labels);
  MetricLabels info_labels(const StartRank& start) const;
  void remove_finished(int64_t now_ns);

  const std::string node_;
  MetricRegistry registry_;
  std::map<SeriesKey, Series> series_;
  std::map<std::string, Counter> fatal_errors_;  // by kind
  Gauge registered_;
  Counter log_lines_dropped_;
  Counter reports_dropped_;
  Gauge copies_bytes_;
  Counter copies_sent_bytes_;
  Counter copies_missed_;
};

}  // namespace penstock
