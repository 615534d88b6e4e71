// Copies of ranks' state on other hosts: what the agent passes on of them.
#include "comm/base/log.h"
#include "worker/agent/agent.h"

namespace penstock {

void Agent::handle(int64_t, const MirrorRanks& message) {
  if (!fenced(message.job, message.epoch)) actions_.mirror(message);
}

void Agent::on_mirrored(const RanksMirrored& outcome) {
  if (fenced(outcome.job, outcome.epoch)) return;
  const Status sent = send(outcome);  // the coordinator repeats the order until it is answered
  if (!sent.ok()) log_debug("RanksMirrored of job {} not sent: {}", outcome.job, sent.to_string());
}

RanksStopped Agent::what_is_held(JobId job, Epoch epoch) const {
  return {job, epoch, actions_.held_state(job), actions_.held_copies(job, epoch)};
}

}  // namespace penstock
