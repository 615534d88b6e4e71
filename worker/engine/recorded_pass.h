// A pass whose sub-operations and exchanges are written down as it runs.
#pragma once

#include "comm/base/status.h"
#include "worker/engine/measured_transport.h"
#include "worker/engine/recorder.h"
#include "worker/model/pass.h"

namespace penstock {

// Used like Pass. A pass has at most one exchange under way: what a sub-operation posts, the next
// one that waits has waited for.
class RecordedPass {
 public:
  // Borrows the recorder and `transport`, the one exchanges go through; null in a world of one.
  RecordedPass(Pass pass, uint8_t direction, int32_t microbatch, Recorder& recorder,
               MeasuredTransport* transport)
      : pass_(pass),
        direction_(direction),
        microbatch_(microbatch),
        recorder_(recorder),
        transport_(transport) {}

  bool finished() const { return pass_.finished(); }
  SubOp next() const { return pass_.next(); }
  bool result_final() const { return pass_.result_final(); }
  Status run_next();
  Status run();

 private:
  Pass pass_;
  const uint8_t direction_;
  const int32_t microbatch_;
  Recorder& recorder_;
  MeasuredTransport* const transport_;
  TraceRecord exchange_;  // under way when begin_ns is not 0
};

}  // namespace penstock
