#include "tests/control/random_message.h"

#include <limits>

#include "comm/base/check.h"

namespace penstock {
namespace {

template <typename Number>
Number number(Random& random, Number least) {
  // Small values and extreme ones both matter.
  if (random.below(8) == 0) return std::numeric_limits<Number>::max();
  return static_cast<Number>(least + static_cast<Number>(random.below(1000)));
}

std::string any_bytes(Random& random, size_t bytes_max) {
  std::string text(random.below(bytes_max + 1), '\0');
  for (char& c : text) c = static_cast<char>(random.below(256));
  return text;
}

std::string name(Random& random) {
  std::string text(1 + random.below(40), '\0');
  for (char& c : text) c = static_cast<char>('a' + random.below(26));
  return text;
}

double amount(Random& random) {
  return random.uniform() * 1e6;
}

template <typename Message>
void fill_key(Message& message, Random& random) {
  message.job.value = number<uint64_t>(random, 1);
  message.epoch.value = number<uint32_t>(random, 1);
  if constexpr (requires { message.rank; }) {
    message.rank.value = static_cast<int32_t>(random.below(kRanksMax));
  }
}

std::vector<RankStatus> rank_statuses(Random& random) {
  std::vector<RankStatus> ranks(random.below(5));
  for (RankStatus& rank : ranks) {
    fill_key(rank, random);
    rank.state = static_cast<RankState>(random.below(4));
    rank.step = number<int64_t>(random, 0);
    rank.pace = {number<int64_t>(random, 0), random.uniform(), random.uniform()};
  }
  return ranks;
}

std::vector<Instruction> instructions(Random& random) {
  std::vector<Instruction> list(random.below(20));
  for (Instruction& instruction : list) {
    instruction.op = static_cast<Op>(random.below(static_cast<uint64_t>(Op::kOptimizerStep) + 1));
    instruction.direction = static_cast<uint8_t>(random.below(2));
    instruction.microbatch = number<int32_t>(random, -1);
    instruction.backward_direction = static_cast<uint8_t>(random.below(2));
    instruction.backward_microbatch = number<int32_t>(random, -1);
    instruction.peer = number<int32_t>(random, -1);
  }
  return list;
}

SavedSlice saved_slice(Random& random) {
  SavedSlice slice;
  slice.name = name(random);
  slice.dtype = "f32";
  for (size_t i = random.below(5); i > 0; --i) {
    const int64_t extent = number<int64_t>(random, 1);
    const int64_t size = 1 + static_cast<int64_t>(random.below(static_cast<uint64_t>(extent)));
    slice.shape.push_back(extent);
    slice.box_size.push_back(size);
    slice.box_offset.push_back(
        static_cast<int64_t>(random.below(static_cast<uint64_t>(extent - size) + 1)));
  }
  slice.file_offset = random.below(1 << 30);
  slice.byte_count = random.below(1 << 30);
  slice.digest = {random.next(), random.next()};
  return slice;
}

// One number per expert of some layers.
template <typename Values>
void fill_layers(std::map<int64_t, Values>& layers, Random& random) {
  const uint64_t layer_count = random.below(4);
  const size_t experts = 1 + random.below(40);
  for (uint64_t i = 0; i < layer_count; ++i) layers[number<int32_t>(random, 0)].resize(experts);
}

ExpertSeats expert_seats(Random& random) {
  ExpertSeats seats;
  fill_layers(seats.layers, random);
  for (auto& [layer, experts] : seats.layers) {
    for (size_t i = 0; i < experts.size(); ++i) {
      experts[i] = static_cast<int32_t>(i);
      std::swap(experts[i], experts[random.below(i + 1)]);
    }
  }
  return seats;
}

void fill(Register& message, Random& random) {
  message.protocol_version = number<uint32_t>(random, 0);
  message.name = name(random);
  message.incarnation = number<uint64_t>(random, 1);
  message.host = name(random);
  message.device_count = number<int32_t>(random, 1);
  message.device_kind = name(random);
  message.http_address = any_bytes(random, 30);
  message.ranks = rank_statuses(random);
  message.state_address = any_bytes(random, 30);
  message.state_key = {random.next(), random.next()};
  message.sequence = number<uint64_t>(random, 1);
  message.challenge = random.next();
}

void fill(Registered& message, Random& random) {
  if (random.below(2) == 0) {
    message.refusal = name(random);
    message.challenge = random.next();
    return;
  }
  message.worker.value = number<uint64_t>(random, 1);
  message.heartbeat_interval_ms = 1 + static_cast<int64_t>(random.below(3'600'000));
  message.lease_ms = static_cast<int64_t>(random.below(3'600'001));
  message.heard_sequence = random.next();
}

void fill(Heartbeat& message, Random& random) {
  message.worker.value = number<uint64_t>(random, 1);
  message.incarnation = number<uint64_t>(random, 1);
  message.sequence = random.next();
  message.ranks = rank_statuses(random);
  message.sent_at_ns = number<int64_t>(random, 0);
}

void fill(StartRank& message, Random& random) {
  fill_key(message, random);
  message.device = number<int32_t>(random, 0);
  message.spec_json = "{" + any_bytes(random, 2000) + "}";
  message.program.pipeline_index = number<int32_t>(random, 0);
  message.program.training = instructions(random);
  message.program.evaluation = instructions(random);
  for (int32_t size = 1; random.below(2) == 0; ++size) {
    message.program.resized.push_back({size, instructions(random)});
  }
  message.checkpoint_dir = "/" + name(random);
  if (random.below(2) == 0) {
    message.restore_manifest = "/" + name(random);
    message.restore_step = number<int64_t>(random, 0);
  }
  if (message.restore_manifest.empty() && random.below(2) == 0) {
    message.from_memory = true;
    message.restore_step = number<int64_t>(random, 1);
    message.state_from = {any_bytes(random, 30), {random.next(), random.next()}};
  }
  message.saved_step = number<int64_t>(random, 0);
  message.first_unreported_step = number<int64_t>(random, 0);
  message.seats = expert_seats(random);
  while (random.below(2) == 0) {
    const int64_t first = 1 + static_cast<int64_t>(random.below(1000));
    message.left_out.push_back({first, first + static_cast<int64_t>(random.below(1000))});
  }
}

void fill(RankReady& message, Random& random) {
  fill_key(message, random);
  message.address = any_bytes(random, 600);
  message.data.resize(random.below(4));
  for (DataIdentity& found : message.data) {
    found = {name(random), number<int64_t>(random, 0), {random.next(), random.next()}};
  }
}

void fill(BeginTraining& message, Random& random) {
  fill_key(message, random);
  message.addresses.resize(1 + random.below(8));
  for (std::string& address : message.addresses) address = any_bytes(random, 300);
}

void fill(StopRanks& message, Random& random) {
  fill_key(message, random);
  message.grace_ms = static_cast<int64_t>(random.below(3'600'001));
  message.reason = any_bytes(random, 100);
  message.keep_state = random.below(2) == 0;
}

void fill(RankExited& message, Random& random) {
  fill_key(message, random);
  if (random.below(2) == 0) {
    message.exit_code = static_cast<int32_t>(random.below(256));
  } else {
    message.exit_code = -1;
    message.signal = 1 + static_cast<int32_t>(random.below(64));
  }
  message.reason = any_bytes(random, 100);
  message.log_tail = any_bytes(random, 300);
}

void fill(StepReport& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 1);
  message.loss = random.normal();
  message.grad_norm = amount(random);
  message.learning_rate = random.normal();
  message.tokens = number<int64_t>(random, 0);
  message.step_seconds = amount(random);
  message.expert_load_max_ratio = amount(random);
  message.mtp_loss = random.normal();
  message.balance_loss = random.normal();
  message.checkpoint_seconds = amount(random);
  message.guard = {static_cast<GuardSignal>(random.below(4)),
                   kGuardPolicies[random.below(std::size(kGuardPolicies))], random.normal(),
                   random.normal(), random.normal()};
  message.finished_at_ns = static_cast<int64_t>(random.next());
}

void fill(EvaluationReport& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 0);
  message.loss = random.normal();
  message.tokens = number<int64_t>(random, 0);
}

