// The trace of a rank, as its file has it: a header, then records. Inputs may be shorter than the
// 128 bytes before the records.
#include "comm/base/check.h"
#include "comm/run/trace_file.h"
#include "tests/fuzz/targets.h"

namespace penstock {

void fuzz::trace(Bytes input) {
  const auto trace = decode_trace(input);
  if (!trace.ok()) {
    PENSTOCK_CHECK(trace.status().code() == Code::kDataLoss);
    return;
  }
  for (const TraceRecord& record : trace->records) {
    PENSTOCK_CHECK(record.step >= trace->steps.first && record.step <= trace->steps.last);
    PENSTOCK_CHECK(!trace_name(record).empty());
  }
  const std::string text = encode_trace(*trace, trace->steps);
  const auto again = decode_trace(as_bytes(text));
  PENSTOCK_CHECK(again.ok() && again->records == trace->records);
}

}  // namespace penstock
