#include "coordinator/core/job.h"

#include <fmt/format.h>

#include <algorithm>

namespace penstock {

bool Job::commit_in_flight() const {
  return std::any_of(rounds.begin(), rounds.end(),
                     [](const auto& round) { return round.second.committing; });
}

std::optional<double> Job::tokens_per_second() const {
  double seconds = 0.0;
  double tokens = 0.0;
  for (const StepRecord& step : recent_steps) {
    seconds += step.step_seconds;
    tokens += static_cast<double>(step.tokens);
  }
  if (recent_steps.empty() || seconds <= 0.0) return std::nullopt;
  return tokens / seconds;
}

std::optional<double> Job::eta_seconds() const {
  if (recent_steps.empty() || record.state != JobState::kRunning) return std::nullopt;
  double seconds = 0.0;
  int64_t microbatches = 0;  // what time goes with when a ramp changes the size of the steps
  for (const StepRecord& step : recent_steps) {
    seconds += step.step_seconds;
    microbatches += spec.microbatches_at(step.step);
  }
  const int64_t left = spec.microbatches_through(record.target_steps) -
                       spec.microbatches_through(recent_steps.back().step);
  return static_cast<double>(left) * seconds / static_cast<double>(microbatches);
}

bool Worker::was_replaced(uint64_t incarnation) const {
  return std::find(replaced.begin(), replaced.end(), incarnation) != replaced.end();
}

void Worker::note_replaced() {
  replaced.push_back(record.incarnation);
  if (replaced.size() > kReplacedMax) replaced.pop_front();
}

std::string layout_text(const ParallelismSpec& grid) {
  return fmt::format("pipeline {}, data {}, expert {}, {}", grid.pipeline, grid.data, grid.expert,
                     to_string(grid.schedule));
}

}  // namespace penstock