void fill(SegmentSaved& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 0);
  message.file = name(random) + "/" + name(random);
  message.byte_count = random.next();
  message.footer_digest = {random.next(), random.next()};
  message.slices.resize(random.below(6));
  for (SavedSlice& slice : message.slices) slice = saved_slice(random);
}

void fill(SaveFailed& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 0);
  message.reason = any_bytes(random, 100);
}

void fill(CheckpointOutcome& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 0);
  message.committed = random.below(2) == 0;
  message.reason = any_bytes(random, 100);
}

void fill(SaveInterval& message, Random& random) {
  fill_key(message, random);
  message.steps = number<int64_t>(random, 1);
}

void fill(WorkerLeaving& message, Random& random) {
  message.incarnation = random.next() | 1;
  message.left = random.below(2) == 0;
}

void fill(WorkerReleased& message, Random& random) {
  message.worker = {random.next() | 1};
}

void fill(CheckHost& message, Random& random) {
  message.request = random.next() | 1;
}

void fill(HostChecked& message, Random& random) {
  message.request = random.next() | 1;
  message.passed = random.below(2) == 0;
  message.report = any_bytes(random, 100);
}

void fill(PauseRanks& message, Random& random) {
  fill_key(message, random);
}

void fill(RankFinished& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 0);
}

