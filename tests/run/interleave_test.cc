#include <gtest/gtest.h>

#include <algorithm>
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

std::vector<SubOp> ops_of(PassKind kind, int32_t layers, bool first, bool last) {
  std::vector<SubOp> ops;
  for (const PassOp& op : pass_ops(kind, layers, first, last)) ops.push_back(op.op);
  return ops;
}
std::vector<SubOp> forward_ops(int32_t layers, bool first = false) {
  return ops_of(PassKind::kForward, layers, first, false);
}
std::vector<SubOp> backward_ops(int32_t layers, bool first = false, bool last = false) {
  return ops_of(PassKind::kBackward, layers, first, last);
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

TEST(InterleaveTest, OneLayerIsIssuedWithEveryExchangeRightBehindWhatItSends) {
  EXPECT_EQ(run(forward_ops(1), backward_ops(1)),
            "combine(B) attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) "
            "output(F) attn(W)");
}

TEST(InterleaveTest, TheNextLayersCombineStartsBeforeTheWeightsThatHideIt) {
  const std::string layer =
      "attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) ";
  EXPECT_EQ(run(forward_ops(2), backward_ops(2)),
            "combine(B) " + layer + "combine(B) attn(W) " + layer + "output(F) attn(W)");
}

TEST(InterleaveTest, ComputeAndExchangesEachComeInTheOrderOfThePublishedTrace) {
  std::vector<SubOp> log;
  ScriptedPass forward(forward_ops(4), &log);
  ScriptedPass backward(backward_ops(4), &log);
  ASSERT_TRUE(run_overlapped(forward, backward).ok());
  std::string exchanges, computes;
  for (const SubOp op : log) {
    if (op == SubOp::kOutput) continue;
    (is_exchange(op) ? exchanges : computes) += std::string(sub_op_name(op)) + " ";
  }
  std::string exchanges_of_trace, computes_of_trace;
  for (int layer = 0; layer < 4; ++layer) {
    exchanges_of_trace += "combine(B) dispatch(F) dispatch(B) combine(F) ";
    computes_of_trace += "attn(F) mlp(B) mlp(W) mlp(F) attn(B) attn(W) ";
  }
  EXPECT_EQ(exchanges, exchanges_of_trace);
  EXPECT_EQ(computes, computes_of_trace);
}

TEST(InterleaveTest, EveryExchangeHasComputeBetweenItsStartAndItsUse) {
  const auto user_of = [](SubOp exchange) {
    switch (exchange) {
      case SubOp::kDispatch:
        return SubOp::kMlp;
      case SubOp::kCombineBackward:
        return SubOp::kMlpBackward;
      case SubOp::kDispatchBackward:
        return SubOp::kAttentionBackward;
      default:
        return SubOp::kAttention;
    }
  };
  std::vector<SubOp> log;
  ScriptedPass forward(forward_ops(3), &log);
  ScriptedPass backward(backward_ops(3), &log);
  ASSERT_TRUE(run_overlapped(forward, backward).ok());
  for (size_t i = 0; i < log.size(); ++i) {
    if (!is_exchange(log[i])) continue;
    int computes = 0;
    size_t used = i + 1;
    for (; log[used] != user_of(log[i]) && log[used] != SubOp::kOutput; ++used) {
      computes += !is_exchange(log[used]);
    }
    // The first exchange of a pair and the last have only attention beside them.
    const bool at_an_end = i == 0 || log[used] == SubOp::kOutput;
    EXPECT_GE(computes, at_an_end ? 1 : 2) << sub_op_name(log[i]) << " at " << i;
  }
}

TEST(InterleaveTest, WhatTheNeighboursWaitForIsFinalBeforeTheLastWeights) {
  for (int32_t layers = 1; layers <= 4; ++layers) {
    std::vector<SubOp> log;
    ScriptedPass forward(forward_ops(layers), &log);
    ScriptedPass backward(backward_ops(layers), &log);
    ASSERT_TRUE(run_overlapped(forward, backward).ok());
    EXPECT_EQ(log.back(), SubOp::kAttentionWeight);
    EXPECT_EQ(log[log.size() - 2], SubOp::kOutput);
    EXPECT_EQ(log[log.size() - 3], SubOp::kAttentionBackward);
  }
}

TEST(InterleaveTest, EndsOfThePassesRunWhereTheyHaveCompany) {
  EXPECT_EQ(run(forward_ops(1, true), backward_ops(1, true, true)),
            "output(B) output(W) combine(B) embed(F) attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) "
            "mlp(F) combine(F) attn(B) output(F) attn(W) embed(W)");
}

TEST(InterleaveTest, ALongerBackwardRunsOnAlone) {
  EXPECT_EQ(run(forward_ops(1), backward_ops(2)),
            "combine(B) attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) "
            "combine(B) output(F) attn(W) mlp(B) dispatch(B) mlp(W) attn(B) attn(W)");
}

TEST(InterleaveTest, ALongerForwardRunsOnAlone) {
  EXPECT_EQ(run(forward_ops(2), backward_ops(1, true)),
            "combine(B) attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) "
            "attn(W) embed(W) attn(F) dispatch(F) mlp(F) combine(F) output(F)");
}

TEST(InterleaveTest, EveryOperationOfEitherPassRunsOnceAndInOrder) {
  for (int32_t f = 0; f <= 4; ++f) {
    for (int32_t b = 1; b <= 4; ++b) {
      std::vector<SubOp> log;
      ScriptedPass forward(forward_ops(f, true), &log);
      ScriptedPass backward(backward_ops(b, true, true), &log);
      ASSERT_TRUE(run_overlapped(forward, backward).ok());
      std::vector<SubOp> forward_log, backward_log;
      for (const SubOp op : log) {
        (op <= SubOp::kOutput ? forward_log : backward_log).push_back(op);
      }
      EXPECT_EQ(forward_log, forward_ops(f, true));
      EXPECT_EQ(backward_log, backward_ops(b, true, true));
    }
  }
}

TEST(PassOpsTest, InputAndWeightPartsTogetherDoWhatTheFullBackwardDoes) {
  const auto sorted = [](std::vector<PassOp> ops) {
    std::sort(ops.begin(), ops.end(), [](const PassOp& a, const PassOp& b) {
      return std::pair(a.op, a.layer) < std::pair(b.op, b.layer);
    });
    return ops;
  };
  for (const bool first : {false, true}) {
    for (const bool last : {false, true}) {
      std::vector<PassOp> parts = pass_ops(PassKind::kBackwardInput, 3, first, last);
      for (const PassOp& op : pass_ops(PassKind::kWeight, 3, first, last)) parts.push_back(op);
      EXPECT_EQ(sorted(parts), sorted(pass_ops(PassKind::kBackward, 3, first, last)));
    }
  }
}

TEST(InterleaveTest, AFailureEndsThePair) {
  std::vector<SubOp> log;
  ScriptedPass forward(forward_ops(2), &log);
  ScriptedPass backward(backward_ops(2), &log);
  backward.fail_at(1);
  EXPECT_EQ(run_overlapped(forward, backward).code(), Code::kUnavailable);
  EXPECT_EQ(log.size(), 3u);  // combine(B) attn(F) dispatch(F)
}

}  // namespace
}  // namespace penstock
