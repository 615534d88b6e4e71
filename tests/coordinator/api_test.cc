// Every endpoint of docs/http-api.md, over a real core, a store in memory and real log files; no
// sockets.
#include "coordinator/http/api.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "coordinator/http/documents.h"
#include "tests/coordinator/core_harness.h"
#include "tests/coordinator/memory_store.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

class ApiTest : public ::testing::Test {
 protected:
  ApiTest() : api(h.core(), store, logs, metrics, actions()) {
    h.add_worker("w0", 4);
    sync();
  }

  ApiActions actions() {
    ApiActions given;
    given.command = [this](std::function<Event(RequestId)> make,
                           std::function<void(const Answer&)> done) {
      h.feed(make(RequestId{77}));
      sync();
      done(h.answers.back());
    };
    given.list_checkpoints = [this](const Job&, auto done) { done(listing); };
    given.ready = [this] { return readiness; };
    given.now = [this] { return h.now(); };
    return given;
  }
  // What the driver's write does.
  void sync() {
    for (const auto& [key, value] : h.store) store.map[key] = value;
  }
  // The answer, or status 0 while the request waits.
  HttpResponse call(const std::string& method, const std::string& path,
                    std::vector<std::pair<std::string, std::string>> query = {},
                    const std::string& body = {}) {
    HttpRequest request{method, path, std::move(query), body};
    auto answered = std::make_shared<HttpResponse>();
    answered->status = 0;
    last = answered;
    api.handle(request, [answered](HttpResponse response) { *answered = std::move(response); });
    return *answered;
  }
  Json get(const std::string& path, std::vector<std::pair<std::string, std::string>> query = {}) {
    const HttpResponse response = call("GET", path, std::move(query));
    EXPECT_EQ(response.status, 200) << response.body;
    return Json::parse(response.body, nullptr, false);
  }
  std::string error_code(const HttpResponse& response) {
    const Json body = Json::parse(response.body, nullptr, false);
    return body.is_object() && body.contains("error") ? body["error"].value("code", "") : "none";
  }
  JobId running_job(const std::string& name = "tiny") {
    const JobId job = h.submit_ok(four_rank_spec(name));
    h.run(job);
    sync();
    return job;
  }

  CoreHarness h;
  MemoryStore store;
  ScratchFolder scratch;
  LogFiles logs{scratch.path() / "logs"};
  MetricRegistry metrics;
  Result<std::vector<ListedCheckpoint>> listing = std::vector<ListedCheckpoint>();
  Status readiness;
  std::shared_ptr<HttpResponse> last;
  Api api;
};

TEST_F(ApiTest, ASubmittedSpecBecomesAJob) {
  const HttpResponse response =
      call("POST", "/api/v1/jobs", {{"name", "renamed"}}, std::string(kValidSpec));
  EXPECT_EQ(response.status, 201) << response.body;
  const Json job = Json::parse(response.body);
  EXPECT_EQ(job["apiVersion"], "penstock/v1");
  EXPECT_EQ(job["kind"], "Job");
  EXPECT_EQ(job["id"], 1);
  EXPECT_EQ(job["name"], "renamed");
  EXPECT_EQ(job["state"], "STARTING");
  EXPECT_EQ(job["target_steps"], 100);
  EXPECT_EQ(job["world_size"], 4);
  EXPECT_TRUE(job["finished"].is_null());
  EXPECT_TRUE(job["loss"].is_null());
}

TEST_F(ApiTest, AWrongSpecIsRefusedWithLineAndColumnAndNothingStarts) {
  const HttpResponse response =
      call("POST", "/api/v1/jobs", {}, edited("hidden_size", "hiden_size"));
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(error_code(response), "invalid_argument");
  EXPECT_NE(response.body.find("spec:6:"), std::string::npos) << response.body;
  EXPECT_TRUE(h.core().jobs().empty());
}

TEST_F(ApiTest, AnEmptyBodyOrAWrongNameIsRefused) {
  EXPECT_EQ(call("POST", "/api/v1/jobs").status, 400);
  EXPECT_EQ(call("POST", "/api/v1/jobs", {{"name", "a b/c"}}, std::string(kValidSpec)).status, 400);
}

