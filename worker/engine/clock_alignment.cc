#include "worker/engine/clock_alignment.h"

#include <array>
#include <span>

#include "comm/base/clock.h"

namespace penstock {
namespace {

using Times = std::array<int64_t, 2>;  // of rank 0: when the question came, when the answer left

Status wait_for(Transport& transport, TransferHandle handle, uint64_t bytes) {
  PENSTOCK_TRY_ASSIGN(const uint64_t moved, transport.wait(handle));
  if (moved == bytes) return {};
  return data_loss(fmt::format("{} bytes where a clock sends {}", moved, bytes));
}

Status answer(Transport& transport, Tag tag, Rank asker) {
  for (int round = 0; round < kClockRounds; ++round) {
    Times times{};
    PENSTOCK_TRY(wait_for(transport, transport.receive(asker, tag, {}), 0));
    times[0] = times[1] = monotonic_ns();
    const Bytes bytes = std::as_bytes(std::span(times));
    PENSTOCK_TRY(wait_for(transport, transport.send(asker, tag, bytes), bytes.size()));
  }
  return {};
}

Result<ClockOffset> ask(Transport& transport, Tag tag) {
  ClockOffset best{.offset_ns = 0, .uncertainty_ns = INT64_MAX};
  for (int round = 0; round < kClockRounds; ++round) {
    Times times{};
    const MutableBytes into = std::as_writable_bytes(std::span(times));
    const TransferHandle answered = transport.receive(Rank{0}, tag, into);
    const int64_t asked_ns = monotonic_ns();
    const TransferHandle question = transport.send(Rank{0}, tag, {});
    PENSTOCK_TRY(wait_for(transport, answered, into.size()));
    const int64_t answered_ns = monotonic_ns();
    PENSTOCK_TRY(wait_for(transport, question, 0));
    const int64_t away_ns = times[1] - times[0];
    const int64_t uncertainty = (answered_ns - asked_ns - away_ns) / 2;
    if (uncertainty >= best.uncertainty_ns) continue;
    best = {((times[0] - asked_ns) + (times[1] - answered_ns)) / 2, uncertainty};
  }
  return best;
}

}  // namespace

Result<ClockOffset> align_clock(Transport& transport, Tag tag) {
  if (transport.rank().value != 0) return ask(transport, tag);
  for (int32_t r = 1; r < transport.world_size(); ++r) {
    PENSTOCK_TRY(answer(transport, tag, Rank{r}));
  }
  return ClockOffset{};
}

}  // namespace penstock
