#include "worker/engine/lane.h"

#include <algorithm>
#include <utility>

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "worker/engine/rank_layout.h"

namespace penstock {

Lane::Lane(const LaneOptions& options, Stage& stage, Transport* transport, Recorder& recorder)
    : options_(options),
      stage_(stage),
      transport_(transport),
      recorder_(recorder),
      slot_of_(static_cast<size_t>(options.microbatch_count), -1),
      slots_(static_cast<size_t>(options.slot_count)) {
  PENSTOCK_CHECK(options.slot_count > 0);
  PENSTOCK_CHECK(transport != nullptr || (!options.previous && !options.next));
}

void Lane::follow(Lane& leader) {
  PENSTOCK_CHECK(!options_.previous && !leader.options_.next && leader_ == nullptr);
  PENSTOCK_CHECK(slots_.size() == leader.slots_.size(), slots_.size(), leader.slots_.size());
  leader_ = &leader;
  leader.follower_ = this;
}

void Lane::begin(bool training, int64_t microbatch_count) {
  PENSTOCK_CHECK(microbatch_count <= options_.microbatch_count, microbatch_count);
  training_ = training;
  microbatch_count_ = microbatch_count;
  next_posted_ = 0;
  next_slot_ = 0;
  std::fill(slot_of_.begin(), slot_of_.end(), -1);
  for (const SlotState& slot : slots_) {
    PENSTOCK_CHECK(!slot.holds && !slot.input.handle.valid() && !slot.gradient.handle.valid());
    PENSTOCK_CHECK(!slot.output_send.handle.valid() && !slot.gradient_send.handle.valid());
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
    hold(static_cast<int32_t>(s), m);
    return static_cast<int32_t>(s);
  }
  return std::nullopt;
}

void Lane::hold(int32_t slot, int64_t m) {
  SlotState& state = slots_[static_cast<size_t>(slot)];
  PENSTOCK_CHECK(!state.holds, slot, m);
  state.holds = true;
  state.computed = false;
  state.sent = training_ ? !options_.previous : !options_.next;
  state.followed = follower_ == nullptr;
  state.output_sent = false;
  state.gradient_sent = false;
  slot_of_[static_cast<size_t>(m)] = slot;
}

void Lane::post_receives() {
  if (!options_.previous) return;
  for (; next_posted_ < microbatch_count_; ++next_posted_) {
    const std::optional<int32_t> slot = take_slot(next_posted_);
    if (!slot) return;
    slots_[static_cast<size_t>(*slot)].input =
        post_receive(*options_.previous, Transfer::kActivations, next_posted_, stage_.input(*slot));
  }
}

Result<int32_t> Lane::begin_forward(int64_t m) {
  if (!options_.previous) {
    PENSTOCK_CHECK(m == next_posted_, m, next_posted_);
    if (leader_) {
      hold(leader_->slot(m), m);
    } else {
      PENSTOCK_CHECK(take_slot(m).has_value(), m);  // slot_needs() counted them
    }
    ++next_posted_;
  }
  PENSTOCK_CHECK(m < next_posted_, m, next_posted_);
  SlotState& slot = state(m);
  PENSTOCK_TRY(finish_receive(slot.input));
  PENSTOCK_TRY(finish_send(slot.output_send));
  PENSTOCK_TRY(finish_send(slot.gradient_send));
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
  slot.gradient =
      post_receive(*options_.next, Transfer::kGradients, m, stage_.output_gradient(this->slot(m)));
}

void Lane::output_final(int64_t m) {
  SlotState& slot = state(m);
  if (!options_.next || slot.output_sent) return;
  slot.output_send =
      post_send(*options_.next, Transfer::kActivations, m, stage_.output(this->slot(m)));
  slot.output_sent = true;
}

void Lane::send_forward(int64_t m) {
  output_final(m);
  if (training_) return;
  SlotState& slot = state(m);
  slot.sent = true;
  free_if_over(m);
}

Status Lane::receive_gradient(int64_t m) {
  return finish_receive(state(m).gradient);
}

void Lane::gradient_final(int64_t m) {
  SlotState& slot = state(m);
  if (!options_.previous || slot.gradient_sent) return;
  slot.gradient_send =
      post_send(*options_.previous, Transfer::kGradients, m, stage_.input_gradient(this->slot(m)));
  slot.gradient_sent = true;
}

void Lane::send_gradient(int64_t m) {
  gradient_final(m);
  state(m).sent = true;
  free_if_over(m);
}

void Lane::end_weight(int64_t m) {
  state(m).computed = true;
  free_if_over(m);
}

void Lane::free_if_over(int64_t m) {
  SlotState& slot = state(m);
  if (!slot.sent || !slot.computed || !slot.followed) return;
  slot.holds = false;
  slot_of_[static_cast<size_t>(m)] = -1;
  if (leader_) {
    leader_->state(m).followed = true;
    leader_->free_if_over(m);
  }
  post_receives();
}

Status Lane::drain() {
  for (SlotState& slot : slots_) {
    PENSTOCK_CHECK(!slot.holds);
    PENSTOCK_TRY(finish_send(slot.output_send));
    PENSTOCK_TRY(finish_send(slot.gradient_send));
  }
  return {};
}

namespace {

Tag tag_of(Transfer what, uint8_t direction) {
  return tag_of(what == Transfer::kActivations ? Channel::kActivations : Channel::kGradients,
                direction);
}

}  // namespace

Lane::Posted Lane::post_send(Rank peer, Transfer what, int64_t m, std::span<float> buffer) {
  const Bytes bytes = std::as_bytes(boundary(buffer));
  const int64_t begin = monotonic_ns();  // what is small or awaited is complete when send() returns
  const TransferHandle handle = transport_->send(peer, tag_of(what, options_.direction), bytes);
  return {handle,
          {.begin_ns = begin,
           .bytes = static_cast<int64_t>(bytes.size()),
           .microbatch = static_cast<int32_t>(m),
           .peer = peer.value,
           .kind = TraceKind::kSend,
           .what = static_cast<uint8_t>(what),
           .direction = options_.direction}};
}

Lane::Posted Lane::post_receive(Rank peer, Transfer what, int64_t m, std::span<float> buffer) {
  const int64_t begin = monotonic_ns();
  const TransferHandle handle = transport_->receive(peer, tag_of(what, options_.direction),
                                                    std::as_writable_bytes(boundary(buffer)));
  return {handle,
          {.begin_ns = begin,
           .microbatch = static_cast<int32_t>(m),
           .peer = peer.value,
           .kind = TraceKind::kReceive,
           .what = static_cast<uint8_t>(what),
           .direction = options_.direction}};
}

Result<uint64_t> Lane::finish(Posted& posted) {
  TraceRecord& record = posted.record;
  record.wait_begin_ns = monotonic_ns();
  recorder_.flight().begin_at(record, record.wait_begin_ns);
  PENSTOCK_TRY_ASSIGN(const uint64_t moved,
                      transport_->wait(std::exchange(posted.handle, {}), &record.end_ns));
  record.wait_end_ns = monotonic_ns();
  record.bytes = static_cast<int64_t>(moved);
  recorder_.add(record);
  return moved;
}

Status Lane::finish_send(Posted& posted) {
  if (!posted.handle.valid()) return {};
  const Result<uint64_t> moved = finish(posted);
  return moved.ok() ? Status() : moved.status();
}

Status Lane::finish_receive(Posted& posted) {
  if (!posted.handle.valid()) return {};
  PENSTOCK_TRY_ASSIGN(const uint64_t moved, finish(posted));
  const uint64_t wanted = static_cast<uint64_t>(options_.boundary_floats) * sizeof(float);
  if (moved == wanted) return {};
  return data_loss(
      fmt::format("direction {}: a neighbour sent {} bytes where a boundary tensor has {}; "
                  "do all ranks run the same job spec?",
                  options_.direction, moved, wanted));
}

std::span<float> Lane::boundary(std::span<float> buffer) const {
  PENSTOCK_CHECK(static_cast<int64_t>(buffer.size()) >= options_.boundary_floats, buffer.size());
  return buffer.first(static_cast<size_t>(options_.boundary_floats));
}

}  // namespace penstock
