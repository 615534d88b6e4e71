// The rules of message.h, one overload of check() per message.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "comm/control/codec.h"
#include "comm/run/held_state.h"

namespace penstock {
namespace {

constexpr int64_t kMillisecondsMax = 3'600'000;
constexpr int64_t kQuietMillisecondsMax = int64_t{1} << 40;  // 34 years
constexpr size_t kDimensionsMax = 8;
constexpr size_t kRanksPerWorkerMax = 4096;
constexpr int kSignalMax = 64;

Status wrong(std::string_view field, std::string_view rule) {
  return invalid_argument(fmt::format("{} {}", field, rule));
}

Status check_that(bool holds, std::string_view field, std::string_view rule) {
  return holds ? Status() : wrong(field, rule);
}

Status check_text(std::string_view field, const std::string& text, size_t bytes_max) {
  if (text.size() <= bytes_max) return {};
  return invalid_argument(
      fmt::format("{} is {} bytes long, at most {} are allowed", field, text.size(), bytes_max));
}

// Names end up in logs, labels and file names.
Status check_name(std::string_view field, const std::string& name) {
  PENSTOCK_TRY(check_text(field, name, kNameBytesMax));
  PENSTOCK_TRY(check_that(!name.empty(), field, "is empty"));
  for (const char c : name) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) return wrong(field, "holds a control character");
  }
  return {};
}

Status check_amount(std::string_view field, double value) {
  return check_that(std::isfinite(value) && value >= 0.0, field, "is not a finite number >= 0");
}

// Sums of any number of them are finite.
Status check_seconds_of_step(std::string_view field, double value) {
  constexpr double kMost = 1e9;
  return check_that(value >= 0.0 && value <= kMost, field, "is not in 0 .. 1e9");
}

Status check_absolute_path(std::string_view field, const std::string& path) {
  PENSTOCK_TRY(check_name(field, path));
  return check_that(path.front() == '/', field, "is not an absolute path");
}

// A path that cannot leave the directory it is relative to.
Status check_relative_path(std::string_view field, const std::string& path) {
  PENSTOCK_TRY(check_name(field, path));
  PENSTOCK_TRY(check_that(path.front() != '/', field, "is not a relative path"));
  size_t begin = 0;
  while (begin <= path.size()) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string_view part = std::string_view(path).substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..")
      return wrong(field, "has an empty, . or .. part");
    begin = end + 1;
  }
  return {};
}

template <typename Message>
Status check_attempt(const Message& message) {
  PENSTOCK_TRY(check_that(message.job.value != 0, "job", "is 0"));
  return check_that(message.epoch.value != 0, "epoch", "is 0");
}

template <typename Message>
Status check_rank_key(const Message& message) {
  PENSTOCK_TRY(check_attempt(message));
  return check_that(message.rank.value >= 0 && static_cast<size_t>(message.rank.value) < kRanksMax,
                    "rank", "is out of range");
}

Status check_ranks(const std::vector<RankStatus>& ranks) {
  PENSTOCK_TRY(check_that(ranks.size() <= kRanksMax, "ranks", "has too many entries"));
  for (const RankStatus& rank : ranks) {
    PENSTOCK_TRY(check_rank_key(rank));
    PENSTOCK_TRY(check_that(rank.state <= RankState::kFinished, "state", "is unknown"));
    PENSTOCK_TRY(check_that(rank.step >= 0, "step", "is negative"));
    PENSTOCK_TRY(check_that(rank.pace.steps >= 0, "timed steps", "is negative"));
    PENSTOCK_TRY(check_amount("busy_seconds", rank.pace.busy_seconds));
    PENSTOCK_TRY(check_amount("wait_seconds", rank.pace.wait_seconds));
  }
  return {};
}

Status check_instructions(std::string_view field, const std::vector<Instruction>& instructions) {
  PENSTOCK_TRY(check_that(instructions.size() <= kInstructionsMax, field, "has too many entries"));
  for (const Instruction& instruction : instructions) {
    const bool sound = instruction.op <= Op::kOptimizerStep && instruction.direction <= 1 &&
                       instruction.backward_direction <= 1 && instruction.microbatch >= -1 &&
                       instruction.backward_microbatch >= -1 && instruction.peer >= -1;
    if (!sound) return wrong(field, "holds an instruction with a field out of range");
  }
  return {};
}

