// Silent corruption: one changed bit in one place is noticed before the model changes, and the rank
// that it happened on is named.
#include <gtest/gtest.h>

#include <map>

#include "comm/data/forwarding_transport.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

constexpr int64_t kSteps = 4;
constexpr int64_t kFaulty = 2;  // step in which, or before which, a bit changes

enum class Fault {
  kNone,
  kGradient,     // in the second pass
  kActivation,   // what comes of a weight that is another one in the second pass only
  kTransfer,     // on its way to the rank, in the second pass
  kOwnedWeight,  // between two steps, as the next two
  kCopiedWeight,
  kRouterBias
};

void change_bit(void* bytes) {
  static_cast<std::byte*>(bytes)[2] ^= std::byte{0x10};
}

// Of one rank, in its thread. The step before kFaulty has half as many calls and transfers.
struct FaultPlan {
  Fault fault = Fault::kNone;
  int64_t step = 1;  // under way
  std::map<int64_t, int64_t> calls;
  std::map<int64_t, int64_t> transfers;
  std::vector<Stage*> stages = {};

  bool strikes(std::map<int64_t, int64_t>& counted) {
    const int64_t count = ++counted[step];
    return step == kFaulty && count == counted[step - 1] + 1;
  }
};

class FaultyStage final : public Stage {
 public:
  FaultyStage(const StageOptions& options, Kernels& kernels, ExpertExchange* exchange,
              FaultPlan& plan)
      : Stage(options, kernels, exchange), plan_(plan) {
    plan_.stages.push_back(this);
  }

 protected:
  Status run_sub_op(SubOp op, int32_t layer, int32_t slot, int32_t gradient_slot) override {
    const bool strikes = plan_.strikes(plan_.calls);
    float* const weight = &parameters().values(ParameterKind::kDense)[40];
    if (strikes && plan_.fault == Fault::kActivation) change_bit(weight);
    if (strikes && plan_.fault == Fault::kGradient) {
      parameters().gradients(ParameterKind::kDense)[40] += 1.0F;  // a bit of 0 is lost in a sum
    }
    return Stage::run_sub_op(op, layer, slot, gradient_slot);
  }

 private:
  FaultPlan& plan_;
};

class FaultyTransport final : public ForwardingTransport {
 public:
  FaultyTransport(Transport& inner, FaultPlan& plan) : ForwardingTransport(inner), plan_(plan) {}
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override {
    const TransferHandle handle = ForwardingTransport::receive(peer, tag, into);
    if (tag.value >> kExchangeTagBits == static_cast<uint64_t>(Channel::kActivations)) {
      activations_[handle.index] = into;
    }
    return handle;
  }
  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override {
    Result<uint64_t> moved = ForwardingTransport::wait(handle, completed_ns);
    const auto received = activations_.extract(handle.index);
    if (!received.empty() && plan_.strikes(plan_.transfers)) change_bit(received.mapped().data());
    return moved;
  }

 private:
  FaultPlan& plan_;
  std::map<uint32_t, MutableBytes> activations_;
};

class FaultyProbe final : public RankProbe {
 public:
  explicit FaultyProbe(Fault fault) { plan_.fault = fault; }
  Transport& transport(Transport& real) override {
    if (plan_.fault != Fault::kTransfer) return real;
    transport_ = std::make_unique<FaultyTransport>(real, plan_);
    return *transport_;
  }
  StageFactory stage_factory() override {
    return [this](const StageOptions& options, Kernels& kernels, ExpertExchange* exchange) {
      return std::make_unique<FaultyStage>(options, kernels, exchange, plan_);
    };
  }
  void on_step(const StepResult& step) override {
    plan_.step = step.step + 1;
    if (plan_.step != kFaulty) return;
    const std::span<float> weights = plan_.stages[0]->parameters().values(ParameterKind::kDense);
    // The first replica owns the first of them, the last one the last.
    if (plan_.fault == Fault::kOwnedWeight) change_bit(&weights.back());
    if (plan_.fault == Fault::kCopiedWeight) change_bit(&weights.front());
    if (plan_.fault == Fault::kRouterBias) change_bit(&plan_.stages[0]->routers()[0].bias[0]);
  }

 private:
  FaultPlan plan_;
  std::unique_ptr<FaultyTransport> transport_;
};

