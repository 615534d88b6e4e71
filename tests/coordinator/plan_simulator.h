// Runs the training programs of one pipeline in virtual time: every rank works when its inputs are
// there, sends take no time, operations cost what the test says.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <tuple>
#include <vector>

#include "comm/run/program.h"

namespace penstock {

struct OpCosts {
  double forward = 1.0;
  double backward = 2.0;  // full
  double backward_weight = 1.0;
  double pair = 3.0;
  double backward_input() const { return backward - backward_weight; }
};

struct SimulatedRank {
  double busy = 0.0;
  double finished = 0.0;
  int live_max = 0;  // activations whose weight gradient has not run, at their most
  int weight_queue_max = 0;
  std::map<Op, int> counts;
};

struct SimulatedStep {
  bool completed = false;
  double makespan = 0.0;
  std::vector<SimulatedRank> ranks;
  // The largest idle time of a rank. All ranks start together and the step ends when the last one
  // ends.
  double worst_bubble() const {
    double worst = 0.0;
    for (const SimulatedRank& rank : ranks) worst = std::max(worst, makespan - rank.busy);
    return worst;
  }
};

inline double cost_of(const OpCosts& costs, Op op) {
  switch (op) {
    case Op::kForward:
      return costs.forward;
    case Op::kBackward:
      return costs.backward;
    case Op::kBackwardInput:
      return costs.backward_input();
    case Op::kBackwardWeight:
      return costs.backward_weight;
    case Op::kOverlapped:
      return costs.pair;
    default:
      return 0.0;
  }
}

inline SimulatedStep simulate(const std::vector<Program>& programs, const OpCosts& costs) {
  SimulatedStep step;
  step.ranks.resize(programs.size());
  std::map<std::tuple<int, int, int, bool>, std::deque<double>> channels;  // arrival times
  std::vector<size_t> at(programs.size(), 0);
  std::vector<int> live(programs.size(), 0), queued(programs.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (int r = 0; r < static_cast<int>(programs.size()); ++r) {
      SimulatedRank& rank = step.ranks[r];
      for (; at[r] < programs[r].training.size(); ++at[r], moved = true) {
        const Instruction& i = programs[r].training[at[r]];
        const bool forward = i.op == Op::kSendForward || i.op == Op::kReceiveForward;
        if (i.op == Op::kSendForward || i.op == Op::kSendBackward) {
          channels[{r, i.peer, i.direction, forward}].push_back(rank.finished);
          continue;
        }
        if (i.op == Op::kReceiveForward || i.op == Op::kReceiveBackward) {
          auto& channel = channels[{i.peer, r, i.direction, forward}];
          if (channel.empty()) break;
          rank.finished = std::max(rank.finished, channel.front());
          channel.pop_front();
          continue;
        }
        if (i.op == Op::kForward || i.op == Op::kOverlapped) ++live[r];
        rank.live_max = std::max(rank.live_max, live[r]);
        if (i.op == Op::kBackwardInput)
          rank.weight_queue_max = std::max(rank.weight_queue_max, ++queued[r]);
        if (i.op == Op::kBackwardWeight) --queued[r];
        if (i.op == Op::kBackward || i.op == Op::kOverlapped || i.op == Op::kBackwardWeight)
          --live[r];
        ++rank.counts[i.op];
        rank.busy += cost_of(costs, i.op);
        rank.finished += cost_of(costs, i.op);
      }
    }
  }
  step.completed = true;
  for (size_t r = 0; r < programs.size(); ++r) {
    step.completed = step.completed && at[r] == programs[r].training.size();
    step.makespan = std::max(step.makespan, step.ranks[r].finished);
  }
  return step;
}

}  // namespace penstock
