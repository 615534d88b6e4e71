#include "comm/run/program.h"

namespace penstock {

std::string_view op_name(Op op) {
  switch (op) {
    case Op::kReceiveForward:
      return "receive_forward";
    case Op::kForward:
      return "forward";
    case Op::kSendForward:
      return "send_forward";
    case Op::kReceiveBackward:
      return "receive_backward";
    case Op::kBackward:
      return "backward";
    case Op::kBackwardInput:
      return "backward_input";
    case Op::kBackwardWeight:
      return "backward_weight";
    case Op::kSendBackward:
      return "send_backward";
    case Op::kOverlapped:
      return "overlapped";
    case Op::kReduceGradients:
      return "reduce_gradients";
    case Op::kOptimizerStep:
      return "optimizer_step";
  }
  return "unknown";
}

std::string to_string(const Instruction& i) {
  const auto pass = [](std::string_view letter, int direction, int32_t microbatch) {
    return fmt::format("{}{}.{}", letter, direction, microbatch);
  };
  const auto transfer = [&](std::string_view verb, std::string_view letter, char arrow) {
    return fmt::format("{}{}{}{}", verb, pass(letter, i.direction, i.microbatch), arrow, i.peer);
  };
  switch (i.op) {
    case Op::kReceiveForward:
      return transfer("recv", "F", '<');
    case Op::kForward:
      return pass("F", i.direction, i.microbatch);
    case Op::kSendForward:
      return transfer("send", "F", '>');
    case Op::kReceiveBackward:
      return transfer("recv", "B", '<');
    case Op::kBackward:
      return pass("B", i.direction, i.microbatch);
    case Op::kBackwardInput:
      return pass("b", i.direction, i.microbatch);
    case Op::kBackwardWeight:
      return "W";
    case Op::kSendBackward:
      return transfer("send", "B", '>');
    case Op::kOverlapped:
      return fmt::format("{{{} {}}}", pass("F", i.direction, i.microbatch),
                         pass("B", i.backward_direction, i.backward_microbatch));
    case Op::kReduceGradients:
      return "reduce";
    case Op::kOptimizerStep:
      return "optimizer";
  }
  return fmt::format("unknown instruction {}", static_cast<int>(i.op));
}

}  // namespace penstock
