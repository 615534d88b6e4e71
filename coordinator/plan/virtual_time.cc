#include "coordinator/plan/virtual_time.h"

#include <algorithm>
#include <deque>

#include "comm/base/check.h"
#include "comm/run/layout.h"

namespace penstock {
namespace {

struct Message {
  int32_t microbatch = -1;
  double arrival = 0.0;
};

class Pipeline {
 public:
  Pipeline(const ParallelismSpec& parallelism, const std::vector<Program>& programs,
           ProgramKind kind, const OperationCosts& costs)
      : costs_(costs), channels_(programs.size() * 4) {
    timeline_.ranks.resize(programs.size());
    for (const Program& program : programs) {
      Rank rank{.program = instructions_of(program, kind)};
      for (const int64_t stage : stages_of(parallelism, program.pipeline_index)) {
        rank.factors.push_back(
            costs.stage_factors.empty() ? 1.0 : costs.stage_factors[static_cast<size_t>(stage)]);
      }
      timeline_.ranks[ranks_.size()].spans.resize(rank.program.size());
      ranks_.push_back(std::move(rank));
    }
  }

  Result<Timeline> run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t r = 0; r < ranks_.size(); ++r) {
        const size_t before = ranks_[r].at;
        PENSTOCK_TRY(advance(r));
        moved = moved || ranks_[r].at != before;
      }
      moved = reduce_when_all_are_there() || moved;
    }
    PENSTOCK_TRY(check_ended());
    for (const Rank& rank : ranks_) timeline_.makespan = std::max(timeline_.makespan, rank.now);
    for (RankTimeline& rank : timeline_.ranks) rank.idle = timeline_.makespan - rank.busy;
    return std::move(timeline_);
  }

 private:
  struct Rank {
    const std::vector<Instruction>& program;
    std::vector<double> factors = {};  // by direction
    size_t at = 0;                     // next instruction
    double now = 0.0;
    int32_t live = 0;
    std::deque<uint8_t> weight_queue = {};  // directions, oldest first
  };

  // Until the rank has to wait, or is at its end.
  Status advance(size_t r) {
    Rank& rank = ranks_[r];
    for (; rank.at < rank.program.size(); ++rank.at) {
      const Instruction& i = rank.program[rank.at];
      Span& span = timeline_.ranks[r].spans[rank.at];
      if (i.op == Op::kReduceGradients) return {};
      if (i.op == Op::kReceiveForward || i.op == Op::kReceiveBackward) {
        std::deque<Message>& channel = channel_of(r, i);
        if (channel.empty()) return {};
        if (channel.front().microbatch != i.microbatch) {
          return violation(r, "its channel delivers another micro-batch");
        }
        span = {rank.now, std::max(rank.now, channel.front().arrival)};
        channel.pop_front();
      } else if (i.op == Op::kSendForward || i.op == Op::kSendBackward) {
        channel_of(static_cast<size_t>(i.peer), i)
            .push_back({i.microbatch, departure(r, i) + costs_.send});
        span = {rank.now, rank.now};
      } else {
        span = {rank.now, rank.now + duration(rank, i)};
        timeline_.ranks[r].busy += span.end - span.begin;
        account(r, i);
      }
      rank.now = span.end;
    }
    return {};
  }

  static bool makes(const Instruction& pass, const Instruction& send) {
    if (send.op == Op::kSendBackward && pass.op == Op::kOverlapped) {
      return pass.backward_direction == send.direction &&
             pass.backward_microbatch == send.microbatch;
    }
    const bool kind = send.op == Op::kSendForward
                          ? pass.op == Op::kForward || pass.op == Op::kOverlapped
                          : pass.op == Op::kBackward || pass.op == Op::kBackwardInput;
    return kind && pass.direction == send.direction && pass.microbatch == send.microbatch;
  }

  // A value leaves when its send is due, but that of a pass with a tail as soon as it is final.
  double departure(size_t r, const Instruction& send) const {
    const Rank& rank = ranks_[r];
    for (size_t at = rank.at; at-- > 0;) {
      const Instruction& pass = rank.program[at];
      if (!makes(pass, send)) continue;
      const Span& span = timeline_.ranks[r].spans[at];
      double tail = 0.0;  // share of the pass
      if (pass.op == Op::kBackward) tail = costs_.backward_tail / costs_.backward;
      if (pass.op == Op::kOverlapped) tail = costs_.pair_tail / costs_.pair;
      return tail > 0.0 ? span.end - tail * (span.end - span.begin) : rank.now;
    }
    return rank.now;
  }

  double duration(const Rank& rank, const Instruction& i) const {
    const auto factor = [&](uint8_t direction) { return rank.factors[direction]; };
    switch (i.op) {
      case Op::kForward:
        return costs_.forward * factor(i.direction);
      case Op::kBackward:
        return costs_.backward * factor(i.direction);
      case Op::kBackwardInput:
        return costs_.backward_input * factor(i.direction);
      case Op::kBackwardWeight:
        PENSTOCK_CHECK(!rank.weight_queue.empty());
        return costs_.backward_weight * factor(rank.weight_queue.front());
      case Op::kOverlapped: {
        const double forward_share = costs_.forward / (costs_.forward + costs_.backward);
        return costs_.pair * (forward_share * factor(i.direction) +
                              (1.0 - forward_share) * factor(i.backward_direction));
      }
      case Op::kOptimizerStep:
        return costs_.optimizer;
      default:
        PENSTOCK_CHECK(false, to_string(i));
        return 0.0;
    }
  }

  // What is alive. In a pair the forward's activations exist before the backward's are freed.
  void account(size_t r, const Instruction& i) {
    Rank& rank = ranks_[r];
    RankTimeline& timeline = timeline_.ranks[r];
    if (i.op == Op::kForward || i.op == Op::kOverlapped) ++rank.live;
    timeline.live_max = std::max(timeline.live_max, rank.live);
    if (i.op == Op::kBackwardInput) rank.weight_queue.push_back(i.direction);
    const auto queued = static_cast<int32_t>(rank.weight_queue.size());
    timeline.weight_queue_max = std::max(timeline.weight_queue_max, queued);
    if (i.op == Op::kBackwardWeight) rank.weight_queue.pop_front();
    if (i.op == Op::kBackward || i.op == Op::kOverlapped || i.op == Op::kBackwardWeight)
      --rank.live;
  }

  bool reduce_when_all_are_there() {
    double begin = 0.0;
    for (const Rank& rank : ranks_) {
      if (!is_at_reduction(rank)) return false;
      begin = std::max(begin, rank.now);
    }
    for (size_t r = 0; r < ranks_.size(); ++r) {
      timeline_.ranks[r].spans[ranks_[r].at++] = {begin, begin + costs_.reduce};
      timeline_.ranks[r].busy += costs_.reduce;
      ranks_[r].now = begin + costs_.reduce;
    }
    return true;
  }

  static bool is_at_reduction(const Rank& rank) {
    return rank.at < rank.program.size() && rank.program[rank.at].op == Op::kReduceGradients;
  }

  Status check_ended() const {
    // Of ranks in a circle, one that waits for data says more than one that waits for it to reduce.
    for (const bool at_reduction : {false, true}) {
      for (size_t r = 0; r < ranks_.size(); ++r) {
        const bool over = ranks_[r].at == ranks_[r].program.size();
        if (!over && is_at_reduction(ranks_[r]) == at_reduction) {
          return violation(r, "waits for ever: deadlock");
        }
      }
    }
    for (size_t c = 0; c < channels_.size(); ++c) {
      if (channels_[c].empty()) continue;
      return invalid_argument(
          fmt::format("pipeline rank {} is sent {} more {} of direction {} than it receives", c / 4,
                      channels_[c].size(), c % 2 == 1 ? "activations" : "gradients", c / 2 % 2));
    }
    return {};
  }

  Status violation(size_t r, std::string_view rule) const {
    const size_t at = ranks_[r].at;
    return invalid_argument(fmt::format("program of pipeline rank {}, instruction {} ({}): {}", r,
                                        at, to_string(ranks_[r].program[at]), rule));
  }

  std::deque<Message>& channel_of(size_t receiver, const Instruction& i) {
    const bool forward = i.op == Op::kSendForward || i.op == Op::kReceiveForward;
    return channels_[receiver * 4 + i.direction * 2u + (forward ? 1 : 0)];
  }

  const OperationCosts& costs_;
  std::vector<Rank> ranks_;
  std::vector<std::deque<Message>> channels_;  // one sender each: the receiver's neighbour
  Timeline timeline_;
};

}  // namespace

