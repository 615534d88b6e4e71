// What a rank writes down about a step as it runs: spans of its compute thread, and every
// communication with when it was started, when its data was there and when it was waited for. Fixed
// size, so that recording is a store (worker/engine/recorder.h).
//
// All times are nanoseconds of the monotonic clock of the rank's host.
#pragma once

#include <cstdint>
#include <string>

#include "comm/run/program.h"
#include "comm/run/sub_op.h"

namespace penstock {

enum class TraceKind : uint8_t {
  kStep,         // a whole training step; evaluations are not recorded
  kInstruction,  // what: Op. Compute of one instruction, without the waits for pipeline neighbours;
                 // a step may have several spans of kReduceGradients (sums, then weights)
  kSubOp,        // what: SubOp. Inside an instruction; the waits of exchanges it finishes included
  kExchange,     // what: the SubOp that started it (dispatch, combine and their backward twins)
  kSend,         // what: Transfer. To the pipeline neighbour `peer`
  kReceive,      // what: Transfer. From the pipeline neighbour `peer`
  kCollective,   // what: Collective. Inside a reduction; the whole call is communication
};
inline constexpr int kTraceKindCount = 7;

enum class Transfer : uint8_t { kActivations, kGradients };
enum class Collective : uint8_t {
  kReduceDense,
  kReduceExperts,
  kReduceShared,
  kReduceLoads,
  kReduceTotals,
  kGatherDense,
  kGatherExperts,
  kGatherShared,
  kCompareReplicas,
};

struct TraceRecord {
  // Of a span: its ends. Of a communication: when all its messages were posted (packing them is
  // compute, in the sub-operation of the same name), and when the last of them was complete as the
  // transport saw it. A receive is posted as early as its buffer is free, long before it is sent.
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  // Of a communication: the compute thread waited for it, from and to; both 0 when it never had to
  // ask. A wait that found the data there is as short as the question.
  int64_t wait_begin_ns = 0;
  int64_t wait_end_ns = 0;
  int64_t bytes = 0;  // posted by this rank for sending; of a receive: received
  int32_t step = 0;
  int32_t microbatch = -1;
  int32_t peer = -1;   // the other rank of a transfer
  int16_t layer = -1;  // global; -1: none. Of a collective: the stage
  TraceKind kind = TraceKind::kStep;
  uint8_t what = 0;
  uint8_t direction = 0;
  bool operator==(const TraceRecord&) const = default;
};
static_assert(sizeof(TraceRecord) == 64);

constexpr bool is_communication(TraceKind kind) {
  return kind == TraceKind::kExchange || kind == TraceKind::kSend || kind == TraceKind::kReceive ||
         kind == TraceKind::kCollective;
}

// What is traced, in the words of DeepSeek's published trace: "attn(F)", "dispatch(B)", "F", "B",
// "B(input)", "W", "F&B", "optimizer", "send(F)", "receive(B)", "reduce dense". A `what` no such
// kind has gives "?".
std::string trace_name(const TraceRecord& record);

}  // namespace penstock