TEST_F(ApiTest, ATakenNameIsAConflict) {
  running_job();
  const HttpResponse response = call("POST", "/api/v1/jobs", {}, std::string(kValidSpec));
  EXPECT_EQ(response.status, 409);
  EXPECT_EQ(error_code(response), "already_exists");
}

TEST_F(ApiTest, TooManyRanksIsAnInvalidArgument) {
  const HttpResponse response =
      call("POST", "/api/v1/jobs", {}, edited("pipeline: 2, expert: 2", "pipeline: 2, expert: 4"));
  EXPECT_EQ(response.status, 400) << response.body;
  EXPECT_NE(response.body.find("8 ranks"), std::string::npos) << response.body;
}

TEST_F(ApiTest, AJobIsFoundByIdAndByName) {
  running_job();
  EXPECT_EQ(get("/api/v1/jobs/1")["name"], "tiny");
  EXPECT_EQ(get("/api/v1/jobs/tiny")["id"], 1);
  const HttpResponse unknown = call("GET", "/api/v1/jobs/nobody");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(error_code(unknown), "not_found");
}

TEST_F(ApiTest, ARunningJobShowsItsProgress) {
  const JobId job = running_job();
  h.train(job, 1, 30);
  h.checkpoint(job, 20);
  h.say("w0", EvaluationReport{job, Epoch{1}, 0, 5.5, 2048});
  const Json body = get("/api/v1/jobs/1");
  EXPECT_EQ(body["state"], "RUNNING");
  EXPECT_EQ(body["step"], 30);
  EXPECT_DOUBLE_EQ(body["loss"].get<double>(), 4.7);
  EXPECT_DOUBLE_EQ(body["tokens_per_second"].get<double>(), 2048.0);
  EXPECT_DOUBLE_EQ(body["eta_seconds"].get<double>(), 35.0);
  EXPECT_EQ(body["checkpoint"]["step"], 20);
  EXPECT_EQ(body["checkpoint"]["weights_digest"], "00ff");
  EXPECT_EQ(body["evaluations"][0]["loss"], 5.5);
  ASSERT_EQ(body["ranks"].size(), 4u);
  EXPECT_EQ(body["ranks"][3]["worker"], "w0");
  EXPECT_EQ(body["ranks"][3]["device"], 3);
  EXPECT_TRUE(body["last_failure"].is_null());
}

TEST_F(ApiTest, AJobWhoseStateIsCopiedSaysOfWhichStep) {
  h.add_worker("w1", 4);
  JobSpec spec = flat_spec("copied", 8);
  spec.recovery.mirror_automatic = true;
  const JobId job = h.submit_ok(spec);
  h.run(job);
  h.train(job, 1, 1);
  EXPECT_TRUE(get("/api/v1/jobs/copied")["mirrored_step"].is_null());
  const int64_t step = h.sent<MirrorRanks>().at(0).step;
  for (const char* worker : {"w0", "w1"}) h.say(worker, RanksMirrored{job, Epoch{1}, step, {}});
  EXPECT_EQ(get("/api/v1/jobs/copied")["mirrored_step"], step);
}

TEST_F(ApiTest, AJobWithABatchSizeRampCountsTheTokensItHasTrained) {
  JobSpec spec = four_rank_spec("tiny");
  spec.parallelism.microbatch_levels = {{3, 8}};  // of 256 tokens each
  const JobId job = h.submit_ok(spec);
  h.run(job);
  h.train(job, 1, 5);
  EXPECT_EQ(get("/api/v1/jobs/1")["tokens"], (4 + 4 + 8 + 8 + 8) * 256);
}

TEST_F(ApiTest, ARecoveringJobShowsItsFailure) {
  const JobId job = running_job();
  h.train(job, 1, 7);
  h.say("w0", RankExited{job, Epoch{1}, Rank{2}, -1, 9, "killed by signal 9", "step 7\n"});
  sync();
  EXPECT_EQ(get("/api/v1/jobs/1")["step"], 7);
  const Json failure = get("/api/v1/jobs/1")["last_failure"];
  EXPECT_EQ(failure["code"], "rank_killed");
  EXPECT_EQ(failure["message"], "rank 2 on w0 was killed by signal 9");
  EXPECT_EQ(failure["log_tail"], "step 7\n");
  const Json events = get("/api/v1/jobs/1/events");
  EXPECT_EQ(events["items"].back()["log_tail"], "step 7\n");
  EXPECT_EQ(events["items"].front()["log_tail"], "");
  EXPECT_EQ(failure["rank"], 2);
  EXPECT_EQ(failure["worker"], "w0");
  EXPECT_EQ(failure["step"], 7);
}

