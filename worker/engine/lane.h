// One direction of the pipeline on one rank: which slot of the stage each micro-batch is in, and
// its transfers with the neighbours.
//
// Receives are posted as early as their buffer allows: an activation as soon as a slot is free, a
// gradient as soon as its forward has run. Sends are asynchronous; a slot's next forward waits
// until the sends from its buffers are complete. Both together make the schedules' buffered sends
// true without any buffer beside the stage's own.
//
// Per training step and micro-batch, in this order: begin_forward, end_forward, [send_forward],
// [receive_gradient], then [send_gradient] and end_weight in either order. Evaluation:
// begin_forward, end_forward, [send_forward]. Brackets: where there is a neighbour.
// Single-threaded; steady state allocates nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/data/transport.h"
#include "worker/model/stage.h"

namespace penstock {

struct LaneOptions {
  uint8_t direction = 0;
  std::optional<Rank> previous;  // absent: the direction enters here
  std::optional<Rank> next;      // absent: it exits here
  int32_t slot_count = 1;
  int64_t microbatch_count = 0;
  int64_t boundary_floats = 0;  // of one micro-batch's tensor between stages
};

class Lane {
 public:
  // Borrows both. `transport` may be null when there is no neighbour.
  Lane(const LaneOptions& options, Stage& stage, Transport* transport);

  // Starts a step, or an evaluation: forgets the last one and posts the first receives.
  // REQUIRES: the last one ended with drain().
  void begin(bool training);

  // The slot micro-batch `m` runs forward in, its input there and its old sends complete.
  Result<int32_t> begin_forward(int64_t m);
  void end_forward(int64_t m);
  void send_forward(int64_t m);
  // Waits until the gradient of m's output is in output_gradient(slot).
  Status receive_gradient(int64_t m);
  void send_gradient(int64_t m);
  void end_weight(int64_t m);

  // The slot of a micro-batch between its begin_forward and its end.
  int32_t slot(int64_t m) const;
  // Waits for every send of the step.
  Status drain();

 private:
  // What is under way in one slot. A slot is free for the next micro-batch when `holds` is false;
  // its sends may still be running then.
  struct SlotState {
    bool holds = false;
    bool sent = false;        // the last send of its micro-batch was started, or there is none
    bool computed = false;    // its last pass has run
    TransferHandle input;     // receive
    TransferHandle gradient;  // receive
    TransferHandle output_send;
    TransferHandle gradient_send;
  };
  SlotState& state(int64_t m) { return slots_[static_cast<size_t>(slot(m))]; }
  std::optional<int32_t> take_slot(int64_t m);
  void post_receives();
  void free_if_over(int64_t m);
  Status finish(TransferHandle& handle);
  Status finish_receive(TransferHandle& handle);
  Bytes boundary(std::span<float> buffer) const;

  const LaneOptions options_;
  Stage& stage_;
  Transport* const transport_;
  bool training_ = true;
  int64_t next_posted_ = 0;       // micro-batches with a slot: [0, next_posted_)
  size_t next_slot_ = 0;          // to try first
  std::vector<int32_t> slot_of_;  // by micro-batch
  std::vector<SlotState> slots_;
};

}  // namespace penstock
