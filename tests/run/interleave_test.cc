#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "comm/run/interleave.h"

namespace penstock {
namespace {

// Runs nothing; writes down what it is told to run.
class ScriptedPass {
 public:
  ScriptedPass(std::vector<SubOp> ops, std::vector<SubOp>* log) : ops_(std::move(ops)), log_(log) {}
  bool finished() const { return next_ == ops_.size(); }
  SubOp next() const { return ops_[next_]; }
  Status run_next() {
    if (fail_at_ == next_) return unavailable("a peer is gone");
    log_->push_back(ops_[next_++]);
    return {};
  }
  void fail_at(size_t index) { fail_at_ = index; }

 private:
  std::vector<SubOp> ops_;
  std::vector<SubOp>* log_;
  size_t next_ = 0;
  size_t fail_at_ = SIZE_MAX;
};

std::vector<SubOp> forward_ops(int layers, bool first, bool output) {
  std::vector<SubOp> ops;
  if (first) ops.push_back(SubOp::kEmbed);
  for (int l = 0; l < layers; ++l) {
    ops.insert(ops.end(), {SubOp::kAttention, SubOp::kDispatch, SubOp::kMlp, SubOp::kCombine});
  }
  if (output) ops.push_back(SubOp::kOutput);
  return ops;
}
std::vector<SubOp> backward_ops(int layers, bool first, bool last) {
  std::vector<SubOp> ops;
  if (last) ops.insert(ops.end(), {SubOp::kOutputBackward, SubOp::kOutputWeight});
  for (int l = 0; l < layers; ++l) {
    ops.insert(ops.end(), {SubOp::kCombineBackward, SubOp::kMlpBackward, SubOp::kDispatchBackward,
                           SubOp::kMlpWeight, SubOp::kAttentionBackward, SubOp::kAttentionWeight});
  }
  if (first) ops.push_back(SubOp::kEmbedWeight);
  return ops;
}

std::string run(const std::vector<SubOp>& forward, const std::vector<SubOp>& backward) {
  std::vector<SubOp> log;
  ScriptedPass f(forward, &log);
  ScriptedPass b(backward, &log);
  EXPECT_TRUE(run_overlapped(f, b).ok());
  EXPECT_TRUE(f.finished() && b.finished());
  std::string text;
  for (const SubOp op : log)
    text += std::string(text.empty() ? "" : " ") + std::string(sub_op_name(op));
  return text;
}

TEST(InterleaveTest, OneLayerIsIssuedInTheOrderOfThePublishedTrace) {
  EXPECT_EQ(
      run(forward_ops(1, false, false), backward_ops(1, false, false)),
      "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)");
}

TEST(InterleaveTest, TheOrderRepeatsPerLayer) {
  const std::string layer =
      "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)";
  EXPECT_EQ(run(forward_ops(2, false, false), backward_ops(2, false, false)), layer + " " + layer);
}

TEST(InterleaveTest, EndsOfThePassesRunWhereTheyHaveCompany) {
  EXPECT_EQ(run(forward_ops(1, true, true), backward_ops(1, true, true)),
            "output(B) output(W) combine(B) embed(F) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) "
            "mlp(F) attn(B) attn(W) embed(W) combine(F) output(F)");
}

TEST(InterleaveTest, ALongerBackwardRunsOnAlone) {
  EXPECT_EQ(
      run(forward_ops(1, false, true), backward_ops(2, false, false)),
      "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F) "
      "combine(B) output(F) mlp(B) dispatch(B) mlp(W) attn(B) attn(W)");
}

TEST(InterleaveTest, ALongerForwardRunsOnAlone) {
  EXPECT_EQ(
      run(forward_ops(2, false, true), backward_ops(1, true, false)),
      "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) embed(W) "
      "combine(F) attn(F) dispatch(F) mlp(F) combine(F) output(F)");
}

TEST(InterleaveTest, EveryOperationOfEitherPassRunsOnceAndInOrder) {
  for (int f = 0; f <= 4; ++f) {
    for (int b = 0; b <= 4; ++b) {
      std::vector<SubOp> log;
      ScriptedPass forward(forward_ops(f, true, true), &log);
      ScriptedPass backward(backward_ops(b, true, true), &log);
      ASSERT_TRUE(run_overlapped(forward, backward).ok());
      std::vector<SubOp> forward_log, backward_log;
      for (const SubOp op : log) {
        (op <= SubOp::kOutput ? forward_log : backward_log).push_back(op);
      }
      EXPECT_EQ(forward_log, forward_ops(f, true, true));
      EXPECT_EQ(backward_log, backward_ops(b, true, true));
    }
  }
}

TEST(InterleaveTest, AFailureEndsThePair) {
  std::vector<SubOp> log;
  ScriptedPass forward(forward_ops(2, false, false), &log);
  ScriptedPass backward(backward_ops(2, false, false), &log);
  backward.fail_at(1);
  EXPECT_EQ(run_overlapped(forward, backward).code(), Code::kUnavailable);
  EXPECT_EQ(log.size(), 2u);  // combine(B) attn(F)
}

}  // namespace
}  // namespace penstock