TEST_F(ApiTest, JobsAreListedNewestFirstAndByState) {
  h.add_worker("w1", 4);
  running_job("a");
  running_job("b");
  const JobId c = h.submit_ok(four_rank_spec("c"));
  const Json list = get("/api/v1/jobs");
  EXPECT_EQ(list["kind"], "JobList");
  ASSERT_EQ(list["items"].size(), 3u);
  EXPECT_EQ(list["items"][0]["id"], c.value);
  EXPECT_EQ(get("/api/v1/jobs", {{"state", "QUEUED"}})["items"].size(), 1u);
  EXPECT_EQ(get("/api/v1/jobs", {{"limit", "2"}})["items"].size(), 2u);
  EXPECT_EQ(call("GET", "/api/v1/jobs", {{"state", "SLEEPING"}}).status, 400);
  EXPECT_EQ(call("GET", "/api/v1/jobs", {{"limit", "0"}}).status, 400);
  EXPECT_EQ(call("GET", "/api/v1/jobs", {{"limit", "many"}}).status, 400);
}

TEST_F(ApiTest, TheSpecComesBackCanonical) {
  running_job();
  const HttpResponse response = call("GET", "/api/v1/jobs/tiny/spec");
  EXPECT_EQ(parse_job_spec(response.body, "spec").value(), four_rank_spec());
}

TEST_F(ApiTest, EventsPageForwardAndEndWhenTheJobHasEnded) {
  const JobId job = running_job();
  Json page = get("/api/v1/jobs/tiny/events", {{"limit", "2"}});
  EXPECT_EQ(page["kind"], "EventList");
  ASSERT_EQ(page["items"].size(), 2u);
  EXPECT_EQ(page["items"][0]["code"], "submitted");
  EXPECT_EQ(page["items"][0]["actor"], "user");
  EXPECT_EQ(page["items"][0]["state"], "QUEUED");
  EXPECT_FALSE(page["terminal"].get<bool>());
  h.cancel(job);
  h.confirm_stops(job);
  sync();
  size_t count = 2;
  while (!page["terminal"].get<bool>()) {
    page = get("/api/v1/jobs/tiny/events", {{"after", page["next_after"].dump()}, {"limit", "2"}});
    count += page["items"].size();
  }
  EXPECT_EQ(count, 7u);  // submitted, placed, starting, loading, running, stopping, cancelled
}

TEST_F(ApiTest, EventsOfTheClusterIncludeWorkers) {
  const Json page = get("/api/v1/events");
  ASSERT_FALSE(page["items"].empty());
  EXPECT_EQ(page["items"].back()["code"], "worker_up");
  EXPECT_TRUE(page["items"].back()["job"].is_null());
  EXPECT_FALSE(page["terminal"].get<bool>());
}

TEST_F(ApiTest, StepsComeInTheOrderTrainedWithReplaysMarked) {
  const JobId job = running_job();
  h.train(job, 1, 30);
  h.checkpoint(job, 20);
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find();
  h.run(job);
  h.train(job, 21, 31);
  sync();
  const Json page = get("/api/v1/jobs/tiny/steps");
  ASSERT_EQ(page["items"].size(), 41u);
  EXPECT_EQ(page["items"][29]["step"], 30);
  EXPECT_EQ(page["items"][30]["step"], 21);
  EXPECT_EQ(page["items"][30]["epoch"], 2);
  EXPECT_TRUE(page["items"][30]["replayed"].get<bool>());
  EXPECT_FALSE(page["items"][40]["replayed"].get<bool>());
  const Json rest = get("/api/v1/jobs/tiny/steps", {{"after", page["items"][38]["cursor"].dump()}});
  EXPECT_EQ(rest["items"].size(), 2u);
}

