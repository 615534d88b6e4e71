#include "worker/optim/adamw.h"

#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <map>
#include <set>

#include "comm/base/minifloat.h"
#include "comm/base/random.h"
#include "comm/data/reduce.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

ParameterSetOptions whole(const ModelConfig& model) {
  return {{0, model.num_hidden_layers}, {0, model.n_routed_experts}, true, true, true};
}

OptimizerSpec spec() {
  OptimizerSpec optimizer;
  optimizer.lr = 0.01;
  optimizer.weight_decay = 0.1;
  optimizer.clip_grad_norm = 2.0;
  return optimizer;
}

std::vector<OptimizerShard> shards_of(ParameterSet& set, int64_t count, int64_t index) {
  std::vector<OptimizerShard> shards;
  for (const ParameterKind kind : {ParameterKind::kDense, ParameterKind::kExpert}) {
    const ShardRange range = shard_range(std::ssize(set.values(kind)), count, index);
    shards.push_back({&set, kind, {range.begin, range.end}});
  }
  return shards;
}

void fill_gradients(ParameterSet& set, uint64_t step) {
  for (const Parameter& parameter : set.all()) {
    Random random(step, static_cast<uint64_t>(parameter.offset) * 2 + (parameter.expert >= 0));
    for (int64_t i = 0; i < parameter.size; ++i) {
      parameter.gradient[i] = static_cast<float>(random.normal());
    }
  }
}

OptimizerSpec spec_with(MomentType moments) {
  OptimizerSpec optimizer = spec();
  optimizer.moments = moments;
  return optimizer;
}

// An optimizer with the places and the memory that an engine gives it; steps go from one generation
// to another and back.
class OwnedAdamW {
 public:
  OwnedAdamW(const OptimizerSpec& spec, const std::vector<OptimizerShard>& shards, Kernels& kernels)
      : layout_(spec, shards), adamw_(spec, layout_, kernels) {
    for (auto& generation : generations_) generation.resize(layout_.byte_count());
    adamw_.take_weights(generations_[0].data());
  }
  OwnedAdamW(const OwnedAdamW&) = delete;
  void step(int64_t step, double learning_rate, double gradient_factor) {
    adamw_.step(step, learning_rate, gradient_factor, generations_[current_].data(),
                generations_[1 - current_].data());
    current_ = 1 - current_;
  }
  double gradient_square_sum() const { return adamw_.gradient_square_sum(); }
  double clip_factor(double norm) const { return adamw_.clip_factor(norm); }
  std::vector<StateSlice> state() { return adamw_.state(generations_[current_].data()); }
  std::vector<std::byte>& previous() { return generations_[1 - current_]; }
  std::vector<std::byte>& current() { return generations_[current_]; }
  const AdamW& optimizer() const { return adamw_; }

 private:
  StateLayout layout_;
  AdamW adamw_;
  std::vector<std::byte> generations_[2];
  size_t current_ = 0;
};

class AdamWTest : public testing::Test {
 protected:
  void expect_restored_moments_continue(MomentType moments);
  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  ModelConfig model_ = tiny_model();
};

TEST_F(AdamWTest, ThreeStepsEqualTheFormulaInDouble) {
  ParameterSet set(model_, whole(model_));
  set.initialize(3, 0.5);
  std::map<std::string, std::vector<double>> weight, m, v;
  for (const Parameter& p : set.all()) {
    weight[p.name].assign(p.value, p.value + p.size);
    m[p.name].assign(static_cast<size_t>(p.size), 0.0);
    v[p.name].assign(static_cast<size_t>(p.size), 0.0);
  }
  OwnedAdamW adamw(spec(), shards_of(set, 1, 0), *kernels_);
  for (int step = 1; step <= 3; ++step) {
    fill_gradients(set, static_cast<uint64_t>(step));
    const double rate = 0.01 / step, factor = 0.5;
    adamw.step(step, rate, factor);
    for (const Parameter& p : set.all()) {
      const double decay = p.shape.size() > 1 ? 0.1 : 0.0;
      for (size_t i = 0; i < weight[p.name].size(); ++i) {
        const double g = factor * p.gradient[i];
        double& mi = m[p.name][i];
        double& vi = v[p.name][i];
        double& wi = weight[p.name][i];
        mi = 0.9 * mi + 0.1 * g;
        vi = 0.95 * vi + 0.05 * g * g;
        const double update =
            mi / (1 - std::pow(0.9, step)) / (std::sqrt(vi / (1 - std::pow(0.95, step))) + 1e-8);
        wi -= rate * (update + decay * wi);
        ASSERT_NEAR(p.value[i], wi, 2e-6) << p.name << " step " << step;
      }
    }
  }
}

