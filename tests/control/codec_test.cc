#include "comm/control/codec.h"

#include <capnp/message.h>
#include <capnp/serialize.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "comm/control/message.capnp.h"
#include "tests/control/random_message.h"

namespace penstock {
namespace {

// A message of each kind survives the wire unchanged, whatever its fields hold.
template <typename Message>
void expect_round_trip() {
  const size_t kind = ControlMessage(Message()).index();
  const bool holds = rc::check([kind](uint64_t seed) {
    Random random(seed, kind);
    const ControlMessage sent = random_message(kind, random);
    const Status checked = check_message(sent);
    RC_ASSERT(checked.ok());
    const Result<ControlMessage> received = decode(encode(sent));
    RC_ASSERT(received.ok());
    RC_ASSERT(*received == sent);
  });
  EXPECT_TRUE(holds);
}

TEST(CodecTest, RegisterSurvivesTheWire) {
  expect_round_trip<Register>();
}
TEST(CodecTest, RegisteredSurvivesTheWire) {
  expect_round_trip<Registered>();
}
TEST(CodecTest, HeartbeatSurvivesTheWire) {
  expect_round_trip<Heartbeat>();
}
TEST(CodecTest, StartRankSurvivesTheWire) {
  expect_round_trip<StartRank>();
}
TEST(CodecTest, RankReadySurvivesTheWire) {
  expect_round_trip<RankReady>();
}
TEST(CodecTest, BeginTrainingSurvivesTheWire) {
  expect_round_trip<BeginTraining>();
}
TEST(CodecTest, StopRanksSurvivesTheWire) {
  expect_round_trip<StopRanks>();
}
TEST(CodecTest, RanksStoppedSurvivesTheWire) {
  expect_round_trip<RanksStopped>();
}
TEST(CodecTest, RankExitedSurvivesTheWire) {
  expect_round_trip<RankExited>();
}
TEST(CodecTest, StepReportSurvivesTheWire) {
  expect_round_trip<StepReport>();
}
TEST(CodecTest, EvaluationReportSurvivesTheWire) {
  expect_round_trip<EvaluationReport>();
}
TEST(CodecTest, SegmentSavedSurvivesTheWire) {
  expect_round_trip<SegmentSaved>();
}
TEST(CodecTest, SaveFailedSurvivesTheWire) {
  expect_round_trip<SaveFailed>();
}
TEST(CodecTest, CheckpointOutcomeSurvivesTheWire) {
  expect_round_trip<CheckpointOutcome>();
}
TEST(CodecTest, SaveIntervalSurvivesTheWire) {
  expect_round_trip<SaveInterval>();
}
TEST(CodecTest, WorkerLeavingSurvivesTheWire) {
  expect_round_trip<WorkerLeaving>();
}
TEST(CodecTest, WorkerReleasedSurvivesTheWire) {
  expect_round_trip<WorkerReleased>();
}
TEST(CodecTest, CheckHostSurvivesTheWire) {
  expect_round_trip<CheckHost>();
}
TEST(CodecTest, HostCheckedSurvivesTheWire) {
  expect_round_trip<HostChecked>();
}
TEST(CodecTest, PauseRanksSurvivesTheWire) {
  expect_round_trip<PauseRanks>();
}
TEST(CodecTest, MirrorRanksSurvivesTheWire) {
  expect_round_trip<MirrorRanks>();
}
TEST(CodecTest, RanksMirroredSurvivesTheWire) {
  expect_round_trip<RanksMirrored>();
}
TEST(CodecTest, RankFinishedSurvivesTheWire) {
  expect_round_trip<RankFinished>();
}
TEST(CodecTest, LogChunkSurvivesTheWire) {
  expect_round_trip<LogChunk>();
}
TEST(CodecTest, RankHelloSurvivesTheWire) {
  expect_round_trip<RankHello>();
}
TEST(CodecTest, RankProgressSurvivesTheWire) {
  expect_round_trip<RankProgress>();
}

TEST(CodecTest, InspectRanksSurvivesTheWire) {
  expect_round_trip<InspectRanks>();
}
TEST(CodecTest, RanksInspectedSurvivesTheWire) {
  expect_round_trip<RanksInspected>();
}

TEST(CodecTest, ExpertLoadReportSurvivesTheWire) {
  expect_round_trip<ExpertLoadReport>();
}

// A map on this side would hide it.
TEST(CodecTest, ALayerThatIsGivenTwiceIsRefused) {
  for (const bool twice : {false, true}) {
    capnp::MallocMessageBuilder builder;
    auto report = builder.initRoot<wire::ControlMessage>().initExpertLoadReport();
    report.setJob(1);
    report.setEpoch(1);
    report.setStep(1);
    auto layers = report.initLayers(2);
    layers[0].setLayer(7);
    layers[1].setLayer(twice ? 7 : 8);
    const kj::Array<capnp::word> words = capnp::messageToFlatArray(builder);
    const Result<ControlMessage> received =
        decode(std::as_bytes(std::span(words.begin(), words.size())));
    EXPECT_EQ(received.ok(), !twice);
    if (!twice) continue;
    EXPECT_NE(received.status().message().find("one twice"), std::string::npos);
  }
}

TEST(CodecTest, EveryInstructionKindKeepsItsNumber) {
  Random random(1, 0);
  StartRank message =
      std::get<StartRank>(random_message(ControlMessage(StartRank()).index(), random));
  message.program.training.clear();
  for (int op = 0; op <= static_cast<int>(Op::kOptimizerStep); ++op) {
    message.program.training.push_back({static_cast<Op>(op), 1, op, 0, -1, -1});
  }
  const Result<ControlMessage> received = decode(encode(message));
  ASSERT_TRUE(received.ok()) << received.status().to_string();
  EXPECT_EQ(std::get<StartRank>(*received), message);
}

TEST(CodecTest, ANanLossArrivesBecauseItIsNews) {
  StepReport report = {.job = {1}, .epoch = {1}, .step = 4, .loss = std::nan("")};
  report.grad_norm = std::numeric_limits<double>::infinity();
  const Result<ControlMessage> received = decode(encode(report));
  ASSERT_TRUE(received.ok()) << received.status().to_string();
  EXPECT_TRUE(std::isnan(std::get<StepReport>(*received).loss));
  EXPECT_TRUE(std::isinf(std::get<StepReport>(*received).grad_norm));
}

TEST(CodecTest, AnEmptyFrameIsRefused) {
  EXPECT_EQ(decode(Bytes()).status().code(), Code::kInvalidArgument);
}

TEST(CodecTest, AFrameOfOddLengthIsRefused) {
  std::vector<std::byte> frame = encode(RanksStopped{{1}, {1}});
  frame.push_back(std::byte{0});
  EXPECT_EQ(decode(frame).status().code(), Code::kInvalidArgument);
}

TEST(CodecTest, AFrameOverTheLimitIsRefusedUnread) {
  const std::vector<std::byte> frame(kFrameBytesMax + 8);
  const Status status = decode(frame).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find(std::to_string(kFrameBytesMax)), std::string::npos);
}

TEST(CodecTest, BytesAfterTheMessageAreRefused) {
  std::vector<std::byte> frame = encode(RanksStopped{{1}, {1}});
  ASSERT_TRUE(decode(frame).ok());
  frame.resize(frame.size() + 8);
  EXPECT_EQ(decode(frame).status().message(), "bytes after the message's end");
}

TEST(CodecTest, AnUnalignedFrameIsReadAllTheSame) {
  const ControlMessage sent = RanksStopped{{7}, {3}};
  const std::vector<std::byte> frame = encode(sent);
  std::vector<std::byte> shifted(1);
  shifted.insert(shifted.end(), frame.begin(), frame.end());
  const Result<ControlMessage> received = decode(Bytes(shifted).subspan(1));
  ASSERT_TRUE(received.ok()) << received.status().to_string();
  EXPECT_EQ(*received, sent);
}

TEST(CodecTest, AnUnknownMessageKindIsRefused) {
  std::vector<std::byte> frame = encode(RanksStopped{{7}, {3}});
  // Segment table (one word), root pointer (one word), then the union's discriminant.
  const uint16_t kind = 999;
  std::memcpy(frame.data() + 16, &kind, sizeof kind);
  const Status status = decode(frame).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("unknown message kind 999"), std::string::npos);
}