TEST_F(ApiTest, StepLossAndTokensAreOfOneMoment) {
  const JobId job = running_job();
  h.train(job, 1, 30);
  h.checkpoint(job, 20);
  const int64_t a_step = h.job(job).spec.tokens_through(1);
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find();
  h.run(job);
  Json restored = get("/api/v1/jobs/tiny");
  EXPECT_EQ(restored["step"], h.record(job).restore_step);
  EXPECT_EQ(restored["tokens"], h.record(job).restore_step * a_step);
  EXPECT_TRUE(restored["loss"].is_null()) << "step 30's";
  h.train(job, h.record(job).restore_step + 1, h.record(job).restore_step + 1);
  restored = get("/api/v1/jobs/tiny");
  EXPECT_FALSE(restored["loss"].is_null());
  EXPECT_EQ(restored["tokens"], (h.record(job).restore_step + 1) * a_step);
  EXPECT_EQ(restored["highest_step"], 30);
}

TEST_F(ApiTest, ALossThatIsNotANumberIsNull) {
  const JobId job = running_job();
  StepReport report;
  report.job = job;
  report.epoch = Epoch{1};
  report.step = 1;
  report.loss = std::nan("");
  h.say("w0", report);
  sync();
  EXPECT_TRUE(get("/api/v1/jobs/tiny/steps")["items"][0]["loss"].is_null());
  EXPECT_TRUE(get("/api/v1/jobs/tiny")["loss"].is_null());
}

TEST_F(ApiTest, EvaluationsAreListed) {
  const JobId job = running_job();
  h.say("w0", EvaluationReport{job, Epoch{1}, 50, 3.25, 2048});
  const Json list = get("/api/v1/jobs/tiny/evaluations");
  EXPECT_EQ(list["kind"], "EvaluationList");
  EXPECT_EQ(list["items"][0]["step"], 50);
}

TEST_F(ApiTest, CheckpointsAreListedWithTheirDamage) {
  const JobId job = running_job();
  h.checkpoint(job, 20);
  listing = std::vector<ListedCheckpoint>{
      {10, Epoch{1}, "/c/1.manifest", 5, Instant{1}, "1.segment is missing"},
      {20, Epoch{1}, h.record(job).checkpoint->manifest, 4096, Instant{2}, ""}};
  const Json list = get("/api/v1/jobs/tiny/checkpoints");
  ASSERT_EQ(list["items"].size(), 2u);
  EXPECT_TRUE(list["items"][0]["damaged"].get<bool>());
  EXPECT_EQ(list["items"][0]["damage"], "1.segment is missing");
  EXPECT_FALSE(list["items"][1]["damaged"].get<bool>());
  EXPECT_EQ(list["items"][1]["weights_digest"], "00ff");
  listing = unavailable("stale file handle");
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/checkpoints").status, 503);
}

TEST_F(ApiTest, LogsAreReadFromAnOffsetAndEndWithTheJob) {
  const JobId job = running_job();
  ASSERT_TRUE(logs.append({job, Epoch{1}, Rank{1}, 0, "hello\n"}).ok());
  Json chunk = get("/api/v1/jobs/tiny/logs", {{"rank", "1"}});
  EXPECT_EQ(chunk["text"], "hello\n");
  EXPECT_EQ(chunk["next_offset"], 6);
  EXPECT_FALSE(chunk["terminal"].get<bool>());
  h.cancel(job);
  h.confirm_stops(job);
  chunk = get("/api/v1/jobs/tiny/logs", {{"rank", "1"}, {"offset", "2"}});
  EXPECT_EQ(chunk["text"], "llo\n");
  EXPECT_FALSE(chunk["terminal"].get<bool>()) << "there was something to read";
  chunk = get("/api/v1/jobs/tiny/logs", {{"rank", "1"}, {"offset", "6"}});
  EXPECT_TRUE(chunk["terminal"].get<bool>());
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/logs", {{"rank", "4"}}).status, 400);
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/logs", {{"offset", "-1"}}).status, 400);
}

TEST_F(ApiTest, ALogThatIsNotUtf8IsStillJson) {
  const JobId job = running_job();
  ASSERT_TRUE(logs.append({job, Epoch{1}, Rank{0}, 0, "\xFF\xFE!\n"}).ok());
  EXPECT_TRUE(get("/api/v1/jobs/tiny/logs").is_object());
}

