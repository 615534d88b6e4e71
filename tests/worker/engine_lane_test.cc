#include "worker/engine/lane.h"

#include <gtest/gtest.h>

#include <deque>

#include "comm/data/loopback_transport.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/engine_test_support.h"
#include "worker/engine/rank_layout.h"

namespace penstock {
namespace {

constexpr int64_t kBoundary = 16 * 32;

// Lanes of the middle stage of three, between ranks 0 and 2, which the test plays. All in one
// thread: whatever is waited for must have been posted before.
class LaneTest : public ::testing::Test {
 protected:
  static LoopbackOptions quick() { return {.timeout = std::chrono::milliseconds(200)}; }
  LaneTest() : kernels_(make_cpu_kernels()), ends_(make_loopback(3, quick())) {
    const JobSpec spec = tiny_spec("", {3, 1, 1, Schedule::kOneForwardOneBackward}, 1);
    StageOptions options{.model = spec.model,
                         .stage_index = 0,
                         .stage_count = 3,
                         .sequences_max = 1,
                         .sequence_length_max = 16,
                         .slot_count = 2};
    options.stage_index = 1;
    options.model.first_k_dense_replace = 5;  // no experts, hence no exchange
    stage_ = std::make_unique<Stage>(options, *kernels_, nullptr);
    lane_ = std::make_unique<Lane>(LaneOptions{.direction = 0,
                                               .previous = Rank{0},
                                               .next = Rank{2},
                                               .slot_count = 2,
                                               .microbatch_count = 4,
                                               .boundary_floats = kBoundary},
                                   *stage_, ends_[1].get(), recorder_);
  }
  // A neighbour's tensor whose elements are all `value`; kept until the end.
  TransferHandle send(int32_t from, Channel channel, float value, int64_t floats = kBoundary) {
    sent_.push_back(std::vector<float>(static_cast<size_t>(floats), value));
    return ends_[static_cast<size_t>(from)]->send(Rank{1}, tag_of(channel, 0),
                                                  std::as_bytes(std::span(sent_.back())));
  }
  float receive(int32_t at, Channel channel) {
    std::vector<float> values(kBoundary);
    Transport& end = *ends_[static_cast<size_t>(at)];
    const TransferHandle handle =
        end.receive(Rank{1}, tag_of(channel, 0), std::as_writable_bytes(std::span(values)));
    EXPECT_TRUE(end.wait(handle).ok());
    return values[0];
  }

