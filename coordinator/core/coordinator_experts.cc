// Moving experts between ranks: what they carry is measured, and at a checkpoint the job restarts
// from it with other seats (coordinator/plan/expert_placement.h).
//
// Seats change in one place, with the order that ends an epoch: the record of the new seats and the
// job's way to RECOVERING are one batch. So an epoch has the same seats from its first StartRank to
// its last, whenever this process dies; and since checkpoints know nothing of seats, any of them
// goes with any checkpoint.
#include <algorithm>

#include "comm/run/layout.h"
#include "coordinator/core/coordinator.h"

namespace penstock {
namespace {

// Hosts of one expert group when every group is cut into equal blocks of neighbours, one host each;
// else 1: hosts are left out of account then. `host`: by rank.
int64_t nodes_of_groups(const std::vector<std::string>& host, size_t group_size) {
  size_t block = 1;  // ranks of the first group that are on its first host
  while (block < group_size && host[block] == host[0]) ++block;
  if (group_size % block != 0) return 1;
  for (size_t rank = 0; rank < host.size(); ++rank) {
    const bool begins_block = rank % block == 0;
    const bool begins_group = rank % group_size == 0;
    if (!begins_group && (host[rank] == host[rank - 1]) == begins_block) return 1;
  }
  return static_cast<int64_t>(group_size / block);
}

std::string words_of(const ExpertBalance& balance) {
  return fmt::format(
      "{} experts between ranks, so that the most loaded one has {:.2f} instead of "
      "{:.2f} times the mean load",
      balance.moved(), balance.after(), balance.before());
}

}  // namespace

Result<ExpertBalance> Coordinator::measured_balance(const Job& job) const {
  const int64_t ranks = job.spec.parallelism.expert;
  std::vector<std::string> host;
  for (const RankPlacement& at : job.record.placement) host.push_back(workers_.at(at.worker).host);
  return balance_experts(job.loads, job.seats,
                         {.groups = job.spec.model.n_group,
                          .nodes = nodes_of_groups(host, static_cast<size_t>(ranks)),
                          .ranks = ranks});
}

Result<ExpertBalance> Coordinator::rebalance_plan(const Job& job) const {
  const JobRecord& record = job.record;
  const auto refuse = [&](const std::string& why) {
    return failed_precondition(fmt::format("job {} \"{}\" {}", record.id, record.name, why));
  };
  if (record.state != JobState::kRunning) {
    return refuse(
        fmt::format("is {}; experts are moved while it is RUNNING", job_state_name(record.state)));
  }
  if (job.spec.parallelism.expert == 1) {
    return refuse("has parallelism.expert 1: every rank has every expert");
  }
  const ModelConfig& model = job.spec.model;
  if (expert_layers(model).empty()) return refuse("has no layer with routed experts");
  if (!experts_can_move(model) || job.spec.parallelism.expert > kBalancedRanksMax) {
    return refuse(
        fmt::format("is too large: the experts of all layers may be {}, the ranks of an "
                    "expert group {}",
                    kSeatsMax, kBalancedRanksMax));
  }
  const std::optional<int64_t> next = next_save_step(job);
  if (!next || *next >= record.target_steps) {
    return refuse(
        "saves no further checkpoint before its last step, and experts move when one is "
        "committed; see checkpoint.interval");
  }
  if (job.loads.empty()) {
    return refuse("has no measured load yet: it comes with every checkpoint");
  }
  PENSTOCK_TRY_ASSIGN(ExpertBalance balance, measured_balance(job));
  if (balance.moved() == 0) {
    return refuse(
        fmt::format("would gain nothing: no other placement is better, with the most "
                    "loaded rank at {:.2f} times the mean load",
                    balance.before()));
  }
  return balance;
}

void Coordinator::on_event(const RebalanceJob& rebalance) {
  const auto refuse = [&](Status status) {
    effects_.answers.push_back({rebalance.request, std::move(status), {}});
  };
  const auto found = jobs_.find(rebalance.job);
  if (found == jobs_.end()) return refuse(not_found(fmt::format("no job {}", rebalance.job)));
  Job& job = found->second;
  const Result<ExpertBalance> balance = rebalance_plan(job);
  if (!balance.ok()) return refuse(balance.status());
  if (!job.record.rebalance) {
    job.record.rebalance = true;
    changed(job);
    note(job, "user",
         {"rebalance_requested", "the next checkpoint is to move " + words_of(*balance)});
  }
  effects_.answers.push_back({rebalance.request, {}, job.record.id});
}

void Coordinator::on_message(Worker& worker, const ExpertLoadReport& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || job->record.state != JobState::kRunning) return;
  if (!hosted_rank(*job, message.rank, worker.record.id)) return;
  const ModelConfig& model = job->spec.model;
  if (!experts_can_move(model) || message.step > job->record.target_steps) return;
  const std::vector<int64_t> known = expert_layers(model);
  const bool fits =
      std::all_of(message.layers.begin(), message.layers.end(), [&](const auto& entry) {
        return std::binary_search(known.begin(), known.end(), entry.first) &&
               std::ssize(entry.second) == model.n_routed_experts;
      });
  if (!fits) return;
  for (const auto& [layer, loads] : message.layers) job->loads[layer] = loads;
  job->loads_step = message.step;
}