TEST_F(ApiTest, ALongPollIsAnsweredByTheNextRecord) {
  const JobId job = running_job();
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/steps", {{"wait_ms", "30000"}}).status, 0);
  EXPECT_EQ(api.waiting(), 1u);
  api.wake();
  EXPECT_EQ(last->status, 0) << "nothing new yet";
  h.train(job, 1, 1);
  sync();
  api.wake();
  EXPECT_EQ(last->status, 200);
  EXPECT_EQ(Json::parse(last->body)["items"].size(), 1u);
  EXPECT_EQ(api.waiting(), 0u);
}

TEST_F(ApiTest, ALongPollEndsWithItsTime) {
  running_job();
  call("GET", "/api/v1/jobs/tiny/steps", {{"wait_ms", "1000"}});
  api.expire();
  EXPECT_EQ(last->status, 0);
  h.jump(std::chrono::milliseconds(1001));
  api.expire();
  EXPECT_EQ(last->status, 200);
  EXPECT_TRUE(Json::parse(last->body)["items"].empty());
}

TEST_F(ApiTest, ALongPollEndsWhenTheJobEnds) {
  const JobId job = running_job();
  call("GET", "/api/v1/jobs/tiny/logs", {{"wait_ms", "60000"}});
  h.cancel(job);
  h.confirm_stops(job);
  api.wake();
  EXPECT_TRUE(Json::parse(last->body)["terminal"].get<bool>());
}

TEST_F(ApiTest, WaitingLongerThanTheBoundIsRefused) {
  running_job();
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/steps", {{"wait_ms", "60001"}}).status, 400);
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/steps", {{"after", "x"}}).status, 400);
}

// Clients that ask and go away must not make every record dearer to write.
TEST_F(ApiTest, LongPollsBeyondTheBoundAreAnsweredAtOnce) {
  running_job();
  for (size_t i = 0; i < kWaitingMax; ++i) {
    ASSERT_EQ(call("GET", "/api/v1/jobs/tiny/steps", {{"wait_ms", "30000"}}).status, 0);
  }
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/steps", {{"wait_ms", "30000"}}).status, 200);
  EXPECT_EQ(api.waiting(), kWaitingMax);
}

TEST_F(ApiTest, AJobIsCancelledAndResumed) {
  const JobId job = running_job();
  const HttpResponse cancelled = call("POST", "/api/v1/jobs/tiny/cancel", {{"grace_ms", "100"}});
  EXPECT_EQ(cancelled.status, 202);
  EXPECT_EQ(Json::parse(cancelled.body)["state"], "STOPPING");
  EXPECT_EQ(h.sent<StopRanks>().back().grace_ms, 100);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/resume").status, 409) << "not before it has ended";
  h.confirm_stops(job);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/cancel").status, 409);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/resume", {}, "no: spec").status, 400);
  JobSpec next = h.job(job).spec;
  next.recovery.max_restarts = 77;
  const HttpResponse resumed = call("POST", "/api/v1/jobs/tiny/resume", {}, to_json(next));
  EXPECT_EQ(resumed.status, 202) << resumed.body;
  EXPECT_EQ(Json::parse(resumed.body)["state"], "QUEUED");
  EXPECT_EQ(h.job(job).spec, next);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/cancel", {{"grace_ms", "-1"}}).status, 400);
}

TEST_F(ApiTest, AJobThatHasEndedIsRemovedAndNotFoundAfterwards) {
  const JobId job = running_job();
  EXPECT_EQ(call("DELETE", "/api/v1/jobs/tiny").status, 409);
  h.cancel(job);
  h.confirm_stops(job);
  EXPECT_EQ(call("DELETE", "/api/v1/jobs/tiny", {{"checkpoints", "maybe"}}).status, 400);
  EXPECT_EQ(call("DELETE", "/api/v1/jobs/tiny/spec").status, 404);
  const HttpResponse removed = call("DELETE", "/api/v1/jobs/tiny");
  EXPECT_EQ(removed.status, 200) << removed.body;
  const Json document = Json::parse(removed.body);
  EXPECT_EQ(document["kind"], "RemovedJob");
  EXPECT_EQ(document["job"], job.value);
  EXPECT_EQ(document["checkpoints_removed"], false);
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny").status, 404);
  EXPECT_EQ(call("DELETE", "/api/v1/jobs/tiny").status, 404);
}

