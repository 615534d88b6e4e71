#include "comm/run/flight_record.h"

#include <bit>
#include <string_view>

namespace penstock {
namespace {

static_assert(std::endian::native == std::endian::little);

struct Packed {
  int64_t since_ns = 0;
  int64_t step = 0;
  int32_t microbatch = 0;
  int32_t peer = 0;
  int16_t layer = 0;
  uint8_t phase = 0;
  uint8_t kind = 0;
  uint8_t what = 0;
  uint8_t direction = 0;
  uint8_t sending = 0;
  uint8_t reserved = 0;
};
static_assert(sizeof(Packed) == sizeof(FlightFile::Slot));

std::string_view phase_name(FlightPhase phase) {
  switch (phase) {
    case FlightPhase::kStarting:
      return "starting up";
    case FlightPhase::kLoading:
      return "loading";
    case FlightPhase::kReady:
      return "loaded";
    case FlightPhase::kConnecting:
      return "connecting to its peers";
    case FlightPhase::kTraining:
      return "training";
    case FlightPhase::kEvaluating:
      return "evaluating";
    case FlightPhase::kSaving:
      return "saving";
    case FlightPhase::kCommitting:
      return "waiting for the last checkpoint to be committed";
    case FlightPhase::kFinishing:
      return "finishing";
  }
  return "?";
}

}  // namespace

FlightFile::Slot pack_flight(const FlightState& state, int64_t since_ns) {
  return std::bit_cast<FlightFile::Slot>(
      Packed{.since_ns = since_ns,
             .step = state.step,
             .microbatch = state.microbatch,
             .peer = state.peer,
             .layer = state.layer,
             .phase = static_cast<uint8_t>(state.phase),
             .kind = static_cast<uint8_t>(state.kind),
             .what = state.what,
             .direction = state.direction,
             .sending = state.sending ? uint8_t{1} : uint8_t{0}});
}

Result<FlightRecord> decode_flight_record(const FlightFile& file) {
  if (file.magic != kFlightMagic || file.version != kFlightVersion || file.rank < 0) {
    return data_loss("no flight record of this version");
  }
  const auto packed = std::bit_cast<Packed>(file.slots[file.count % 2]);
  const bool sound = packed.phase < kFlightPhaseCount && packed.kind < kTraceKindCount &&
                     packed.since_ns >= 0 && packed.step >= 0 && packed.microbatch >= -1 &&
                     packed.peer >= -1 && packed.layer >= -1 && packed.sending <= 1;
  if (!sound) return data_loss("a flight record that cannot be");
  FlightRecord record{JobId{file.job},
                      Epoch{static_cast<uint32_t>(file.epoch)},
                      Rank{file.rank},
                      packed.since_ns,
                      {}};
  record.state = {.phase = static_cast<FlightPhase>(packed.phase),
                  .step = packed.step,
                  .kind = static_cast<TraceKind>(packed.kind),
                  .what = packed.what,
                  .direction = packed.direction,
                  .microbatch = packed.microbatch,
                  .layer = packed.layer,
                  .peer = packed.peer,
                  .sending = packed.sending != 0,
                  .changes = file.count};
  return record;
}

std::string to_sentence(const FlightState& state) {
  std::string text;
  if (state.kind == TraceKind::kStep) {
    text = phase_name(state.phase);
  } else {
    const TraceRecord operation{.kind = state.kind, .what = state.what};
    text = "in " + trace_name(operation);
    if (state.layer >= 0) {
      const bool of_stage = state.kind == TraceKind::kCollective;
      text += fmt::format(" of {} {}", of_stage ? "stage" : "layer", state.layer);
    }
    if (state.microbatch >= 0) text += fmt::format(", micro-batch {}", state.microbatch);
  }
  if (state.phase == FlightPhase::kTraining) {
    text += fmt::format(", step {}", state.step);
  } else if (state.phase > FlightPhase::kTraining) {
    if (state.kind != TraceKind::kStep) text += fmt::format(", {}", phase_name(state.phase));
    text += fmt::format(" after step {}", state.step);
  }
  if (state.peer >= 0) {
    text += state.sending ? fmt::format(", waiting for rank {} to take a message", state.peer)
                          : fmt::format(", waiting for a message of rank {}", state.peer);
  }
  return text;
}

}  // namespace penstock
