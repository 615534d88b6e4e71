// What the coordinator keeps in its state store, as each of its kinds.
#include "comm/base/check.h"
#include "coordinator/core/records.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

// What was read is written so that it reads the same again.
template <typename Decode, typename Encode>
void try_record(std::string_view text, const Decode& decode, const Encode& encode) {
  const auto read = decode(text);
  if (!read.ok()) {
    PENSTOCK_CHECK(read.status().code() == Code::kDataLoss);
    return;
  }
  const std::string written = encode(*read);
  const auto again = decode(written);
  PENSTOCK_CHECK(again.ok(), again.status().message());
  PENSTOCK_CHECK(encode(*again) == written, written);
}

}  // namespace

void fuzz::record(Bytes input) {
  const std::string_view text = as_text(input);
  const auto value = [](const auto& read) { return record_of(read).value; };
  try_record(text, decode_job, value);
  try_record(text, decode_seats, value);
  try_record(text, decode_data, value);
  try_record(text, decode_worker, value);
  try_record(text, decode_step, value);
  try_record(text, decode_evaluation, value);
  try_record(text, decode_event, [](const JobEvent& read) { return records_of(read)[0].value; });
  try_record(text, decode_last_job, [](JobId read) { return last_job_record(read).value; });
}

}  // namespace penstock