Status check_program(const Program& program) {
  constexpr size_t kSizesMax = 64;
  PENSTOCK_TRY(check_that(program.pipeline_index >= 0, "pipeline_index", "is negative"));
  PENSTOCK_TRY(check_instructions("training", program.training));
  PENSTOCK_TRY(check_instructions("evaluation", program.evaluation));
  PENSTOCK_TRY(check_that(program.resized.size() <= kSizesMax, "resized", "has too many entries"));
  int32_t previous = 0;
  for (const ResizedTraining& resized : program.resized) {
    PENSTOCK_TRY(check_that(resized.microbatches > previous, "resized", "does not ascend from 1"));
    PENSTOCK_TRY(check_instructions("resized", resized.training));
    previous = resized.microbatches;
  }
  return {};
}

// What a layer has one of per expert, and all of a message together.
template <typename Values>
Status check_layers(std::string_view field, const std::map<int64_t, Values>& layers) {
  constexpr size_t kExpertsMax = 1 << 16;
  size_t count = 0;
  for (const auto& [layer, values] : layers) {
    PENSTOCK_TRY(check_that(layer >= 0, field, "has a layer below 0, or one twice"));
    PENSTOCK_TRY(check_that(layer <= std::numeric_limits<int32_t>::max(), field,
                            "has a layer past 31 bits"));
    PENSTOCK_TRY(check_that(values.size() <= kExpertsMax, field, "has too many experts"));
    count += values.size();
  }
  return check_that(count <= static_cast<size_t>(kSeatsMax), field, "has too many entries");
}

Status check_seats(const ExpertSeats& seats) {
  PENSTOCK_TRY(check_layers("seats", seats.layers));
  for (const auto& [layer, experts] : seats.layers) {
    PENSTOCK_TRY(check_that(is_permutation_of_experts(experts), "seats",
                            "do not hold each expert of a layer once"));
  }
  return {};
}

Status check_slice(const SavedSlice& slice) {
  PENSTOCK_TRY(check_name("slice name", slice.name));
  PENSTOCK_TRY(check_name("slice dtype", slice.dtype));
  const size_t dimensions = slice.shape.size();
  PENSTOCK_TRY(check_that(dimensions <= kDimensionsMax, "slice shape", "has too many dimensions"));
  PENSTOCK_TRY(
      check_that(slice.box_offset.size() == dimensions && slice.box_size.size() == dimensions,
                 "slice box", "has another number of dimensions than its tensor"));
  for (size_t i = 0; i < dimensions; ++i) {
    const int64_t extent = slice.shape[i];
    const int64_t offset = slice.box_offset[i];
    const int64_t size = slice.box_size[i];
    // Written without a sum, which could overflow.
    const bool inside =
        extent >= 1 && offset >= 0 && size >= 1 && size <= extent && offset <= extent - size;
    if (!inside) return wrong("slice box", "is not inside its tensor");
  }
  const bool fits = slice.byte_count <= std::numeric_limits<uint64_t>::max() - slice.file_offset;
  return check_that(fits, "slice file range", "overflows");
}

Status check(const Register& message) {
  PENSTOCK_TRY(check_name("name", message.name));
  PENSTOCK_TRY(check_that(message.incarnation != 0, "incarnation", "is 0"));
  PENSTOCK_TRY(check_name("host", message.host));
  PENSTOCK_TRY(check_that(message.device_count >= 1, "device_count", "is below 1"));
  PENSTOCK_TRY(check_name("device_kind", message.device_kind));
  PENSTOCK_TRY(check_text("http_address", message.http_address, kNameBytesMax));
  PENSTOCK_TRY(check_text("state_address", message.state_address, kNameBytesMax));
  PENSTOCK_TRY(check_that(message.sequence != 0, "sequence", "is 0"));
  return check_ranks(message.ranks);
}

Status check(const Registered& message) {
  PENSTOCK_TRY(check_text("refusal", message.refusal, kNameBytesMax));
  const bool unknown = message.worker.value == 0;
  PENSTOCK_TRY(check_that(unknown || message.challenge == 0, "challenge", "is of a known worker"));
  if (!message.refusal.empty()) return {};
  const bool in_range =
      message.heartbeat_interval_ms >= 1 && message.heartbeat_interval_ms <= kMillisecondsMax;
  PENSTOCK_TRY(check_that(in_range, "heartbeat_interval_ms", "is not in 1 .. 3600000"));
  const bool lease_in_range = message.lease_ms >= 0 && message.lease_ms <= kMillisecondsMax;
  return check_that(lease_in_range, "lease_ms", "is not in 0 .. 3600000");
}