TEST_F(ApiTest, AResumeMayAskForAProofAndTheJobSaysHowFarItIs) {
  const JobId job = running_job();
  h.train(job, 1, 30);
  h.cancel(job);
  h.confirm_stops(job);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/resume", {{"prove", "0"}}).status, 400);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/resume", {{"prove", "31"}}).status, 409);
  const HttpResponse resumed = call("POST", "/api/v1/jobs/tiny/resume", {{"prove", "10"}});
  EXPECT_EQ(resumed.status, 202) << resumed.body;
  EXPECT_EQ(Json::parse(resumed.body)["proof"],
            Json({{"steps", 10}, {"from", 0}, {"through", 30}, {"compared", 0}}));
}

TEST_F(ApiTest, AJobSaysHowOftenItIsSavedAndWhereThatIsChosenWhy) {
  running_job();
  const Json fixed = Json::parse(call("GET", "/api/v1/jobs/tiny").body)["checkpoint_interval"];
  EXPECT_EQ(fixed, Json({{"automatic", false}, {"steps", 20}}));
  JobSpec spec = four_rank_spec("automatic");
  spec.checkpoint.interval = 0;
  spec.checkpoint.automatic = true;
  h.add_worker("w9", 4);
  h.submit_ok(spec);
  const Json chosen =
      Json::parse(call("GET", "/api/v1/jobs/automatic").body)["checkpoint_interval"];
  EXPECT_EQ(chosen["automatic"], true);
  EXPECT_EQ(chosen["steps"], 10);
  EXPECT_EQ(chosen["max_overhead"], 0.01);
  EXPECT_EQ(chosen["mtbf_seconds"], 45e6) << "50,000 hours of a device, of which there are four";
  EXPECT_NE(chosen["reason"].get<std::string>().find("first checkpoint"), std::string::npos);
}

TEST_F(ApiTest, ExpertsAreAskedToMoveAndThePlanIsShown) {
  const JobId job = running_job();
  const HttpResponse early = call("GET", "/api/v1/jobs/tiny/rebalance");
  EXPECT_EQ(early.status, 409);
  EXPECT_EQ(error_code(early), "failed_precondition");
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/rebalance").status, 409);
  EXPECT_EQ(call("POST", "/api/v1/jobs/nobody/rebalance").status, 404);
  h.train(job, 1, 20);
  h.say("w0", ExpertLoadReport{job, Epoch{1}, Rank{0}, 20, {{1, {8, 8, 8, 8, 1, 1, 1, 1}}}});
  const Json plan = get("/api/v1/jobs/tiny/rebalance");
  EXPECT_EQ(plan["kind"], "Rebalance");
  EXPECT_EQ(plan["job"], 1);
  EXPECT_EQ(plan["measured_step"], 20);
  EXPECT_EQ(plan["requested"], false);
  EXPECT_EQ(get("/api/v1/jobs/tiny")["rebalance_requested"], false);
  EXPECT_EQ(plan["experts"], 8);
  EXPECT_EQ(plan["moved"], 4);
  EXPECT_DOUBLE_EQ(plan["imbalance_before"].get<double>(), 32.0 / 18.0);
  EXPECT_DOUBLE_EQ(plan["imbalance_after"].get<double>(), 1.0);
  EXPECT_DOUBLE_EQ(plan["gain"].get<double>(), 1.0 - 18.0 / 32.0);
  ASSERT_EQ(plan["items"].size(), 1u);
  EXPECT_EQ(plan["items"][0]["layer"], 1);
  EXPECT_EQ(plan["items"][0]["moved"], 4);
  const HttpResponse asked = call("POST", "/api/v1/jobs/tiny/rebalance");
  EXPECT_EQ(asked.status, 202);
  EXPECT_EQ(Json::parse(asked.body)["requested"], true);
  EXPECT_EQ(get("/api/v1/jobs/tiny")["rebalance_requested"], true);
}

