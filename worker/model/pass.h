// A pass of one micro-batch through one stage: a cursor over its sub-operations
// (comm/run/sub_op.h).
#pragma once

#include <cstdint>
#include <span>

#include "comm/base/status.h"
#include "comm/run/sub_op.h"

namespace penstock {

class Stage;

// A pass under way: a cursor over its sub-operations. Small, copyable; no copy may run beside the
// original.
// A default-made pass is finished.
class Pass {
 public:
  bool finished() const { return next_ == ops_.size(); }
  // The sub-operation that run_next() will run. REQUIRES: !finished().
  SubOp next() const { return position().op; }
  // Layer (global index) of next(); -1 for embedding and output.
  int64_t next_layer() const;
  // Whether what the neighbouring stage gets of this pass (the output, or the gradient of the
  // input) is final: no sub-operation left makes any of it.
  bool result_final() const;
  // Runs one. An error (a lost peer) leaves the stage unusable: the rank exits. REQUIRES:
  // !finished().
  Status run_next();
  // Runs all that is left.
  Status run();
  Pass() = default;

 private:
  friend class Stage;
  Pass(Stage* stage, PassKind kind, int32_t slot, int32_t gradient_slot);
  const PassOp& position() const;

  Stage* stage_ = nullptr;
  PassKind kind_ = PassKind::kForward;
  int32_t slot_ = -1;
  int32_t gradient_slot_ = -1;
  std::span<const PassOp> ops_;  // the stage's
  size_t next_ = 0;
};

}  // namespace penstock