Status check(const Heartbeat& message) {
  PENSTOCK_TRY(check_that(message.worker.value != 0, "worker", "is 0"));
  PENSTOCK_TRY(check_that(message.incarnation != 0, "incarnation", "is 0"));
  PENSTOCK_TRY(check_that(message.sent_at_ns >= 0, "sent_at_ns", "is negative"));
  return check_ranks(message.ranks);
}

Status check(const StartRank& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.device >= 0, "device", "is negative"));
  PENSTOCK_TRY(check_that(!message.spec_json.empty(), "spec_json", "is empty"));
  PENSTOCK_TRY(check_text("spec_json", message.spec_json, kTextBytesMax));
  PENSTOCK_TRY(check_program(message.program));
  PENSTOCK_TRY(check_absolute_path("checkpoint_dir", message.checkpoint_dir));
  if (message.from_memory) {
    PENSTOCK_TRY(check_that(message.restore_manifest.empty(), "restore_manifest",
                            "is given, and memory, too"));
    PENSTOCK_TRY(check_that(message.restore_step >= 1, "restore_step", "is below 1"));
    PENSTOCK_TRY(check_text("state_from", message.state_from.address, kNameBytesMax));
  } else if (message.restore_manifest.empty()) {
    PENSTOCK_TRY(
        check_that(message.restore_step == 0, "restore_step", "is given without a manifest"));
  } else {
    PENSTOCK_TRY(check_absolute_path("restore_manifest", message.restore_manifest));
  }
  PENSTOCK_TRY(check_that(message.restore_step >= 0, "restore_step", "is negative"));
  PENSTOCK_TRY(
      check_that(message.first_unreported_step >= 0, "first_unreported_step", "is negative"));
  PENSTOCK_TRY(check_that(message.save_interval >= 0, "save_interval", "is negative"));
  PENSTOCK_TRY(check_that(message.saved_step >= 0, "saved_step", "is negative"));
  PENSTOCK_TRY(
      check_that(message.left_out.size() <= kStepRangesMax, "left_out", "has too many entries"));
  for (const StepRange& range : message.left_out) {
    PENSTOCK_TRY(check_that(range.first >= 1 && range.last >= range.first, "left_out",
                            "has a range that is none"));
  }
  return check_seats(message.seats);
}

Status check(const RankReady& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.data.size() <= kDataSetsMax, "data", "has too many entries"));
  for (const DataIdentity& found : message.data) {
    PENSTOCK_TRY(check_name("data path", found.path));
    PENSTOCK_TRY(check_that(found.tokens >= 0, "data tokens", "is negative"));
  }
  return check_text("address", message.address, kAddressBytesMax);
}

Status check(const BeginTraining& message) {
  PENSTOCK_TRY(check_attempt(message));
  const bool bounded = !message.addresses.empty() && message.addresses.size() <= kRanksMax;
  PENSTOCK_TRY(check_that(bounded, "addresses", "is empty or has too many entries"));
  for (const std::string& address : message.addresses) {
    PENSTOCK_TRY(check_text("address", address, kAddressBytesMax));
  }
  return {};
}

Status check(const StopRanks& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_that(message.grace_ms >= 0 && message.grace_ms <= kMillisecondsMax, "grace_ms",
                          "is not in 0 .. 3600000"));
  return check_text("reason", message.reason, kNameBytesMax);
}

Status check(const RankExited& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.signal >= 0 && message.signal <= kSignalMax, "signal",
                          "is not in 0 .. 64"));
  PENSTOCK_TRY(check_that(message.exit_code >= -1 && message.exit_code <= 255, "exit_code",
                          "is not in -1 .. 255"));
  PENSTOCK_TRY(check_that((message.exit_code == -1) == (message.signal != 0), "exit_code",
                          "contradicts signal: it is -1 exactly when a signal ended the rank"));
  PENSTOCK_TRY(check_text("log_tail", message.log_tail, kLogTailBytesMax));
  return check_text("reason", message.reason, kNameBytesMax);
}