TEST_F(AdamWTest, AStepLeavesTheGenerationItReadsAsItWas) {
  for (const MomentType moments : {MomentType::kFp32, MomentType::kBf16}) {
    ParameterSet set(model_, whole(model_));
    set.initialize(3, 0.5);
    OwnedAdamW adamw(spec_with(moments), shards_of(set, 2, 1), *kernels_);
    for (int step = 1; step <= 3; ++step) {
      fill_gradients(set, static_cast<uint64_t>(step));
      const std::vector<std::byte> before = adamw.current();
      adamw.step(step, 0.01, 1.0);
      EXPECT_EQ(adamw.previous(), before);
      EXPECT_NE(adamw.current(), before);
    }
  }
}

TEST_F(AdamWTest, InPlaceAndFromOneGenerationToAnotherAreTheSameBits) {
  for (const MomentType moments : {MomentType::kFp32, MomentType::kBf16}) {
    ParameterSet apart(model_, whole(model_)), in_place(model_, whole(model_));
    apart.initialize(3, 0.5);
    in_place.initialize(3, 0.5);
    OwnedAdamW two(spec_with(moments), shards_of(apart, 1, 0), *kernels_);
    const StateLayout layout(spec_with(moments), shards_of(in_place, 1, 0));
    AdamW one(spec_with(moments), layout, *kernels_);
    std::vector<std::byte> generation(layout.byte_count());
    one.take_weights(generation.data());
    for (int step = 1; step <= 3; ++step) {
      fill_gradients(apart, static_cast<uint64_t>(step));
      fill_gradients(in_place, static_cast<uint64_t>(step));
      two.step(step, 0.01, 1.0);
      one.step(step, 0.01, 1.0, generation.data(), generation.data());
    }
    EXPECT_EQ(generation, two.current());
  }
}

TEST_F(AdamWTest, PutsBackTheWeightsOfAGeneration) {
  ParameterSet set(model_, whole(model_));
  set.initialize(3, 0.5);
  OwnedAdamW adamw(spec(), shards_of(set, 3, 1), *kernels_);
  const auto all = set.values(ParameterKind::kDense);
  const std::vector<float> before(all.begin(), all.end());
  for (float& weight : all) weight += 1.0F;
  adamw.optimizer().put_weights(adamw.current().data());
  const ShardRange owned = shard_range(std::ssize(all), 3, 1);
  for (int64_t i = 0; i < std::ssize(all); ++i) {
    const bool own = owned.begin <= i && i < owned.end;
    ASSERT_EQ(all[i], own ? before[i] : before[i] + 1.0F) << i;
  }
}

TEST_F(AdamWTest, ShardsOfThreeReplicasTogetherEqualOneOptimizer) {
  ParameterSet alone(model_, whole(model_)), shared(model_, whole(model_));
  alone.initialize(3, 0.5);
  shared.initialize(3, 0.5);
  OwnedAdamW one(spec(), shards_of(alone, 1, 0), *kernels_);
  std::deque<OwnedAdamW> replicas;
  for (int64_t r = 0; r < 3; ++r) replicas.emplace_back(spec(), shards_of(shared, 3, r), *kernels_);
  for (int step = 1; step <= 2; ++step) {
    fill_gradients(alone, static_cast<uint64_t>(step));
    fill_gradients(shared, static_cast<uint64_t>(step));
    double squares = 0.0;
    for (const OwnedAdamW& replica : replicas) squares += replica.gradient_square_sum();
    EXPECT_NEAR(squares, one.gradient_square_sum(), 1e-9 * squares);
    one.step(step, 0.01, 1.0);
    for (OwnedAdamW& replica : replicas) replica.step(step, 0.01, 1.0);
  }
  for (const Parameter& p : alone.all()) {
    const Parameter* twin = shared.find(p.name);
    for (int64_t i = 0; i < p.size; ++i) ASSERT_FLOAT_EQ(p.value[i], twin->value[i]) << p.name;
  }
}

