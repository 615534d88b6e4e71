// What penstock doctor makes of records: which failure counts, what came of it, what to type.
#include "ops/cli/verdict.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

Json event(const char* time, int epoch, const char* from, const char* state, const char* code,
           const char* message, Json rank = {}, const char* actor = "coordinator") {
  return {{"time", time},
          {"epoch", epoch},
          {"from", *from == '\0' ? Json() : Json(from)},
          {"state", state},
          {"code", code},
          {"message", message},
          {"rank", std::move(rank)},
          {"actor", actor}};
}

constexpr const char* kKilled =
    "rank 2 on w2 was killed by signal 9; it was in dispatch(F) of layer 1, step 61";

JobHistory history(const char* state, const char* code, const char* message) {
  JobHistory history;
  history.job = {{"id", 7},
                 {"name", "quick"},
                 {"state", state},
                 {"reason", {{"code", code}, {"message", message}}},
                 {"highest_step", 88},
                 {"target_steps", 300},
                 {"epoch", 2},
                 {"failures", 1},
                 {"max_restarts", 5},
                 {"checkpoint", {{"step", 60}, {"manifest", "/c/60.manifest"}, {"time", "t"}}},
                 {"last_failure",
                  {{"code", "rank_killed"},
                   {"message", kKilled},
                   {"rank", 2},
                   {"worker", "w2"},
                   {"step", 60},
                   {"log_tail", "one\ntwo\n"}}}};
  history.events = {
      event("2026-11-21T00:00:00.000Z", 1, "LOADING", "RUNNING", "running", "trains"),
      event("2026-11-21T00:00:10.000Z", 1, "RUNNING", "RECOVERING", "peer_lost", "rank 1 lost", 1,
            "worker w1"),
      event("2026-11-21T00:00:10.100Z", 1, "", "RECOVERING", "rank_killed", kKilled, 2,
            "worker w2"),
      event("2026-11-21T00:00:10.200Z", 2, "RECOVERING", "PLACING", "placed", "4 ranks"),
      event("2026-11-21T00:00:10.200Z", 2, "PLACING", "STARTING", "starting",
            "starting from the checkpoint of step 60"),
      event("2026-11-21T00:00:10.500Z", 2, "LOADING", "RUNNING", "running", "trains")};
  history.hosts = {{"w2", "kestrel"}};
  return history;
}

