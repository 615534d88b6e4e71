#include "comm/control/codec_fields.h"

#include <algorithm>

namespace penstock::codec_fields {
namespace {

// A wire enum's number must be ours, because both convert by number.
static_assert(static_cast<int>(wire::Op::OPTIMIZER_STEP) == static_cast<int>(Op::kOptimizerStep));
static_assert(static_cast<int>(wire::Op::OVERLAPPED) == static_cast<int>(Op::kOverlapped));
static_assert(static_cast<int>(wire::RankState::FINISHED) ==
              static_cast<int>(RankState::kFinished));

// Numbers past 255 must not wrap around into valid ones; check_message() refuses 255.
uint8_t bounded_enumerant(uint16_t number) {
  return static_cast<uint8_t>(std::min<uint16_t>(number, 255));
}

capnp::Text::Reader text(const std::string& value) {
  return {value.c_str(), value.size()};
}
std::string take_text(capnp::Text::Reader reader) {
  return {reader.begin(), reader.size()};
}

capnp::Data::Reader data(const std::string& value) {
  return {reinterpret_cast<const kj::byte*>(value.data()), value.size()};
}
std::string take_data(capnp::Data::Reader reader) {
  return {reinterpret_cast<const char*>(reader.begin()), reader.size()};
}

template <typename Builder, typename Message>
void put_attempt(Builder& builder, const Message& message) {
  builder.setJob(message.job.value);
  builder.setEpoch(message.epoch.value);
}
template <typename Builder, typename Message>
void put_rank_key(Builder& builder, const Message& message) {
  put_attempt(builder, message);
  builder.setRank(message.rank.value);
}
template <typename Reader, typename Message>
void take_attempt(const Reader& reader, Message& message) {
  message.job.value = reader.getJob();
  message.epoch.value = reader.getEpoch();
}
template <typename Reader, typename Message>
void take_rank_key(const Reader& reader, Message& message) {
  take_attempt(reader, message);
  message.rank.value = reader.getRank();
}

void put_ranks(capnp::List<wire::RankStatus>::Builder list, const std::vector<RankStatus>& ranks) {
  for (size_t i = 0; i < ranks.size(); ++i) {
    wire::RankStatus::Builder builder = list[i];
    put_rank_key(builder, ranks[i]);
    builder.setState(static_cast<wire::RankState>(ranks[i].state));
    builder.setStep(ranks[i].step);
    builder.setTimedSteps(ranks[i].pace.steps);
    builder.setBusySeconds(ranks[i].pace.busy_seconds);
    builder.setWaitSeconds(ranks[i].pace.wait_seconds);
  }
}
std::vector<RankStatus> take_ranks(capnp::List<wire::RankStatus>::Reader list) {
  std::vector<RankStatus> ranks;
  ranks.reserve(list.size());
  for (const wire::RankStatus::Reader reader : list) {
    RankStatus& rank = ranks.emplace_back();
    take_rank_key(reader, rank);
    rank.state =
        static_cast<RankState>(bounded_enumerant(static_cast<uint16_t>(reader.getState())));
    rank.step = reader.getStep();
    rank.pace = {reader.getTimedSteps(), reader.getBusySeconds(), reader.getWaitSeconds()};
  }
  return ranks;
}

void put_instructions(capnp::List<wire::Instruction>::Builder list,
                      const std::vector<Instruction>& instructions) {
  for (size_t i = 0; i < instructions.size(); ++i) {
    const Instruction& instruction = instructions[i];
    wire::Instruction::Builder builder = list[i];
    builder.setOp(static_cast<wire::Op>(instruction.op));
    builder.setDirection(instruction.direction);
    builder.setMicrobatch(instruction.microbatch);
    builder.setBackwardDirection(instruction.backward_direction);
    builder.setBackwardMicrobatch(instruction.backward_microbatch);
    builder.setPeer(instruction.peer);
  }
}
std::vector<Instruction> take_instructions(capnp::List<wire::Instruction>::Reader list) {
  std::vector<Instruction> instructions;
  instructions.reserve(list.size());
  for (const wire::Instruction::Reader reader : list) {
    Instruction& instruction = instructions.emplace_back();
    instruction.op = static_cast<Op>(bounded_enumerant(static_cast<uint16_t>(reader.getOp())));
    instruction.direction = reader.getDirection();
    instruction.microbatch = reader.getMicrobatch();
    instruction.backward_direction = reader.getBackwardDirection();
    instruction.backward_microbatch = reader.getBackwardMicrobatch();
    instruction.peer = reader.getPeer();
  }
  return instructions;
}

// A layer given twice becomes layer -1, which check_message() refuses.
template <typename Layers>
auto& new_layer(Layers& layers, int32_t layer) {
  return layers[layers.contains(layer) ? -1 : layer];
}

void put_seats(capnp::List<wire::LayerSeats>::Builder list, const ExpertSeats& seats) {
  unsigned index = 0;
  for (const auto& [layer, experts] : seats.layers) {
    wire::LayerSeats::Builder builder = list[index++];
    builder.setLayer(static_cast<int32_t>(layer));
    capnp::List<uint16_t>::Builder by_seat = builder.initExperts(experts.size());
    for (size_t i = 0; i < experts.size(); ++i) by_seat.set(i, static_cast<uint16_t>(experts[i]));
  }
}
ExpertSeats take_seats(capnp::List<wire::LayerSeats>::Reader list) {
  ExpertSeats seats;
  for (const wire::LayerSeats::Reader reader : list) {
    std::vector<int32_t>& experts = new_layer(seats.layers, reader.getLayer());
    const capnp::List<uint16_t>::Reader by_seat = reader.getExperts();
    experts.reserve(by_seat.size());
    for (const uint16_t expert : by_seat) experts.push_back(expert);
  }
  return seats;
}

void put_extents(capnp::List<int64_t>::Builder list, const std::vector<int64_t>& extents) {
  for (size_t i = 0; i < extents.size(); ++i) list.set(i, extents[i]);
}
std::vector<int64_t> take_extents(capnp::List<int64_t>::Reader list) {
  std::vector<int64_t> extents;
  extents.reserve(list.size());
  for (const int64_t extent : list) extents.push_back(extent);
  return extents;
}

void put_place(wire::StatePlace::Builder builder, const StatePlace& place) {
  builder.setAddress(text(place.address));
  builder.setKeyLow(place.key.low);
  builder.setKeyHigh(place.key.high);
}
StatePlace take_place(wire::StatePlace::Reader reader) {
  return {take_text(reader.getAddress()), {reader.getKeyLow(), reader.getKeyHigh()}};
}

void put_held(capnp::List<wire::HeldRank>::Builder list, const std::vector<HeldRank>& ranks) {
  for (unsigned i = 0; i < ranks.size(); ++i) {
    list[i].setRank(ranks[i].rank.value);
    put_extents(list[i].initSteps(ranks[i].steps.size()), ranks[i].steps);
  }
}
std::vector<HeldRank> take_held(capnp::List<wire::HeldRank>::Reader list) {
  std::vector<HeldRank> ranks;
  ranks.reserve(list.size());
  for (const wire::HeldRank::Reader reader : list) {
    ranks.push_back({{reader.getRank()}, take_extents(reader.getSteps())});
  }
  return ranks;
}

void put_slice(wire::SavedSlice::Builder builder, const SavedSlice& slice) {
  builder.setName(text(slice.name));
  builder.setDtype(text(slice.dtype));
  put_extents(builder.initShape(slice.shape.size()), slice.shape);
  put_extents(builder.initBoxOffset(slice.box_offset.size()), slice.box_offset);
  put_extents(builder.initBoxSize(slice.box_size.size()), slice.box_size);
  builder.setFileOffset(slice.file_offset);
  builder.setByteCount(slice.byte_count);
  builder.setDigestLow(slice.digest.low);
  builder.setDigestHigh(slice.digest.high);
}
SavedSlice take_slice(wire::SavedSlice::Reader reader) {
  SavedSlice slice;
  slice.name = take_text(reader.getName());
  slice.dtype = take_text(reader.getDtype());
  slice.shape = take_extents(reader.getShape());
  slice.box_offset = take_extents(reader.getBoxOffset());
  slice.box_size = take_extents(reader.getBoxSize());
  slice.file_offset = reader.getFileOffset();
  slice.byte_count = reader.getByteCount();
  slice.digest = {reader.getDigestLow(), reader.getDigestHigh()};
  return slice;
}

}  // namespace

void put(wire::Register::Builder builder, const Register& message) {
  builder.setProtocolVersion(message.protocol_version);
  builder.setName(text(message.name));
  builder.setIncarnation(message.incarnation);
  builder.setHost(text(message.host));
  builder.setDeviceCount(message.device_count);
  builder.setDeviceKind(text(message.device_kind));
  builder.setHttpAddress(text(message.http_address));
  put_ranks(builder.initRanks(message.ranks.size()), message.ranks);
  put_place(builder.initStatePlace(), {message.state_address, message.state_key});
  builder.setSequence(message.sequence);
  builder.setChallenge(message.challenge);
}
void take(wire::Register::Reader reader, Register& message) {
  message.protocol_version = reader.getProtocolVersion();
  message.name = take_text(reader.getName());
  message.incarnation = reader.getIncarnation();
  message.host = take_text(reader.getHost());
  message.device_count = reader.getDeviceCount();
  message.device_kind = take_text(reader.getDeviceKind());
  message.http_address = take_text(reader.getHttpAddress());
  message.ranks = take_ranks(reader.getRanks());
  const StatePlace place = take_place(reader.getStatePlace());
  message.state_address = place.address;
  message.state_key = place.key;
  message.sequence = reader.getSequence();
  message.challenge = reader.getChallenge();
}

void put(wire::Registered::Builder builder, const Registered& message) {
  builder.setWorker(message.worker.value);
  builder.setHeartbeatIntervalMs(message.heartbeat_interval_ms);
  builder.setRefusal(text(message.refusal));
  builder.setLeaseMs(message.lease_ms);
  builder.setHeardSequence(message.heard_sequence);
  builder.setChallenge(message.challenge);
}
void take(wire::Registered::Reader reader, Registered& message) {
  message.worker.value = reader.getWorker();
  message.heartbeat_interval_ms = reader.getHeartbeatIntervalMs();
  message.refusal = take_text(reader.getRefusal());
  message.lease_ms = reader.getLeaseMs();
  message.heard_sequence = reader.getHeardSequence();
  message.challenge = reader.getChallenge();
}

void put(wire::Heartbeat::Builder builder, const Heartbeat& message) {
  builder.setWorker(message.worker.value);
  builder.setIncarnation(message.incarnation);
  builder.setSequence(message.sequence);
  put_ranks(builder.initRanks(message.ranks.size()), message.ranks);
  builder.setSentAtNs(message.sent_at_ns);
}
void take(wire::Heartbeat::Reader reader, Heartbeat& message) {
  message.worker.value = reader.getWorker();
  message.incarnation = reader.getIncarnation();
  message.sequence = reader.getSequence();
  message.ranks = take_ranks(reader.getRanks());
  message.sent_at_ns = reader.getSentAtNs();
}

void put(wire::StartRank::Builder builder, const StartRank& message) {
  put_rank_key(builder, message);
  builder.setDevice(message.device);
  builder.setSpecJson(text(message.spec_json));
  wire::Program::Builder program = builder.initProgram();
  program.setPipelineIndex(message.program.pipeline_index);
  put_instructions(program.initTraining(message.program.training.size()), message.program.training);
  put_instructions(program.initEvaluation(message.program.evaluation.size()),
                   message.program.evaluation);
  const std::vector<ResizedTraining>& resized = message.program.resized;
  capnp::List<wire::ResizedTraining>::Builder list = program.initResized(resized.size());
  for (size_t i = 0; i < resized.size(); ++i) {
    list[i].setMicrobatches(resized[i].microbatches);
    put_instructions(list[i].initTraining(resized[i].training.size()), resized[i].training);
  }
  builder.setCheckpointDir(text(message.checkpoint_dir));
  builder.setRestoreManifest(text(message.restore_manifest));
  builder.setRestoreStep(message.restore_step);
  builder.setFirstUnreportedStep(message.first_unreported_step);
  put_seats(builder.initSeats(message.seats.layers.size()), message.seats);
  builder.setSaveInterval(message.save_interval);
  builder.setFromMemory(message.from_memory);
  builder.setSavedStep(message.saved_step);
  put_place(builder.initStateFrom(), message.state_from);
  capnp::List<wire::StepRange>::Builder left_out = builder.initLeftOut(message.left_out.size());
  for (size_t i = 0; i < message.left_out.size(); ++i) {
    left_out[i].setFirst(message.left_out[i].first);
    left_out[i].setLast(message.left_out[i].last);
  }
}
void take(wire::StartRank::Reader reader, StartRank& message) {
  take_rank_key(reader, message);
  message.device = reader.getDevice();
  message.spec_json = take_text(reader.getSpecJson());
  const wire::Program::Reader program = reader.getProgram();
  message.program.pipeline_index = program.getPipelineIndex();
  message.program.training = take_instructions(program.getTraining());
  message.program.evaluation = take_instructions(program.getEvaluation());
  for (const wire::ResizedTraining::Reader resized : program.getResized()) {
    message.program.resized.push_back(
        {resized.getMicrobatches(), take_instructions(resized.getTraining())});
  }
  message.checkpoint_dir = take_text(reader.getCheckpointDir());
  message.restore_manifest = take_text(reader.getRestoreManifest());
  message.restore_step = reader.getRestoreStep();
  message.first_unreported_step = reader.getFirstUnreportedStep();
  message.seats = take_seats(reader.getSeats());
  message.save_interval = reader.getSaveInterval();
  message.from_memory = reader.getFromMemory();
  message.saved_step = reader.getSavedStep();
  message.state_from = take_place(reader.getStateFrom());
  for (const wire::StepRange::Reader range : reader.getLeftOut()) {
    message.left_out.push_back({range.getFirst(), range.getLast()});
  }
}

void put(wire::RankReady::Builder builder, const RankReady& message) {
  put_rank_key(builder, message);
  builder.setAddress(data(message.address));
  capnp::List<wire::DataIdentity>::Builder list = builder.initData(message.data.size());
  for (size_t i = 0; i < message.data.size(); ++i) {
    const DataIdentity& found = message.data[i];
    list[i].setPath(text(found.path));
    list[i].setTokens(found.tokens);
    list[i].setDigestLow(found.digest.low);
    list[i].setDigestHigh(found.digest.high);
  }
}
void take(wire::RankReady::Reader reader, RankReady& message) {
  take_rank_key(reader, message);
  message.address = take_data(reader.getAddress());
  const capnp::List<wire::DataIdentity>::Reader list = reader.getData();
  message.data.reserve(list.size());
  for (const wire::DataIdentity::Reader found : list) {
    message.data.push_back({take_text(found.getPath()),
                            found.getTokens(),
                            {found.getDigestLow(), found.getDigestHigh()}});
  }
}

void put(wire::BeginTraining::Builder builder, const BeginTraining& message) {
  put_attempt(builder, message);
  capnp::List<capnp::Data>::Builder list = builder.initAddresses(message.addresses.size());
  for (size_t i = 0; i < message.addresses.size(); ++i) list.set(i, data(message.addresses[i]));
}
void take(wire::BeginTraining::Reader reader, BeginTraining& message) {
  take_attempt(reader, message);
  const capnp::List<capnp::Data>::Reader list = reader.getAddresses();
  message.addresses.reserve(list.size());
  for (const capnp::Data::Reader address : list) message.addresses.push_back(take_data(address));
}

void put(wire::StopRanks::Builder builder, const StopRanks& message) {
  put_attempt(builder, message);
  builder.setGraceMs(message.grace_ms);
  builder.setReason(text(message.reason));
  builder.setKeepState(message.keep_state);
}
void take(wire::StopRanks::Reader reader, StopRanks& message) {
  take_attempt(reader, message);
  message.grace_ms = reader.getGraceMs();
  message.reason = take_text(reader.getReason());
  message.keep_state = reader.getKeepState();
}

void put(wire::RankExited::Builder builder, const RankExited& message) {
  put_rank_key(builder, message);
  builder.setExitCode(message.exit_code);
  builder.setSignal(message.signal);
  builder.setReason(text(message.reason));
  builder.setLogTail(data(message.log_tail));
}
void take(wire::RankExited::Reader reader, RankExited& message) {
  take_rank_key(reader, message);
  message.exit_code = reader.getExitCode();
  message.signal = reader.getSignal();
  message.reason = take_text(reader.getReason());
  message.log_tail = take_data(reader.getLogTail());
}

void put(wire::RanksStopped::Builder builder, const RanksStopped& message) {
  put_attempt(builder, message);
  put_held(builder.initHeld(message.held.size()), message.held);
  put_held(builder.initCopies(message.copies.size()), message.copies);
}
void take(wire::RanksStopped::Reader reader, RanksStopped& message) {
  take_attempt(reader, message);
  message.held = take_held(reader.getHeld());
  message.copies = take_held(reader.getCopies());
}

void put(wire::StepReport::Builder builder, const StepReport& message) {
  put_attempt(builder, message);
  builder.setStep(message.step);
  builder.setLoss(message.loss);
  builder.setGradNorm(message.grad_norm);
  builder.setLearningRate(message.learning_rate);
  builder.setTokens(message.tokens);
  builder.setStepSeconds(message.step_seconds);
  builder.setExpertLoadMaxRatio(message.expert_load_max_ratio);
  builder.setFinishedAtNs(message.finished_at_ns);
  builder.setMtpLoss(message.mtp_loss);
  builder.setBalanceLoss(message.balance_loss);
  builder.setCheckpointSeconds(message.checkpoint_seconds);
  builder.setGuardSignal(static_cast<uint8_t>(message.guard.signal));
  builder.setGuardAction(static_cast<uint8_t>(message.guard.action));
  builder.setGuardValue(message.guard.value);
  builder.setGuardMedian(message.guard.median);
  builder.setGuardLimit(message.guard.limit);
}
void take(wire::StepReport::Reader reader, StepReport& message) {
  take_attempt(reader, message);
  message.step = reader.getStep();
  message.loss = reader.getLoss();
  message.grad_norm = reader.getGradNorm();
  message.learning_rate = reader.getLearningRate();
  message.tokens = reader.getTokens();
  message.step_seconds = reader.getStepSeconds();
  message.expert_load_max_ratio = reader.getExpertLoadMaxRatio();
  message.finished_at_ns = reader.getFinishedAtNs();
  message.mtp_loss = reader.getMtpLoss();
  message.balance_loss = reader.getBalanceLoss();
  message.checkpoint_seconds = reader.getCheckpointSeconds();
  message.guard = {static_cast<GuardSignal>(reader.getGuardSignal()),
                   static_cast<GuardPolicy>(reader.getGuardAction()), reader.getGuardValue(),
                   reader.getGuardMedian(), reader.getGuardLimit()};
}

void put(wire::EvaluationReport::Builder builder, const EvaluationReport& message) {
  put_attempt(builder, message);
  builder.setStep(message.step);
  builder.setLoss(message.loss);
  builder.setTokens(message.tokens);
}
void take(wire::EvaluationReport::Reader reader, EvaluationReport& message) {
  take_attempt(reader, message);
  message.step = reader.getStep();
  message.loss = reader.getLoss();
  message.tokens = reader.getTokens();
}

void put(wire::SegmentSaved::Builder builder, const SegmentSaved& message) {
  put_rank_key(builder, message);
  builder.setStep(message.step);
  builder.setFile(text(message.file));
  builder.setByteCount(message.byte_count);
  builder.setFooterDigestLow(message.footer_digest.low);
  builder.setFooterDigestHigh(message.footer_digest.high);
  capnp::List<wire::SavedSlice>::Builder list = builder.initSlices(message.slices.size());
  for (size_t i = 0; i < message.slices.size(); ++i) put_slice(list[i], message.slices[i]);
  builder.setPauses(message.pauses);
}
void take(wire::SegmentSaved::Reader reader, SegmentSaved& message) {
  take_rank_key(reader, message);
  message.step = reader.getStep();
  message.file = take_text(reader.getFile());
  message.byte_count = reader.getByteCount();
  message.footer_digest = {reader.getFooterDigestLow(), reader.getFooterDigestHigh()};
  const capnp::List<wire::SavedSlice>::Reader list = reader.getSlices();
  message.slices.reserve(list.size());
  for (const wire::SavedSlice::Reader slice : list) message.slices.push_back(take_slice(slice));
  message.pauses = reader.getPauses();
}

void put(wire::SaveFailed::Builder builder, const SaveFailed& message) {
  put_rank_key(builder, message);
  builder.setStep(message.step);
  builder.setReason(text(message.reason));
}
void take(wire::SaveFailed::Reader reader, SaveFailed& message) {
  take_rank_key(reader, message);
  message.step = reader.getStep();
  message.reason = take_text(reader.getReason());
}

void put(wire::CheckpointOutcome::Builder builder, const CheckpointOutcome& message) {
  put_attempt(builder, message);
  builder.setStep(message.step);
  builder.setCommitted(message.committed);
  builder.setReason(text(message.reason));
}
void take(wire::CheckpointOutcome::Reader reader, CheckpointOutcome& message) {
  take_attempt(reader, message);
  message.step = reader.getStep();
  message.committed = reader.getCommitted();
  message.reason = take_text(reader.getReason());
}

void put(wire::SaveInterval::Builder builder, const SaveInterval& message) {
  put_attempt(builder, message);
  builder.setSteps(message.steps);
}
void take(wire::SaveInterval::Reader reader, SaveInterval& message) {
  take_attempt(reader, message);
  message.steps = reader.getSteps();
}

void put(wire::PauseRanks::Builder builder, const PauseRanks& message) {
  put_attempt(builder, message);
}
void take(wire::PauseRanks::Reader reader, PauseRanks& message) {
  take_attempt(reader, message);
}

void put(wire::WorkerLeaving::Builder builder, const WorkerLeaving& message) {
  builder.setIncarnation(message.incarnation);
  builder.setLeft(message.left);
}
void take(wire::WorkerLeaving::Reader reader, WorkerLeaving& message) {
  message.incarnation = reader.getIncarnation();
  message.left = reader.getLeft();
}

void put(wire::WorkerReleased::Builder builder, const WorkerReleased& message) {
  builder.setWorker(message.worker.value);
}
void take(wire::WorkerReleased::Reader reader, WorkerReleased& message) {
  message.worker = {reader.getWorker()};
}

void put(wire::CheckHost::Builder builder, const CheckHost& message) {
  builder.setRequest(message.request);
}
void take(wire::CheckHost::Reader reader, CheckHost& message) {
  message.request = reader.getRequest();
}

void put(wire::HostChecked::Builder builder, const HostChecked& message) {
  builder.setRequest(message.request);
  builder.setPassed(message.passed);
  builder.setReport(text(message.report));
}
void take(wire::HostChecked::Reader reader, HostChecked& message) {
  message.request = reader.getRequest();
  message.passed = reader.getPassed();
  message.report = take_text(reader.getReport());
}

void put(wire::ExpertLoadReport::Builder builder, const ExpertLoadReport& message) {
  put_rank_key(builder, message);
  builder.setStep(message.step);
  capnp::List<wire::LayerLoads>::Builder list = builder.initLayers(message.layers.size());
  unsigned index = 0;
  for (const auto& [layer, loads] : message.layers) {
    wire::LayerLoads::Builder of_layer = list[index++];
    of_layer.setLayer(static_cast<int32_t>(layer));
    capnp::List<double>::Builder by_expert = of_layer.initLoads(loads.size());
    for (size_t i = 0; i < loads.size(); ++i) by_expert.set(i, loads[i]);
  }
}
void take(wire::ExpertLoadReport::Reader reader, ExpertLoadReport& message) {
  take_rank_key(reader, message);
  message.step = reader.getStep();
  for (const wire::LayerLoads::Reader of_layer : reader.getLayers()) {
    std::vector<double>& loads = new_layer(message.layers, of_layer.getLayer());
    const capnp::List<double>::Reader by_expert = of_layer.getLoads();
    loads.reserve(by_expert.size());
    for (const double load : by_expert) loads.push_back(load);
  }
}

void put(wire::RankFinished::Builder builder, const RankFinished& message) {
  put_rank_key(builder, message);
  builder.setStep(message.step);
}
void take(wire::RankFinished::Reader reader, RankFinished& message) {
  take_rank_key(reader, message);
  message.step = reader.getStep();
}

void put(wire::LogChunk::Builder builder, const LogChunk& message) {
  put_rank_key(builder, message);
  builder.setOffset(message.offset);
  builder.setText(data(message.text));
}
void take(wire::LogChunk::Reader reader, LogChunk& message) {
  take_rank_key(reader, message);
  message.offset = reader.getOffset();
  message.text = take_data(reader.getText());
}

void put(wire::RankHello::Builder builder, const RankHello& message) {
  put_rank_key(builder, message);
  builder.setPid(message.pid);
}
void take(wire::RankHello::Reader reader, RankHello& message) {
  take_rank_key(reader, message);
  message.pid = reader.getPid();
}

void put(wire::RankProgress::Builder builder, const RankProgress& message) {
  put_rank_key(builder, message);
  builder.setStep(message.step);
  builder.setStepSeconds(message.step_seconds);
  builder.setComputeSeconds(message.compute_seconds);
  builder.setExpertWaitSeconds(message.expert_wait_seconds);
  builder.setPipelineWaitSeconds(message.pipeline_wait_seconds);
  builder.setReduceSeconds(message.reduce_seconds);
  builder.setOptimizerSeconds(message.optimizer_seconds);
  builder.setCheckpointSeconds(message.checkpoint_seconds);
  builder.setBytesSent(message.bytes_sent);
  builder.setArenaBytes(message.arena_bytes);
}
void take(wire::RankProgress::Reader reader, RankProgress& message) {
  take_rank_key(reader, message);
  message.step = reader.getStep();
  message.step_seconds = reader.getStepSeconds();
  message.compute_seconds = reader.getComputeSeconds();
  message.expert_wait_seconds = reader.getExpertWaitSeconds();
  message.pipeline_wait_seconds = reader.getPipelineWaitSeconds();
  message.reduce_seconds = reader.getReduceSeconds();
  message.optimizer_seconds = reader.getOptimizerSeconds();
  message.checkpoint_seconds = reader.getCheckpointSeconds();
  message.bytes_sent = reader.getBytesSent();
  message.arena_bytes = reader.getArenaBytes();
}

void put(wire::MirrorRanks::Builder builder, const MirrorRanks& message) {
  put_attempt(builder, message);
  builder.setStep(message.step);
  builder.setKeptStep(message.kept_step);
  builder.setBytesPerSecond(message.bytes_per_second);
  capnp::List<wire::MirrorTarget>::Builder list = builder.initSend(message.send.size());
  for (unsigned i = 0; i < message.send.size(); ++i) {
    list[i].setRank(message.send[i].rank.value);
    put_place(list[i].initTo(), message.send[i].to);
  }
  capnp::List<int32_t>::Builder keep = builder.initKeep(message.keep.size());
  for (unsigned i = 0; i < message.keep.size(); ++i) keep.set(i, message.keep[i].value);
}
void take(wire::MirrorRanks::Reader reader, MirrorRanks& message) {
  take_attempt(reader, message);
  message.step = reader.getStep();
  message.kept_step = reader.getKeptStep();
  message.bytes_per_second = reader.getBytesPerSecond();
  for (const wire::MirrorTarget::Reader target : reader.getSend()) {
    message.send.push_back({{target.getRank()}, take_place(target.getTo())});
  }
  for (const int32_t rank : reader.getKeep()) message.keep.push_back({rank});
}

void put(wire::RanksMirrored::Builder builder, const RanksMirrored& message) {
  put_attempt(builder, message);
  builder.setStep(message.step);
  builder.setFailure(text(message.failure));
  builder.setMissed(message.missed);
  builder.setOutdated(message.outdated);
  builder.setKeptStep(message.kept_step);
}
void take(wire::RanksMirrored::Reader reader, RanksMirrored& message) {
  take_attempt(reader, message);
  message.step = reader.getStep();
  message.failure = take_text(reader.getFailure());
  message.missed = reader.getMissed();
  message.outdated = reader.getOutdated();
  message.kept_step = reader.getKeptStep();
}

void put(wire::InspectRanks::Builder builder, const InspectRanks& message) {
  put_attempt(builder, message);
  builder.setRequest(message.request);
}
void take(wire::InspectRanks::Reader reader, InspectRanks& message) {
  take_attempt(reader, message);
  message.request = reader.getRequest();
}

void put(wire::RanksInspected::Builder builder, const RanksInspected& message) {
  put_attempt(builder, message);
  builder.setRequest(message.request);
  capnp::List<wire::RankActivity>::Builder list = builder.initRanks(message.ranks.size());
  for (unsigned i = 0; i < message.ranks.size(); ++i) {
    const RankActivity& activity = message.ranks[i];
    const FlightState& state = activity.state;
    wire::RankActivity::Builder entry = list[i];
    entry.setRank(activity.rank.value);
    entry.setProcess(static_cast<wire::ProcessState>(activity.process));
    entry.setRecorded(activity.recorded);
    entry.setPhase(static_cast<uint8_t>(state.phase));
    entry.setStep(state.step);
    entry.setKind(static_cast<uint8_t>(state.kind));
    entry.setWhat(state.what);
    entry.setDirection(state.direction);
    entry.setMicrobatch(state.microbatch);
    entry.setLayer(state.layer);
    entry.setPeer(state.peer);
    entry.setSending(state.sending);
    entry.setChanges(state.changes);
    entry.setQuietMs(activity.quiet_ms);
    entry.setLogTail(data(activity.log_tail));
  }
}
void take(wire::RanksInspected::Reader reader, RanksInspected& message) {
  take_attempt(reader, message);
  message.request = reader.getRequest();
  for (const wire::RankActivity::Reader entry : reader.getRanks()) {
    RankActivity& activity = message.ranks.emplace_back();
    activity.rank.value = entry.getRank();
    activity.process = static_cast<ProcessState>(entry.getProcess());
    activity.recorded = entry.getRecorded();
    activity.state = {.phase = static_cast<FlightPhase>(entry.getPhase()),
                      .step = entry.getStep(),
                      .kind = static_cast<TraceKind>(entry.getKind()),
                      .what = entry.getWhat(),
                      .direction = entry.getDirection(),
                      .microbatch = entry.getMicrobatch(),
                      .layer = entry.getLayer(),
                      .peer = entry.getPeer(),
                      .sending = entry.getSending(),
                      .changes = entry.getChanges()};
    activity.quiet_ms = entry.getQuietMs();
    activity.log_tail = take_data(entry.getLogTail());
  }
}

}  // namespace penstock::codec_fields