TEST_F(AdamWTest, GapsBetweenTensorsStayZero) {
  model_.moe_intermediate_size = 11;  // matrices of 352 elements would fill their places exactly
  model_.hidden_size = 30;
  ParameterSet set(model_, whole(model_));
  set.initialize(3, 0.5);
  fill_gradients(set, 1);
  OwnedAdamW adamw(spec(), shards_of(set, 1, 0), *kernels_);
  adamw.step(1, 0.01, 1.0);
  size_t end = 0, gaps = 0;
  for (const Parameter& p : set.all()) {
    if (p.kind != ParameterKind::kExpert) continue;
    for (; end < static_cast<size_t>(p.offset); ++end, ++gaps) {
      EXPECT_EQ(set.values(p.kind)[end], 0.0F);
    }
    end = static_cast<size_t>(p.offset + p.size);
  }
  EXPECT_GT(gaps, 0u);
}

TEST_F(AdamWTest, ClippingScalesToTheLimitAndLeavesSmallGradientsAlone) {
  OwnedAdamW adamw(spec(), {}, *kernels_);
  EXPECT_DOUBLE_EQ(adamw.clip_factor(1.9), 1.0);
  EXPECT_NEAR(adamw.clip_factor(8.0), 0.25, 1e-6);
  OptimizerSpec off = spec();
  off.clip_grad_norm = 0.0;
  EXPECT_DOUBLE_EQ(OwnedAdamW(off, {}, *kernels_).clip_factor(1e9), 1.0);
}

TEST_F(AdamWTest, StateOfAllShardsTilesEveryTensorOnceForEachOfThreeKinds) {
  ParameterSet set(model_, whole(model_));
  set.initialize(3, 0.5);
  std::map<std::string, std::vector<int>> written;
  for (int64_t r = 0; r < 3; ++r) {
    OwnedAdamW adamw(spec(), shards_of(set, 3, r), *kernels_);
    for (const StateSlice& state : adamw.state()) {
      ASSERT_TRUE(check_slice(state.slice).ok()) << state.slice.name;
      ASSERT_EQ(byte_count(state.slice), state.bytes.size());
      std::vector<int>& counts = written[state.slice.name];
      counts.resize(static_cast<size_t>(element_count(state.slice.shape)), 0);
      const Box all{std::vector<int64_t>(state.slice.shape.size(), 0), state.slice.shape};
      for_each_run(state.slice.box, state.slice.box, all, dense_strides(state.slice.shape),
                   [&](const penstock::Run& run) {
                     for (int64_t i = 0; i < run.count; ++i) {
                       ++counts[static_cast<size_t>(run.destination + i)];
                     }
                   });
    }
  }
  EXPECT_EQ(written.size(), 3 * set.all().size());
  for (const auto& [name, counts] : written) {
    for (const int count : counts) ASSERT_EQ(count, 1) << name;
  }
}

