// The real program with a coordinator that gives canned answers: what it makes of them for people.
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "comm/control/event_loop.h"
#include "comm/control/http_server.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

class AnswersTest : public testing::Test {
 protected:
  ~AnswersTest() override {
    loop_.stop();
    if (thread_.joinable()) thread_.join();
  }

  // Before the first ask(). `call`: "GET /api/v1/workers".
  void answer(const std::string& call, const char* kind, Json body) {
    body["apiVersion"] = "penstock/v1";
    body["kind"] = kind;
    answers_[call] = body.dump();
  }

  ProgramRun ask(std::vector<std::string> arguments) {
    if (!server_) serve();
    arguments.insert(arguments.begin(), binary("penstock").string());
    arguments.insert(arguments.end(), {"--server", fmt::format("127.0.0.1:{}", server_->port())});
    return run_program(
        arguments, {"PENSTOCK_DEV_STATE_DIR=" + (folder_.path() / "dev").string(), "NO_COLOR=1"});
  }

 private:
  void serve() {
    auto started = HttpServer::start(
        loop_.io_context(), {}, [this](const HttpRequest& request, HttpResponder respond) {
          const auto known = answers_.find(request.method + " " + request.path);
          if (known != answers_.end()) return respond(json_response(known->second));
          respond({404, "application/json", R"({"error":{"code":"not_found","message":"none"}})"});
        });
    ASSERT_TRUE(started.ok()) << started.status().to_string();
    server_ = *std::move(started);
    thread_ = std::thread([this] { loop_.run(); });
  }

  ScratchFolder folder_;
  std::map<std::string, std::string> answers_;  // constant once the server runs
  EventLoop loop_;
  std::unique_ptr<HttpServer> server_;
  std::thread thread_;
};

Json list_of(const std::vector<Json>& items) {
  Json list;
  list["items"] = items;
  return list;
}