// After the commit of `step`: asked to, or by the rule of the spec.
void Coordinator::rebalance_at_checkpoint(Job& job, int64_t step) {
  JobRecord& record = job.record;
  const int64_t trained = record.last_step ? std::max(record.last_step->step, step) : step;
  if (record.state != JobState::kRunning || trained >= record.target_steps || job.loads.empty()) {
    return;
  }
  if (record.proof) return;  // the steps to compare with were trained with experts where they are
  const RebalanceSpec& rule = job.spec.parallelism.rebalance;
  const int64_t interval = job.spec.checkpoint.interval;
  const int64_t saves = record.saving ? record.saving->commits : interval > 0 ? step / interval : 0;
  const bool due = rule.threshold > 0.0 && saves > 0 && saves % rule.every_checkpoints == 0 &&
                   job.spec.parallelism.expert <= kBalancedRanksMax;
  const bool asked = std::exchange(record.rebalance, false);
  if (!asked && !due) return;
  changed(job);
  const Result<ExpertBalance> balance = measured_balance(job);
  const bool better = balance.ok() && balance->moved() > 0;
  if (!better || !(asked || worth_moving(*balance, rule.threshold))) {
    if (asked) {
      note(job, "coordinator",
           {"rebalance_dropped", balance.ok() ? "experts stay: by the newest measured load no "
                                                "other placement is better"
                                              : "experts stay: " + balance.status().message()});
    }
    return;
  }
  job.seats = balance->seats(job.seats);
  effects_.seats.push_back({record.id, job.seats});
  record.rebalanced_step = record.highest_step;  // records up to it are of the old seats
  stop_epoch(job, JobState::kRecovering, JobState::kFailed, 0, "coordinator",
             {kRebalancing, fmt::format("restarts from the checkpoint of step {} to move {}", step,
                                        words_of(*balance))});
}

// Of the layers that the ranks of one pipeline index hold.
ExpertSeats Coordinator::seats_for(const Job& job, int64_t pipeline_index) const {
  const ModelConfig& model = job.spec.model;
  const int64_t stages = stage_count(job.spec.parallelism);
  ExpertSeats seats;
  for (const int64_t stage : stages_of(job.spec.parallelism, pipeline_index)) {
    Range layers = stage_layers(model.num_hidden_layers, stages, stage);
    if (stage == stages - 1) layers.end += model.num_nextn_predict_layers;
    seats.layers.insert(job.seats.layers.lower_bound(layers.begin),
                        job.seats.layers.lower_bound(layers.end));
  }
  return seats;
}

}  // namespace penstock
