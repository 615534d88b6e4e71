#include "worker/model/linear.h"

#include <gtest/gtest.h>

#include <numeric>

#include "comm/base/minifloat.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

// kv_a_proj_with_mqa lies behind q_a_proj: one weight of two tensors.
class LinearTest : public testing::Test {
 protected:
  static constexpr int64_t kRows = 9;
  static ModelConfig model() {
    ModelConfig model = tiny_model();
    model.initializer_range = 0.5;  // so that the two tensors' largest values differ
    return model;
  }
  LinearTest() : parameters_(model(), {.layers = {0, 1}, .experts = {0, 8}}) {
    parameters_.initialize(1, 0.5);
    const std::string stem = "model.layers.0.self_attn.";
    first_ = parameters_.find(stem + "q_a_proj.weight");
    second_ = parameters_.find(stem + "kv_a_proj_with_mqa.weight");
    for (int64_t i = 0; i < second_->size; ++i) second_->value[i] *= 100;
    weight_ = LinearWeight(*first_, second_);
    x_.resize(static_cast<size_t>(kRows * weight_.in));
    dy_.resize(static_cast<size_t>(kRows * weight_.out));
    for (size_t i = 0; i < x_.size(); ++i) x_[i] = std::sin(static_cast<float>(i));
    for (size_t i = 0; i < dy_.size(); ++i) dy_[i] = std::cos(static_cast<float>(3 * i));
  }
  Linears linears(Precision precision) {
    Linears result(*kernels_, precision);
    MemoryPlan plan(arena_);
    result.take_workspace(plan, parameters_.all());
    return result;
  }
  ConstMatrix x() const { return {x_.data(), weight_.in}; }
  ConstMatrix dy() const { return {dy_.data(), weight_.out}; }

  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  Arena arena_{"linear test", 8 << 20};
  ParameterSet parameters_;
  const Parameter* first_;
  const Parameter* second_;
  LinearWeight weight_;
  std::vector<float> x_, dy_;
};

TEST_F(LinearTest, Fp32IsTheMatrixProduct) {
  const Linears fp32 = linears(Precision::kFp32);
  std::vector<float> y(dy_.size()), product(dy_.size());
  fp32.forward(kRows, weight_, x(), Store::kOverwrite, {y.data(), weight_.out});
  kernels_->matmul(kRows, weight_.out, weight_.in, x(), Transpose::kNo, {weight_.value, weight_.in},
                   Transpose::kYes, Store::kOverwrite, {product.data(), weight_.out});
  EXPECT_EQ(y, product);

  std::vector<float> dx(x_.size()), d_product(x_.size());
  fp32.input_gradient(kRows, weight_, dy(), {dx.data(), weight_.in});
  kernels_->matmul(kRows, weight_.in, weight_.out, dy(), Transpose::kNo,
                   {weight_.value, weight_.in}, Transpose::kNo, Store::kOverwrite,
                   {d_product.data(), weight_.in});
  EXPECT_EQ(dx, d_product);

  fp32.weight_gradient(kRows, weight_, dy(), x());
  std::vector<float> gradient(static_cast<size_t>(weight_.out * weight_.in));
  kernels_->matmul(weight_.out, weight_.in, kRows, dy(), Transpose::kYes, x(), Transpose::kNo,
                   Store::kAccumulate, {gradient.data(), weight_.in});
  EXPECT_TRUE(std::equal(gradient.begin(), gradient.end(), weight_.gradient));

  const std::vector<float> before = x_;
  fp32.round(RowFormat::kE4m3, kRows, weight_.in, x(), {x_.data(), weight_.in});
  EXPECT_EQ(x_, before);
}

// The second tensor's values are a hundred times the first's: in one block they would drown them.
TEST_F(LinearTest, EachTensorOfAnFp8WeightHasItsOwnBlocks) {
  const Linears fp8 = linears(Precision::kFp8);
  std::vector<float> y(dy_.size()), dx(x_.size());
  fp8.forward(kRows, weight_, x(), Store::kOverwrite, {y.data(), weight_.out});
  fp8.input_gradient(kRows, weight_, dy(), {dx.data(), weight_.in});
  fp8.weight_gradient(kRows, weight_, dy(), x());
  const std::vector<float> gradient(weight_.gradient, weight_.gradient + weight_.out * weight_.in);

  parameters_.zero_gradients();
  std::vector<float> apart(dy_.size()), d_first(x_.size()), d_second(x_.size());
  const LinearWeight first(*first_), second(*second_);
  const auto run = [&](const LinearWeight& weight, int64_t column, std::vector<float>& d) {
    const ConstMatrix part = {dy_.data() + column, weight_.out};
    fp8.forward(kRows, weight, x(), Store::kOverwrite, {apart.data() + column, weight_.out});
    fp8.input_gradient(kRows, weight, part, {d.data(), weight_.in});
    fp8.weight_gradient(kRows, weight, part, x());
  };
  run(first, 0, d_first);
  run(second, first.out, d_second);
  EXPECT_EQ(y, apart);
  for (size_t i = 0; i < dx.size(); ++i) EXPECT_EQ(dx[i], d_first[i] + d_second[i]);
  EXPECT_TRUE(std::equal(gradient.begin(), gradient.end(), weight_.gradient));
}

TEST_F(LinearTest, Fp8OutputsAreBf16AndCloseToFp32) {
  const Linears fp8 = linears(Precision::kFp8), fp32 = linears(Precision::kFp32);
  std::vector<float> y(dy_.size()), exact(dy_.size());
  fp8.forward(kRows, weight_, x(), Store::kOverwrite, {y.data(), weight_.out});
  fp32.forward(kRows, weight_, x(), Store::kOverwrite, {exact.data(), weight_.out});
  for (const float value : y) EXPECT_EQ(value, round_to_bf16(value));
  EXPECT_LT(relative_difference(y, exact), 0.08);
  EXPECT_GT(relative_difference(y, exact), 0.003);
}

TEST_F(LinearTest, GroupsUseTheWeightOfTheirOwn) {
  const std::string stem = "model.layers.1.mlp.experts.";
  ParameterSet experts(model(), {.layers = {1, 2}, .experts = {0, 8}});
  experts.initialize(2, 0.5);
  LinearWeight weight(*experts.find(stem + "0.down_proj.weight"));
  weight.group_stride = experts.find(stem + "1.down_proj.weight")->value - weight.value;
  const Linears fp8 = linears(Precision::kFp8);
  const int64_t offsets[] = {0, 4, 4, kRows};
  std::vector<float> x(static_cast<size_t>(kRows * weight.in), 0.3F);
  std::vector<float> y(static_cast<size_t>(kRows * weight.out)), alone(y.size());
  fp8.forward({3, offsets}, weight, {x.data(), weight.in}, Store::kOverwrite,
              {y.data(), weight.out});
  for (const int64_t group : {0, 2}) {
    const LinearWeight own(*experts.find(stem + std::to_string(group) + ".down_proj.weight"));
    fp8.forward(kRows, own, {x.data(), weight.in}, Store::kOverwrite, {alone.data(), weight.out});
    for (int64_t i = offsets[group] * weight.out; i < offsets[group + 1] * weight.out; ++i) {
      ASSERT_EQ(y[static_cast<size_t>(i)], alone[static_cast<size_t>(i)]) << group << " " << i;
    }
  }
}

}  // namespace
}  // namespace penstock