Json job_in(const char* state) {
  return {{"id", 7},
          {"name", "quick"},
          {"state", state},
          {"reason", {{"code", "x"}, {"message", "as it is"}}},
          {"step", 88},
          {"target_steps", 300},
          {"epoch", 2},
          {"restarts", 1},
          {"failures", 1},
          {"max_restarts", 5},
          {"last_failure",
           {{"code", "rank_killed"},
            {"message", "rank 2 on w2 was killed"},
            {"rank", 2},
            {"worker", "w2"},
            {"log_tail", "one\ntwo\n"}}}};
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class DescribeTest : public AnswersTest {
 protected:
  std::string describe(const Json& job) {
    answer("GET /api/v1/jobs/quick", "Job", job);
    const Json killed = {{"time", "2026-11-21T00:00:10.000Z"},
                         {"epoch", 1},
                         {"from", "RUNNING"},
                         {"state", "RECOVERING"},
                         {"code", "rank_killed"},
                         {"actor", "worker w2"},
                         {"message", "rank 2 on w2 was killed"}};
    answer("GET /api/v1/jobs/7/events", "EventList", list_of({killed}));
    const ProgramRun run = ask({"describe", "quick"});
    EXPECT_EQ(run.exit_code, 0) << run.err;
    return run.out;
  }
  std::string describe_on_one_worker(const Json& mirror) {
    Json job = job_in("RUNNING");
    job["ranks"] = {{{"rank", 0}, {"worker", "w0"}}, {{"rank", 1}, {"worker", "w0"}}};
    Json spec;
    spec["recovery"]["mirror"] = mirror;
    answer("GET /api/v1/jobs/7/spec", "TrainingRun", spec);
    return describe(job);
  }
};

TEST_F(DescribeTest, OfAJobThatTrainsAFailureIsOneLine) {
  const std::string text = describe(job_in("RUNNING"));
  EXPECT_TRUE(has(text, " ago: rank 2 on w2 was killed; penstock doctor quick\n")) << text;
  EXPECT_FALSE(has(text, "last output")) << text;
  EXPECT_TRUE(has(text, "\nattempt     2 (1 failure, 5 allowed)\n")) << text;
}

TEST_F(DescribeTest, OfAJobThatFailedTheLastOutputIsShown) {
  const std::string text = describe(job_in("FAILED"));
  EXPECT_TRUE(has(text, "\nfailure     rank 2 on w2 was killed\n")) << text;
  EXPECT_TRUE(has(text, "\nlast output one\n            two\n")) << text;
  EXPECT_TRUE(has(text, "penstock resume quick\n")) << text;
}

TEST_F(AnswersTest, PsTellsOfAJobThatFailedUnlessANewerOneHasItsName) {
  Json again = job_in("SUCCEEDED"), before = job_in("FAILED"), other = job_in("FAILED");
  other["name"] = "slow";
  answer("GET /api/v1/jobs", "JobList", list_of({again, other, before}));
  const ProgramRun run = ask({"ps"});
  EXPECT_TRUE(has(run.err, "3 finished jobs not shown, 1 of them FAILED: penstock doctor slow; "))
      << run.err;
}

TEST_F(AnswersTest, AStepThatTheJobNeverReachesIsNotWaitedFor) {
  answer("GET /api/v1/jobs/quick", "Job", job_in("RUNNING"));
  const ProgramRun run = ask({"wait", "quick", "--for", "step=1000000"});
  EXPECT_EQ(run.exit_code, 2) << run.err;
}

TEST_F(AnswersTest, WhoWaitedForAJobThatFailedIsSentToTheDoctor) {
  answer("GET /api/v1/jobs/quick", "Job", job_in("FAILED"));
  answer("GET /api/v1/jobs/7", "Job", job_in("FAILED"));
  const ProgramRun run = ask({"wait", "quick"});
  EXPECT_EQ(run.exit_code, 10) << run.err;
  EXPECT_TRUE(has(run.err, "next: penstock doctor quick; penstock logs quick; penstock resume"))
      << run.err;
}

TEST_F(DescribeTest, CopiesAreSaidToBeOfTheirStep) {
  Json job = job_in("RUNNING");
  job["mirrored_step"] = 87;
  const std::string text = describe(job);
  EXPECT_TRUE(has(text, "\ncopies      step 87, in the memory of two workers each\n")) << text;
}

TEST_F(DescribeTest, CopiesThatAreAskedForAndCannotBeAreSaidToBeNone) {
  const std::string text = describe_on_one_worker("auto");
  EXPECT_TRUE(has(text, "\ncopies      none: all ranks are on one worker\n")) << text;
}

TEST_F(DescribeTest, CopiesThatNobodyAskedForAreNotMentioned) {
  const std::string text = describe_on_one_worker(0);
  EXPECT_FALSE(has(text, "\ncopies")) << text;
}

// Of one worker, drained for a fan or in quarantine for a check, or both.
class WorkerTest : public AnswersTest {
 protected:
  void worker_is(bool drained, bool quarantined, bool releasing = false) {
    Json worker = {{"id", 1}, {"name", "w1"}, {"state", "drained"}};
    worker["drain_reason"] = drained ? Json("fan") : Json();
    worker["quarantine"] = Json();
    if (quarantined) worker["quarantine"] = {{"reason", "ECC"}, {"releasing", releasing}};
    answer("GET /api/v1/workers", "WorkerList", list_of({worker}));
    // What the worker is once it was told.
    Json undrained = worker;
    undrained["drain_reason"] = Json();
    answer("POST /api/v1/workers/w1/undrain", "Worker", undrained);
    if (quarantined) worker["quarantine"]["releasing"] = true;
    answer("POST /api/v1/workers/w1/release", "Worker", worker);
  }
  std::string note_of(const char* verb, int exit_code = 0) {
    const ProgramRun run = ask({verb, "w1"});
    EXPECT_EQ(run.exit_code, exit_code) << run.err;
    return run.err;
  }
};

TEST_F(WorkerTest, DrainedAndInQuarantineBothAreSaid) {
  worker_is(/*drained=*/true, /*quarantined=*/true);
  const std::string table = ask({"workers"}).out;
  EXPECT_TRUE(has(table, "drained: fan; in quarantine: ECC\n")) << table;
  const std::string released = note_of("release");
  EXPECT_TRUE(has(released, "but is drained: penstock undrain w1\n")) << released;
  const std::string undrained = note_of("undrain");
  EXPECT_TRUE(has(undrained, "but in quarantine: penstock release w1\n")) << undrained;
}

TEST_F(WorkerTest, WhatItIsNotCannotBeEnded) {
  worker_is(/*drained=*/false, /*quarantined=*/true);
  const std::string undrained = note_of("undrain", 6);
  EXPECT_TRUE(has(undrained, "w1 is not drained, but in quarantine: penstock release w1\n"))
      << undrained;
  const ProgramRun other = ask({"undrain", "w2"});
  EXPECT_EQ(other.exit_code, 3);
  EXPECT_TRUE(has(other.err, "no worker is named \"w2\"; did you mean \"w1\"?\n")) << other.err;
}

TEST_F(WorkerTest, WhoIsDrainedOnlyIsNotInQuarantine) {
  worker_is(/*drained=*/true, /*quarantined=*/false);
  const std::string released = note_of("release", 6);
  EXPECT_TRUE(has(released, "not in quarantine, but drained: penstock undrain w1\n")) << released;
}

TEST_F(WorkerTest, WhoIsReleasedAlreadyIsNotToBeReleasedAgain) {
  worker_is(/*drained=*/true, /*quarantined=*/true, /*releasing=*/true);
  const std::string undrained = note_of("undrain");
  EXPECT_TRUE(has(undrained, "as soon as its host has passed a check")) << undrained;
  EXPECT_FALSE(has(undrained, "penstock release")) << undrained;
}

}  // namespace
}  // namespace penstock
