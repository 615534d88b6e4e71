#include "worker/model/pass.h"

#include "worker/model/stage_impl.h"

namespace penstock {
PassShape Pass::shape() const {
  return pass_shape(kind_, stage_->impl_->is_first(), stage_->impl_->is_last());
}

Pass::Pass(Stage* stage, PassKind kind, int32_t slot, int32_t gradient_slot)
    : stage_(stage), kind_(kind), slot_(slot), gradient_slot_(gradient_slot) {
  const PassShape parts = shape();
  count_ = static_cast<int32_t>(parts.before.size() + parts.after.size()) +
           static_cast<int32_t>(parts.layer.size()) * stage->impl_->layer_count();
}

Pass::Position Pass::position() const {
  PENSTOCK_CHECK(!finished(), "the pass is finished");
  const PassShape parts = shape();
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
          kind_ == PassKind::kForward ? layer : layer_count - 1 - layer};
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
  if (kind_ == PassKind::kForward) stage.forward_under_way = false;
  if (kind_ == PassKind::kBackward || kind_ == PassKind::kBackwardInput)
    stage.backward_under_way = false;
  if (kind_ == PassKind::kBackward || kind_ == PassKind::kWeight) {
    stage.gradient_slots[static_cast<size_t>(gradient_slot_)].taken = false;
  }
  return {};
}

Status Pass::run() {
  while (!finished()) PENSTOCK_TRY(run_next());
  return {};
}

}  // namespace penstock