void fill(LogChunk& message, Random& random) {
  fill_key(message, random);
  message.offset = random.next();
  message.text = any_bytes(random, 5000);
}

void fill(RankHello& message, Random& random) {
  fill_key(message, random);
  message.pid = number<int32_t>(random, 1);
}

void fill(RankProgress& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 0);
  message.step_seconds = amount(random);
  message.compute_seconds = amount(random);
  message.expert_wait_seconds = amount(random);
  message.pipeline_wait_seconds = amount(random);
  message.reduce_seconds = amount(random);
  message.optimizer_seconds = amount(random);
  message.checkpoint_seconds = amount(random);
  message.bytes_sent = random.next();
  message.arena_bytes = random.next();
}

std::vector<HeldRank> held_ranks(Random& random) {
  std::vector<HeldRank> ranks;
  for (int32_t rank = 0; random.below(3) != 0; ++rank) {
    HeldRank& held = ranks.emplace_back();
    held.rank = Rank{rank};
    for (int64_t step = 1 + static_cast<int64_t>(random.below(3)); step > 0; --step) {
      held.steps.push_back(number<int64_t>(random, 0));
    }
    std::sort(held.steps.begin(), held.steps.end());
  }
  return ranks;
}

void fill(RanksStopped& message, Random& random) {
  fill_key(message, random);
  message.held = held_ranks(random);
  message.copies = held_ranks(random);
}

void fill(MirrorRanks& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 1);
  message.kept_step = static_cast<int64_t>(random.below(static_cast<uint64_t>(message.step)));
  message.bytes_per_second = number<int64_t>(random, 1);
  for (int32_t rank = 0; random.below(3) != 0; ++rank) {
    message.send.push_back({{rank}, {name(random), {random.next(), random.next()}}});
    message.keep.push_back({rank + 1000});
  }
}

void fill(RanksMirrored& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 1);
  message.failure = any_bytes(random, 100);
  message.missed = random.below(2) == 0;
  message.outdated = random.below(2) == 0;
  message.kept_step = static_cast<int64_t>(random.below(static_cast<uint64_t>(message.step)));
}

void fill(ExpertLoadReport& message, Random& random) {
  fill_key(message, random);
  message.step = number<int64_t>(random, 1);
  fill_layers(message.layers, random);
  for (auto& [layer, loads] : message.layers) {
    for (double& load : loads) load = amount(random);
  }
}

void fill(InspectRanks& message, Random& random) {
  fill_key(message, random);
  message.request = random.next();
}

void fill(RanksInspected& message, Random& random) {
  fill_key(message, random);
  message.request = random.next();
  message.ranks.resize(random.below(5));
  for (RankActivity& activity : message.ranks) {
    activity.rank.value = static_cast<int32_t>(random.below(kRanksMax));
    activity.process = static_cast<ProcessState>(random.below(kProcessStateCount));
    activity.recorded = random.below(2) == 0;
    activity.state = {.phase = static_cast<FlightPhase>(random.below(kFlightPhaseCount)),
                      .step = number<int64_t>(random, 0),
                      .kind = static_cast<TraceKind>(random.below(kTraceKindCount)),
                      .what = static_cast<uint8_t>(random.below(256)),
                      .direction = static_cast<uint8_t>(random.below(256)),
                      .microbatch = number<int32_t>(random, -1),
                      .layer = number<int16_t>(random, -1),
                      .peer = number<int32_t>(random, -1),
                      .sending = random.below(2) == 0,
                      .changes = random.next()};
    activity.quiet_ms = static_cast<int64_t>(random.below(1 << 30));
    activity.log_tail = any_bytes(random, 300);
  }
}

template <size_t Kind = 0>
ControlMessage make(size_t kind, Random& random) {
  if constexpr (Kind < kMessageKinds) {
    if (kind != Kind) return make<Kind + 1>(kind, random);
    std::variant_alternative_t<Kind, ControlMessage> message;
    fill(message, random);
    return message;
  } else {
    check_failed(__FILE__, __LINE__, "kind < kMessageKinds", fmt::format(" {}", kind));
  }
}

}  // namespace

ControlMessage random_message(size_t kind, Random& random) {
  return make(kind, random);
}

}  // namespace penstock
