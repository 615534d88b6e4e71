// One TEST per rule of message.h that check_message() enforces: a sound message, one field broken,
// the error names it.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "comm/control/codec.h"

namespace penstock {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Register sound_register() {
  Register message;
  message.name = "w0";
  message.incarnation = 1;
  message.host = "host";
  message.device_count = 1;
  message.device_kind = "cpu";
  message.sequence = 1;
  return message;
}

StartRank sound_start() {
  StartRank message;
  message.job = {1};
  message.epoch = {1};
  message.spec_json = "{}";
  message.checkpoint_dir = "/checkpoints/1";
  return message;
}

SegmentSaved sound_segment() {
  SegmentSaved message;
  message.job = {1};
  message.epoch = {1};
  message.step = 10;
  message.file = "step-10/rank-0.segment";
  SavedSlice slice;
  slice.name = "lm_head.weight|weight";
  slice.dtype = "f32";
  slice.shape = {8, 4};
  slice.box_offset = {4, 0};
  slice.box_size = {4, 4};
  message.slices.push_back(slice);
  return message;
}

// The refusal names the message and the field.
void expect_refused(const ControlMessage& message, const std::string& field) {
  const Status status = check_message(message);
  ASSERT_FALSE(status.ok()) << "accepted although " << field << " is wrong";
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find(field), std::string::npos) << status.message();
  EXPECT_NE(status.message().find(std::string(message_name(message))), std::string::npos)
      << status.message();
  EXPECT_FALSE(decode(encode(message)).ok()) << "the codec let it through";
}

TEST(MessageCheckTest, SoundMessagesPass) {
  EXPECT_TRUE(check_message(sound_register()).ok());
  EXPECT_TRUE(check_message(sound_start()).ok());
  EXPECT_TRUE(check_message(sound_segment()).ok());
}

TEST(MessageCheckTest, RegisterNeedsAName) {
  Register message = sound_register();
  message.name.clear();
  expect_refused(message, "name is empty");
}

TEST(MessageCheckTest, NamesHoldNoControlCharacters) {
  Register message = sound_register();
  message.name = "w0\nlevel=error fake line";
  expect_refused(message, "name holds a control character");
}

TEST(MessageCheckTest, NamesAreBounded) {
  Register message = sound_register();
  message.name.assign(kNameBytesMax + 1, 'x');
  expect_refused(message, "name is 4097 bytes long");
}

TEST(MessageCheckTest, RegisterNeedsAnIncarnation) {
  Register message = sound_register();
  message.incarnation = 0;
  expect_refused(message, "incarnation");
}

TEST(MessageCheckTest, RegisterNeedsASequence) {
  Register message = sound_register();
  message.sequence = 0;
  expect_refused(message, "sequence");
}

TEST(MessageCheckTest, RegisterNeedsADevice) {
  Register message = sound_register();
  message.device_count = 0;
  expect_refused(message, "device_count");
}

TEST(MessageCheckTest, RankStatesAreKnownOnes) {
  Register message = sound_register();
  message.ranks.push_back({.job = {1}, .epoch = {1}, .rank = {0}});
  message.ranks.back().state = static_cast<RankState>(4);
  expect_refused(message, "state");
}

TEST(MessageCheckTest, TimesOfHeartbeatsAreNotNegative) {
  Heartbeat message = {.worker = {1}, .incarnation = 1, .sequence = 1, .ranks = {}};
  message.sent_at_ns = std::numeric_limits<int64_t>::min();
  expect_refused(message, "sent_at_ns");
}

// Their sums are reported, too.
TEST(MessageCheckTest, SecondsOfStepsAreBounded) {
  RankProgress message{.job = {1}, .epoch = {1}, .rank = {0}, .step = 1};
  EXPECT_TRUE(check_message(message).ok());
  for (const double seconds : {-1.0, 1e10, kNan}) {
    message.compute_seconds = seconds;
    expect_refused(message, "compute_seconds");
  }
}

TEST(MessageCheckTest, RankStepsAreNotNegative) {
  Heartbeat message = {.worker = {1}, .incarnation = 1, .sequence = 1, .ranks = {}};
  message.ranks.push_back({.job = {1}, .epoch = {1}, .rank = {0}});
  message.ranks.back().step = -1;
  expect_refused(message, "step");
}

