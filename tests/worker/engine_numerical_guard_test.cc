// What a guard decides, by hand-made losses and gradient norms.
#include "worker/engine/numerical_guard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace penstock {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

GuardsSpec spec_of(GuardPolicy loss, GuardPolicy norm = GuardPolicy::kNone) {
  GuardsSpec spec;
  spec.loss_spike = {loss, 6.0, 8};
  spec.grad_norm_spike = {norm, 6.0, 8};
  return spec;
}
// Losses around 4 and norms around 1, none of which is a spike.
void accept(NumericalGuard& guard, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double wave = 0.1 * static_cast<double>(i % 3);
    ASSERT_EQ(guard.judge(4.0 + wave, 1.0 + wave).signal, GuardSignal::kNone) << i;
  }
}

TEST(NumericalGuardTest, WhatIsNoNumberStopsEvenWithNothingToCompareWith) {
  for (const auto& [loss, norm] :
       {std::pair{kNan, 1.0}, {4.0, kNan}, {kInfinity, 1.0}, {4.0, kInfinity}}) {
    NumericalGuard guard{GuardsSpec()};
    const GuardFinding finding = guard.judge(loss, norm);
    EXPECT_EQ(finding.signal, GuardSignal::kNotFinite);
    EXPECT_EQ(finding.action, GuardPolicy::kStop);
    EXPECT_FALSE(std::isfinite(finding.value));
  }
}

TEST(NumericalGuardTest, ASpikeIsAboveTheMedianBySoManyDeviations) {
  NumericalGuard guard(spec_of(GuardPolicy::kSkip));
  accept(guard, 8);  // 4.0 4.1 4.2 4.0 4.1 4.2 4.0 4.1: median 4.1, deviations' median 0.1
  const double limit = 4.1 + 6.0 * 1.4826 * 0.1;
  const GuardFinding finding = guard.judge(std::nextafter(limit + 1e-9, 9.0), 1.0);
  EXPECT_EQ(finding.signal, GuardSignal::kLossSpike);
  EXPECT_EQ(finding.action, GuardPolicy::kSkip);
  EXPECT_DOUBLE_EQ(finding.median, 4.1);
  EXPECT_NEAR(finding.limit, limit, 1e-9);
  EXPECT_EQ(guard.judge(limit - 1e-9, 1.0).signal, GuardSignal::kNone);
}

TEST(NumericalGuardTest, NothingIsJudgedBeforeHalfAWindow) {
  NumericalGuard guard(spec_of(GuardPolicy::kSkip));
  accept(guard, 3);
  EXPECT_EQ(guard.judge(1000.0, 1.0).signal, GuardSignal::kNone) << "the fourth";
  EXPECT_EQ(guard.judge(1000.0, 1.0).signal, GuardSignal::kLossSpike);
}

TEST(NumericalGuardTest, AStepThatIsLeftOutIsNotPartOfWhatIsUsual) {
  NumericalGuard guard(spec_of(GuardPolicy::kSkip));
  accept(guard, 8);
  for (int i = 0; i < 9; ++i) {
    EXPECT_EQ(guard.judge(9.0, 1.0).action, GuardPolicy::kSkip) << i;
  }
  NumericalGuard lenient(spec_of(GuardPolicy::kWarn));
  accept(lenient, 8);
  int warnings = 0;
  for (int i = 0; i < 9; ++i) warnings += lenient.judge(9.0, 1.0).action == GuardPolicy::kWarn;
  EXPECT_LT(warnings, 9) << "steps that count move it";
  EXPECT_GE(warnings, 4) << "but not a few of them";
}

TEST(NumericalGuardTest, OneSkipTooManyStops) {
  GuardsSpec spec = spec_of(GuardPolicy::kSkip);
  spec.not_finite = GuardPolicy::kSkip;
  spec.max_skips = 2;
  NumericalGuard guard(spec);
  EXPECT_EQ(guard.judge(kNan, 1.0).action, GuardPolicy::kSkip);
  accept(guard, 8);
  EXPECT_EQ(guard.judge(9.0, 1.0).action, GuardPolicy::kSkip);
  EXPECT_EQ(guard.judge(kNan, 1.0).action, GuardPolicy::kStop);
  EXPECT_EQ(guard.skips(), 2);
}

TEST(NumericalGuardTest, TheSevererOfTwoFindingsHolds) {
  NumericalGuard guard(spec_of(GuardPolicy::kWarn, GuardPolicy::kStop));
  accept(guard, 8);
  EXPECT_EQ(guard.judge(9.0, 1.0).action, GuardPolicy::kWarn);
  EXPECT_EQ(guard.judge(4.0, 9.0).signal, GuardSignal::kGradNormSpike);
  NumericalGuard both(spec_of(GuardPolicy::kWarn, GuardPolicy::kStop));
  accept(both, 8);
  const GuardFinding finding = both.judge(9.0, 9.0);
  EXPECT_EQ(finding.signal, GuardSignal::kGradNormSpike);
  EXPECT_EQ(finding.action, GuardPolicy::kStop);
}

TEST(NumericalGuardTest, ALossThatHardlyMovesTripsOverNothing) {
  NumericalGuard guard(spec_of(GuardPolicy::kSkip));
  for (int i = 0; i < 8; ++i) EXPECT_EQ(guard.judge(4.0, 1.0).signal, GuardSignal::kNone);
  EXPECT_EQ(guard.judge(4.02, 1.0).signal, GuardSignal::kNone);
  EXPECT_EQ(guard.judge(4.03, 1.0).signal, GuardSignal::kLossSpike);
}

TEST(NumericalGuardTest, ItsStateIsAllThatItDecidesBy) {
  const GuardsSpec spec = spec_of(GuardPolicy::kSkip, GuardPolicy::kSkip);
  NumericalGuard whole(spec);
  for (int i = 0; i < 3000; ++i) {  // around the rings
    whole.judge(4.0 + 0.01 * std::sin(i), 1.0 + 0.01 * std::cos(i));
  }
  NumericalGuard resumed(spec);
  std::copy(whole.state().begin(), whole.state().end(), resumed.state().begin());
  for (int i = 0; i < 100; ++i) {
    const double loss = 4.0 + 0.02 * std::sin(7 * i);
    const double norm = 1.0 + 0.02 * std::cos(5 * i);
    EXPECT_EQ(whole.judge(loss, norm), resumed.judge(loss, norm)) << i;
  }
}

}  // namespace
}  // namespace penstock
