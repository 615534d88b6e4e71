#include "comm/run/sub_op.h"

#include <array>

#include "comm/base/check.h"

namespace penstock {
namespace {

constexpr std::array kEmbedOps = {SubOp::kEmbed};
constexpr std::array kForwardOps = {SubOp::kAttention, SubOp::kDispatch, SubOp::kMlp,
                                    SubOp::kCombine};
constexpr std::array kFinalOps = {SubOp::kOutput};
constexpr std::array kOutputOps = {SubOp::kOutputBackward, SubOp::kOutputWeight};
constexpr std::array kBackwardOps = {SubOp::kCombineBackward,   SubOp::kMlpBackward,
                                     SubOp::kDispatchBackward,  SubOp::kMlpWeight,
                                     SubOp::kAttentionBackward, SubOp::kAttentionWeight};
constexpr std::array kBackwardInputOps = {SubOp::kCombineBackward, SubOp::kMlpBackward,
                                          SubOp::kDispatchBackward, SubOp::kAttentionBackward};
constexpr std::array kWeightOps = {SubOp::kMlpWeight, SubOp::kAttentionWeight};
constexpr std::array kEmbedWeightOps = {SubOp::kEmbedWeight};

std::span<const SubOp> when(bool there, std::span<const SubOp> ops) {
  return there ? ops : std::span<const SubOp>();
}

}  // namespace

PassShape pass_shape(PassKind kind, bool first, bool last) {
  const std::span<const SubOp> output(kOutputOps);
  switch (kind) {
    case PassKind::kForward:
      return {when(first, kEmbedOps), kForwardOps, kFinalOps};
    case PassKind::kBackward:
      return {when(last, output), kBackwardOps, when(first, kEmbedWeightOps)};
    case PassKind::kBackwardInput:
      return {when(last, output.first(1)), kBackwardInputOps, {}};
    case PassKind::kWeight:
      return {when(last, output.last(1)), kWeightOps, when(first, kEmbedWeightOps)};
  }
  PENSTOCK_CHECK(false, static_cast<int>(kind));
  return {};
}

std::string_view sub_op_name(SubOp op) {
  switch (op) {
    case SubOp::kEmbed:
      return "embed(F)";
    case SubOp::kAttention:
      return "attn(F)";
    case SubOp::kDispatch:
      return "dispatch(F)";
    case SubOp::kMlp:
      return "mlp(F)";
    case SubOp::kCombine:
      return "combine(F)";
    case SubOp::kOutput:
      return "output(F)";
    case SubOp::kOutputBackward:
      return "output(B)";
    case SubOp::kOutputWeight:
      return "output(W)";
    case SubOp::kCombineBackward:
      return "combine(B)";
    case SubOp::kMlpBackward:
      return "mlp(B)";
    case SubOp::kDispatchBackward:
      return "dispatch(B)";
    case SubOp::kMlpWeight:
      return "mlp(W)";
    case SubOp::kAttentionBackward:
      return "attn(B)";
    case SubOp::kAttentionWeight:
      return "attn(W)";
    case SubOp::kEmbedWeight:
      return "embed(W)";
  }
  PENSTOCK_CHECK(false, "unknown sub-operation");
  return {};
}

}  // namespace penstock
