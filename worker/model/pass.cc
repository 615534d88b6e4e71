#include "worker/model/pass.h"

#include <array>
#include <span>

#include "worker/model/stage_impl.h"

namespace penstock {
namespace {

constexpr std::array kForwardOps = {SubOp::kAttention, SubOp::kDispatch, SubOp::kMlp,
                                    SubOp::kCombine};
constexpr std::array kBackwardOps = {SubOp::kCombineBackward,   SubOp::kMlpBackward,
                                     SubOp::kDispatchBackward,  SubOp::kMlpWeight,
                                     SubOp::kAttentionBackward, SubOp::kAttentionWeight};
constexpr std::array kBackwardInputOps = {SubOp::kCombineBackward, SubOp::kMlpBackward,
                                          SubOp::kDispatchBackward, SubOp::kAttentionBackward};
constexpr std::array kWeightOps = {SubOp::kMlpWeight, SubOp::kAttentionWeight};
constexpr std::array kOutputOps = {SubOp::kOutputBackward, SubOp::kOutputWeight};

std::span<const SubOp> none() {
  return {};
}

}  // namespace

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

// Every pass is: some operations at its start, the same ones for each layer, some at its end.
Pass::Shape Pass::shape() const {
  const bool first = stage_->impl_->is_first();
  const bool last = stage_->impl_->is_last();
  static constexpr std::array kEmbedOps = {SubOp::kEmbed};
  static constexpr std::array kFinalOps = {SubOp::kOutput};
  static constexpr std::array kEmbedWeightOps = {SubOp::kEmbedWeight};
  const std::span<const SubOp> output(kOutputOps);
  const std::span<const SubOp> embed_weight =
      first ? std::span<const SubOp>(kEmbedWeightOps) : none();
  switch (kind_) {
    case Kind::kForward:
      return {first ? std::span<const SubOp>(kEmbedOps) : none(), kForwardOps, kFinalOps};
    case Kind::kBackward:
      return {last ? output : none(), kBackwardOps, embed_weight};
    case Kind::kBackwardInput:
      return {last ? output.first(1) : none(), kBackwardInputOps, none()};
    case Kind::kWeight:
      return {last ? output.last(1) : none(), kWeightOps, embed_weight};
  }
  PENSTOCK_CHECK(false, "unknown kind of pass");
  return {};
}

Pass::Pass(Stage* stage, Kind kind, int32_t slot, int32_t gradient_slot)
    : stage_(stage), kind_(kind), slot_(slot), gradient_slot_(gradient_slot) {
  const Shape parts = shape();
  count_ = static_cast<int32_t>(parts.before.size() + parts.after.size()) +
           static_cast<int32_t>(parts.layer.size()) * stage->impl_->layer_count();
}

Pass::Position Pass::position() const {
  PENSTOCK_CHECK(!finished(), "the pass is finished");
  const Shape parts = shape();
  const auto before = static_cast<int32_t>(parts.before.size());
  const auto per_layer = static_cast<int32_t>(parts.layer.size());
  const int32_t layer_count = stage_->impl_->layer_count();
  if (next_ < before) return {parts.before[static_cast<size_t>(next_)], -1};
  const int32_t index = next_ - before;
  const int32_t layer = index / per_layer;
  if (layer >= layer_count) {
    return {parts.after[static_cast<size_t>(index - layer_count * per_layer)], -1};
  }
  return {parts.layer[static_cast<size_t>(index % per_layer)],
          kind_ == Kind::kForward ? layer : layer_count - 1 - layer};
}

SubOp Pass::next() const {
  return position().op;
}

int64_t Pass::next_layer() const {
  const int32_t layer = position().layer;
  return layer < 0 ? -1 : stage_->impl_->layer_range.begin + layer;
}

Status Pass::run_next() {
  const Position at = position();
  PENSTOCK_TRY(stage_->run_sub_op(at.op, at.layer, slot_, gradient_slot_));
  ++next_;
  if (!finished()) return {};
  Stage::Impl& stage = *stage_->impl_;
  if (kind_ == Kind::kForward) stage.forward_under_way = false;
  if (kind_ == Kind::kBackward || kind_ == Kind::kBackwardInput) stage.backward_under_way = false;
  if (kind_ == Kind::kBackward || kind_ == Kind::kWeight) {
    stage.gradient_slots[static_cast<size_t>(gradient_slot_)].taken = false;
  }
  return {};
}

Status Pass::run() {
  while (!finished()) PENSTOCK_TRY(run_next());
  return {};
}

}  // namespace penstock
