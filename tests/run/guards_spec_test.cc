// The section `guards` of a job spec.
#include <gtest/gtest.h>

#include "comm/run/job_spec.h"
#include "tests/run/spec_text.h"

namespace penstock {
namespace {

Result<JobSpec> with_guards(const std::string& keys) {
  return parse_job_spec(std::string(kValidSpec) + "guards: {" + keys + "}\n", "s.yaml");
}
std::string error_of(const std::string& keys) {
  const Result<JobSpec> spec = with_guards(keys);
  return spec.ok() ? "no error" : spec.status().message();
}

TEST(GuardsSpecTest, WithoutTheSectionOnlyWhatIsNoNumberStopsTheJob) {
  const auto spec = parse_job_spec(kValidSpec, "s.yaml");
  ASSERT_TRUE(spec.ok());
  EXPECT_EQ(spec->guards, GuardsSpec());
  EXPECT_EQ(spec->guards.not_finite, GuardPolicy::kStop);
  EXPECT_EQ(spec->guards.loss_spike.policy, GuardPolicy::kNone);
  EXPECT_EQ(spec->guards.grad_norm_spike.policy, GuardPolicy::kNone);
  EXPECT_FALSE(spec->guards.remembers());
}

TEST(GuardsSpecTest, EveryKeyIsReadAndWrittenOut) {
  const auto spec = with_guards(
      "not_finite: skip, loss_spike: {policy: rollback, sigmas: 8.5, window: 64}, "
      "grad_norm_spike: {policy: warn, sigmas: 20, window: 16}, rollback_steps: 30, "
      "max_skips: 4, max_rollbacks: 2, compare_replicas_every: 7, duplicate_every: 50");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  const GuardsSpec expected = {.not_finite = GuardPolicy::kSkip,
                               .loss_spike = {GuardPolicy::kRollback, 8.5, 64},
                               .grad_norm_spike = {GuardPolicy::kWarn, 20.0, 16},
                               .rollback_steps = 30,
                               .max_skips = 4,
                               .max_rollbacks = 2,
                               .compare_replicas_every = 7,
                               .duplicate_every = 50};
  EXPECT_EQ(spec->guards, expected);
  EXPECT_TRUE(spec->guards.remembers());
  const auto again = parse_job_spec(to_json(*spec), "canonical");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(*again, *spec);
}

TEST(GuardsSpecTest, MistakesAreNamedWithTheirPlace) {
  EXPECT_EQ(error_of("not_finite: ignore"),
            "s.yaml:32:22: guards.not_finite must be stop, skip or rollback, not ignore");
  EXPECT_EQ(error_of("loss_spike: {policy: skp}"),
            "s.yaml:32:31: guards.loss_spike.policy must be none, warn, skip, rollback or "
            "stop, not skp; did you mean \"skip\"?");
  EXPECT_EQ(error_of("grad_norm_spike: {sigma: 4}"),
            "s.yaml:32:28: unknown key \"sigma\" in guards.grad_norm_spike; did you mean "
            "\"sigmas\"?");
  EXPECT_EQ(error_of("loss_spike: {sigmas: 0}"),
            "s.yaml:32:31: guards.loss_spike.sigmas must be a number above 0 and at most 1000000, "
            "not 0");
  EXPECT_EQ(error_of("loss_spike: {window: 2000}"),
            "s.yaml:32:31: guards.loss_spike.window must be an integer from 4 to 1024, not 2000");
  EXPECT_EQ(error_of("rollback_steps: 0"),
            "s.yaml:32:26: guards.rollback_steps must be an integer from 1 to 1000000000, not 0");
}

TEST(GuardsSpecTest, RollingBackNeedsCheckpoints) {
  const auto error = [](const std::string& interval, const std::string& policy) {
    const auto spec = parse_job_spec(
        edited("checkpoint: {interval: 20}", "checkpoint: {interval: " + interval + "}") +
            "guards: {loss_spike: {policy: " + policy + "}}\n",
        "s.yaml");
    return spec.ok() ? "no error" : spec.status().message();
  };
  EXPECT_EQ(error("0", "rollback"),
            "s.yaml:32:9: guards: policy rollback needs checkpoint.interval above 0 or auto: "
            "there is nothing to go back to without checkpoints");
  EXPECT_EQ(error("auto", "rollback"), "no error");
  EXPECT_EQ(error("0", "skip"), "no error");
}

}  // namespace
}  // namespace penstock