TEST(CodecTest, EveryTruncationOfEveryKindIsRefusedOrAShorterMessage) {
  for (size_t kind = 0; kind < kMessageKinds; ++kind) {
    Random random(5, kind);
    const std::vector<std::byte> frame = encode(random_message(kind, random));
    for (size_t size = 0; size < frame.size(); ++size) {
      EXPECT_FALSE(decode(Bytes(frame).first(size)).ok()) << "kind " << kind << " size " << size;
    }
  }
}

// 10,000 damaged frames of every kind, 1 to 8 bytes each: the result is a message that keeps every
// rule, or an error that says what is wrong; never a crash, and under the sanitizers never a bad
// access.
TEST(CodecTest, DamagedFramesNeverDoMoreThanFail) {
  constexpr int kFramesPerKind = 10000;
  int refused = 0;
  for (size_t kind = 0; kind < kMessageKinds; ++kind) {
    Random random(9, kind);
    const std::vector<std::byte> sound = encode(random_message(kind, random));
    for (int i = 0; i < kFramesPerKind; ++i) {
      std::vector<std::byte> frame = sound;
      for (uint64_t damage = 1 + random.below(8); damage > 0; --damage) {
        frame[random.below(frame.size())] = static_cast<std::byte>(random.below(256));
      }
      const Result<ControlMessage> result = decode(frame);
      if (result.ok()) {
        ASSERT_TRUE(check_message(*result).ok());
      } else {
        ++refused;
        ASSERT_EQ(result.status().code(), Code::kInvalidArgument);
        ASSERT_FALSE(result.status().message().empty());
      }
    }
  }
  EXPECT_GT(refused, kFramesPerKind);
}

