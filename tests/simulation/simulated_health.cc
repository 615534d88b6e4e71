// Quarantine: nothing is placed on a worker whose host is not trusted, and it takes no more workers
// than it may.
#include <algorithm>

#include "tests/simulation/simulated_coordinator.h"

namespace penstock {

void SimulatedCoordinator::check_health(const Effects& effects) {
  for (const JobEvent& event : effects.events) {
    if (event.reason.code == "worker_quarantined") ++counts_.quarantines;
    if (event.reason.code != "placed") continue;
    const JobRecord& record = core_->find_job(event.job)->record;
    if (record.restored_from_memory) continue;  // where its state is, to save it
    for (const RankPlacement& at : record.placement) {
      const WorkerRecord& worker = core_->find_worker(at.worker)->record;
      if (!worker.quarantine && !worker.check_due) continue;
      violate(fmt::format("job {} epoch {} is placed on {}, whose host is not trusted", event.job,
                          record.epoch, worker.name));
    }
  }
  const auto& workers = core_->workers();
  const auto taken = std::count_if(workers.begin(), workers.end(), [](const auto& worker) {
    const auto& quarantine = worker.second.record.quarantine;
    return quarantine && !quarantine->by_user;
  });
  if (taken > std::max<int64_t>(1, std::ssize(workers) / 4)) {
    violate(fmt::format("{} of {} workers are in quarantine by themselves", taken, workers.size()));
  }
}

}  // namespace penstock
