#include "tests/coordinator/plan_meaning.h"

#include <deque>
#include <map>
#include <tuple>

#include "comm/run/layout.h"

namespace penstock {
namespace {

using Symbol = uint64_t;
using Place = std::pair<int, int>;                // (direction, micro-batch)
using Channel = std::tuple<int, int, int, bool>;  // (from, to, direction, of activations)

Symbol mix(std::initializer_list<Symbol> parts) {
  Symbol symbol = 0x9e3779b97f4a7c15u;
  for (const Symbol part : parts) {
    symbol = (symbol ^ part) * 0xff51afd7ed558ccdu;
    symbol ^= symbol >> 32;
  }
  return symbol;
}

std::optional<Symbol> find(const std::map<Place, Symbol>& values, const Place& place) {
  const auto found = values.find(place);
  return found == values.end() ? std::nullopt : std::optional(found->second);
}

class RankMeaning {
 public:
  RankMeaning(const ParallelismSpec& parallelism, int rank)
      : parallelism_(parallelism), rank_(rank) {}

  // False: the instruction has no meaning where it stands.
  bool execute(const Instruction& i, std::map<Channel, std::deque<Symbol>>& channels) {
    if (reduced_ && i.op != Op::kOptimizerStep) return false;
    const Place place{i.direction, i.microbatch};
    switch (i.op) {
      case Op::kReceiveForward:
        return receive(received_outputs_, place, channels[{i.peer, rank_, i.direction, true}]);
      case Op::kReceiveBackward:
        return receive(received_gradients_, place, channels[{i.peer, rank_, i.direction, false}]);
      case Op::kSendForward:
        return send(outputs_, place, channels[{rank_, i.peer, i.direction, true}]);
      case Op::kSendBackward:
        return send(input_gradients_, place, channels[{rank_, i.peer, i.direction, false}]);
      case Op::kForward:
        return forward(place);
      case Op::kBackward:
        return backward(place) && weight(place);
      case Op::kBackwardInput:
        queue_.push_back(place);
        return backward(place);
      case Op::kBackwardWeight: {
        if (queue_.empty()) return false;
        const Place oldest = queue_.front();
        queue_.pop_front();
        return weight(oldest);
      }
      case Op::kOverlapped: {
        const Place behind{i.backward_direction, i.backward_microbatch};
        return behind.first != place.first && forward(place) && backward(behind) && weight(behind);
      }
      case Op::kReduceGradients:
        reduced_ = true;
        return true;
      case Op::kOptimizerStep:
        return reduced_ && !std::exchange(stepped_, true);
    }
    return false;
  }

  std::optional<Symbol> end() const {
    if (!reduced_ || !queue_.empty()) return std::nullopt;
    return mix({gradients_[0], gradients_[1], losses_[0], losses_[1], stepped_});
  }

 private:
  static bool receive(std::map<Place, Symbol>& into, const Place& place,
                      std::deque<Symbol>& channel) {
    const Symbol value = channel.front();
    channel.pop_front();
    return into.emplace(place, value).second;
  }
  static bool send(const std::map<Place, Symbol>& from, const Place& place,
                   std::deque<Symbol>& channel) {
    const std::optional<Symbol> value = find(from, place);
    if (value) channel.push_back(*value);
    return value.has_value();
  }

  Symbol stage(int direction) const {
    return static_cast<Symbol>(stages_of(parallelism_, rank_)[static_cast<size_t>(direction)]);
  }
  Neighbours neighbours(int direction) const {
    return pipeline_neighbours(parallelism_, rank_, direction);
  }

  bool forward(const Place& place) {
    const auto [direction, microbatch] = place;
    if (direction >= direction_count(parallelism_)) return false;
    if (microbatch < 0 || microbatch >= microbatches_per_direction(parallelism_)) return false;
    const int32_t previous = neighbours(direction).previous;
    std::optional<Symbol> input = find(received_outputs_, place);
    if (previous < 0) {
      input = static_cast<Symbol>(microbatch_index(parallelism_, direction, microbatch));
    } else if (previous == rank_) {
      input = find(outputs_, {1 - direction, microbatch});
    }
    if (!input) return false;
    const Symbol output = mix({'F', stage(direction), *input});
    if (neighbours(direction).next < 0) losses_[direction] = mix({losses_[direction], output});
    return inputs_.emplace(place, *input).second && outputs_.emplace(place, output).second;
  }

  bool backward(const Place& place) {
    const auto [direction, microbatch] = place;
    const std::optional<Symbol> output = find(outputs_, place);
    if (!output) return false;
    const int32_t next = neighbours(direction).next;
    std::optional<Symbol> gradient = find(received_gradients_, place);
    if (next < 0) {
      gradient = mix({'L', *output});
    } else if (next == rank_) {
      gradient = find(input_gradients_, {1 - direction, microbatch});
    }
    if (!gradient) return false;
    output_gradients_[place] = *gradient;
    return input_gradients_.emplace(place, mix({'b', stage(direction), inputs_[place], *gradient}))
        .second;
  }

  bool weight(const Place& place) {
    Symbol& sum = gradients_[place.first];
    sum = mix({sum, inputs_[place], output_gradients_[place]});
    return true;
  }

  const ParallelismSpec& parallelism_;
  const int rank_;
  std::map<Place, Symbol> received_outputs_, received_gradients_;
  std::map<Place, Symbol> inputs_, outputs_, input_gradients_, output_gradients_;
  std::deque<Place> queue_;
  std::array<Symbol, 2> gradients_{}, losses_{};  // by direction: sums so far
  bool reduced_ = false;
  bool stepped_ = false;
};

}  // namespace

std::optional<uint64_t> meaning_of(const ParallelismSpec& parallelism,
                                   const std::vector<Program>& programs, ProgramKind kind) {
  std::map<Channel, std::deque<Symbol>> channels;
  std::vector<RankMeaning> ranks;
  for (int r = 0; r < std::ssize(programs); ++r) ranks.emplace_back(parallelism, r);
  std::vector<size_t> at(programs.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t r = 0; r < programs.size(); ++r) {
      const std::vector<Instruction>& program = instructions_of(programs[r], kind);
      for (; at[r] < program.size(); ++at[r], moved = true) {
        const Instruction& i = program[at[r]];
        const bool forward = i.op == Op::kReceiveForward;
        const bool receives = forward || i.op == Op::kReceiveBackward;
        if (receives && channels[{i.peer, r, i.direction, forward}].empty()) break;
        if (!ranks[r].execute(i, channels)) return std::nullopt;
      }
    }
  }
  Symbol all = 0;
  for (size_t r = 0; r < programs.size(); ++r) {
    const std::optional<Symbol> end = ranks[r].end();
    if (!end || at[r] < instructions_of(programs[r], kind).size()) return std::nullopt;
    all = mix({all, *end});
  }
  for (const auto& [channel, values] : channels) {
    if (!values.empty()) return std::nullopt;
  }
  return all;
}

}  // namespace penstock
