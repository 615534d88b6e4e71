// Scaling: a job goes on with another data-parallel width. Its epoch is paused for it, and the new
// spec is taken over between two epochs, in the batch that says so; any layout loads what another
// one saved. Asked for by the user, or within parallelism.elastic: a job that finds no room shrinks
// instead of waiting, and grows at a checkpoint when devices are free.
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/scaling.h"

namespace penstock {
namespace {

Status refused(const Job& job, const std::string& why) {
  return failed_precondition(fmt::format("job {} \"{}\" {}", job.record.id, job.record.name, why));
}

int64_t device_count(const std::vector<FreeDevices>& workers) {
  int64_t count = 0;
  for (const FreeDevices& worker : workers) count += std::ssize(worker.devices);
  return count;
}

}  // namespace

// Whether the job may be asked to go on with `next`; it says what is missing.
Status Coordinator::check_scaling(const Job& job, const JobSpec& next) const {
  const JobState state = job.record.state;
  if (is_final(state)) {
    const std::string next = state == JobState::kSucceeded
                                 ? "submit another job"
                                 : fmt::format("penstock resume {} --spec FILE goes on in another "
                                               "layout",
                                               job.record.name);
    return refused(job, fmt::format("is {}; {}", job_state_name(state), next));
  }
  if (state == JobState::kStopping) return refused(job, "is being stopped");
  if (job.record.proof) return refused(job, "compares its steps with recorded ones; wait for that");
  if (!job.placed()) return check_submission(next, job.record.id);
  const int64_t free = device_count(free_on_workers());
  int64_t own = 0;
  for (const RankPlacement& at : job.record.placement) {
    const Worker& worker = workers_.at(at.worker);
    own += worker.takes_ranks() ? 1 : 0;
  }
  const int64_t missing = next.parallelism.world_size() - own - free;
  if (missing <= 0) return {};
  return refused(
      job, fmt::format("would need {} with data {}, but has {} and {} free: {} missing; "
                       "start more workers, or choose a smaller width",
                       counted(next.parallelism.world_size(), "device"), next.parallelism.data, own,
                       free == 1 ? "1 more is" : fmt::format("{} more are", free),
                       missing == 1 ? "1 is" : fmt::format("{} are", missing)));
}

void Coordinator::on_event(const ScaleJob& scale) {
  const auto answer = [&](Status status, JobId job = {}) {
    effects_.answers.push_back({scale.request, std::move(status), job});
  };
  const auto found = jobs_.find(scale.job);
  if (found == jobs_.end()) return answer(not_found(fmt::format("no job {}", scale.job)));
  Job& job = found->second;
  const Result<JobSpec> next = with_data_width(job.spec, scale.data);
  if (!next.ok()) return answer(next.status());
  if (Status status = check_scaling(job, *next); !status.ok()) return answer(std::move(status));
  ask_to_scale(job, *next, "user", "as asked");
  answer({}, job.record.id);
}

void Coordinator::ask_to_scale(Job& job, const JobSpec& next, const std::string& actor,
                               const std::string& why) {
  JobRecord& record = job.record;
  const int64_t data = next.parallelism.data;
  const int64_t now = job.spec.parallelism.data;
  const int64_t wanted = data == now ? 0 : data;
  if (record.scale_to == wanted) return;
  record.scale_to = wanted;
  changed(job);
  const std::string words =
      wanted == 0
          ? fmt::format("stays at data {}", now)
          : fmt::format("is to go from data {} to {}, on {} instead of {}, {}", now, data,
                        counted(next.parallelism.world_size(), "rank"), job.world_size(), why);
  note(job, actor, {"scale_requested", words});
  if (!scale_unplaced(job)) pause_when_wanted(job);
}

// Between two epochs: takes the new width over, or drops it when there is no room for it any more.
// What daemons hold is of the old layout: the job goes on from that first. Returns whether it has
// another spec now.
bool Coordinator::scale_unplaced(Job& job) {
  JobRecord& record = job.record;
  const bool holds = !job.held.empty() || !job.copies.empty();
  if (record.scale_to == 0 || job.placed() || holds) return false;
  const int64_t before = job.spec.parallelism.data;
  const Result<JobSpec> next = with_data_width(job.spec, std::exchange(record.scale_to, 0));
  changed(job);
  PENSTOCK_CHECK(next.ok(), next.status().message());  // it was, when it was asked for
  const bool grows = next->parallelism.data > before;
  if (record.state == JobState::kRecovering && grows &&
      !place(next->parallelism, free_on_workers())) {
    note(job, "coordinator",
         {"scale_dropped", fmt::format("stays at data {}: there is no room for data {} any more",
                                       before, next->parallelism.data)});
    return false;
  }
  adopt_spec(job, *next);
  note(job, "coordinator",
       {kScaled, fmt::format("goes on with data {} instead of {}, on {}", next->parallelism.data,
                             before, counted(job.world_size(), "rank"))});
  return true;
}

// Of a job that may shrink and has no room as it is: the widest one that has, which it takes over.
// REQUIRES: nothing of the job is placed, and what it restores from is known.
std::optional<std::vector<RankPlacement>> Coordinator::place_narrower(Job& job) {
  const bool room_to_come = std::any_of(workers_.begin(), workers_.end(), [&](const auto& entry) {
    return is_being_checked(entry.second);
  });
  if (room_to_come) return std::nullopt;  // in less time than a narrower width costs
  const ParallelismSpec& grid = job.spec.parallelism;
  if (grid.elastic == ElasticSpec() || job.record.proof || job.record.restored_from_memory)
    return {};
  const std::vector<FreeDevices> free = free_on_workers();
  const int64_t before = grid.data;
  for (int64_t data = before - 1; data >= grid.elastic.min_data; --data) {
    if (grid.pipeline * grid.expert * data > device_count(free)) continue;
    const Result<JobSpec> next = with_data_width(job.spec, data);
    if (!next.ok()) continue;
    auto placement = place(next->parallelism, free);
    if (!placement) continue;
    const std::string missing = why_no_room(job);
    adopt_spec(job, *next);
    job.record.scale_to = 0;
    note(job, "coordinator",
         {kScaled, fmt::format("shrinks from data {} to {}, on {}, instead of waiting: it {}",
                               before, data, counted(job.world_size(), "rank"), missing)});
    return placement;
  }
  return {};
}

// After a commit. Jobs that wait for devices go first.
void Coordinator::grow_at_checkpoint(Job& job) {
  const JobRecord& record = job.record;
  const ParallelismSpec& grid = job.spec.parallelism;
  if (record.state != JobState::kRunning || record.proof || wanted_pause(job)) return;
  const bool others_wait = std::any_of(open_jobs_.begin(), open_jobs_.end(), [&](const JobId id) {
    const JobState state = jobs_.at(id).record.state;
    return state == JobState::kQueued || state == JobState::kRecovering;
  });
  if (grid.data >= grid.elastic.max_data || others_wait) return;
  const int64_t room = device_count(free_on_workers()) + job.world_size();
  for (int64_t data = grid.elastic.max_data; data > grid.data; --data) {
    if (grid.pipeline * grid.expert * data > room) continue;
    const Result<JobSpec> next = with_data_width(job.spec, data);
    if (next.ok()) return ask_to_scale(job, *next, "coordinator", "since devices are free");
  }
}

}  // namespace penstock
