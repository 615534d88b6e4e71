// What penstock chaos says came of a fault.
#include "ops/cli/recovery_watch.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "ops/cli/text.h"

namespace penstock {
namespace {

constexpr const char* kFaultTime = "2026-11-21T00:00:10.000Z";

std::string second(double seconds) {
  return format_utc(parse_utc(kFaultTime).value() + Duration(static_cast<int64_t>(seconds * 1e9)));
}

Fault fault(double lasts, bool ends_attempt) {
  return {.at = parse_utc(kFaultTime).value(),
          .lasts = Duration(static_cast<int64_t>(lasts * 1e9)),
          .ends_attempt = ends_attempt,
          .epoch = 1,
          .step = 40};
}

Json step(int epoch, int number, double at, double took = 0.1) {
  return {{"epoch", epoch}, {"step", number}, {"time", second(at)}, {"step_seconds", took}};
}

Json event(int epoch, const char* from, const char* state, const char* code, double at,
           const char* message = "") {
  return {{"epoch", epoch},     {"from", from},       {"state", state},     {"code", code},
          {"time", second(at)}, {"message", message}, {"actor", "worker w"}};
}

TEST(RecoveryWatchTest, AKilledRankIsRecoveredFromWithTheFirstStepBeyondThoseBefore) {
  RecoveryWatch watch(fault(0, true));
  watch.add_step(step(1, 41, 0.001));  // was on its way
  EXPECT_FALSE(watch.done()) << "the attempt is about to end";
  watch.add_event(event(1, "RUNNING", "RECOVERING", "rank_killed", 0.02, "killed"));
  watch.add_event(
      event(2, "PLACING", "STARTING", "starting", 0.1, "starting from the checkpoint of step 39"));
  watch.add_event(event(2, "LOADING", "RUNNING", "running", 0.3, "trains"));
  watch.add_step(step(2, 40, 0.4));
  watch.add_step(step(2, 41, 0.5));
  EXPECT_FALSE(watch.done());
  watch.add_step(step(2, 42, 0.6));
  EXPECT_TRUE(watch.done());
  const Json document = watch.document();
  EXPECT_EQ(document["outcome"], "recovered");
  EXPECT_EQ(document["steps_replayed"], 2);
  EXPECT_EQ(document["next_step"], 42);
  EXPECT_NEAR(document["recovery_seconds"].get<double>(), 0.6, 0.002);
  EXPECT_EQ(document["attempts"], 1);
  EXPECT_EQ(document["detected"]["code"], "rank_killed");
  EXPECT_NEAR(document["detected"]["seconds"].get<double>(), 0.02, 0.002);
  EXPECT_EQ(document["resumed"]["source"], "the checkpoint of step 39");
  EXPECT_NEAR(document["resumed"]["seconds"].get<double>(), 0.3, 0.002);
  const std::string text = recovery_text(document);
  for (const char* part :
       {"detected    after 0.02 s: killed\n",
        "resumed     attempt 2 from the checkpoint of step 39, training again after 0.30 s\n",
        "recovered   step 42 was finished 0.60 s after the fault; 2 steps trained again\n"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

TEST(RecoveryWatchTest, APauseThatIsOverWithoutAFailureDisturbedNothing) {
  RecoveryWatch watch(fault(5, false));
  watch.add_step(step(1, 41, 0.01));
  EXPECT_FALSE(watch.done()) << "the pause is not over";
  watch.add_step(step(1, 42, 5.05, 5.03));
  ASSERT_TRUE(watch.done());
  const Json document = watch.document();
  EXPECT_EQ(document["outcome"], "undisturbed");
  EXPECT_TRUE(document["detected"].is_null());
  EXPECT_EQ(document["attempts"], 0);
  EXPECT_DOUBLE_EQ(document["slowest_step_seconds"].get<double>(), 5.03);
}

TEST(RecoveryWatchTest, AnAttemptThatFailedMeanwhileIsWaitedForHoweverLateItStillTrained) {
  RecoveryWatch watch(fault(5, false));
  watch.add_step(step(1, 42, 5.05));
  watch.add_event(event(1, "RUNNING", "RECOVERING", "worker_lost", 5.1));
  EXPECT_FALSE(watch.done());
  EXPECT_EQ(watch.document()["outcome"], "pending");
  watch.add_step(step(2, 43, 7.0));
  EXPECT_TRUE(watch.done());
  EXPECT_EQ(watch.document()["outcome"], "recovered");
}

TEST(RecoveryWatchTest, OfSeveralAttemptsTheOneThatTrainedIsTheResumedOne) {
  RecoveryWatch watch(fault(0, true));
  watch.add_event(event(1, "RUNNING", "RECOVERING", "rank_killed", 0.02));
  watch.add_event(event(2, "PLACING", "STARTING", "starting", 0.1, "starting from A"));
  watch.add_event(event(2, "LOADING", "RECOVERING", "data_corrupt", 0.2));
  watch.add_event(event(2, "", "RECOVERING", "checkpoint_refused", 0.3, "40 is damaged"));
  watch.add_event(event(3, "PLACING", "STARTING", "starting", 0.4, "starting from B"));
  watch.add_event(event(3, "LOADING", "RUNNING", "running", 0.5));
  watch.add_step(step(3, 41, 0.9));
  const Json document = watch.document();
  EXPECT_EQ(document["resumed"]["source"], "B");
  EXPECT_EQ(document["detected"]["code"], "rank_killed");
  EXPECT_EQ(document["attempts"], 2);
  EXPECT_EQ(document["refused"], Json{"40 is damaged"});
}

}  // namespace
}  // namespace penstock
