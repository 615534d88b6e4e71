#include "worker/engine/recorded_pass.h"

#include "comm/base/clock.h"

namespace penstock {

Status RecordedPass::run_next() {
  TraceRecord span{.begin_ns = monotonic_ns(),
                   .microbatch = microbatch_,
                   .layer = static_cast<int16_t>(pass_.next_layer()),
                   .kind = TraceKind::kSubOp,
                   .what = static_cast<uint8_t>(pass_.next()),
                   .direction = direction_};
  recorder_.flight().begin(span);
  PENSTOCK_TRY(pass_.run_next());
  span.end_ns = monotonic_ns();
  recorder_.add(span);
  if (transport_ == nullptr) return {};
  const TransportActivity activity = transport_->take_activity();
  if (activity.wait_count > 0 && exchange_.begin_ns != 0) {
    exchange_.end_ns = activity.completed_ns;
    exchange_.wait_begin_ns = activity.wait_begin_ns;
    exchange_.wait_end_ns = activity.wait_end_ns;
    recorder_.add(exchange_);
    exchange_.begin_ns = 0;
  }
  if (activity.post_count > 0) {
    exchange_ = span;
    exchange_.kind = TraceKind::kExchange;
    exchange_.begin_ns = span.end_ns;
    exchange_.bytes = activity.sent_bytes;
  }
  return {};
}

Status RecordedPass::run() {
  while (!finished()) PENSTOCK_TRY(run_next());
  return {};
}

}  // namespace penstock
