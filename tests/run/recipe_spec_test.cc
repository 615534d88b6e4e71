// The keys of the training recipe.
#include <gtest/gtest.h>

#include "comm/run/job_spec.h"
#include "tests/run/spec_text.h"

namespace penstock {
namespace {

constexpr std::string_view kOptimizer = "betas: [0.9, 0.95]}";
constexpr std::string_view kSchedule = "warmup_steps: 10, decay: cosine";

Result<JobSpec> parsed(std::string_view from, const std::string& to) {
  return parse_job_spec(edited(from, to), "s.yaml");
}
Result<JobSpec> with_optimizer(const std::string& keys) {
  return parsed(kOptimizer, "betas: [0.9, 0.95], " + keys + "}");
}
Result<JobSpec> with_schedule(const std::string& keys) {
  return parsed(kSchedule, "warmup_steps: 10, " + keys);
}
std::string error_of(const Result<JobSpec>& spec) {
  return spec.ok() ? "no error" : spec.status().message();
}

TEST(StepLevelsTest, AValueHoldsFromItsStepToTheNextLevel) {
  const std::vector<StepLevel<int64_t>> levels = {{5, 10}, {8, 20}};
  EXPECT_EQ(value_at<int64_t>(levels, 1, 4), 1);
  EXPECT_EQ(value_at<int64_t>(levels, 1, 5), 10);
  EXPECT_EQ(value_at<int64_t>(levels, 1, 7), 10);
  EXPECT_EQ(value_at<int64_t>(levels, 1, 8), 20);
  EXPECT_EQ(value_at<int64_t>(levels, 1, 1000), 20);
  EXPECT_EQ(value_at<int64_t>({}, 1, 1000), 1);
}

TEST(RecipeSpecTest, TheWholeLearningRateScheduleOfV3CanBeWritten) {
  const auto spec = with_schedule(
      "hold_steps: 30, decay: cosine, decay_steps: 20, "
      "lr_ratio: [{from_step: 80, value: 0.1}, {from_step: 90, value: 0.0332}], "
      "bias_update_speed: [{from_step: 95, value: 0}]");
  ASSERT_TRUE(spec.ok()) << error_of(spec);
  EXPECT_EQ(spec->optimizer.hold_steps, 30);
  EXPECT_EQ(spec->optimizer.decay_steps, 20);
  EXPECT_EQ(spec->optimizer.lr_levels, (std::vector<StepLevel<double>>{{80, 0.1}, {90, 0.0332}}));
  EXPECT_EQ(spec->optimizer.bias_update_levels, (std::vector<StepLevel<double>>{{95, 0.0}}));
  const auto again = parse_job_spec(to_json(*spec), "canonical");
  ASSERT_TRUE(again.ok()) << error_of(again);
  EXPECT_EQ(*again, *spec);
}

TEST(RecipeSpecTest, OptimizerStateKeysAreRead) {
  const auto spec = with_optimizer(
      "no_decay: [embedding, router], moments: bf16, ema_decay: 0.999, ema_evaluation: true");
  ASSERT_TRUE(spec.ok()) << error_of(spec);
  EXPECT_TRUE(spec->optimizer.no_decay.embedding && spec->optimizer.no_decay.router);
  EXPECT_FALSE(spec->optimizer.no_decay.head);
  EXPECT_EQ(spec->optimizer.moments, MomentType::kBf16);
  EXPECT_EQ(spec->optimizer.ema_decay, 0.999);
  EXPECT_TRUE(spec->optimizer.ema_evaluation);
  const auto again = parse_job_spec(to_json(*spec), "canonical");
  ASSERT_TRUE(again.ok()) << error_of(again);
  EXPECT_EQ(*again, *spec);
}

TEST(RecipeSpecTest, LevelsOutOfOrderAreRefusedAtTheLevel) {
  EXPECT_EQ(error_of(with_schedule("lr_ratio: [{from_step: 80, value: 0.1}, {from_step: 80, "
                                   "value: 0.2}]")),
            "s.yaml:29:70: schedule.lr_ratio[1].from_step 80 must be above the 80 before it");
}

TEST(RecipeSpecTest, ALevelNeedsBothItsKeysAndNoOther) {
  EXPECT_NE(error_of(with_schedule("lr_ratio: [{from_step: 80}]"))
                .find("schedule.lr_ratio[0].value is missing"),
            std::string::npos);
  EXPECT_NE(error_of(with_schedule("lr_ratio: [{from_step: 80, value: 0.1, until: 9}]"))
                .find("unknown key \"until\" in schedule.lr_ratio[0]"),
            std::string::npos);
  EXPECT_NE(error_of(with_schedule("lr_ratio: 0.1")).find("must be a list of at most 64 levels"),
            std::string::npos);
}

TEST(RecipeSpecTest, PartsOfTheScheduleThatDoNotFitTheRunAreRefused) {
  EXPECT_EQ(error_of(with_schedule("hold_steps: 91")),
            "s.yaml:29:42: schedule: 10 steps of warm-up, 91 held and 0 of decay are more than "
            "training.steps 100");
  EXPECT_EQ(error_of(with_schedule("decay_steps: 91")),
            "s.yaml:29:43: schedule.decay_steps 91 ends at step 101, after training.steps 100");
  EXPECT_NE(error_of(with_schedule("hold_steps: 50, lr_ratio: [{from_step: 60, value: 0.1}]"))
                .find("schedule.lr_ratio begins at step 60, before warm-up, hold and decay end at "
                      "step 60"),
            std::string::npos);
}

TEST(RecipeSpecTest, WrongWordsOfTheOptimizerAreRefused) {
  EXPECT_EQ(error_of(with_optimizer("moments: fp8")),
            "s.yaml:28:74: optimizer.moments must be fp32 or bf16");
  EXPECT_EQ(error_of(with_optimizer("no_decay: [norms]")),
            "s.yaml:28:76: optimizer.no_decay must be a list out of embedding, head, router");
  EXPECT_NE(error_of(with_optimizer("ema_decay: 1")).find("optimizer.ema_decay must be below 1"),
            std::string::npos);
  EXPECT_NE(error_of(with_optimizer("ema_evaluation: true"))
                .find("optimizer.ema_evaluation needs optimizer.ema_decay above 0"),
            std::string::npos);
}

}  // namespace
}  // namespace penstock