TEST(VerdictTest, OfARecoveredJobItSaysWhatFailedWhereAndWhatCameOfIt) {
  const Json verdict = verdict_of(history("RUNNING", "running", "trains"), false);
  EXPECT_EQ(verdict["verdict"], kKilled);
  const Json& failure = verdict["failure"];
  EXPECT_EQ(failure["rank"], 2);
  EXPECT_EQ(failure["worker"], "w2");
  EXPECT_EQ(failure["host"], "kestrel");
  EXPECT_EQ(failure["operation"], "in dispatch(F) of layer 1, step 61");
  EXPECT_EQ(failure["step"], 60);
  EXPECT_EQ(failure["log"], (Json{"one", "two"}));
  EXPECT_EQ(verdict["checkpoint"]["step"], 60);
  EXPECT_EQ(verdict["recovery"]["source"], "the checkpoint of step 60");
  EXPECT_DOUBLE_EQ(verdict["recovery"]["seconds"].get<double>(), 0.5)
      << "from when the first of the two was noticed";
  EXPECT_EQ(verdict["command"], "penstock wait quick");
  const std::string text = verdict_text(verdict, "RUNNING");
  EXPECT_EQ(text.find("verdict     rank 2 on w2 was killed"), 0u) << text;
  for (const char* part :
       {"attempt 2, 1 failure, 5 allowed\n", "rank 2, w2, host kestrel, after step 60",
        "/c/60.manifest", "attempt 2 from the checkpoint of step 60, training again after 0.50 s",
        "last output one\n            two\n"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

TEST(VerdictTest, AttemptsThatFailedAreListedTheFirstFirstEachWithItsCause) {
  JobHistory known = history("RECOVERING", "rank_exited", "rank 0 on w0 exited with code 1");
  known.events.push_back(event("2026-11-21T00:01:00.000Z", 2, "RUNNING", "RECOVERING",
                               "rank_exited", "rank 0 on w0 exited with code 1", 0, "worker w0"));
  known.events.push_back(
      event("2026-11-21T00:02:00.000Z", 3, "RUNNING", "RECOVERING", "rebalancing", "experts move"));
  known.events.push_back(event("2026-11-21T00:03:00.000Z", 4, "RUNNING", "RECOVERING",
                               "rolling_back", "step 90: loss 9.5 is above 6.5"));
  const Json failures = verdict_of(known, false)["failures"];
  ASSERT_EQ(failures.size(), 2u) << failures.dump(1);
  EXPECT_EQ(failures[0]["code"], "rank_killed") << "a lost peer is no cause";
  EXPECT_EQ(failures[0]["time"], "2026-11-21T00:00:10.000Z");
  EXPECT_EQ(failures[0]["worker"], "w2");
  EXPECT_EQ(failures[1]["code"], "rank_exited");
}

TEST(VerdictTest, AFailureThatUsesUpTheBudgetKeepsItsRankAndWorker) {
  JobHistory known = history("FAILED", "restart_budget", "failure 2: rank 0 on w0 was killed");
  known.events.push_back(event("2026-11-21T00:01:00.000Z", 2, "RUNNING", "STOPPING",
                               "restart_budget", "failure 2: rank 0 on w0 was killed", 0,
                               "worker w0"));
  known.events.push_back(event("2026-11-21T00:01:01.000Z", 2, "STOPPING", "FAILED",
                               "restart_budget", "failure 2: rank 0 on w0 was killed"));
  const Json failures = verdict_of(known, false)["failures"];
  ASSERT_EQ(failures.size(), 2u) << failures.dump(1);
  EXPECT_EQ(failures[1]["rank"], 0);
  EXPECT_EQ(failures[1]["worker"], "w0");
  EXPECT_EQ(failures[1]["time"], "2026-11-21T00:01:00.000Z");
}

TEST(VerdictTest, AFailedJobIsResumedFromItsCheckpointUnlessThatCannotHelp) {
  const std::string budget = std::string("failure 6 with recovery.max_restarts 5: ") + kKilled;
  const Json used_up = verdict_of(history("FAILED", "restart_budget", budget.c_str()), false);
  EXPECT_EQ(used_up["verdict"], budget);
  EXPECT_EQ(used_up["failure"]["rank"], 2);
  EXPECT_EQ(used_up["command"], "penstock resume quick");
  EXPECT_NE(used_up["next"].get<std::string>().find("step 60"), std::string::npos);

  JobHistory diverged = history("FAILED", "diverged", "the loss of step 61 is NaN");
  diverged.job["last_failure"]["code"] = "diverged";
  EXPECT_EQ(verdict_of(diverged, false)["command"], "penstock export quick --step 60 -o quick-60");
  diverged.job["checkpoint"] = nullptr;
  EXPECT_EQ(verdict_of(diverged, false)["command"], "penstock describe quick");
}

TEST(VerdictTest, WhatNoRankDidIsBlamedOnNone) {
  const Json verdict =
      verdict_of(history("FAILED", "final_checkpoint", "it could not be saved"), false);
  EXPECT_EQ(verdict["verdict"], "it could not be saved");
  EXPECT_EQ(verdict["failure"]["code"], "final_checkpoint");
  EXPECT_FALSE(verdict["failure"].contains("rank") && !verdict["failure"]["rank"].is_null());
}

TEST(VerdictTest, AJobThatNeverFailedHasNoFailure) {
  JobHistory known = history("QUEUED", "waits", "needs 8 devices, 4 are there");
  known.job["last_failure"] = nullptr;
  known.events.clear();
  const Json verdict = verdict_of(known, false);
  EXPECT_TRUE(verdict["failure"].is_null());
  EXPECT_TRUE(verdict["failures"].empty());
  EXPECT_EQ(verdict["verdict"], "quick has not failed; it is QUEUED: needs 8 devices, 4 are there");
}

TEST(VerdictTest, OfAJobThatWaitsForDevicesItSaysWhoHasThem) {
  const Json verdict = verdict_of(
      history("RECOVERING", "waiting_for_devices", "needs 4 devices; 4 more on drained workers"),
      false);
  EXPECT_EQ(verdict["command"], "penstock workers");
  const std::string next = verdict["next"];
  for (const char* part : {"4 more on drained workers", "undrain", "release", "dev up"}) {
    EXPECT_NE(next.find(part), std::string::npos) << next;
  }
}

TEST(VerdictTest, OfflineItDoesNotSayThatTheJobTrains) {
  const Json verdict = verdict_of(history("RUNNING", "running", "trains"), true);
  EXPECT_EQ(verdict["offline"], true);
  EXPECT_NE(verdict["next"].get<std::string>().find("was RUNNING"), std::string::npos);
}

TEST(VerdictTest, TheOperationIsFoundInBothKindsOfSentences) {
  EXPECT_EQ(operation_in(kKilled), "in dispatch(F) of layer 1, step 61");
  EXPECT_EQ(operation_in("rank 3 on w1 has not moved for 10.2 s, in attn(B) of layer 0, "
                         "micro-batch 1, step 9: its process is stopped, by SIGSTOP or a "
                         "debugger; rank 0 on w0 waits for it in receive(F), step 9"),
            "in attn(B) of layer 0, micro-batch 1, step 9");
  EXPECT_EQ(operation_in("worker w1 is lost"), "");
}

}  // namespace
}  // namespace penstock