class EngineAuditTest : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }

  StandaloneOptions options_of(const TinyLayout& layout, int64_t compare, int64_t duplicate) {
    JobSpec spec = tiny_spec(directory_.path(), layout, kSteps);
    spec.model.first_k_dense_replace = 0;
    spec.optimizer.bias_update_speed = 0.01;
    spec.optimizer.ema_decay = 0.9;
    spec.guards.compare_replicas_every = compare;
    spec.guards.duplicate_every = duplicate;
    return tiny_run(spec);
  }
  // What a run says in which `fault` happens on its last rank.
  std::string ended_by(Fault fault, StandaloneOptions options) {
    const auto last = static_cast<int32_t>(options.spec.parallelism.world_size()) - 1;
    options.make_probe = [=](Rank rank) -> Result<std::unique_ptr<RankProbe>> {
      return std::unique_ptr<RankProbe>(
          std::make_unique<FaultyProbe>(rank.value == last ? fault : Fault::kNone));
    };
    return run_standalone_threads(options).status().message();
  }
  void expect_words(const std::string& said, const std::vector<std::string>& words) {
    for (const std::string& word : words) {
      EXPECT_NE(said.find(word), std::string::npos) << "\"" << word << "\" in: " << said;
    }
  }
  const std::vector<TinyLayout> layouts_ = {{2, 2, 1, Schedule::kDualPipe},
                                            {2, 1, 2, Schedule::kZeroBubble},
                                            {2, 2, 1, Schedule::kDualPipeV},
                                            {1, 2, 2, Schedule::kOneForwardOneBackward}};
  ScratchDirectory directory_;
};

TEST_F(EngineAuditTest, LookingForCorruptionChangesNoBitAndFindsNoneWhereNoneIs) {
  std::vector<TinyLayout> layouts = layouts_;
  layouts.push_back({});
  for (const TinyLayout& layout : layouts) {
    for (const Precision precision : {Precision::kFp32, Precision::kFp8}) {
      StandaloneOptions plain = options_of(layout, 0, 0);
      plain.spec.training.precision = precision;
      StandaloneOptions audited = options_of(layout, 1, 2);
      audited.spec.training.precision = precision;
      EXPECT_EQ(train_tiny(audited).weights_digest, train_tiny(plain).weights_digest)
          << to_string(layout);
    }
  }
}

TEST_F(EngineAuditTest, ARankThatComputesSomethingElseIsNamed) {
  for (const TinyLayout& layout : layouts_) {
    expect_words(ended_by(Fault::kGradient, options_of(layout, 0, kFaulty)),
                 {"rank 3: step 2: ", "this rank's gradients differ"});
    expect_words(ended_by(Fault::kActivation, options_of(layout, 0, kFaulty)),
                 {"rank 3: step 2: ", "that this rank sent to rank ", "differ: its processor"});
    EXPECT_EQ(ended_by(Fault::kGradient, options_of(layout, 0, 0)), "") << "nobody looked";
  }
  expect_words(ended_by(Fault::kActivation, options_of({}, 0, kFaulty)),
               {"rank 0: step 2: ", "this rank's gradients differ"});
}

TEST_F(EngineAuditTest, WhatChangesOnTheWayIsNoRanksFault) {
  expect_words(ended_by(Fault::kTransfer, options_of(layouts_[0], 0, kFaulty)),
               {"rank 3: step 2: computed twice, the activations that arrived from rank ",
                "the way between them changes bits"});
}

TEST_F(EngineAuditTest, AWeightThatChangesInMemoryIsFoundWhereItIs) {
  for (const TinyLayout& layout : layouts_) {
    for (const Fault fault : {Fault::kOwnedWeight, Fault::kRouterBias}) {
      expect_words(ended_by(fault, options_of(layout, kFaulty, 0)),
                   {"rank 3: step 2: this rank's weights are no longer those of its last step"});
    }
    EXPECT_EQ(ended_by(Fault::kOwnedWeight, options_of(layout, 3, 0)), "") << "too late";
    expect_words(ended_by(Fault::kCopiedWeight, options_of(layout, kFaulty, 0)),
                 {"rank 3: step 2: this rank's copy of weights of stage ", "which owns them"});
  }
}

}  // namespace
}  // namespace penstock
