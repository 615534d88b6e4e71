#include "worker/model/pass.h"

#include <algorithm>

#include "worker/model/stage_impl.h"

namespace penstock {

Pass::Pass(Stage* stage, PassKind kind, int32_t slot, int32_t gradient_slot)
    : stage_(stage),
      kind_(kind),
      slot_(slot),
      gradient_slot_(gradient_slot),
      ops_(stage->impl_->pass_ops(kind, stage->impl_->slot_at(slot).training)) {}

const PassOp& Pass::position() const {
  PENSTOCK_CHECK(!finished(), "the pass is finished");
  return ops_[next_];
}

int64_t Pass::next_layer() const {
  const int32_t layer = position().layer;
  return layer < 0 ? -1 : stage_->impl_->layer_range.begin + layer;
}

bool Pass::result_final() const {
  return std::ranges::all_of(ops_.subspan(next_),
                             [](const PassOp& left) { return is_weight_part(left.op); });
}

Status Pass::run_next() {
  const PassOp at = position();
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
