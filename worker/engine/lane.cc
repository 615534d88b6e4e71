#include "worker/engine/lane.h"

#include <algorithm>
#include <utility>

#include "comm/base/check.h"
#include "worker/engine/rank_layout.h"

namespace penstock {

Lane::Lane(const LaneOptions& options, Stage& stage, Transport* transport)
    : options_(options),
      stage_(stage),
      transport_(transport),
      slot_of_(static_cast<size_t>(options.microbatch_count), -1),
      slots_(static_cast<size_t>(options.slot_count)) {
  PENSTOCK_CHECK(options.slot_count > 0);
  PENSTOCK_CHECK(transport != nullptr || (!options.previous && !options.next));
}

void Lane::begin(bool training) {
  training_ = training;
  next_posted_ = 0;
  next_slot_ = 0;
  std::fill(slot_of_.begin(), slot_of_.end(), -1);
  for (const SlotState& slot : slots_) {
    PENSTOCK_CHECK(!slot.holds && !slot.input.valid() && !slot.gradient.valid());
    PENSTOCK_CHECK(!slot.output_send.valid() && !slot.gradient_send.valid());
  }
  post_receives();
}

int32_t Lane::slot(int64_t m) const {
  const int32_t slot = slot_of_[static_cast<size_t>(m)];
  PENSTOCK_CHECK(slot >= 0, m);
  return slot;
}

std::optional<int32_t> Lane::take_slot(int64_t m) {
  // In turn, not the first free one: in an evaluation slots are free at once, and the longer one
  // rests, the surer is its output sent before its next forward must wait for that.
  for (size_t tried = 0; tried < slots_.size(); ++tried) {
    const size_t s = next_slot_;
    next_slot_ = (next_slot_ + 1) % slots_.size();
    if (slots_[s].holds) continue;
    slots_[s].holds = true;
    slots_[s].computed = false;
    slots_[s].sent = training_ ? !options_.previous : !options_.next;
    slot_of_[static_cast<size_t>(m)] = static_cast<int32_t>(s);
    return static_cast<int32_t>(s);
  }
  return std::nullopt;
}

void Lane::post_receives() {
  if (!options_.previous) return;
  for (; next_posted_ < options_.microbatch_count; ++next_posted_) {
    const std::optional<int32_t> slot = take_slot(next_posted_);
    if (!slot) return;
    const Bytes into = boundary(stage_.input(*slot));
    slots_[static_cast<size_t>(*slot)].input =
        transport_->receive(*options_.previous, tag_of(Channel::kActivations, options_.direction),
                            {const_cast<std::byte*>(into.data()), into.size()});
  }
}

Result<int32_t> Lane::begin_forward(int64_t m) {
  if (!options_.previous) {
    PENSTOCK_CHECK(m == next_posted_, m, next_posted_);
    PENSTOCK_CHECK(take_slot(m).has_value(), m);  // slot_needs() counted them
    ++next_posted_;
  }
  PENSTOCK_CHECK(m < next_posted_, m, next_posted_);
  SlotState& slot = state(m);
  PENSTOCK_TRY(finish_receive(slot.input));
  PENSTOCK_TRY(finish(slot.output_send));
  PENSTOCK_TRY(finish(slot.gradient_send));
  return this->slot(m);
}

void Lane::end_forward(int64_t m) {
  SlotState& slot = state(m);
  if (!training_) {
    slot.computed = true;
    free_if_over(m);
    return;
  }
  if (!options_.next) return;
  const Bytes into = boundary(stage_.output_gradient(this->slot(m)));
  slot.gradient =
      transport_->receive(*options_.next, tag_of(Channel::kGradients, options_.direction),
                          {const_cast<std::byte*>(into.data()), into.size()});
}

void Lane::send_forward(int64_t m) {
  SlotState& slot = state(m);
  slot.output_send =
      transport_->send(*options_.next, tag_of(Channel::kActivations, options_.direction),
                       boundary(stage_.output(this->slot(m))));
  if (training_) return;
  slot.sent = true;
  free_if_over(m);
}

Status Lane::receive_gradient(int64_t m) {
  return finish_receive(state(m).gradient);
}

void Lane::send_gradient(int64_t m) {
  SlotState& slot = state(m);
  slot.gradient_send =
      transport_->send(*options_.previous, tag_of(Channel::kGradients, options_.direction),
                       boundary(stage_.input_gradient(this->slot(m))));
  slot.sent = true;
  free_if_over(m);
}

void Lane::end_weight(int64_t m) {
  state(m).computed = true;
  free_if_over(m);
}

void Lane::free_if_over(int64_t m) {
  SlotState& slot = state(m);
  if (!slot.sent || !slot.computed) return;
  slot.holds = false;
  slot_of_[static_cast<size_t>(m)] = -1;
  post_receives();
}

Status Lane::drain() {
  for (SlotState& slot : slots_) {
    PENSTOCK_CHECK(!slot.holds);
    PENSTOCK_TRY(finish(slot.output_send));
    PENSTOCK_TRY(finish(slot.gradient_send));
  }
  return {};
}

Status Lane::finish(TransferHandle& handle) {
  if (!handle.valid()) return {};
  const Result<uint64_t> moved = transport_->wait(std::exchange(handle, {}));
  return moved.ok() ? Status() : moved.status();
}

Status Lane::finish_receive(TransferHandle& handle) {
  if (!handle.valid()) return {};
  PENSTOCK_TRY_ASSIGN(const uint64_t moved, transport_->wait(std::exchange(handle, {})));
  const uint64_t wanted = static_cast<uint64_t>(options_.boundary_floats) * sizeof(float);
  if (moved == wanted) return {};
  return data_loss(
      fmt::format("direction {}: a neighbour sent {} bytes where a boundary tensor has {}; "
                  "do all ranks run the same job spec?",
                  options_.direction, moved, wanted));
}

Bytes Lane::boundary(std::span<float> buffer) const {
  PENSTOCK_CHECK(static_cast<int64_t>(buffer.size()) >= options_.boundary_floats, buffer.size());
  return std::as_bytes(buffer.first(static_cast<size_t>(options_.boundary_floats)));
}

}  // namespace penstock
