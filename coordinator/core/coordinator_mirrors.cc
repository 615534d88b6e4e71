// Copies of ranks' state in other workers' memory: who keeps whose, and of which step.
//
// One step at a time is named to every host of a job. When all of them have said that its copies
// are where they are to be, that step is one to go back to, and a later one is named; copies of the
// one before stay until that is done in turn. A round that fails costs a little work and no copy.
#include <algorithm>

#include "comm/run/layout.h"
#include "coordinator/core/coordinator.h"

namespace penstock {
namespace {

// An order takes that long to be everywhere, with much to spare.
constexpr double kOrderSeconds = 0.1;
constexpr int64_t kLeadMin = 2;
constexpr int64_t kHasteMax = 8;  // of MirrorState::haste
// Until the next try, of what a worker could not do.
constexpr Duration kMirrorRetry = std::chrono::seconds(30);
constexpr int64_t kBytesPerMebibyte = 1 << 20;

}  // namespace

bool Coordinator::wants_mirror(const Job& job) {
  const RecoverySpec& recovery = job.spec.recovery;
  return recovery.mirrors() && job.record.state == JobState::kRunning && !job.record.proof;
}

// Every rank's copy goes to another worker of the job: of another host where there is one, then
// where fewest copies are, then where the rank's weights are, too: on the ranks of its pipeline
// column, or its DualPipe twin's. Empty: it has no other worker, or one that takes in no copies.
std::map<Rank, WorkerId> Coordinator::choose_buddies(const Job& job) const {
  const std::vector<RankPlacement>& placement = job.record.placement;
  const ParallelismSpec& grid = job.spec.parallelism;
  const std::set<WorkerId> all = hosts(job);
  const bool able = std::all_of(all.begin(), all.end(), [&](WorkerId id) {
    return !workers_.at(id).state_place.address.empty();
  });
  if (all.size() < 2 || !able) return {};
  std::map<WorkerId, std::set<int64_t>> stages;  // that a worker's ranks hold
  for (int32_t rank = 0; rank < std::ssize(placement); ++rank) {
    const int64_t index = grid_position(grid, Rank{rank}).pipeline_index;
    for (const int64_t stage : stages_of(grid, index)) {
      stages[placement[rank].worker].insert(stage);
    }
  }
  std::map<WorkerId, int64_t> kept;
  std::map<Rank, WorkerId> buddies;
  for (int32_t rank = 0; rank < std::ssize(placement); ++rank) {
    const Worker& own = workers_.at(placement[rank].worker);
    const int64_t index = grid_position(grid, Rank{rank}).pipeline_index;
    const int64_t stage = stages_of(grid, index).front();
    const auto cost = [&](WorkerId id) {
      const bool same_host = workers_.at(id).host == own.host;
      return std::tuple(same_host, kept[id], !stages[id].contains(stage), id);
    };
    std::optional<WorkerId> best;
    for (const WorkerId id : all) {
      if (id != own.record.id && (!best || cost(id) < cost(*best))) best = id;
    }
    buddies[Rank{rank}] = *best;
    ++kept[*best];
  }
  return buddies;
}

// Steps from the newest one known to one that no rank can have passed when it hears of it.
int64_t Coordinator::mirror_lead(const Job& job) {
  double seconds = 0.0;
  for (const StepRecord& step : job.recent_steps) seconds += step.step_seconds;
  const double mean = seconds / static_cast<double>(std::max<size_t>(1, job.recent_steps.size()));
  const double steps = mean > 0.0 ? kOrderSeconds / mean : 0.0;
  return (kLeadMin + static_cast<int64_t>(std::min(steps, 1000.0))) * job.mirror.haste;
}

// Called when a step is reported and at every tick: names the next step, or repeats what was named.
void Coordinator::keep_mirroring(Job& job) {
  if (!wants_mirror(job)) return;
  MirrorState& mirror = job.mirror;
  if (!mirror.awaiting.empty()) {
    if (now_ - mirror.ordered_at < two_beats()) return;
    mirror.ordered_at = now_;
    for (const WorkerId worker : mirror.awaiting) send_mirror(job, worker);
    return;
  }
  const JobRecord& record = job.record;
  const bool trains = record.last_step && record.last_step->epoch == record.epoch;
  if (!trains || now_ < mirror.not_before) return;
  if (mirror.buddies.empty()) mirror.buddies = choose_buddies(job);
  if (mirror.buddies.empty()) return;
  const int64_t step = std::max(record.last_step->step + mirror_lead(job),
                                mirror.kept_step + job.spec.recovery.mirror);
  if (step >= record.target_steps) return;
  mirror.step = step;
  mirror.ordered_at = now_;
  mirror.awaiting = hosts(job);
  for (const WorkerId worker : mirror.awaiting) send_mirror(job, worker);
}

void Coordinator::send_mirror(const Job& job, WorkerId worker) {
  const JobRecord& record = job.record;
  MirrorRanks order{record.id,
                    record.epoch,
                    job.mirror.step,
                    job.mirror.kept_step,
                    job.spec.recovery.mirror_rate * kBytesPerMebibyte,
                    {},
                    {}};
  for (const auto& [rank, buddy] : job.mirror.buddies) {
    if (record.placement[rank.value].worker == worker) {
      order.send.push_back({rank, workers_.at(buddy).state_place});
    }
    if (buddy == worker) order.keep.push_back(rank);
  }
  send(worker, std::move(order));
}

// The coordinator before this one named a later step, or knew of copies that this one does not.
void Coordinator::catch_up(Job& job, const RanksMirrored& message) {
  MirrorState& mirror = job.mirror;
  const bool is_news = message.step > mirror.step || message.kept_step > mirror.kept_step;
  if (!is_news || mirror.awaiting.empty() || message.step >= job.record.target_steps) return;
  mirror.step = std::max(mirror.step, message.step);
  mirror.kept_step = std::max(mirror.kept_step, message.kept_step);
  mirror.ordered_at = now_;
  mirror.awaiting = hosts(job);
  for (const WorkerId host : mirror.awaiting) send_mirror(job, host);
}

void Coordinator::on_message(Worker& worker, const RanksMirrored& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || job->record.state != JobState::kRunning) return;
  MirrorState& mirror = job->mirror;
  if (message.outdated) return catch_up(*job, message);
  if (message.step != mirror.step || !mirror.awaiting.contains(worker.record.id)) return;
  if (message.failure.empty()) {
    mirror.awaiting.erase(worker.record.id);
    if (!mirror.awaiting.empty()) return;
    mirror.kept_step = mirror.step;
    mirror.haste = std::max<int64_t>(1, mirror.haste / 2);
    mirror.told.clear();
    return;  // the next one is named when a step is reported
  }
  mirror.awaiting.clear();
  if (message.missed) {
    mirror.haste = std::min(2 * mirror.haste, kHasteMax);
    return;
  }
  mirror.not_before = now_ + kMirrorRetry;
  if (mirror.told == message.failure) return;
  mirror.told = message.failure;
  note(*job, "worker " + worker.record.name,
       {"mirror_failed", fmt::format("copies of the state of step {} could not be made ({}); tried "
                                     "again in {:.0f} s",
                                     message.step, message.failure, to_seconds(kMirrorRetry))});
}

}  // namespace penstock
