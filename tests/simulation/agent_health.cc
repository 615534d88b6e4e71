// A sick host: ranks crash there again and again, and its checks notice, or do not. Users release
// it all the same.
#include "tests/simulation/agent_cluster.h"

namespace penstock {
namespace {

constexpr double kNoticed = 0.5;
constexpr double kReleased = 0.002;  // per tick
constexpr Duration kCheckLongest = std::chrono::seconds(3);

}  // namespace

bool AgentCluster::is_sick(const Worker& worker) const {
  return options_.sick_worker && faulty_ && &worker == &workers_.front();
}

Status AgentCluster::begin_check(Worker& worker) {
  worker.check_ends_ns = within(kCheckLongest);
  worker.check_incarnation = worker.incarnation;
  return {};
}

// Of a daemon that is still the one that began it.
void AgentCluster::end_check(Worker& worker) {
  if (!worker.check_ends_ns || now_ns() < *worker.check_ends_ns) return;
  worker.check_ends_ns.reset();
  if (worker.check_incarnation != worker.incarnation) return;
  const bool passed = !is_sick(worker) || !chance(kNoticed);
  trace(worker.name, "its host {} a check", passed ? "passes" : "fails");
  worker.agent->on_host_checked(passed, "simulated");
}

void AgentCluster::release_hosts() {
  if (!options_.sick_worker) return;
  for (const Worker& worker : workers_) {
    if (!faulty_ || !core_hears() || !chance(kReleased)) continue;
    const auto* known = core_->find_worker(worker.name);
    if (known != nullptr && known->record.quarantine) {
      feed(QuarantineWorker{RequestId{++requests_}, worker.name, {}});
    }
  }
}

}  // namespace penstock
