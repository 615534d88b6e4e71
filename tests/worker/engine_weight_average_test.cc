#include "worker/engine/weight_average.h"

#include <gtest/gtest.h>

#include "tests/worker/engine_test_support.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

class WeightAverageTest : public testing::Test {
 protected:
  WeightAverageTest() : set_(tiny_model(), options()) { set_.initialize(3, 0.5); }
  static ParameterSetOptions options() {
    const ModelConfig model = tiny_model();
    return {{0, model.num_hidden_layers}, {0, model.n_routed_experts}, true, true, true};
  }
  // The second half of the dense buffer and all experts.
  std::vector<OptimizerShard> shards() {
    const int64_t dense = std::ssize(set_.values(ParameterKind::kDense));
    return {{&set_, ParameterKind::kDense, {dense / 2, dense}},
            {&set_, ParameterKind::kExpert, {0, std::ssize(set_.values(ParameterKind::kExpert))}}};
  }
  void change_weights() {
    for (float& w : set_.values(ParameterKind::kDense)) w = 1.25F * w + 0.5F;
    for (float& w : set_.values(ParameterKind::kExpert)) w -= 0.75F;
  }
  static std::vector<float> values_of(WeightAverage& average) {
    std::vector<float> values;
    for (const StateSlice& state : average.state()) {
      const auto* first = reinterpret_cast<const float*>(state.bytes.data());
      values.insert(values.end(), first, first + state.bytes.size() / sizeof(float));
    }
    return values;
  }

  ParameterSet set_;
};

TEST_F(WeightAverageTest, StartsAtTheWeightsAndMovesByTheFormula) {
  WeightAverage average(0.75, shards());
  average.reset();
  std::vector<double> expected;
  for (const float a : values_of(average)) expected.push_back(a);
  WeightAverage now(0.0, shards());  // follows the weights at once
  for (int step = 0; step < 3; ++step) {
    change_weights();
    average.start();
    average.wait();
    now.start();
    now.wait();
    const std::vector<float> weights = values_of(now), got = values_of(average);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = 0.75 * expected[i] + 0.25 * weights[i];
      ASSERT_NEAR(got[i], expected[i], 1e-5);
    }
  }
}

TEST_F(WeightAverageTest, ExchangingTwiceChangesNoBit) {
  WeightAverage average(0.9, shards());
  average.reset();
  change_weights();
  const auto all = set_.values(ParameterKind::kDense);
  const std::vector<float> weights(all.begin(), all.end()), kept = values_of(average);
  average.exchange_with_weights();
  EXPECT_TRUE(std::equal(weights.begin(), weights.begin() + std::ssize(weights) / 2, all.begin()))
      << "the other replica's half";
  EXPECT_NE(std::vector<float>(all.begin(), all.end()), weights);
  average.exchange_with_weights();
  EXPECT_EQ(std::vector<float>(all.begin(), all.end()), weights);
  EXPECT_EQ(values_of(average), kept);
}

TEST_F(WeightAverageTest, AnUpdateUnderWayIsFinishedBeforeTheEnd) {
  WeightAverage average(0.5, shards());
  average.reset();
  average.start();
}

class AveragedRunTest : public testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }
  StandaloneOptions options_of(const TinyLayout& layout, double decay) const {
    JobSpec spec = tiny_spec(directory_.path(), layout, 6);
    spec.optimizer.ema_decay = decay;
    spec.optimizer.ema_evaluation = decay > 0.0;
    spec.training.evaluation_interval = 2;
    StandaloneOptions options = tiny_run(spec);
    options.evaluate = true;
    return options;
  }
  ScratchDirectory directory_;
};

TEST_F(AveragedRunTest, AnAverageAndItsEvaluationChangeNoBitOfTheTraining) {
  for (const TinyLayout& layout : {TinyLayout{}, TinyLayout{2, 2, 1, Schedule::kDualPipe}}) {
    const StandaloneReport plain = train_tiny(options_of(layout, 0.0));
    const StandaloneReport averaged = train_tiny(options_of(layout, 0.8));
    EXPECT_EQ(averaged.weights_digest, plain.weights_digest) << to_string(layout);
    ASSERT_EQ(averaged.steps.size(), plain.steps.size());
    for (size_t i = 0; i < plain.steps.size(); ++i) {
      EXPECT_EQ(averaged.steps[i].loss, plain.steps[i].loss);
      EXPECT_EQ(averaged.steps[i].grad_norm, plain.steps[i].grad_norm);
    }
    ASSERT_EQ(averaged.evaluations.size(), 4u);
    EXPECT_EQ(averaged.evaluations[0].loss, plain.evaluations[0].loss);  // both: initial weights
    EXPECT_GT(averaged.evaluations[3].loss, plain.evaluations[3].loss);  // lags behind learning
  }
}

TEST_F(AveragedRunTest, EveryLayoutEvaluatesTheSameAverage) {
  const StandaloneReport one = train_tiny(options_of({}, 0.8));
  for (const TinyLayout& layout : {TinyLayout{2, 1, 2, Schedule::kOneForwardOneBackward},
                                   TinyLayout{4, 2, 1, Schedule::kDualPipe}}) {
    const StandaloneReport report = train_tiny(options_of(layout, 0.8));
    ASSERT_EQ(report.evaluations.size(), one.evaluations.size());
    for (size_t i = 0; i < one.evaluations.size(); ++i) {
      EXPECT_NEAR(report.evaluations[i].loss, one.evaluations[i].loss, 5e-5) << to_string(layout);
    }
  }
}

}  // namespace
}  // namespace penstock