TEST(MessageCheckTest, WhatRanksSpendTheirStepsWithIsNoLessThanNothing) {
  for (const RankPace& pace : {RankPace{-1, 0.0, 0.0}, RankPace{1, -1.0, 0.0},
                               RankPace{1, 0.0, std::numeric_limits<double>::infinity()}}) {
    Heartbeat message = {.worker = {1}, .incarnation = 1, .sequence = 1, .ranks = {}};
    message.ranks.push_back({.job = {1}, .epoch = {1}, .rank = {0}, .pace = pace});
    EXPECT_FALSE(check_message(message).ok());
  }
}

TEST(MessageCheckTest, ChecksOfHostsAreNumberedAndTheirReportsBounded) {
  expect_refused(CheckHost{0}, "request");
  expect_refused(HostChecked{0, true, ""}, "request");
  expect_refused(HostChecked{1, true, std::string(kCheckReportBytesMax + 1, 'x')}, "report");
}

TEST(MessageCheckTest, RegisteredMayAskToRegisterAgainOrRefuse) {
  EXPECT_TRUE(check_message(Registered{{0}, 1000, ""}).ok());
  EXPECT_TRUE(check_message(Registered{{0}, 0, "the protocol version differs"}).ok());
}

TEST(MessageCheckTest, OnlyWhoIsNotKnownIsAskedWhetherItLives) {
  EXPECT_TRUE(check_message(Registered{{0}, 1000, "", 15'000, 0, 7}).ok());
  expect_refused(Registered{{1}, 1000, "", 15'000, 0, 7}, "challenge");
}

TEST(MessageCheckTest, HeartbeatIntervalsAreBounded) {
  expect_refused(Registered{{1}, 0, ""}, "heartbeat_interval_ms");
  expect_refused(Registered{{1}, 3'600'001, ""}, "heartbeat_interval_ms");
  expect_refused(Registered{{1}, 1000, "", -1}, "lease_ms");
  expect_refused(Registered{{1}, 1000, "", 3'600'001}, "lease_ms");
}

TEST(MessageCheckTest, HeartbeatNeedsAWorker) {
  expect_refused(Heartbeat{{0}, 1, 1, {}}, "worker");
}

TEST(MessageCheckTest, JobZeroIsNobody) {
  expect_refused(RanksStopped{{0}, {1}}, "job");
}

TEST(MessageCheckTest, EpochZeroIsNone) {
  expect_refused(RanksStopped{{1}, {0}}, "epoch");
}

MirrorRanks sound_mirror() {
  return {{1}, {1}, 9, 4, 1000, {{Rank{0}, {"host:1", {}}}, {Rank{1}, {"host:1", {}}}}, {Rank{2}}};
}

TEST(MessageCheckTest, OrdersToCopyNameStepsRanksOnceAndPlaces) {
  EXPECT_TRUE(check_message(sound_mirror()).ok());
  const auto refused = [](auto change, const std::string& field) {
    MirrorRanks message = sound_mirror();
    change(message);
    expect_refused(message, field);
  };
  refused([](MirrorRanks& m) { m.step = 0; }, "step");
  refused([](MirrorRanks& m) { m.kept_step = 9; }, "kept_step");
  refused([](MirrorRanks& m) { m.kept_step = -1; }, "kept_step");
  refused([](MirrorRanks& m) { m.bytes_per_second = 0; }, "bytes_per_second");
  refused([](MirrorRanks& m) { m.send[1].rank = {0}; }, "rank");
  refused([](MirrorRanks& m) { m.send[1].to.address.clear(); }, "address");
  refused([](MirrorRanks& m) { m.keep = {{2}, {2}}; }, "rank");
  refused([](MirrorRanks& m) { m.keep = {{-1}}; }, "rank");
  refused([](MirrorRanks& m) { m.keep.resize(4097); }, "keep");
}

TEST(MessageCheckTest, CopiesAreBoundedAsWhatIsHeldIs) {
  const auto stopped = [](std::vector<HeldRank> copies) {
    return RanksStopped{{1}, {1}, {}, std::move(copies)};
  };
  EXPECT_TRUE(check_message(stopped({{Rank{0}, {3, 8}}, {Rank{9}, {8}}})).ok());
  expect_refused(stopped({{Rank{0}, {8, 3}}}), "steps");
  expect_refused(stopped({{Rank{0}, {}}}), "steps");
  expect_refused(stopped({{Rank{0}, {1, 2, 3, 4}}}), "steps");
  expect_refused(stopped({{Rank{0}, {3}}, {Rank{0}, {3}}}), "rank");
}

TEST(MessageCheckTest, RanksAreNotNegative) {
  expect_refused(RankFinished{{1}, {1}, {-1}, 1}, "rank");
}

TEST(MessageCheckTest, RanksAreBounded) {
  expect_refused(RankFinished{{1}, {1}, {static_cast<int32_t>(kRanksMax)}, 1}, "rank");
}

TEST(MessageCheckTest, StartRankNeedsADevice) {
  StartRank message = sound_start();
  message.device = -1;
  expect_refused(message, "device");
}

TEST(MessageCheckTest, StartRankNeedsASpec) {
  StartRank message = sound_start();
  message.spec_json.clear();
  expect_refused(message, "spec_json");
}

TEST(MessageCheckTest, SpecsAreBounded) {
  StartRank message = sound_start();
  message.spec_json.assign(kTextBytesMax + 1, ' ');
  expect_refused(message, "spec_json");
}

TEST(MessageCheckTest, CheckpointDirectoriesAreAbsolute) {
  StartRank message = sound_start();
  message.checkpoint_dir = "relative";
  expect_refused(message, "checkpoint_dir");
}

TEST(MessageCheckTest, ManifestsAreAbsolute) {
  StartRank message = sound_start();
  message.restore_manifest = "manifest";
  expect_refused(message, "restore_manifest");
}

TEST(MessageCheckTest, ARestoreStepNeedsAManifest) {
  StartRank message = sound_start();
  message.restore_step = 60;
  expect_refused(message, "restore_step");
}

TEST(MessageCheckTest, InstructionOpsAreKnownOnes) {
  StartRank message = sound_start();
  message.program.training.push_back({.op = static_cast<Op>(11)});
  expect_refused(message, "training");
}

TEST(MessageCheckTest, InstructionDirectionsAreZeroOrOne) {
  StartRank message = sound_start();
  message.program.evaluation.push_back({.op = Op::kForward, .direction = 2});
  expect_refused(message, "evaluation");
}

TEST(MessageCheckTest, ResizedProgramsAreFewAscendAndHoldKnownInstructions) {
  StartRank message = sound_start();
  message.program.resized = {{2, {}}, {4, {}}};
  EXPECT_TRUE(check_message(message).ok());
  message.program.resized = {{4, {}}, {4, {}}};
  expect_refused(message, "resized");
  message.program.resized = {{0, {}}};
  expect_refused(message, "resized");
  message.program.resized = {{2, {{.op = static_cast<Op>(11)}}}};
  expect_refused(message, "resized");
  message.program.resized.clear();
  for (int32_t size = 1; size <= 65; ++size) message.program.resized.push_back({size, {}});
  expect_refused(message, "resized");
}

TEST(MessageCheckTest, AddressesAreBounded) {
  expect_refused(RankReady{{1}, {1}, {0}, std::string(kAddressBytesMax + 1, 'a')}, "address");
}

TEST(MessageCheckTest, DataOfARankIsNamedCountedAndBounded) {
  const auto found = [](const DataIdentity& data) { return RankReady{{1}, {1}, {0}, "a", {data}}; };
  EXPECT_TRUE(check_message(found({"/d", 0, {}})).ok());
  expect_refused(found({"", 0, {}}), "data path");
  expect_refused(found({"/d\n", 0, {}}), "data path");
  expect_refused(found({"/d", -1, {}}), "data tokens");
  expect_refused(RankReady{{1}, {1}, {0}, "a", std::vector<DataIdentity>(kDataSetsMax + 1)},
                 "data");
}

TEST(MessageCheckTest, BeginTrainingNeedsAddresses) {
  expect_refused(BeginTraining{{1}, {1}, {}}, "addresses");
}

TEST(MessageCheckTest, GracesAreBounded) {
  expect_refused(StopRanks{{1}, {1}, -1, ""}, "grace_ms");
  expect_refused(StopRanks{{1}, {1}, 3'600'001, ""}, "grace_ms");
}

TEST(MessageCheckTest, AnExitHasACodeOrASignal) {
  expect_refused(RankExited{{1}, {1}, {0}, 1, 9, ""}, "exit_code");
  expect_refused(RankExited{{1}, {1}, {0}, -1, 0, ""}, "exit_code");
  EXPECT_TRUE(check_message(RankExited{{1}, {1}, {0}, -1, 9, ""}).ok());
}

TEST(MessageCheckTest, SignalsAndCodesAreOnesThatExist) {
  expect_refused(RankExited{{1}, {1}, {0}, -1, 65, ""}, "signal");
  expect_refused(RankExited{{1}, {1}, {0}, 256, 0, ""}, "exit_code");
}

TEST(MessageCheckTest, ReasonsAreBounded) {
  expect_refused(RankExited{{1}, {1}, {0}, 1, 0, std::string(kNameBytesMax + 1, 'r')}, "reason");
  expect_refused(RankExited{{1}, {1}, {0}, 1, 0, "", std::string(kLogTailBytesMax + 1, 't')},
                 "log_tail");
}

TEST(MessageCheckTest, StepsOfReportsBeginAtOne) {
  expect_refused(StepReport{.job = {1}, .epoch = {1}, .step = 0}, "step");
}

TEST(MessageCheckTest, OnlyLossAndGradientNormMayBeNan) {
  StepReport message = {.job = {1}, .epoch = {1}, .step = 1, .loss = kNan, .grad_norm = kNan};
  EXPECT_TRUE(check_message(message).ok());
  message.learning_rate = kNan;
  expect_refused(message, "learning_rate");
  message.learning_rate = 0.0;
  message.step_seconds = -1.0;
  expect_refused(message, "step_seconds");
}

TEST(MessageCheckTest, ProgressFiguresAreFinite) {
  RankProgress message = {.job = {1}, .epoch = {1}, .rank = {0}, .step = 1};
  EXPECT_TRUE(check_message(message).ok());
  message.reduce_seconds = kNan;
  expect_refused(message, "reduce_seconds");
}

TEST(MessageCheckTest, SeatsHoldEachExpertOfALayerOnce) {
  StartRank message = sound_start();
  message.seats.layers = {{3, {2, 0, 1}}, {4, {}}};
  EXPECT_TRUE(check_message(message).ok());
  for (const std::vector<int32_t>& bad :
       {std::vector<int32_t>{0, 0, 1}, {0, 1, 3}, {0, 1, -1}, {1, 2, 3}}) {
    message.seats.layers = {{3, bad}};
    expect_refused(message, "seats");
  }
  message.seats.layers = {{-2, {0, 1}}};
  expect_refused(message, "seats");
}

TEST(MessageCheckTest, SeatsAndLoadsAreBounded) {
  StartRank start = sound_start();
  start.seats.layers[0].assign((1 << 16) + 1, 0);
  expect_refused(start, "seats");
  ExpertLoadReport report = {.job = {1}, .epoch = {1}, .rank = {0}, .step = 1, .layers = {}};
  for (int64_t layer = 0; layer < 17; ++layer) report.layers[layer].assign(1 << 16, 1.0);
  EXPECT_FALSE(check_message(report).ok());
  report.layers.erase(0);
  EXPECT_TRUE(check_message(report).ok());
}

TEST(MessageCheckTest, LoadsAreAmountsOfAStep) {
  ExpertLoadReport report = {
      .job = {1}, .epoch = {1}, .rank = {0}, .step = 1, .layers = {{2, {0.0, 5.5}}}};
  EXPECT_TRUE(check_message(report).ok());
  for (const double bad : {kNan, std::numeric_limits<double>::infinity(), -1.0}) {
    report.layers[2][1] = bad;
    expect_refused(report, "load");
  }
  report.layers.clear();
  report.step = 0;
  expect_refused(report, "step");
}

TEST(MessageCheckTest, EvaluationTokensAreNotNegative) {
  expect_refused(EvaluationReport{{1}, {1}, 1, 2.0, -5}, "tokens");
}

TEST(MessageCheckTest, SegmentFilesStayInTheirDirectory) {
  for (const char* file : {"/etc/passwd", "../x", "a/../../x", "a//b", "a/.", ""}) {
    SegmentSaved message = sound_segment();
    message.file = file;
    expect_refused(message, "file");
  }
}

TEST(MessageCheckTest, BoxesHaveTheirTensorsDimensions) {
  SegmentSaved message = sound_segment();
  message.slices[0].box_size.pop_back();
  expect_refused(message, "slice box");
}

TEST(MessageCheckTest, BoxesLieInsideTheirTensor) {
  SegmentSaved message = sound_segment();
  message.slices[0].box_offset[0] = 5;
  expect_refused(message, "slice box");
}

TEST(MessageCheckTest, BoxesThatOverflowAreRefused) {
  SegmentSaved message = sound_segment();
  message.slices[0].box_offset[0] = std::numeric_limits<int64_t>::max();
  message.slices[0].box_size[0] = std::numeric_limits<int64_t>::max();
  message.slices[0].shape[0] = std::numeric_limits<int64_t>::max();
  expect_refused(message, "slice box");
}

TEST(MessageCheckTest, SliceFileRangesDoNotOverflow) {
  SegmentSaved message = sound_segment();
  message.slices[0].file_offset = std::numeric_limits<uint64_t>::max();
  message.slices[0].byte_count = 1;
  expect_refused(message, "slice file range");
}

TEST(MessageCheckTest, TensorsHaveAtMostEightDimensions) {
  SegmentSaved message = sound_segment();
  message.slices[0].shape.assign(9, 1);
  message.slices[0].box_size.assign(9, 1);
  message.slices[0].box_offset.assign(9, 0);
  expect_refused(message, "slice shape");
}

TEST(MessageCheckTest, SavesAndOutcomesHaveAStep) {
  expect_refused(SaveFailed{{1}, {1}, {0}, -1, "disk full"}, "step");
  expect_refused(CheckpointOutcome{{1}, {1}, -1, true, ""}, "step");
  expect_refused(SaveInterval{{1}, {1}, 0}, "steps");
}

TEST(MessageCheckTest, WhatRanksDoIsBounded) {
  const auto with = [](const std::function<void(RankActivity&)>& change) {
    RanksInspected message{{1}, {1}, 1, {}};
    change(message.ranks.emplace_back());
    return message;
  };
  EXPECT_TRUE(check_message(with([](RankActivity&) {})).ok());
  expect_refused(InspectRanks{{0}, {1}, 1}, "job");
  expect_refused(with([](RankActivity& a) { a.rank.value = -1; }), "rank");
  expect_refused(with([](RankActivity& a) { a.process = static_cast<ProcessState>(6); }),
                 "process");
  expect_refused(with([](RankActivity& a) { a.state.phase = static_cast<FlightPhase>(9); }),
                 "phase");
  expect_refused(with([](RankActivity& a) { a.state.kind = static_cast<TraceKind>(7); }), "kind");
  expect_refused(with([](RankActivity& a) { a.state.step = -1; }), "step");
  expect_refused(with([](RankActivity& a) { a.state.microbatch = -2; }), "microbatch");
  expect_refused(with([](RankActivity& a) { a.state.layer = -2; }), "layer");
  expect_refused(with([](RankActivity& a) { a.state.peer = -2; }), "peer");
  expect_refused(with([](RankActivity& a) { a.quiet_ms = -1; }), "quiet_ms");
  expect_refused(with([](RankActivity& a) { a.quiet_ms = (int64_t{1} << 40) + 1; }), "quiet_ms");
  expect_refused(with([](RankActivity& a) { a.log_tail.assign(kLogTailBytesMax + 1, 't'); }),
                 "log_tail");
  expect_refused(RanksInspected{{1}, {1}, 1, std::vector<RankActivity>(4097)}, "ranks");
}

TEST(MessageCheckTest, LogChunksAreBounded) {
  expect_refused(LogChunk{{1}, {1}, {0}, 0, std::string(kTextBytesMax + 1, 'l')}, "text");
}

TEST(MessageCheckTest, HellosHaveAProcess) {
  expect_refused(RankHello{{1}, {1}, {0}, 0}, "pid");
}

TEST(MessageCheckTest, NamesOfMessagesAreUnique) {
  EXPECT_EQ(message_name(StepReport()), "step_report");
  EXPECT_EQ(message_name(RanksStopped()), "ranks_stopped");
  EXPECT_EQ(message_name(Register()), "register");
  EXPECT_EQ(message_name(RankProgress()), "rank_progress");
  EXPECT_EQ(message_name(ExpertLoadReport()), "expert_load_report");
}

}  // namespace
}  // namespace penstock