TEST_F(ApiTest, WorkersAreListedWithWhatTheyRun) {
  running_job();
  const Json list = get("/api/v1/workers");
  ASSERT_EQ(list["items"].size(), 1u);
  const Json& worker = list["items"][0];
  EXPECT_EQ(worker["name"], "w0");
  EXPECT_EQ(worker["state"], "up");
  EXPECT_EQ(worker["devices"], 4);
  EXPECT_EQ(worker["free_devices"], 0);
  EXPECT_EQ(worker["ranks"].size(), 4u);
  h.workers.at("w0").alive = false;
  h.pass(std::chrono::seconds(5));
  EXPECT_EQ(get("/api/v1/workers")["items"][0]["state"], "lost");
}

TEST_F(ApiTest, AWorkerThatIsNotHeardIsSilentSinceItWas) {
  CoreConfig config = CoreHarness::test_config();
  config.lease = std::chrono::seconds(60);
  Coordinator core(config);
  const Instant heard{1'000'000'000'000};
  ASSERT_TRUE(core.start(heard, {}).ok());
  Register message;
  message.name = "w0";
  message.incarnation = 1;
  message.device_count = 1;
  core.step(heard, WorkerMessage{"peer", message});
  const auto worker = [&] { return Json::parse(worker_list_document(core))["items"][0]; };
  EXPECT_EQ(worker()["state"], "up");
  EXPECT_TRUE(worker()["silent_since"].is_null());
  for (int i = 1; i <= 8; ++i) core.step(heard + std::chrono::milliseconds(500 * i), Tick{});
  EXPECT_EQ(worker()["state"], "silent");
  EXPECT_EQ(worker()["silent_since"], format_utc(heard));
}

TEST_F(ApiTest, AWorkerIsQuarantinedWithAReasonAndReleased) {
  running_job();
  EXPECT_EQ(call("POST", "/api/v1/workers/w0/quarantine").status, 400);
  const HttpResponse answer =
      call("POST", "/api/v1/workers/w0/quarantine", {{"reason", "ECC errors"}});
  EXPECT_EQ(answer.status, 202);
  const Json worker = Json::parse(answer.body);
  EXPECT_EQ(worker["state"], "quarantined");
  EXPECT_EQ(worker["quarantine"]["reason"], "ECC errors");
  EXPECT_EQ(worker["quarantine"]["by"], "user");
  EXPECT_EQ(worker["quarantine"]["code"], "requested");
  EXPECT_TRUE(worker["quarantine"]["until"].is_null());
  EXPECT_EQ(worker["free_devices"], 0);
  EXPECT_EQ(call("POST", "/api/v1/workers/w9/release").status, 404);
  const HttpResponse released = call("POST", "/api/v1/workers/w0/release");
  EXPECT_EQ(released.status, 202);
  EXPECT_EQ(Json::parse(released.body)["quarantine"]["releasing"], true);
  h.check_hosts();
  EXPECT_TRUE(get("/api/v1/workers")["items"][0]["quarantine"].is_null());
}

TEST_F(ApiTest, PrometheusFindsTheWorkersThatAreUp) {
  EXPECT_EQ(get("/api/v1/prometheus/targets"),
            Json::parse(R"([{"targets":["127.0.0.1:90"],"labels":{"penstock_node":"w0"}}])"));
  h.workers.at("w0").alive = false;
  h.pass(std::chrono::seconds(5));
  EXPECT_EQ(get("/api/v1/prometheus/targets"), Json::array());
}

TEST_F(ApiTest, ProbesAnswerAndReadinessFollowsTheStore) {
  EXPECT_EQ(call("GET", "/livez").body, "ok\n");
  EXPECT_EQ(call("GET", "/readyz").status, 200);
  readiness = resource_exhausted("disk full");
  EXPECT_GE(call("GET", "/readyz").status, 400);
  EXPECT_EQ(call("GET", "/livez").status, 200);
}

TEST_F(ApiTest, TheVersionIsThere) {
  EXPECT_FALSE(get("/api/v1/version")["version"].empty());
}

TEST_F(ApiTest, ThePageListsJobsAndEscapesNames) {
  running_job();
  const HttpResponse page = call("GET", "/");
  EXPECT_EQ(page.content_type, "text/html; charset=utf-8");
  EXPECT_NE(page.body.find(">tiny</a>"), std::string::npos);
  h.exit_rank(JobId{1}, 0, ExitCode::kFailure, "<script>alert(1)</script>");
  EXPECT_EQ(call("GET", "/").body.find("<script>"), std::string::npos);
}