TEST_F(AdamWTest, StatePointsAtTheElementsOfItsBox) {
  ParameterSet set(model_, whole(model_));
  set.initialize(3, 0.5);
  fill_gradients(set, 1);
  OwnedAdamW adamw(spec(), shards_of(set, 3, 1), *kernels_);
  adamw.step(1, 0.01, 1.0);
  size_t seen = 0;
  for (const StateSlice& state : adamw.state()) {
    const auto bar = state.slice.name.find('|');
    const Parameter* p = set.find(state.slice.name.substr(0, bar));
    ASSERT_NE(p, nullptr) << state.slice.name;
    int64_t first = 0;
    const std::vector<int64_t> strides = dense_strides(p->shape);
    for (size_t d = 0; d < strides.size(); ++d) first += state.slice.box.offset[d] * strides[d];
    const auto* values = reinterpret_cast<const float*>(state.bytes.data());
    for (size_t i = 0; i < state.bytes.size() / sizeof(float); ++i) {
      const auto index = static_cast<size_t>(first) + i;
      const float g = p->gradient[index];
      if (bar == std::string::npos) {
        EXPECT_EQ(values[i], p->value[index]);
      } else if (state.slice.name.ends_with("exp_avg")) {
        EXPECT_NEAR(values[i], 0.1 * g, 1e-6 * std::abs(g));
      } else {
        EXPECT_NEAR(values[i], 0.05 * g * g, 1e-6 * g * g);
      }
      ++seen;
    }
  }
  EXPECT_GT(seen, 1000u);
}

TEST_F(AdamWTest, RestoredMomentsContinueBitForBit) {
  for (const MomentType moments : {MomentType::kFp32, MomentType::kBf16}) {
    expect_restored_moments_continue(moments);
  }
}

TEST_F(AdamWTest, Bf16MomentsAreTheFp32OnesRoundedAndTheUpdateUsesTheUnroundedOnes) {
  ParameterSet wide_set(model_, whole(model_)), narrow_set(model_, whole(model_));
  wide_set.initialize(3, 0.5);
  narrow_set.initialize(3, 0.5);
  OwnedAdamW wide(spec(), shards_of(wide_set, 1, 0), *kernels_);
  OwnedAdamW narrow(spec_with(MomentType::kBf16), shards_of(narrow_set, 1, 0), *kernels_);
  fill_gradients(wide_set, 1);
  fill_gradients(narrow_set, 1);
  wide.step(1, 0.01, 1.0);  // from moments of 0, which rounding leaves alone
  narrow.step(1, 0.01, 1.0);
  for (const Parameter& p : wide_set.all()) {
    ASSERT_TRUE(std::equal(p.value, p.value + p.size, narrow_set.find(p.name)->value)) << p.name;
  }
  const auto expected = wide.state(), got = narrow.state();
  ASSERT_EQ(got.size(), expected.size());
  size_t moments = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].slice.name, expected[i].slice.name);
    if (got[i].slice.dtype != DType::kBf16) continue;
    ASSERT_EQ(2 * got[i].bytes.size(), expected[i].bytes.size());
    const auto* rounded = reinterpret_cast<const uint16_t*>(got[i].bytes.data());
    const auto* exact = reinterpret_cast<const float*>(expected[i].bytes.data());
    for (size_t j = 0; j < got[i].bytes.size() / 2; ++j, ++moments) {
      ASSERT_EQ(rounded[j], encode_bf16(exact[j])) << got[i].slice.name;
    }
  }
  EXPECT_GT(moments, 10'000u);
}

TEST_F(AdamWTest, ExemptMatricesAndNormsDoNotDecay) {
  OptimizerSpec optimizer = spec();
  optimizer.no_decay = {.embedding = true, .head = false, .router = true};
  ParameterSet set(model_, whole(model_));
  set.initialize(3, 0.5);
  OwnedAdamW adamw(optimizer, shards_of(set, 1, 0), *kernels_);
  std::map<std::string, float> before;
  for (const Parameter& p : set.all()) before[p.name] = p.value[0];
  adamw.step(1, 0.01, 1.0);  // with gradients of 0, decay is all that moves a weight
  std::set<std::string> still;
  for (const Parameter& p : set.all()) {
    if (p.value[0] == before[p.name]) still.insert(p.name);
  }
  EXPECT_TRUE(still.contains("model.embed_tokens.weight"));
  EXPECT_FALSE(still.contains("lm_head.weight"));
  EXPECT_TRUE(still.contains("model.layers.2.mlp.gate.weight"));
  EXPECT_FALSE(still.contains("model.layers.0.mlp.gate_proj.weight"));
  EXPECT_TRUE(still.contains("model.layers.0.input_layernorm.weight"));
  EXPECT_FALSE(still.contains("model.layers.2.mlp.experts.3.up_proj.weight"));
}