TEST(CodecTest, RandomBytesNeverDoMoreThanFail) {
  Random random(11, 0);
  for (int i = 0; i < 50000; ++i) {
    std::vector<std::byte> frame(8 * (1 + random.below(40)));
    for (std::byte& byte : frame) byte = static_cast<std::byte>(random.below(256));
    // A single segment of the right size, so that the pointers inside get read.
    const uint64_t table = static_cast<uint64_t>(frame.size() / 8 - 1) << 32;
    if (random.below(2) == 0) std::memcpy(frame.data(), &table, sizeof table);
    const Result<ControlMessage> result = decode(frame);
    if (result.ok()) {
      ASSERT_TRUE(check_message(*result).ok());
    }
  }
}

// Many pointers to one long text would expand a small frame into a huge message.
TEST(CodecTest, AFrameThatExpandsIsRefused) {
  constexpr unsigned kAddresses = 2000;
  constexpr size_t kTextBytes = 60000;
  capnp::MallocMessageBuilder builder(1 << 16);  // words: everything in one segment
  auto begin = builder.initRoot<wire::ControlMessage>().initBeginTraining();
  begin.setJob(1);
  begin.setEpoch(1);
  auto addresses = begin.initAddresses(kAddresses);
  addresses.init(0, kTextBytes);
  const kj::Array<capnp::word> words = capnp::messageToFlatArray(builder);
  std::vector<uint64_t> frame(words.size());
  std::memcpy(frame.data(), words.begin(), frame.size() * sizeof(uint64_t));
  const auto bytes = [&frame] { return std::as_bytes(std::span(frame)); };
  ASSERT_TRUE(decode(bytes()).ok());

  // A list pointer is: kind 1 (2 bits), offset in words from its own end (30), element size 2 for
  // bytes (3), count (29). The text lies behind the list, so element i's offset is i less.
  const auto is_text = [](uint64_t word) {
    return (word & 3) == 1 && ((word >> 32) & 7) == 2 && (word >> 35) == kTextBytes;
  };
  const auto first = std::find_if(frame.begin(), frame.end(), is_text);
  ASSERT_NE(first, frame.end());
  const uint64_t pointer = *first;
  for (unsigned i = 1; i < kAddresses; ++i) first[i] = pointer - (uint64_t{i} << 2);
  const Status status = decode(bytes()).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("damaged frame"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace penstock