TEST_F(ApiTest, EveryRouteOfTheOpenApiDocumentExists) {
  const JobId job = running_job();
  h.cancel(job);
  h.confirm_stops(job);
  const Json document = get("/openapi.json");
  EXPECT_EQ(document["openapi"], "3.1.0");
  size_t calls = 0;
  for (const auto& [path, methods] : document["paths"].items()) {
    std::string concrete = path;
    if (const size_t at = concrete.find("{job}"); at != std::string::npos) {
      concrete.replace(at, 5, "tiny");
    }
    if (const size_t at = concrete.find("{worker}"); at != std::string::npos) {
      concrete.replace(at, 8, "w0");
    }
    if (const size_t at = concrete.find("{backup}"); at != std::string::npos) {
      concrete.replace(at, 8, "1");
    }
    for (const auto& [method, description] : methods.items()) {
      EXPECT_TRUE(description["responses"].contains("default"));
      ++calls;
      if (method == "delete") continue;  // last: after it the others are about nothing
      const HttpResponse response = call(method == "post" ? "POST" : "GET", concrete);
      EXPECT_EQ(response.body.find("openapi.json lists"), std::string::npos)
          << method << " " << path;
    }
  }
  EXPECT_EQ(calls, 31u);
  EXPECT_NE(call("DELETE", "/api/v1/jobs/tiny").status, 404);
}

TEST_F(ApiTest, ABackupHasEveryRecord) {
  running_job();
  const HttpResponse response = call("POST", "/api/v1/backups");
  EXPECT_EQ(response.status, 201);
  const Json backup = Json::parse(response.body);
  EXPECT_EQ(backup["done"], true);
  const auto text = backup["text"].get<std::string>();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), std::ssize(h.store) + 2);
  EXPECT_EQ(call("GET", "/api/v1/backups/1", {{"offset", "x"}}).status, 400);
  EXPECT_EQ(call("GET", "/api/v1/backups/1x").status, 404);
  EXPECT_EQ(call("GET", "/api/v1/backups/99999999999999999999").status, 404);
}

TEST_F(ApiTest, UnknownRoutesAndMethodsAreNotFound) {
  running_job();
  for (const std::string path : {"/nothing", "/api", "/api/v1", "/api/v2/jobs",
                                 "/api/v1/jobs/tiny/x", "/api/v1/jobs/tiny/logs/more"}) {
    const HttpResponse response = call("GET", path);
    EXPECT_EQ(response.status, 404) << path;
    EXPECT_EQ(error_code(response), "not_found");
  }
  EXPECT_EQ(call("DELETE", "/api/v1/jobs").status, 404);
  EXPECT_EQ(call("PUT", "/api/v1/jobs/tiny").status, 404);
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/cancel").status, 404);
  EXPECT_EQ(call("POST", "/api/v1/jobs/tiny/steps").status, 404);
}

TEST_F(ApiTest, AJobShowsTheDataThatItsRanksFound) {
  h.data = {{"/c/train", 5000, {2, 1}}};
  const JobId job = running_job();
  const Json shown = get(fmt::format("/api/v1/jobs/{}", job))["data"];
  EXPECT_EQ(shown, Json::parse(R"([{"path": "/c/train", "tokens": 5000,
                                    "digest": "00000000000000010000000000000002"}])"));
}

TEST_F(ApiTest, RequestsAreCountedByRouteNotByPath) {
  call("GET", "/api/v1/jobs/one");
  call("GET", "/api/v1/jobs/two");
  call("GET", "/random");
  const std::string text = call("GET", "/metrics").body;
  EXPECT_NE(text.find("penstock_coordinator_api_requests_total{code=\"404\",method=\"GET\",route=\""
                      "/api/v1/jobs/{job}\"} 2"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("route=\"unknown\""), std::string::npos);
  EXPECT_EQ(text.find("random"), std::string::npos);
}

TEST_F(ApiTest, ADamagedRecordIsAnErrorNotACrash) {
  running_job();
  store.map[step_prefix(JobId{1}) + key_number(uint64_t{1} << 32 | 1)] = "{";
  EXPECT_EQ(call("GET", "/api/v1/jobs/tiny/steps").status, 500);
}

}  // namespace
}  // namespace penstock