// Two steps in one go, and with the state carried over in between, end in equal bits.
void AdamWTest::expect_restored_moments_continue(MomentType moments) {
  ParameterSet straight(model_, whole(model_)), resumed(model_, whole(model_));
  straight.initialize(3, 0.5);
  OwnedAdamW first(spec_with(moments), shards_of(straight, 1, 0), *kernels_);
  fill_gradients(straight, 1);
  first.step(1, 0.01, 1.0);
  OwnedAdamW second(spec_with(moments), shards_of(resumed, 1, 0), *kernels_);
  const auto from = first.state();
  auto to = second.state();
  ASSERT_EQ(from.size(), to.size());
  for (size_t i = 0; i < from.size(); ++i) {
    std::copy(from[i].bytes.begin(), from[i].bytes.end(), to[i].bytes.begin());
  }
  second.optimizer().put_weights(second.current().data());
  fill_gradients(straight, 2);
  fill_gradients(resumed, 2);
  first.step(2, 0.01, 1.0);
  second.step(2, 0.01, 1.0);
  for (const Parameter& p : straight.all()) {
    EXPECT_TRUE(std::equal(p.value, p.value + p.size, resumed.find(p.name)->value)) << p.name;
  }
}

TEST(BoxesOfRangeTest, CutsARangeOfAMatrixIntoPartialWholeAndPartialRows) {
  const std::vector<int64_t> shape = {6, 4};
  const auto boxes = boxes_of_range(shape, 3, 18);
  ASSERT_EQ(boxes.size(), 3u);
  EXPECT_EQ(boxes[0], (Box{{0, 3}, {1, 1}}));
  EXPECT_EQ(boxes[1], (Box{{1, 0}, {3, 4}}));
  EXPECT_EQ(boxes[2], (Box{{4, 0}, {1, 2}}));
}

TEST(BoxesOfRangeTest, APieceOfOneRowIsOneBoxAndAnEmptyRangeNone) {
  const std::vector<int64_t> shape = {6, 4};
  EXPECT_EQ(boxes_of_range(shape, 5, 7), (std::vector<Box>{{{1, 1}, {1, 2}}}));
  EXPECT_EQ(boxes_of_range(shape, 4, 6), (std::vector<Box>{{{1, 0}, {1, 2}}}));
  EXPECT_TRUE(boxes_of_range(shape, 5, 5).empty());
}

// Every range of small tensors of 1 to 4 dimensions: exact cover, in order, at most 2N-1 boxes.
TEST(BoxesOfRangeTest, CoversEveryRangeOfEveryShapeExactlyWithFewBoxes) {
  const std::vector<std::vector<int64_t>> shapes = {
      {7}, {3, 5}, {2, 3, 4}, {2, 2, 3, 2}, {1, 4, 1}};
  for (const auto& shape : shapes) {
    const std::vector<int64_t> strides = dense_strides(shape);
    const int64_t total = element_count(shape);
    for (int64_t begin = 0; begin <= total; ++begin) {
      for (int64_t end = begin; end <= total; ++end) {
        const auto boxes = boxes_of_range(shape, begin, end);
        EXPECT_LE(boxes.size(), 2 * shape.size() - 1);
        int64_t next = begin;
        for (const Box& box : boxes) {
          int64_t first = 0;
          for (size_t d = 0; d < shape.size(); ++d) {
            first += box.offset[d] * strides[d];
            ASSERT_LE(box.offset[d] + box.size[d], shape[d]);
          }
          ASSERT_EQ(first, next);
          next += element_count(box);
        }
        ASSERT_EQ(next, end);
      }
    }
  }
}

}  // namespace
}  // namespace penstock