Status check_distinct(std::string_view field, const std::vector<Rank>& ranks) {
  PENSTOCK_TRY(check_that(ranks.size() <= kRanksPerWorkerMax, field, "has too many entries"));
  std::set<Rank> seen;
  for (const Rank rank : ranks) {
    const bool sound = rank.value >= 0 && static_cast<size_t>(rank.value) < kRanksMax;
    PENSTOCK_TRY(check_that(sound, "rank", "is out of range"));
    PENSTOCK_TRY(check_that(seen.insert(rank).second, "rank", "is there twice"));
  }
  return {};
}

// Steps of ranks whose state is held.
Status check_held(std::string_view field, const std::vector<HeldRank>& ranks) {
  std::vector<Rank> numbers;
  for (const HeldRank& held : ranks) {
    numbers.push_back(held.rank);
    const bool bounded = !held.steps.empty() && held.steps.size() <= kStateGenerations;
    PENSTOCK_TRY(check_that(bounded, "steps", "is empty or has too many entries"));
    PENSTOCK_TRY(check_that(held.steps.front() >= 0, "steps", "has a negative one"));
    const bool ascending = std::is_sorted(held.steps.begin(), held.steps.end());
    PENSTOCK_TRY(check_that(ascending, "steps", "is not ascending"));
  }
  return check_distinct(field, numbers);
}

Status check(const RanksStopped& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_held("held", message.held));
  return check_held("copies", message.copies);
}

Status check(const MirrorRanks& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_that(message.step >= 1, "step", "is below 1"));
  PENSTOCK_TRY(check_that(message.kept_step >= 0 && message.kept_step < message.step, "kept_step",
                          "is not in 0 .. step - 1"));
  PENSTOCK_TRY(check_that(message.bytes_per_second >= 1, "bytes_per_second", "is below 1"));
  std::vector<Rank> sent;
  for (const MirrorTarget& target : message.send) {
    PENSTOCK_TRY(check_name("address", target.to.address));
    sent.push_back(target.rank);
  }
  PENSTOCK_TRY(check_distinct("send", sent));
  return check_distinct("keep", message.keep);
}

Status check(const RanksMirrored& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_that(message.step >= 1, "step", "is below 1"));
  PENSTOCK_TRY(check_that(message.kept_step >= 0 && message.kept_step < message.step, "kept_step",
                          "is not in 0 .. step - 1"));
  return check_text("failure", message.failure, kNameBytesMax);
}

Status check(const StepReport& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_that(message.step >= 1, "step", "is below 1"));
  PENSTOCK_TRY(check_that(std::isfinite(message.learning_rate), "learning_rate", "is not finite"));
  PENSTOCK_TRY(check_that(message.tokens >= 0, "tokens", "is negative"));
  PENSTOCK_TRY(check_amount("step_seconds", message.step_seconds));
  PENSTOCK_TRY(check_amount("checkpoint_seconds", message.checkpoint_seconds));
  PENSTOCK_TRY(
      check_that(message.guard.signal <= kGuardSignalLast, "guard.signal", "is not known"));
  PENSTOCK_TRY(
      check_that(message.guard.action <= GuardPolicy::kStop, "guard.action", "is not known"));
  return check_amount("expert_load_max_ratio", message.expert_load_max_ratio);
}

Status check(const EvaluationReport& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_that(message.step >= 0, "step", "is negative"));
  return check_that(message.tokens >= 0, "tokens", "is negative");
}

Status check(const SegmentSaved& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.step >= 0, "step", "is negative"));
  PENSTOCK_TRY(check_relative_path("file", message.file));
  PENSTOCK_TRY(check_that(message.slices.size() <= kSlicesMax, "slices", "has too many entries"));
  for (const SavedSlice& slice : message.slices) PENSTOCK_TRY(check_slice(slice));
  return {};
}

Status check(const SaveFailed& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.step >= 0, "step", "is negative"));
  return check_text("reason", message.reason, kNameBytesMax);
}

Status check(const CheckpointOutcome& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(check_that(message.step >= 0, "step", "is negative"));
  return check_text("reason", message.reason, kNameBytesMax);
}

Status check(const SaveInterval& message) {
  PENSTOCK_TRY(check_attempt(message));
  return check_that(message.steps >= 1, "steps", "is below 1");
}

