#include "comm/control/metrics.h"

#include <gtest/gtest.h>

#include <limits>

namespace penstock {
namespace {

TEST(MetricsTest, ASeriesExistsAtZeroFromTheMomentItIsKnown) {
  MetricRegistry registry;
  registry.counter("penstock_run_steps_total", "Steps.", {{"run", "a"}});
  EXPECT_NE(registry.render().find("penstock_run_steps_total{run=\"a\"} 0"), std::string::npos)
      << registry.render();
}

TEST(MetricsTest, TheSameNameAndLabelsAreTheSameSeries) {
  MetricRegistry registry;
  registry.counter("penstock_run_steps_total", "Steps.", {{"run", "a"}}).increment();
  registry.counter("penstock_run_steps_total", "Steps.", {{"run", "a"}}).increment(2);
  registry.counter("penstock_run_steps_total", "Steps.", {{"run", "b"}}).increment();
  EXPECT_EQ(registry.counter("penstock_run_steps_total", "Steps.", {{"run", "a"}}).value(), 3.0);
}

TEST(MetricsTest, EveryKindRendersWithHelpAndType) {
  MetricRegistry registry;
  registry.counter("penstock_run_steps_total", "Steps.").increment();
  registry.gauge("penstock_run_loss", "Loss.").set(2.5);
  registry.histogram("penstock_run_step_duration_seconds", "Step.", {0.1, 1.0}).observe(0.5);
  const std::string text = registry.render();
  EXPECT_NE(text.find("# HELP penstock_run_steps_total Steps."), std::string::npos);
  EXPECT_NE(text.find("# TYPE penstock_run_steps_total counter"), std::string::npos);
  EXPECT_NE(text.find("# TYPE penstock_run_loss gauge\npenstock_run_loss 2.5"), std::string::npos);
  EXPECT_NE(text.find("penstock_run_step_duration_seconds_bucket{le=\"1\"} 1"), std::string::npos)
      << text;
  EXPECT_NE(text.find("penstock_run_step_duration_seconds_count 1"), std::string::npos);
}

TEST(MetricsTest, RemovingByLabelRemovesItFromEveryName) {
  MetricRegistry registry;
  for (const char* run : {"a", "b"}) {
    registry.counter("penstock_run_steps_total", "Steps.", {{"run", run}});
    registry.gauge("penstock_run_state", "State.", {{"run", run}, {"state", "RUNNING"}});
    registry.histogram("penstock_run_step_duration_seconds", "Step.", {1.0}, {{"run", run}});
  }
  registry.gauge("penstock_coordinator_runs", "Runs.", {{"state", "RUNNING"}});
  registry.remove_series("run", "a");
  const std::string text = registry.render();
  EXPECT_EQ(text.find("run=\"a\""), std::string::npos) << text;
  EXPECT_NE(text.find("run=\"b\""), std::string::npos);
  EXPECT_NE(text.find("penstock_coordinator_runs{state=\"RUNNING\"}"), std::string::npos);
}

TEST(MetricsTest, AFamilyWithoutSeriesIsNotRendered) {
  MetricRegistry registry;
  registry.gauge("penstock_run_loss", "Loss.", {{"run", "a"}});
  registry.remove_series("run", "a");
  EXPECT_EQ(registry.render(), "");
}

TEST(MetricsTest, ASeriesRemovedAndMadeAgainStartsAtZero) {
  MetricRegistry registry;
  registry.counter("penstock_run_steps_total", "Steps.", {{"run", "a"}}).increment(5);
  registry.remove_series("run", "a");
  EXPECT_EQ(registry.counter("penstock_run_steps_total", "Steps.", {{"run", "a"}}).value(), 0.0);
}

TEST(MetricsTest, TheOrderOfTheTextDoesNotDependOnTheOrderOfMaking) {
  MetricRegistry one;
  MetricRegistry two;
  one.gauge("penstock_run_loss", "Loss.", {{"run", "a"}});
  one.gauge("penstock_run_loss", "Loss.", {{"run", "b"}});
  one.gauge("penstock_build_info", "Info.");
  two.gauge("penstock_build_info", "Info.");
  two.gauge("penstock_run_loss", "Loss.", {{"run", "b"}});
  two.gauge("penstock_run_loss", "Loss.", {{"run", "a"}});
  EXPECT_EQ(one.render(), two.render());
}

TEST(MetricsTest, ValuesThatAreNotFiniteRenderAsPrometheusWritesThem) {
  MetricRegistry registry;
  registry.gauge("penstock_run_loss", "Loss.").set(std::numeric_limits<double>::quiet_NaN());
  EXPECT_NE(registry.render().find("penstock_run_loss Nan"), std::string::npos)
      << registry.render();
}

TEST(MetricsDeathTest, AWrongNameIsABug) {
  MetricRegistry registry;
  EXPECT_DEATH(registry.counter("not a name", "x"), "metric name and labels are valid");
}

TEST(MetricsDeathTest, ACounterNeverGoesDown) {
  MetricRegistry registry;
  EXPECT_DEATH(registry.counter("penstock_run_steps_total", "x").increment(-1), "by >= 0");
}

TEST(MetricsTest, LatencyBoundsAscend) {
  const std::vector<double>& bounds = latency_bounds_seconds();
  for (size_t i = 1; i < bounds.size(); ++i) EXPECT_LT(bounds[i - 1], bounds[i]);
}

}  // namespace
}  // namespace penstock
