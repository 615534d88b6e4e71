#include "worker/engine/weight_average.h"

#include <gtest/gtest.h>

#include <atomic>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/engine_test_support.h"
#include "tests/worker/model_test_support.h"
#include "worker/optim/adamw.h"

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
  static OptimizerSpec spec() {
    OptimizerSpec optimizer;
    optimizer.ema_decay = 0.5;  // so that it has a place
    return optimizer;
  }
  float* weights_in(std::vector<std::byte>& generation, size_t place) const {
    return reinterpret_cast<float*>(generation.data() + layout_.places()[place].weights);
  }
  // What an optimizer step does to weights.
  void change_weights(std::vector<std::byte>& previous, std::vector<std::byte>& next) const {
    for (size_t p = 0; p < layout_.places().size(); ++p) {
      const int64_t size = layout_.places()[p].shard.owned.size();
      for (int64_t i = 0; i < size; ++i) {
        weights_in(next, p)[i] = 1.25F * weights_in(previous, p)[i] + (p == 0 ? 0.5F : -0.75F);
      }
    }
  }
  static std::vector<float> values_of(const std::vector<StateSlice>& slices) {
    std::vector<float> values;
    for (const StateSlice& state : slices) {
      const auto* first = reinterpret_cast<const float*>(state.bytes.data());
      values.insert(values.end(), first, first + state.bytes.size() / sizeof(float));
    }
    return values;
  }
  std::vector<float> weights_of(std::vector<std::byte>& generation) const {
    std::vector<float> values;
    for (const StateLayout::Place& place : layout_.places()) {
      for (const ShardPiece& piece : pieces_of(place.shard)) {
        const auto* first =
            reinterpret_cast<const float*>(generation.data() + place.weights) + piece.offset;
        values.insert(values.end(), first, first + (piece.end - piece.begin));
      }
    }
    return values;
  }
  std::vector<std::byte> make_generation() const {
    return std::vector<std::byte>(layout_.byte_count());
  }

  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  ParameterSet set_;
  const StateLayout layout_{spec(), shards()};
  const AdamW optimizer_{spec(), layout_, *kernels_};
};

TEST_F(WeightAverageTest, StartsAtTheWeightsAndMovesByTheFormula) {
  std::atomic<int> finished = 0;
  WeightAverage average(0.75, layout_, [&] { ++finished; });
  std::vector<std::byte> generations[] = {make_generation(), make_generation()};
  optimizer_.take_weights(generations[0].data());
  average.reset(generations[0].data());
  EXPECT_EQ(values_of(average.state(generations[0].data())), weights_of(generations[0]));
  std::vector<double> expected;
  for (const float a : weights_of(generations[0])) expected.push_back(a);
  for (int step = 0; step < 3; ++step) {
    std::vector<std::byte>& previous = generations[step % 2];
    std::vector<std::byte>& next = generations[(step + 1) % 2];
    change_weights(previous, next);
    const std::vector<std::byte> before = previous;
    average.start(previous.data(), next.data());
    average.wait();
    EXPECT_EQ(finished, step + 1);
    EXPECT_EQ(previous, before) << "what is read stays whole";
    const std::vector<float> weights = weights_of(next);
    const std::vector<float> got = values_of(average.state(next.data()));
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = 0.75 * expected[i] + 0.25 * weights[i];
      ASSERT_NEAR(got[i], expected[i], 1e-5);
    }
  }
}

TEST_F(WeightAverageTest, TakesThePlaceOfTheOwnedWeightsAlone) {
  WeightAverage average(0.9, layout_, [] {});
  std::vector<std::byte> first = make_generation(), second = make_generation();
  optimizer_.take_weights(first.data());
  average.reset(first.data());
  change_weights(first, second);
  average.start(first.data(), second.data());
  average.wait();
  optimizer_.put_weights(second.data());
  const auto all = set_.values(ParameterKind::kDense);
  const std::vector<float> weights(all.begin(), all.end());
  average.put_in_place_of_weights(second.data());
  EXPECT_TRUE(std::equal(weights.begin(), weights.begin() + std::ssize(weights) / 2, all.begin()))
      << "the other replica's half";
  EXPECT_NE(std::vector<float>(all.begin(), all.end()), weights);
  optimizer_.put_weights(second.data());
  EXPECT_EQ(std::vector<float>(all.begin(), all.end()), weights);
}

TEST_F(WeightAverageTest, AnUpdateUnderWayIsFinishedBeforeTheEnd) {
  std::vector<std::byte> first = make_generation(), second = make_generation();
  std::atomic<bool> finished = false;
  {
    WeightAverage average(0.5, layout_, [&] { finished = true; });
    average.reset(first.data());
    average.start(first.data(), second.data());
  }
  EXPECT_TRUE(finished);
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
