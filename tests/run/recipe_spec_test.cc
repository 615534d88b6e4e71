// The keys of the training recipe.
#include <fmt/format.h>
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

TEST(StepLevelsTest, TheTotalBeforeAStepAddsUpItsLevels) {
  const std::vector<StepLevel<int64_t>> levels = {{1, 3}, {5, 10}, {8, 20}};
  int64_t total = 0;
  for (int64_t step = 1; step < 12; ++step) {
    EXPECT_EQ(total_before<int64_t>(levels, 99, step), total) << step;
    total += value_at<int64_t>(levels, 99, step);
  }
  EXPECT_EQ(total_before<int64_t>({}, 7, 4), 21);
}

TEST(RecipeSpecTest, ABatchSizeRampIsReadAndCountsItsTokens) {
  const auto spec = parsed("microbatches: 4}",
                           "microbatches: 4, microbatch_ramp: [{from_step: 3, value: 6}, "
                           "{from_step: 5, value: 10}]}");
  ASSERT_TRUE(spec.ok()) << error_of(spec);
  const int64_t sequence = 2 * 128;  // of both expert ranks
  EXPECT_EQ(spec->tokens_at(2), 4 * sequence);
  EXPECT_EQ(spec->tokens_at(3), 6 * sequence);
  EXPECT_EQ(spec->tokens_through(6), (4 + 4 + 6 + 6 + 10 + 10) * sequence);
  const auto again = parse_job_spec(to_json(*spec), "canonical");
  ASSERT_TRUE(again.ok()) << error_of(again);
  EXPECT_EQ(*again, *spec);
}

TEST(RecipeSpecTest, EveryLevelOfARampObeysTheSchedule) {
  const auto error = [](const std::string& levels) {
    return error_of(
        parsed("microbatches: 4}", "microbatches: 4, microbatch_ramp: [" + levels + "]}"));
  };
  EXPECT_EQ(error("{from_step: 3, value: 5}"),
            "s.yaml:27:116: parallelism.microbatch_ramp[0].value must be even with schedule "
            "dualpipe, not 5: half enter at each end");
  EXPECT_NE(error("{from_step: 3, value: 6}, {from_step: 4, value: 2}")
                .find("parallelism.microbatch_ramp[1].value must be at least 2 x "
                      "parallelism.pipeline = 4 with schedule dualpipe, not 2"),
            std::string::npos);
  EXPECT_NE(error("{from_step: 3, value: 32768}, {from_step: 4, value: 32766}")
                .find("parallelism.pipeline x all sizes of parallelism.microbatch_ramp is 131076, "
                      "more than 131072; use fewer levels"),
            std::string::npos);
  EXPECT_EQ(error("{from_step: 3, value: 32768}, {from_step: 4, value: 4}, "
                  "{from_step: 5, value: 32768}"),
            "no error");
  EXPECT_NE(error("{from_step: 3, value: 0}")
                .find("parallelism.microbatch_ramp[0].value must be an integer from 1"),
            std::string::npos);
}

TEST(RecipeSpecTest, ARampMustBeAsLargeAsItsScheduleNeeds) {
  const auto error = [](const std::string& schedule, int64_t size) {
    return error_of(parsed("schedule: dualpipe, microbatches: 4}",
                           fmt::format("schedule: {}, microbatches: 4, microbatch_ramp: "
                                       "[{{from_step: 3, value: {}}}]}}",
                                       schedule, size)));
  };
  for (const char* schedule : {"1f1b", "zb1p"}) {
    EXPECT_NE(error(schedule, 1)
                  .find("microbatch_ramp[0].value must be at least "
                        "parallelism.pipeline = 2 with schedule"),
              std::string::npos);
    EXPECT_EQ(error(schedule, 3), "no error");
  }
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

TEST(RecipeSpecTest, YarnIsReadInBothItsForms) {
  const std::string keys =
      "rope_type: yarn, factor: 40, original_max_position_embeddings: 4096, mscale: 1.0, "
      "mscale_all_dim: 1.0";
  const auto old_form = parsed("  kv_lora_rank", "  rope_scaling: {" + keys + "}\n  kv_lora_rank");
  ASSERT_TRUE(old_form.ok()) << error_of(old_form);
  const YarnScaling expected{40.0, 4096, 32.0, 1.0, 1.0, 1.0};
  EXPECT_EQ(old_form->model.rope_scaling, expected);
  const auto again = parse_job_spec(to_json(*old_form), "canonical");
  ASSERT_TRUE(again.ok()) << error_of(again);
  EXPECT_EQ(*again, *old_form);
  const auto new_form = parsed(
      "  kv_lora_rank", "  rope_parameters: {" + keys + ", rope_theta: 500}\n  kv_lora_rank");
  ASSERT_TRUE(new_form.ok()) << error_of(new_form);
  EXPECT_EQ(new_form->model.rope_scaling, expected);
  EXPECT_EQ(new_form->model.rope_theta, 500.0);
}

TEST(RecipeSpecTest, YarnThatMakesNoSenseIsRefused) {
  const auto error = [](const std::string& keys) {
    return error_of(parsed("  kv_lora_rank", "  rope_scaling: {" + keys + "}\n  kv_lora_rank"));
  };
  EXPECT_EQ(error("type: yarn, factor: 40"),
            "s.yaml:10:17: model.rope_scaling.original_max_position_embeddings is missing; it has "
            "no default");
  EXPECT_EQ(error("factor: 40"),
            "s.yaml:10:18: unknown key \"factor\" in model.rope_scaling; valid keys: type, "
            "rope_type");
  EXPECT_EQ(error("type: yarn, factor: 0.5, original_max_position_embeddings: 4096"),
            "s.yaml:10:38: model.rope_scaling.factor must be a number from 1 to 1000000, not 0.5");
  EXPECT_NE(error("type: yarn, factor: 40, original_max_position_embeddings: 4096, beta_fast: 1")
                .find("model.rope_scaling.beta_fast 1 must be above beta_slow 1"),
            std::string::npos);
}

TEST(RecipeSpecTest, WhatIsRecomputedIsAListOfTwoWords) {
  const auto spec = parsed("seed: 42", "seed: 42, recompute: [norms, mla_up]");
  ASSERT_TRUE(spec.ok()) << error_of(spec);
  EXPECT_TRUE(spec->training.recompute.norms && spec->training.recompute.mla_up);
  const auto again = parse_job_spec(to_json(*spec), "canonical");
  ASSERT_TRUE(again.ok()) << error_of(again);
  EXPECT_EQ(*again, *spec);
  EXPECT_EQ(error_of(parsed("seed: 42", "seed: 42, recompute: [everything]")),
            "s.yaml:30:46: training.recompute must be a list out of norms, mla_up, not everything");
}

TEST(RecipeSpecTest, WrongWordsOfTheOptimizerAreRefused) {
  EXPECT_EQ(error_of(with_optimizer("moments: fp8")),
            "s.yaml:28:67: optimizer.moments must be fp32 or bf16, not fp8; did you mean "
            "\"fp32\"?");
  EXPECT_EQ(error_of(with_optimizer("no_decay: [norms]")),
            "s.yaml:28:69: optimizer.no_decay must be a list out of embedding, head, router, not "
            "norms");
  EXPECT_NE(error_of(with_optimizer("ema_decay: 1")).find("optimizer.ema_decay must be below 1"),
            std::string::npos);
  EXPECT_NE(error_of(with_optimizer("ema_evaluation: true"))
                .find("optimizer.ema_evaluation needs optimizer.ema_decay above 0"),
            std::string::npos);
}

}  // namespace
}  // namespace penstock
