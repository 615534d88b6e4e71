// One direction of the pipeline on one rank: which slot of the stage each micro-batch is in, and
// its transfers with the neighbours.
//
// Receives are posted as early as their buffer allows: an activation as soon as a slot is free, a
// gradient as soon as its forward has run. Sends are asynchronous; a slot's next forward waits
// until the sends from its buffers are complete. Both together make the schedules' buffered sends
// true without any buffer beside the stage's own.
//
// Where the stage after or before this one is on the same rank (DualPipeV's last one), the lane of
// the second stage follows that of the first: micro-batch m is in the same slot of both stages,
// which share the buffers between them (Stage::join), and the first lane keeps the slot until both
// are done with it.
//
// A result may be on its way before the pass that makes it ends: output_final() and
// gradient_final() start the send that send_forward() or send_gradient() else starts.
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
#include "comm/run/trace_record.h"
#include "worker/engine/recorder.h"
#include "worker/model/stage.h"

namespace penstock {

struct LaneOptions {
  uint8_t direction = 0;
  std::optional<Rank> previous;  // absent: the direction enters here, or the lane follows another
  std::optional<Rank> next;      // absent: it exits here, or another lane follows
  int32_t slot_count = 1;
  int64_t microbatch_count = 0;  // most of any step
  int64_t boundary_floats = 0;   // of one micro-batch's tensor between stages
};

class Lane {
 public:
  // Borrows all; transfers are written down in `recorder` when they were waited for. `transport`
  // may be null when there is no neighbour.
  Lane(const LaneOptions& options, Stage& stage, Transport* transport, Recorder& recorder);

  // Makes this lane follow `leader`. Once, before the first begin(). REQUIRES: no previous rank
  // here, no next one there, and as many slots.
  void follow(Lane& leader);

  // Starts a step, or an evaluation: forgets the last one and posts the first receives.
  // REQUIRES: the last one ended with drain().
  void begin(bool training, int64_t microbatch_count);

  // The slot micro-batch `m` runs forward in, its input there and its old sends complete.
  Result<int32_t> begin_forward(int64_t m);
  // The output is what it will be. Optional; before end_forward().
  void output_final(int64_t m);
  void end_forward(int64_t m);
  void send_forward(int64_t m);
  // Waits until the gradient of m's output is in output_gradient(slot).
  Status receive_gradient(int64_t m);
  // The gradient of the input is what it will be. Optional; before send_gradient().
  void gradient_final(int64_t m);
  void send_gradient(int64_t m);
  void end_weight(int64_t m);

  // The slot of a micro-batch between its begin_forward and its end.
  int32_t slot(int64_t m) const;
  // Waits for every send of the step.
  Status drain();

 private:
  // A transfer under way, if there is one.
  struct Posted {
    TransferHandle handle;
    TraceRecord record;
  };
  // What is under way in one slot. A slot is free for the next micro-batch when `holds` is false;
  // its sends may still be running then.
  struct SlotState {
    bool holds = false;
    bool sent = false;         // the last send of its micro-batch was started, or there is none
    bool computed = false;     // its last pass has run
    bool followed = false;     // the following lane is done with it, or there is none
    bool output_sent = false;  // its send was started; the same of the gradient
    bool gradient_sent = false;
    Posted input;     // receive
    Posted gradient;  // receive
    Posted output_send;
    Posted gradient_send;
  };
  SlotState& state(int64_t m) { return slots_[static_cast<size_t>(slot(m))]; }
  std::optional<int32_t> take_slot(int64_t m);
  void hold(int32_t slot, int64_t m);
  void post_receives();
  void free_if_over(int64_t m);
  Posted post_send(Rank peer, Transfer what, int64_t m, std::span<float> buffer);
  Posted post_receive(Rank peer, Transfer what, int64_t m, std::span<float> buffer);
  // Waits for a transfer that is under way; the bytes moved.
  Result<uint64_t> finish(Posted& posted);
  Status finish_send(Posted& posted);
  Status finish_receive(Posted& posted);
  std::span<float> boundary(std::span<float> buffer) const;

  const LaneOptions options_;
  Stage& stage_;
  Transport* const transport_;
  Recorder& recorder_;
  Lane* leader_ = nullptr;    // the lane this one follows
  Lane* follower_ = nullptr;  // the lane that follows this one
  bool training_ = true;
  int64_t microbatch_count_ = 0;  // of this step
  int64_t next_posted_ = 0;       // micro-batches with a slot: [0, next_posted_)
  size_t next_slot_ = 0;          // to try first
  std::vector<int32_t> slot_of_;  // by micro-batch
  std::vector<SlotState> slots_;
};

}  // namespace penstock
