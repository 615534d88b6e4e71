#include "worker/rank/state_fetch.h"

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "comm/control/state_stream.h"
#include "worker/engine/state_memory.h"

namespace penstock {
namespace {

constexpr Duration kPatience = std::chrono::seconds(10);

}  // namespace

Status fetch_state(const StartRank& start, const Path& state_file) {
  PENSTOCK_CHECK(start.from_memory && !start.state_from.address.empty());
  const std::string what = fmt::format("fetch the state of step {} from the daemon at {}",
                                       start.restore_step, start.state_from.address);
  if (state_file.empty()) return failed_precondition(what + ": there is no memory to put it in");
  const int64_t begin_ns = monotonic_ns();
  Result<StateConnection> daemon = StateConnection::connect(start.state_from.address, kPatience);
  if (!daemon.ok()) return daemon.status().with_context(what);
  const Result<StreamAnswer> answer = daemon->ask({.kind = StreamKind::kFetch,
                                                   .key = start.state_from.key,
                                                   .job = start.job,
                                                   .epoch = {start.epoch.value - 1},
                                                   .rank = start.rank,
                                                   .step = start.restore_step},
                                                  kPatience);
  if (!answer.ok()) return answer.status().with_context(what);
  PENSTOCK_TRY_ASSIGN(
      StateMemory memory,
      StateMemory::make({start.job, start.rank, answer->contents}, answer->byte_count, state_file));
  for (size_t g = 0; g < kStateGenerations; ++g) memory.begin_writing(g);
  const Status received =
      daemon->receive_state({memory.generation(0), answer->byte_count}, kPatience);
  if (!received.ok()) return received.with_context(what);
  memory.publish(0, start.restore_step);
  log_info("fetched the state of step {} from {}: {} bytes in {:.3f} s", start.restore_step,
           start.state_from.address, answer->byte_count,
           to_seconds(Duration(monotonic_ns() - begin_ns)));
  return {};
}

}  // namespace penstock
