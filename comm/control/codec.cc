#include "comm/control/codec.h"

#include <capnp/message.h>
#include <capnp/serialize.h>

#include "comm/control/codec_fields.h"

namespace penstock {
namespace {

// ControlMessage > StartRank > Program > list > ResizedTraining > list > Instruction is the
// deepest; more is an attack.
constexpr int kNestingMax = 8;

template <typename Message, typename Reader>
ControlMessage taken(Reader reader) {
  Message message;
  codec_fields::take(reader, message);
  return message;
}

Result<ControlMessage> to_message(wire::ControlMessage::Reader reader) {
  switch (reader.which()) {
    case wire::ControlMessage::REGISTER:
      return taken<Register>(reader.getRegister());
    case wire::ControlMessage::REGISTERED:
      return taken<Registered>(reader.getRegistered());
    case wire::ControlMessage::HEARTBEAT:
      return taken<Heartbeat>(reader.getHeartbeat());
    case wire::ControlMessage::START_RANK:
      return taken<StartRank>(reader.getStartRank());
    case wire::ControlMessage::RANK_READY:
      return taken<RankReady>(reader.getRankReady());
    case wire::ControlMessage::BEGIN_TRAINING:
      return taken<BeginTraining>(reader.getBeginTraining());
    case wire::ControlMessage::STOP_RANKS:
      return taken<StopRanks>(reader.getStopRanks());
    case wire::ControlMessage::RANK_EXITED:
      return taken<RankExited>(reader.getRankExited());
    case wire::ControlMessage::STEP_REPORT:
      return taken<StepReport>(reader.getStepReport());
    case wire::ControlMessage::EVALUATION_REPORT:
      return taken<EvaluationReport>(reader.getEvaluationReport());
    case wire::ControlMessage::SEGMENT_SAVED:
      return taken<SegmentSaved>(reader.getSegmentSaved());
    case wire::ControlMessage::SAVE_FAILED:
      return taken<SaveFailed>(reader.getSaveFailed());
    case wire::ControlMessage::CHECKPOINT_OUTCOME:
      return taken<CheckpointOutcome>(reader.getCheckpointOutcome());
    case wire::ControlMessage::RANK_FINISHED:
      return taken<RankFinished>(reader.getRankFinished());
    case wire::ControlMessage::LOG_CHUNK:
      return taken<LogChunk>(reader.getLogChunk());
    case wire::ControlMessage::RANK_HELLO:
      return taken<RankHello>(reader.getRankHello());
    case wire::ControlMessage::RANK_PROGRESS:
      return taken<RankProgress>(reader.getRankProgress());
    case wire::ControlMessage::RANKS_STOPPED:
      return taken<RanksStopped>(reader.getRanksStopped());
    case wire::ControlMessage::EXPERT_LOAD_REPORT:
      return taken<ExpertLoadReport>(reader.getExpertLoadReport());
    case wire::ControlMessage::WORKER_LEAVING:
      return taken<WorkerLeaving>(reader.getWorkerLeaving());
    case wire::ControlMessage::WORKER_RELEASED:
      return taken<WorkerReleased>(reader.getWorkerReleased());
    case wire::ControlMessage::CHECK_HOST:
      return taken<CheckHost>(reader.getCheckHost());
    case wire::ControlMessage::HOST_CHECKED:
      return taken<HostChecked>(reader.getHostChecked());
    case wire::ControlMessage::PAUSE_RANKS:
      return taken<PauseRanks>(reader.getPauseRanks());
    case wire::ControlMessage::SAVE_INTERVAL:
      return taken<SaveInterval>(reader.getSaveInterval());
    case wire::ControlMessage::MIRROR_RANKS:
      return taken<MirrorRanks>(reader.getMirrorRanks());
    case wire::ControlMessage::RANKS_MIRRORED:
      return taken<RanksMirrored>(reader.getRanksMirrored());
    case wire::ControlMessage::INSPECT_RANKS:
      return taken<InspectRanks>(reader.getInspectRanks());
    case wire::ControlMessage::RANKS_INSPECTED:
      return taken<RanksInspected>(reader.getRanksInspected());
  }
  return invalid_argument(fmt::format("unknown message kind {}", static_cast<int>(reader.which())));
}

// Initializes the union member of one kind.
auto init(wire::ControlMessage::Builder b, const Register&) {
  return b.initRegister();
}
auto init(wire::ControlMessage::Builder b, const Registered&) {
  return b.initRegistered();
}
auto init(wire::ControlMessage::Builder b, const Heartbeat&) {
  return b.initHeartbeat();
}
auto init(wire::ControlMessage::Builder b, const StartRank&) {
  return b.initStartRank();
}
auto init(wire::ControlMessage::Builder b, const RankReady&) {
  return b.initRankReady();
}
auto init(wire::ControlMessage::Builder b, const BeginTraining&) {
  return b.initBeginTraining();
}
auto init(wire::ControlMessage::Builder b, const StopRanks&) {
  return b.initStopRanks();
}
auto init(wire::ControlMessage::Builder b, const RankExited&) {
  return b.initRankExited();
}
auto init(wire::ControlMessage::Builder b, const StepReport&) {
  return b.initStepReport();
}
auto init(wire::ControlMessage::Builder b, const EvaluationReport&) {
  return b.initEvaluationReport();
}
auto init(wire::ControlMessage::Builder b, const SegmentSaved&) {
  return b.initSegmentSaved();
}
auto init(wire::ControlMessage::Builder b, const SaveFailed&) {
  return b.initSaveFailed();
}
auto init(wire::ControlMessage::Builder b, const CheckpointOutcome&) {
  return b.initCheckpointOutcome();
}
auto init(wire::ControlMessage::Builder b, const RankFinished&) {
  return b.initRankFinished();
}
auto init(wire::ControlMessage::Builder b, const LogChunk&) {
  return b.initLogChunk();
}
auto init(wire::ControlMessage::Builder b, const RankHello&) {
  return b.initRankHello();
}
auto init(wire::ControlMessage::Builder b, const RankProgress&) {
  return b.initRankProgress();
}

auto init(wire::ControlMessage::Builder b, const RanksStopped&) {
  return b.initRanksStopped();
}
auto init(wire::ControlMessage::Builder b, const ExpertLoadReport&) {
  return b.initExpertLoadReport();
}
auto init(wire::ControlMessage::Builder b, const WorkerLeaving&) {
  return b.initWorkerLeaving();
}
auto init(wire::ControlMessage::Builder b, const WorkerReleased&) {
  return b.initWorkerReleased();
}
auto init(wire::ControlMessage::Builder b, const CheckHost&) {
  return b.initCheckHost();
}
auto init(wire::ControlMessage::Builder b, const HostChecked&) {
  return b.initHostChecked();
}
auto init(wire::ControlMessage::Builder b, const PauseRanks&) {
  return b.initPauseRanks();
}
auto init(wire::ControlMessage::Builder b, const SaveInterval&) {
  return b.initSaveInterval();
}
auto init(wire::ControlMessage::Builder b, const MirrorRanks&) {
  return b.initMirrorRanks();
}
auto init(wire::ControlMessage::Builder b, const RanksMirrored&) {
  return b.initRanksMirrored();
}
auto init(wire::ControlMessage::Builder b, const InspectRanks&) {
  return b.initInspectRanks();
}
auto init(wire::ControlMessage::Builder b, const RanksInspected&) {
  return b.initRanksInspected();
}

}  // namespace

std::vector<std::byte> encode(const ControlMessage& message) {
  capnp::MallocMessageBuilder builder;
  const auto root = builder.initRoot<wire::ControlMessage>();
  std::visit([&root](const auto& kind) { codec_fields::put(init(root, kind), kind); }, message);
  const kj::Array<capnp::word> words = capnp::messageToFlatArray(builder);
  const auto* begin = reinterpret_cast<const std::byte*>(words.begin());
  return {begin, begin + words.size() * sizeof(capnp::word)};
}

Result<ControlMessage> decode(Bytes frame) {
  if (frame.empty() || frame.size() > kFrameBytesMax || frame.size() % sizeof(capnp::word) != 0) {
    return invalid_argument(
        fmt::format("a frame of {} bytes: a message is a multiple of 8, at most {}", frame.size(),
                    kFrameBytesMax));
  }
  const size_t word_count = frame.size() / sizeof(capnp::word);
  std::vector<capnp::word> words(word_count);
  std::memcpy(words.data(), frame.data(), frame.size());
  capnp::ReaderOptions options;
  options.nestingLimit = kNestingMax;
  // A sound message reads each word about once; pointers that share or overlap targets to make a
  // small frame expand into a large message run into this.
  options.traversalLimitInWords = 2 * word_count + 64;
  try {  // the only catch of kj::Exception in comm/control
    capnp::FlatArrayMessageReader reader({words.data(), words.size()}, options);
    if (reader.getEnd() != words.data() + words.size()) {
      return invalid_argument("bytes after the message's end");
    }
    PENSTOCK_TRY_ASSIGN(ControlMessage message, to_message(reader.getRoot<wire::ControlMessage>()));
    PENSTOCK_TRY(check_message(message));
    return message;
  } catch (const kj::Exception& exception) {
    return invalid_argument(fmt::format("damaged frame: {}", exception.getDescription().cStr()));
  }
}

}  // namespace penstock
