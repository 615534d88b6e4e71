// Copies of ranks' state in other daemons' memory, as worker/agent/state_mirror.h makes them: each
// takes some time, and some are missed.
#include <algorithm>

#include "tests/simulation/agent_cluster.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

constexpr Duration kStreamMax = milliseconds(300);
constexpr Duration kRetry = milliseconds(300);

}  // namespace

void AgentCluster::take_order(Worker& worker, const MirrorRanks& order) {
  Copies& copies = worker.copies;
  Copies::Round& round = copies.rounds[order.job];
  const MirrorRanks& last = round.order;
  if (order.epoch < last.epoch) return;
  const bool same = order.epoch == last.epoch;
  if (same && (order.step < last.step || order.kept_step < last.kept_step)) {
    return copies.to_say.push_back(
        {order.job, last.epoch, last.step, {}, false, true, last.kept_step});
  }
  if (same && order.step == last.step) {
    if (round.outcome) copies.to_say.push_back(*round.outcome);
    return;
  }
  round = {order, {}, {}};
  std::erase_if(copies.kept, [&](const auto& entry) {
    const auto& [job, epoch, rank, step] = entry.first;
    return job == order.job && step != order.step && step != order.kept_step;
  });
  for (const MirrorTarget& target : order.send) take_copy(worker, order.job, target.rank);
}

// Once the rank is there, and before it has overwritten the step.
void AgentCluster::take_copy(Worker& worker, JobId job, Rank rank) {
  const auto found = worker.copies.rounds.find(job);
  if (found == worker.copies.rounds.end() || found->second.outcome) return;
  Copies::Round& round = found->second;
  const MirrorRanks& order = round.order;
  const auto target = std::find_if(order.send.begin(), order.send.end(),
                                   [&](const MirrorTarget& sent) { return sent.rank == rank; });
  const auto memory = worker.memory.find({job, rank});
  if (target == order.send.end() || memory == worker.memory.end()) return;
  if (memory->second.epoch != order.epoch || round.ranks.contains(rank)) return;
  const std::map<int64_t, Trained>& steps = memory->second.steps;
  const auto state = steps.find(order.step);
  const bool overwritten = state == steps.end() && steps.upper_bound(order.step) != steps.end();
  if (overwritten || (state != steps.end() && chance(0.02))) {
    round.outcome = {job, order.epoch, order.step, "too late", true};
    return worker.copies.to_say.push_back(*round.outcome);
  }
  if (state == steps.end()) return;
  const CopyKey key{job, order.epoch, rank, order.step};
  worker.copies.kept[key] = state->second;
  round.ranks[rank] = false;
  worker.copies.under_way.push_back({within(kStreamMax), key, state->second, target->to});
}

AgentCluster::Worker* AgentCluster::find_worker(const StatePlace& place) {
  for (Worker& worker : workers_) {
    if (worker.name == place.address) return place_of(worker) == place ? &worker : nullptr;
  }
  return nullptr;
}

StatePlace AgentCluster::place_of(const Worker& worker) {
  return {worker.name, {static_cast<uint64_t>(worker.incarnation), 0}};
}

bool AgentCluster::deliver_copy(Worker& worker, const Copies::UnderWay& copy) {
  const auto& [job, epoch, rank, step] = copy.key;
  const auto found = worker.copies.rounds.find(job);
  const bool wanted = found != worker.copies.rounds.end() && !found->second.outcome &&
                      found->second.order.epoch == epoch && found->second.order.step == step;
  if (!wanted) return true;
  Worker* const buddy = find_worker(copy.to);
  if (buddy == nullptr || !buddy->agent || now_ns() < buddy->stalled_until_ns) return false;
  const auto expected = buddy->copies.rounds.find(job);
  if (expected == buddy->copies.rounds.end()) return false;
  const MirrorRanks& order = expected->second.order;
  const bool takes = order.epoch == epoch && order.step == step &&
                     std::find(order.keep.begin(), order.keep.end(), rank) != order.keep.end();
  if (!takes) return false;
  buddy->copies.kept[copy.key] = copy.trained;
  Copies::Round& round = found->second;
  round.ranks[rank] = true;
  const bool all = round.ranks.size() == round.order.send.size() &&
                   std::all_of(round.ranks.begin(), round.ranks.end(),
                               [](const auto& entry) { return entry.second; });
  if (all) {
    round.outcome = {job, epoch, step, "", false};
    worker.copies.to_say.push_back(*round.outcome);
    ++counts_.mirrored;
  }
  return true;
}

void AgentCluster::move_copies(Worker& worker) {
  Copies& copies = worker.copies;
  for (Copies::UnderWay& copy : std::exchange(copies.under_way, {})) {
    if (now_ns() >= copy.at_ns && deliver_copy(worker, copy)) continue;
    if (now_ns() >= copy.at_ns) copy.at_ns = within(kRetry);
    copies.under_way.push_back(std::move(copy));
  }
  for (const RanksMirrored& outcome : std::exchange(copies.to_say, {})) {
    worker.agent->on_mirrored(outcome);
  }
}

void AgentCluster::copy_actions(Worker& worker, AgentActions& actions) {
  actions.mirror = [this, &worker](const MirrorRanks& order) { take_order(worker, order); };
  actions.held_copies = [&worker](JobId job, Epoch epoch) {
    std::vector<HeldRank> ranks;
    for (const auto& [key, trained] : worker.copies.kept) {
      const auto& [of_job, of_epoch, rank, step] = key;
      if (of_job != job || of_epoch != epoch) continue;
      if (ranks.empty() || ranks.back().rank != rank) ranks.push_back({rank, {}});
      ranks.back().steps.push_back(step);
    }
    return ranks;
  };
  actions.fence_copies = [&worker](JobId job, Epoch epoch) {
    const auto found = worker.copies.rounds.find(job);
    if (found != worker.copies.rounds.end() && found->second.order.epoch <= epoch) {
      worker.copies.rounds.erase(found);
    }
    std::erase_if(worker.copies.kept, [&](const auto& entry) {
      return std::get<JobId>(entry.first) == job && std::get<Epoch>(entry.first) < epoch;
    });
  };
}

// What a rank finds at a daemon that it is sent to.
bool AgentCluster::fetch(const StartRank& start, Trained* trained) {
  const Worker* const keeper = find_worker(start.state_from);
  if (keeper == nullptr || !keeper->agent) return false;
  const auto copy = keeper->copies.kept.find(
      {start.job, Epoch{start.epoch.value - 1}, start.rank, start.restore_step});
  if (copy == keeper->copies.kept.end()) return false;
  *trained = copy->second;
  ++counts_.fetched;
  return true;
}

}  // namespace penstock
