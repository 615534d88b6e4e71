#include "ops/cli/follow.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace penstock {
namespace {

Json running() {
  return {{"state", "RUNNING"},          {"step", 61},
          {"target_steps", 200},         {"loss", 4.17021},
          {"tokens_per_second", 8123.5}, {"eta_seconds", 70.2}};
}

TEST(FollowTest, TheProgressLineHasStepLossSpeedTimeAndState) {
  EXPECT_EQ(progress_line(running()),
            "step 61/200  loss 4.1702  8.1k tokens/s  eta 1m10s  RUNNING");
}

TEST(FollowTest, TheLiveLineHasTheNewestCheckpointToo) {
  Json job = running();
  job["checkpoint"] = nullptr;
  EXPECT_EQ(live_line(job), progress_line(job));
  job["checkpoint"] = {{"step", 60}};
  EXPECT_EQ(live_line(job), progress_line(job) + "  checkpoint 60");
}

TEST(FollowTest, OnlyOrdinaryProgressIsLeftToTheLiveLine) {
  EXPECT_TRUE(shown_by_live_line("checkpoint_committed"));
  EXPECT_TRUE(shown_by_live_line("running"));
  for (const char* code : {"rank_killed", "checkpoint_failed", "checkpoint_missing", "succeeded",
                           "starting", "worker_lost", "waiting_for_devices"}) {
    EXPECT_FALSE(shown_by_live_line(code)) << code;
  }
}

TEST(FollowTest, WhatIsNotKnownYetIsLeftOut) {
  Json job = running();
  job["loss"] = job["tokens_per_second"] = job["eta_seconds"] = nullptr;
  job["state"] = "QUEUED";
  job["step"] = 0;
  EXPECT_EQ(progress_line(job), "step 0/200  QUEUED");
}

TEST(FollowTest, AFinishedJobHasNoTimeLeft) {
  Json job = running();
  job["state"] = "SUCCEEDED";
  EXPECT_EQ(progress_line(job).find("eta"), std::string::npos);
}

TEST(FollowTest, ConditionsHoldInTheirStateOrFromTheirStep) {
  const Json job = running();
  EXPECT_TRUE(holds({.state = "RUNNING", .step = {}, .timeout = {}}, job));
  EXPECT_FALSE(holds({.state = "FAILED", .step = {}, .timeout = {}}, job));
  EXPECT_FALSE(holds({}, job));
  EXPECT_TRUE(holds({.state = "", .step = 61, .timeout = {}}, job));
  EXPECT_FALSE(holds({.state = "", .step = 62, .timeout = {}}, job));
}

TEST(FollowTest, ExitCodesSayHowAJobEnded) {
  const auto ended = [](const char* state, const char* failure) {
    Json job = {{"state", state}, {"last_failure", nullptr}};
    if (*failure != '\0') job["last_failure"] = {{"code", failure}};
    return exit_code_of_job(job);
  };
  EXPECT_EQ(ended("SUCCEEDED", ""), ExitCode::kOk);
  EXPECT_EQ(ended("SUCCEEDED", "rank_killed"), ExitCode::kOk);
  EXPECT_EQ(ended("CANCELLED", ""), ExitCode::kJobCancelled);
  EXPECT_EQ(ended("FAILED", "rank_killed"), ExitCode::kJobFailed);
  EXPECT_EQ(ended("FAILED", ""), ExitCode::kJobFailed);
  EXPECT_EQ(ended("FAILED", "out_of_memory"), ExitCode::kOutOfMemory);
  EXPECT_EQ(ended("FAILED", "data_corrupt"), ExitCode::kDataCorrupt);
}

}  // namespace
}  // namespace penstock
