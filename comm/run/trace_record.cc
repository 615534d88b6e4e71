#include "comm/run/trace_record.h"

#include <array>
#include <string_view>

namespace penstock {
namespace {

std::string_view instruction_name(Op op) {
  switch (op) {
    case Op::kForward:
      return "F";
    case Op::kBackward:
      return "B";
    case Op::kBackwardInput:
      return "B(input)";
    case Op::kBackwardWeight:
      return "W";
    case Op::kOverlapped:
      return "F&B";
    case Op::kReduceGradients:
      return "reduce";
    case Op::kOptimizerStep:
      return "optimizer";
    case Op::kReceiveForward:
    case Op::kSendForward:
    case Op::kReceiveBackward:
    case Op::kSendBackward:
      break;  // they are transfers, and take no time of their own
  }
  return "?";
}

std::string_view collective_name(uint8_t what) {
  constexpr std::array<std::string_view, 9> kNames = {
      "reduce dense", "reduce experts", "reduce shared", "reduce loads",    "reduce totals",
      "gather dense", "gather experts", "gather shared", "compare replicas"};
  return what < kNames.size() ? kNames[what] : "?";
}

}  // namespace

std::string trace_name(const TraceRecord& record) {
  const auto transfer = [&](std::string_view verb) {
    const bool forward = record.what == static_cast<uint8_t>(Transfer::kActivations);
    return std::string(verb) + (forward ? "(F)" : "(B)");
  };
  switch (record.kind) {
    case TraceKind::kStep:
      return "step";
    case TraceKind::kInstruction:
      return std::string(instruction_name(static_cast<Op>(record.what)));
    case TraceKind::kSubOp:
    case TraceKind::kExchange:
      return std::string(record.what < kSubOpCount ? sub_op_name(static_cast<SubOp>(record.what))
                                                   : "?");
    case TraceKind::kSend:
      return transfer("send");
    case TraceKind::kReceive:
      return transfer("receive");
    case TraceKind::kCollective:
      return std::string(collective_name(record.what));
  }
  return "?";
}

}  // namespace penstock