double Timeline::bubble() const {
  double most = 0.0;
  for (const RankTimeline& rank : ranks) most = std::max(most, rank.idle);
  return most;
}

const std::vector<Instruction>& instructions_of(const Program& program, ProgramKind kind) {
  return kind == ProgramKind::kTraining ? program.training : program.evaluation;
}

Result<Timeline> run_in_virtual_time(const ParallelismSpec& parallelism,
                                     const std::vector<Program>& programs, ProgramKind kind,
                                     const OperationCosts& costs) {
  PENSTOCK_CHECK(std::ssize(programs) == parallelism.pipeline, programs.size());
  PENSTOCK_CHECK(
      costs.stage_factors.empty() || std::ssize(costs.stage_factors) == stage_count(parallelism),
      costs.stage_factors.size());
  return Pipeline(parallelism, programs, kind, costs).run();
}

double bubble_by_formula(const ParallelismSpec& parallelism, const OperationCosts& costs) {
  const auto P = static_cast<double>(parallelism.pipeline);
  const double pair_hop = costs.pair - costs.pair_tail + costs.backward - 3 * costs.backward_weight;
  switch (parallelism.schedule) {
    case Schedule::kDualPipe:
      if (P == 1) return 0.0;
      return (P / 2 - 1) * pair_hop;
    case Schedule::kDualPipeV:
      return (P - 1) * pair_hop;
    case Schedule::kZeroBubble:
      return (P - 1) * (costs.forward + costs.backward - 2 * costs.backward_weight);
    case Schedule::kOneForwardOneBackward:
      return (P - 1) * (costs.forward + costs.backward - costs.backward_tail);
  }
  PENSTOCK_CHECK(false);
  return 0.0;
}

}  // namespace penstock
