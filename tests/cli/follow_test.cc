#include "ops/cli/follow.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "comm/base/clock.h"
#include "comm/control/event_loop.h"
#include "comm/control/http_server.h"

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

// What happened to a job, in order: entries have the "line" that a follower prints of them.
using History = std::vector<Json>;

// A coordinator that has seen the first `seen_` entries of a history, and `pace` more after every
// answer: whatever a follower asks for, things happen in between.
class ScriptedCoordinator {
 public:
  ScriptedCoordinator(History history, size_t pace) : history_(std::move(history)), pace_(pace) {
    auto started = HttpServer::start(loop_.io_context(), HttpServerOptions(),
                                     [this](const HttpRequest& request, HttpResponder respond) {
                                       respond(json_response(answer(request).dump()));
                                     });
    EXPECT_TRUE(started.ok()) << started.status().to_string();
    server_ = *std::move(started);
    thread_ = std::thread([this] { loop_.run(); });
  }
  ~ScriptedCoordinator() {
    loop_.stop();
    thread_.join();
  }
  std::string address() const { return fmt::format("127.0.0.1:{}", server_->port()); }

 private:
  Json answer(const HttpRequest& request) {
    Json document = request.path.ends_with("/events")  ? list(request, "event")
                    : request.path.ends_with("/steps") ? list(request, "step")
                                                       : job();
    document["apiVersion"] = "penstock/v1";
    seen_ = std::min(seen_ + pace_, history_.size());
    return document;
  }
  Json list(const HttpRequest& request, const std::string& kind) const {
    const size_t after = std::stoul(std::string(*request.parameter("after")));
    Json items = Json::array();
    size_t next = after;
    for (size_t i = after; i < seen_; ++i) {
      if (history_[i]["kind"] != kind) continue;
      items.push_back(history_[i]);
      next = i + 1;
    }
    return {{"items", items}, {"next_after", next}};
  }
  // As the real one: at step 0 again while a run that has no checkpoint starts anew.
  Json job() const {
    Json job = {{"kind", "Job"}, {"step", 0}, {"target_steps", 4}, {"state", "QUEUED"}};
    job["evaluations"] = Json::array();
    for (size_t i = 0; i < seen_; ++i) {
      const Json& entry = history_[i];
      if (entry["kind"] == "event") {
        job["state"] = entry["state"];
        if (entry["state"] == "STARTING") job["step"] = 0;
      } else if (entry["kind"] == "step") {
        job["step"] = entry["step"];
        job["loss"] = entry["loss"];
      } else {
        job["evaluations"].push_back(entry);
      }
    }
    return job;
  }

  const History history_;
  const size_t pace_;
  size_t seen_ = 1;
  EventLoop loop_;
  std::unique_ptr<HttpServer> server_;
  std::thread thread_;
};

// A job that fails after its third step, before any checkpoint, and then trains to its end. Steps
// and evaluations are timed by clocks that are `skew` ahead. Notes within a run are ordered by time
// and so only without a skew.
History history_with_a_recovery(Duration skew) {
  History history;
  int64_t milliseconds = 1'800'000'000'000;
  const auto time = [&](Duration ahead) {
    return format_utc(
        Instant{++milliseconds * 1'000'000 + std::chrono::nanoseconds(ahead).count()});
  };
  const auto event = [&](int epoch, const char* state, const char* from, const std::string& text) {
    history.push_back({{"kind", "event"}, {"epoch", epoch}, {"state", state}, {"code", "x"}});
    history.back().update({{"message", text}, {"time", time(Duration(0))}});
    history.back()["from"] = *from == '\0' ? Json() : Json(from);
    history.back()["line"] = fmt::format("{}  {}", state, text);
  };
  const auto step = [&](int epoch, int number) {
    const double loss = 10.0 * epoch + number;
    history.push_back({{"kind", "step"}, {"epoch", epoch}, {"step", number}, {"loss", loss}});
    history.back()["time"] = time(skew);
    history.back()["line"] = fmt::format("step {}/4  loss {:.4f}  RUNNING", number, loss);
  };
  const auto evaluation = [&](int epoch, int number) {
    const double loss = 10.0 * epoch + number;
    history.push_back({{"kind", "evaluation"}, {"epoch", epoch}, {"step", number}, {"loss", loss}});
    history.back()["time"] = time(skew);
    history.back()["line"] =
        fmt::format("held-out loss {:.4f} nats/token after step {}", loss, number);
  };
  event(0, "QUEUED", "", "submitted");
  for (const int epoch : {1, 2}) {
    event(epoch, "STARTING", epoch == 1 ? "PLACING" : "RECOVERING", fmt::format("start {}", epoch));
    event(epoch, "LOADING", "STARTING", fmt::format("load {}", epoch));
    event(epoch, "RUNNING", "LOADING", fmt::format("run {}", epoch));
    evaluation(epoch, 0);
    for (int number = 1; number <= (epoch == 1 ? 3 : 4); ++number) step(epoch, number);
    if (epoch == 1) event(1, "RECOVERING", "RUNNING", "rank 2 was killed");
  }
  if (skew == Duration(0)) event(2, "RUNNING", "", "checkpoint of step 4");
  evaluation(2, 4);
  event(2, "STOPPING", "RUNNING", "trained");
  event(2, "SUCCEEDED", "STOPPING", "trained 4 steps");
  return history;
}

TEST(FollowTest, LinesAreInTheOrderInWhichThingsHappenedAlsoAfterARecovery) {
  for (const Duration skew : {Duration(0), Duration(std::chrono::hours(1))}) {
    const History history = history_with_a_recovery(skew);
    for (const size_t pace : {1, 2, 3, 4, 5, 7, 100}) {
      const ScriptedCoordinator coordinator(history, pace);
      testing::internal::CaptureStderr();
      Output out;
      const auto job = follow_job(Client(coordinator.address()), out, "7");
      const std::string text = testing::internal::GetCapturedStderr();
      ASSERT_TRUE(job.ok()) << job.status().message();
      EXPECT_EQ((*job)["state"], "SUCCEEDED");

      const std::string what = fmt::format("pace {}, skew {}:\n{}", pace, skew.count(), text);
      size_t at = 0;  // of the history
      std::istringstream lines(text);
      for (std::string line; std::getline(lines, line); ++at) {
        for (; at < history.size() && history[at]["line"] != line; ++at) {
          ASSERT_EQ(history[at]["kind"], "step") << "only steps are passed over; " << what;
        }
        ASSERT_LT(at, history.size()) << "\"" << line << "\" never was; " << what;
      }
      EXPECT_EQ(at, history.size()) << what;
      EXPECT_NE(text.find("step 4/4  loss 24.0000"), std::string::npos) << what;
    }
  }
}

}  // namespace
}  // namespace penstock