  Recorder recorder_{0};
  std::unique_ptr<Kernels> kernels_;
  std::vector<std::unique_ptr<LoopbackTransport>> ends_;
  std::unique_ptr<Stage> stage_;
  std::unique_ptr<Lane> lane_;
  std::deque<std::vector<float>> sent_;
};

TEST_F(LaneTest, InputsArriveBeforeAnybodyAsksAndLandInTheirSlots) {
  lane_->begin(true, 4);
  // Both slots' receives are posted, so both sends complete although the lane has done nothing yet.
  EXPECT_TRUE(ends_[0]->done(send(0, Channel::kActivations, 1.0F)));
  EXPECT_TRUE(ends_[0]->done(send(0, Channel::kActivations, 2.0F)));
  EXPECT_FALSE(ends_[0]->done(send(0, Channel::kActivations, 3.0F)));
  for (const int64_t m : {0, 1}) {
    const Result<int32_t> slot = lane_->begin_forward(m);
    ASSERT_TRUE(slot.ok());
    EXPECT_EQ(stage_->input(*slot)[0], static_cast<float>(m + 1));
    lane_->end_forward(m);
  }
}

TEST_F(LaneTest, ASlotServesTheNextMicrobatchOnceGradientIsSentAndWeightPartHasRun) {
  lane_->begin(true, 4);
  const TransferHandle third =
      (send(0, Channel::kActivations, 1.0F), send(0, Channel::kActivations, 2.0F),
       send(0, Channel::kActivations, 3.0F));
  const int32_t slot = *lane_->begin_forward(0);
  stage_->output(slot)[0] = 10.0F;
  lane_->end_forward(0);
  lane_->send_forward(0);
  EXPECT_EQ(receive(2, Channel::kActivations), 10.0F);
  send(2, Channel::kGradients, 20.0F);
  ASSERT_TRUE(lane_->receive_gradient(0).ok());
  EXPECT_EQ(stage_->output_gradient(slot)[0], 20.0F);
  stage_->input_gradient(slot)[0] = 30.0F;
  lane_->send_gradient(0);
  EXPECT_FALSE(ends_[0]->done(third));  // the weight part still needs the slot
  lane_->end_weight(0);
  EXPECT_TRUE(ends_[0]->done(third));
  EXPECT_EQ(receive(0, Channel::kGradients), 30.0F);
  ASSERT_TRUE(lane_->begin_forward(1).ok());
  lane_->end_forward(1);
  const Result<int32_t> reused = lane_->begin_forward(2);
  ASSERT_TRUE(reused.ok());
  EXPECT_EQ(*reused, slot);
  EXPECT_EQ(stage_->input(*reused)[0], 3.0F);
}

TEST_F(LaneTest, AResultThatIsFinalLeavesBeforeItsPassEndsAndOnce) {
  lane_->begin(true, 4);
  send(0, Channel::kActivations, 1.0F);
  const int32_t slot = *lane_->begin_forward(0);
  stage_->output(slot)[0] = 10.0F;
  lane_->output_final(0);
  EXPECT_EQ(receive(2, Channel::kActivations), 10.0F);
  lane_->end_forward(0);
  lane_->send_forward(0);
  send(2, Channel::kGradients, 20.0F);
  ASSERT_TRUE(lane_->receive_gradient(0).ok());
  stage_->input_gradient(slot)[0] = 30.0F;
  lane_->gradient_final(0);
  EXPECT_EQ(receive(0, Channel::kGradients), 30.0F);
  lane_->end_weight(0);
  lane_->send_gradient(0);
  // The next of each is that of the next micro-batch.
  send(0, Channel::kActivations, 2.0F);
  stage_->output(*lane_->begin_forward(1))[0] = 11.0F;
  lane_->end_forward(1);
  lane_->send_forward(1);
  EXPECT_EQ(receive(2, Channel::kActivations), 11.0F);
}

TEST_F(LaneTest, AStepOfFewerMicrobatchesTakesNoInputOfTheNextStep) {
  lane_->begin(false, 1);
  EXPECT_TRUE(ends_[0]->done(send(0, Channel::kActivations, 1.0F)));
  const TransferHandle next = send(0, Channel::kActivations, 2.0F);
  EXPECT_FALSE(ends_[0]->done(next));
  ASSERT_TRUE(lane_->begin_forward(0).ok());
  lane_->end_forward(0);
  lane_->send_forward(0);
  receive(2, Channel::kActivations);
  ASSERT_TRUE(lane_->drain().ok());
  EXPECT_FALSE(ends_[0]->done(next));
  lane_->begin(false, 4);
  EXPECT_TRUE(ends_[0]->done(next));
  const Result<int32_t> slot = lane_->begin_forward(0);
  ASSERT_TRUE(slot.ok());
  EXPECT_EQ(stage_->input(*slot)[0], 2.0F);
}

TEST_F(LaneTest, AForwardWaitsUntilTheSlotsOldSendsAreComplete) {
  lane_->begin(false, 4);  // in an evaluation slots are free at once
  for (float value = 1.0F; value <= 3.0F; value += 1.0F) send(0, Channel::kActivations, value);
  for (const int64_t m : {0, 1}) {
    ASSERT_TRUE(lane_->begin_forward(m).ok());
    lane_->end_forward(m);
    lane_->send_forward(m);
  }
  // Nobody receives the output of micro-batch 0, whose slot micro-batch 2 would overwrite.
  EXPECT_EQ(lane_->begin_forward(2).status().code(), Code::kDeadlineExceeded);
}

// Stages 1 and 2 of three on one rank: what DualPipeV's last rank has.
class FollowingLaneTest : public LaneTest {
 protected:
  FollowingLaneTest() {
    StageOptions options = stage_->options();
    options.stage_index = 2;
    second_stage_ = std::make_unique<Stage>(options, *kernels_, nullptr);
    second_stage_->join(*stage_);
    LaneOptions lane{.direction = 0,
                     .previous = Rank{0},
                     .next = {},
                     .slot_count = 2,
                     .microbatch_count = 4,
                     .boundary_floats = kBoundary};
    lane_ = std::make_unique<Lane>(lane, *stage_, ends_[1].get(), recorder_);
    lane.direction = 1;
    lane.previous = {};
    second_ = std::make_unique<Lane>(lane, *second_stage_, ends_[1].get(), recorder_);
    second_->follow(*lane_);
    for (float value = 1.0F; value <= 3.0F; value += 1.0F) {
      last_sent_ = send(0, Channel::kActivations, value);
    }
  }
  void forward(Lane& lane, int64_t m) {
    ASSERT_TRUE(lane.begin_forward(m).ok());
    lane.end_forward(m);
  }
  std::unique_ptr<Stage> second_stage_;
  std::unique_ptr<Lane> second_;
  TransferHandle last_sent_;
};

TEST_F(FollowingLaneTest, AMicrobatchIsInTheSameSlotAndBuffersOfBothStages) {
  lane_->begin(true, 4);
  second_->begin(true, 4);
  for (const int64_t m : {0, 1}) {
    forward(*lane_, m);
    forward(*second_, m);
    const int32_t slot = lane_->slot(m);
    EXPECT_EQ(second_->slot(m), slot);
    EXPECT_EQ(second_stage_->input(slot).data(), stage_->output(slot).data());
    EXPECT_EQ(second_stage_->input_gradient(slot).data(), stage_->output_gradient(slot).data());
  }
  EXPECT_NE(lane_->slot(0), lane_->slot(1));
}

TEST_F(FollowingLaneTest, TheFirstLaneKeepsASlotUntilBothAreDoneWithIt) {
  lane_->begin(true, 4);
  second_->begin(true, 4);
  forward(*lane_, 0);
  forward(*second_, 0);
  lane_->send_gradient(0);
  lane_->end_weight(0);
  EXPECT_FALSE(ends_[0]->done(last_sent_));  // the third input: its receive needs a free slot
  second_->end_weight(0);
  EXPECT_TRUE(ends_[0]->done(last_sent_));
}

TEST_F(FollowingLaneTest, InAnEvaluationASlotIsFreeAfterTheSecondForward) {
  lane_->begin(false, 4);
  second_->begin(false, 4);
  forward(*lane_, 0);
  EXPECT_FALSE(ends_[0]->done(last_sent_));
  forward(*second_, 0);
  EXPECT_TRUE(ends_[0]->done(last_sent_));
}

TEST_F(LaneTest, TransfersAreWrittenDownWithTheTimesOfTheirWaits) {
  recorder_.begin_step(5);
  lane_->begin(true, 4);
  send(0, Channel::kActivations, 1.0F);
  ASSERT_TRUE(lane_->begin_forward(0).ok());
  const std::vector<TraceRecord> records = recorder_.records();
  ASSERT_EQ(records.size(), 1u);
  const TraceRecord& record = records[0];
  EXPECT_EQ(trace_name(record), "receive(F)");
  EXPECT_EQ(record.step, 5);
  EXPECT_EQ(record.microbatch, 0);
  EXPECT_EQ(record.peer, 0);
  EXPECT_EQ(record.bytes, kBoundary * 4);
  EXPECT_LT(record.begin_ns, record.end_ns);  // posted, then there, then asked for
  EXPECT_LT(record.end_ns, record.wait_begin_ns);
  EXPECT_LT(record.wait_begin_ns, record.wait_end_ns);
}

TEST_F(LaneTest, ATensorOfAnotherSizeIsDataLoss) {
  lane_->begin(true, 4);
  send(0, Channel::kActivations, 1.0F, kBoundary / 2);
  const Result<int32_t> slot = lane_->begin_forward(0);
  EXPECT_EQ(slot.status().code(), Code::kDataLoss);
  EXPECT_NE(slot.status().message().find("same job spec"), std::string::npos);
}

TEST_F(LaneTest, ADeadNeighbourEndsTheWaitAsUnavailable) {
  lane_->begin(true, 4);
  ends_[0]->kill();
  EXPECT_EQ(lane_->begin_forward(0).status().code(), Code::kUnavailable);
}

}  // namespace
}  // namespace penstock