Status check(const WorkerLeaving& message) {
  return check_that(message.incarnation != 0, "incarnation", "is 0");
}

Status check(const WorkerReleased& message) {
  return check_that(message.worker.value != 0, "worker", "is 0");
}

Status check(const CheckHost& message) {
  return check_that(message.request != 0, "request", "is 0");
}

Status check(const HostChecked& message) {
  PENSTOCK_TRY(check_that(message.request != 0, "request", "is 0"));
  return check_text("report", message.report, kCheckReportBytesMax);
}

Status check(const PauseRanks& message) {
  return check_attempt(message);
}

Status check(const ExpertLoadReport& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.step >= 1, "step", "is below 1"));
  PENSTOCK_TRY(check_layers("layers", message.layers));
  for (const auto& [layer, loads] : message.layers) {
    for (const double load : loads) PENSTOCK_TRY(check_amount("load", load));
  }
  return {};
}

Status check(const InspectRanks& message) {
  return check_attempt(message);
}

Status check(const RanksInspected& message) {
  PENSTOCK_TRY(check_attempt(message));
  PENSTOCK_TRY(
      check_that(message.ranks.size() <= kRanksPerWorkerMax, "ranks", "has too many entries"));
  for (const RankActivity& activity : message.ranks) {
    const FlightState& state = activity.state;
    const bool rank_sound =
        activity.rank.value >= 0 && static_cast<size_t>(activity.rank.value) < kRanksMax;
    PENSTOCK_TRY(check_that(rank_sound, "rank", "is out of range"));
    PENSTOCK_TRY(check_that(static_cast<int>(activity.process) < kProcessStateCount, "process",
                            "is unknown"));
    PENSTOCK_TRY(
        check_that(static_cast<int>(state.phase) < kFlightPhaseCount, "phase", "is unknown"));
    PENSTOCK_TRY(check_that(static_cast<int>(state.kind) < kTraceKindCount, "kind", "is unknown"));
    PENSTOCK_TRY(check_that(state.step >= 0, "step", "is negative"));
    PENSTOCK_TRY(check_that(state.microbatch >= -1, "microbatch", "is below -1"));
    PENSTOCK_TRY(check_that(state.layer >= -1, "layer", "is below -1"));
    PENSTOCK_TRY(check_that(state.peer >= -1, "peer", "is below -1"));
    const bool bounded = activity.quiet_ms >= 0 && activity.quiet_ms <= kQuietMillisecondsMax;
    PENSTOCK_TRY(check_that(bounded, "quiet_ms", "is not in 0 .. 2^40"));
    PENSTOCK_TRY(check_text("log_tail", activity.log_tail, kLogTailBytesMax));
  }
  return {};
}

Status check(const RankFinished& message) {
  PENSTOCK_TRY(check_rank_key(message));
  return check_that(message.step >= 0, "step", "is negative");
}

Status check(const LogChunk& message) {
  PENSTOCK_TRY(check_rank_key(message));
  return check_text("text", message.text, kTextBytesMax);
}

Status check(const RankHello& message) {
  PENSTOCK_TRY(check_rank_key(message));
  return check_that(message.pid >= 1, "pid", "is below 1");
}

Status check(const RankProgress& message) {
  PENSTOCK_TRY(check_rank_key(message));
  PENSTOCK_TRY(check_that(message.step >= 0, "step", "is negative"));
  PENSTOCK_TRY(check_seconds_of_step("step_seconds", message.step_seconds));
  PENSTOCK_TRY(check_seconds_of_step("compute_seconds", message.compute_seconds));
  PENSTOCK_TRY(check_seconds_of_step("expert_wait_seconds", message.expert_wait_seconds));
  PENSTOCK_TRY(check_seconds_of_step("pipeline_wait_seconds", message.pipeline_wait_seconds));
  PENSTOCK_TRY(check_seconds_of_step("reduce_seconds", message.reduce_seconds));
  PENSTOCK_TRY(check_seconds_of_step("optimizer_seconds", message.optimizer_seconds));
  return check_seconds_of_step("checkpoint_seconds", message.checkpoint_seconds);
}

}  // namespace

Status check_message(const ControlMessage& message) {
  const Status status = std::visit([](const auto& kind) { return check(kind); }, message);
  return status.ok() ? status : status.with_context(message_name(message));
}

}  // namespace penstock
