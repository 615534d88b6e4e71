// The whole coordinator in this process: real store, real sockets; the worker on the other end is
// this test.
#include "coordinator/driver/driver.h"

#include <gtest/gtest.h>

#include <csignal>
#include <future>
#include <thread>

#include "comm/control/channel.h"
#include "comm/control/event_loop.h"
#include "comm/control/pulse_thread.h"
#include "coordinator/core/records.h"
#include "tests/run/spec_text.h"
#include "tests/support/cluster.h"
#include "tests/support/hung_file_system.h"

namespace penstock {
namespace {

// A driver on a thread of its own.
class RunningDriver {
 public:
  explicit RunningDriver(const Path& state_dir) {
    DriverOptions options;
    options.state_dir = state_dir;
    options.http_port = 0;
    options.control_port = 0;
    options.heartbeat_interval_ms = 100;
    auto started = Driver::start(options);
    if (!started.ok()) {
      ADD_FAILURE() << started.status().to_string();
      std::abort();
    }
    driver_ = *std::move(started);
    thread_ = std::thread([this] { driver_->run(); });
  }
  ~RunningDriver() {
    driver_->stop();
    thread_.join();
  }
  HttpReply call(const std::string& method, const std::string& path, const std::string& body = {}) {
    HttpCall call;
    call.method = method;
    call.url = "http://" + driver_->http_address() + path;
    call.body = body;
    const auto reply = http_call(call);
    EXPECT_TRUE(reply.ok()) << reply.status().to_string();
    return reply.ok() ? *reply : HttpReply{};
  }
  Json get(const std::string& path) { return Json::parse(call("GET", path).body, nullptr, false); }
  std::string control_endpoint() const { return driver_->control_endpoint(); }

 private:
  std::unique_ptr<Driver> driver_;
  std::thread thread_;
};

// A worker daemon whose ranks exist in its reports only: ready as soon as ordered, training when
// told to begin.
class ScriptedWorker {
 public:
  ScriptedWorker(const std::string& endpoint, int32_t devices) {
    thread_ = std::thread([this, endpoint, devices] { run(endpoint, devices); });
  }
  ~ScriptedWorker() {
    loop_.stop();
    thread_.join();
  }
  void say(ControlMessage message) {
    loop_.post([this, message = std::move(message)] { send(message); });
  }
  void stop_beating() {
    loop_.post([this] { beats_ = false; });
  }

 private:
  void send(const ControlMessage& message) {
    // What is lost with the connection is repeated, as a daemon would.
    if (channel_ && channel_->connected()) {
      EXPECT_TRUE(channel_->send(message).ok());
    }
  }
  void run(const std::string& endpoint, int32_t devices) {
    DealerChannel::Handlers handlers;
    handlers.on_connected = [this, devices] { register_as("w0", devices); };
    handlers.on_message = [this, devices](const ControlMessage& message) {
      on_order(message, devices);
    };
    DealerOptions options;
    options.queue_while_disconnected = false;
    auto connected = DealerChannel::connect(loop_, endpoint, options, std::move(handlers));
    ASSERT_TRUE(connected.ok());
    channel_ = *std::move(connected);
    loop_.call_every(std::chrono::milliseconds(100), [this] {
      if (!registered_ || !beats_ || !channel_->connected()) return;
      Heartbeat beat;
      beat.worker = worker_;
      beat.incarnation = 5;
      beat.sequence = ++sequence_;
      beat.ranks = ranks_;
      send(beat);
    });
    loop_.run();
    channel_.reset();
  }
  void register_as(const std::string& name, int32_t devices) {
    Register message;
    message.name = name;
    message.incarnation = 5;
    message.host = "localhost";
    message.device_count = devices;
    message.device_kind = "cpu";
    message.http_address = "127.0.0.1:9";
    message.sequence = ++sequence_;
    message.ranks = ranks_;
    send(message);
  }
  void on_order(const ControlMessage& message, int32_t devices) {
    if (const auto* registered = std::get_if<Registered>(&message)) {
      worker_ = registered->worker;
      registered_ = worker_.value != 0;
      if (!registered_) register_as("w0", devices);
    } else if (const auto* start = std::get_if<StartRank>(&message)) {
      ranks_.push_back({start->job, start->epoch, start->rank, RankState::kReady, 0});
      send(RankReady{start->job, start->epoch, start->rank, "address"});
    } else if (const auto* begin = std::get_if<BeginTraining>(&message)) {
      for (RankStatus& rank : ranks_) rank.state = RankState::kTraining;
      send(LogChunk{begin->job, begin->epoch, Rank{0}, 0, "rank 0 trains\n"});
    } else if (const auto* stop = std::get_if<StopRanks>(&message)) {
      std::erase_if(ranks_, [&](const RankStatus& rank) { return rank.epoch <= stop->epoch; });
      send(RanksStopped{stop->job, stop->epoch});
    }
  }

  EventLoop loop_;
  std::unique_ptr<DealerChannel> channel_;
  // Loop thread only.
  WorkerId worker_;
  bool registered_ = false;
  bool beats_ = true;
  uint64_t sequence_ = 0;
  std::vector<RankStatus> ranks_;
  std::thread thread_;
};

bool reaches(RunningDriver& driver, const std::string& job, const std::string& state) {
  return wait_until([&] { return driver.get("/api/v1/jobs/" + job).value("state", "") == state; },
                    seconds(20));
}

bool has_worker(RunningDriver& driver) {
  return wait_until(
      [&] {
        const Json items = driver.get("/api/v1/workers")["items"];
        return !items.empty() && items[0]["state"] == "up";
      },
      seconds(20));
}

// As behind a lost segment of the control channel.
TEST(DriverTest, AWorkerWhosePulsesArriveIsNotLostThoughItsHeartbeatsDoNot) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  ScriptedWorker worker(driver.control_endpoint(), 4);
  ASSERT_TRUE(has_worker(driver));
  const auto state = [&] {
    return driver.get("/api/v1/workers")["items"][0].value("state", std::string());
  };
  auto pulses =
      PulseThread::start(driver.control_endpoint(), 5, LeaseFile::create().value()).value();
  pulses->registered({WorkerId{1}, std::chrono::milliseconds(100)});
  ASSERT_TRUE(wait_until([&] { return pulses->answers() > 0; }, kPatience));
  worker.stop_beating();
  const uint64_t before = pulses->answers();
  const uint64_t ten_beats = 10 * kPulsesPerBeat;
  ASSERT_TRUE(wait_until([&] { return pulses->answers() > before + ten_beats; }, kPatience));
  EXPECT_EQ(state(), "up");
  pulses->cut_off(true);
  EXPECT_TRUE(wait_until([&] { return state() == "lost"; }, kPatience));
}

// Its heartbeats still come, as what a dead daemon had sent may.
TEST(DriverTest, AWorkerWhoseHostProvesThatItIsGoneIsLostWithoutASilence) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  ScriptedWorker worker(driver.control_endpoint(), 4);
  ASSERT_TRUE(has_worker(driver));
  const auto has_proof = [&] {
    const Json list = driver.get("/api/v1/events?limit=1000");
    for (const Json& event : list["items"]) {
      if (event["code"] != "worker_lost") continue;
      return event["message"].get<std::string>().find("refuses connections") != std::string::npos;
    }
    return false;
  };
  auto pulses =
      PulseThread::start(driver.control_endpoint(), 5, LeaseFile::create().value()).value();
  pulses->registered({WorkerId{1}, std::chrono::milliseconds(100)});
  ASSERT_TRUE(wait_until([&] { return pulses->answers() > 0; }, kPatience));
  EXPECT_FALSE(has_proof());
  pulses.reset();  // and its life port
  EXPECT_TRUE(wait_until(has_proof, kPatience)) << driver.call("GET", "/api/v1/events").body;
}

TEST(DriverTest, AJobRunsReportsAndIsCancelledOverRealSockets) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  ScriptedWorker worker(driver.control_endpoint(), 4);
  ASSERT_TRUE(has_worker(driver));
  ASSERT_EQ(driver.call("POST", "/api/v1/jobs", std::string(kValidSpec)).status, 201);
  ASSERT_TRUE(reaches(driver, "tiny", "RUNNING"));
  StepReport report;
  report.job = {1};
  report.epoch = {1};
  report.step = 1;
  report.loss = 5.25;
  report.tokens = 2048;
  report.step_seconds = 0.5;
  worker.say(report);
  const Json steps = driver.get("/api/v1/jobs/tiny/steps?wait_ms=20000");
  ASSERT_EQ(steps["items"].size(), 1u);
  EXPECT_EQ(steps["items"][0]["loss"], 5.25);
  EXPECT_EQ(driver.get("/api/v1/jobs/tiny/logs?wait_ms=20000")["text"], "rank 0 trains\n");
  EXPECT_TRUE(std::filesystem::is_directory(scratch.path() / "checkpoints" / "1"));
  ASSERT_EQ(driver.call("POST", "/api/v1/jobs/tiny/cancel").status, 202);
  EXPECT_TRUE(reaches(driver, "tiny", "CANCELLED"));

  // What promtool says of every series a job leaves behind.
  const std::string metrics = driver.call("GET", "/metrics").body;
  EXPECT_NE(metrics.find("penstock_run_steps_total{run=\"1\"} 1"), std::string::npos) << metrics;
  EXPECT_NE(metrics.find("penstock_run_state{run=\"1\",state=\"CANCELLED\"} 1"), std::string::npos);
  EXPECT_NE(metrics.find("penstock_run_global_batch_tokens{run=\"1\"} 2048"), std::string::npos);
  const Path file = scratch.path() / "metrics.txt";
  ASSERT_TRUE(write_and_sync(file, as_bytes(metrics)).ok());
  const ProgramRun lint =
      run_program({"/bin/sh", "-c", "promtool check metrics < '" + file.string() + "'"});
  EXPECT_EQ(lint.exit_code, 0);
  EXPECT_EQ(lint.out + lint.err, "");
}

TEST(DriverTest, ARestartKeepsJobsEventsAndRuns) {
  const ScratchFolder scratch;
  {
    RunningDriver driver(scratch.path());
    ScriptedWorker worker(driver.control_endpoint(), 4);
    ASSERT_TRUE(has_worker(driver));
    ASSERT_EQ(driver.call("POST", "/api/v1/jobs", std::string(kValidSpec)).status, 201);
    ASSERT_TRUE(reaches(driver, "tiny", "RUNNING"));
  }
  RunningDriver driver(scratch.path());
  const Json job = driver.get("/api/v1/jobs/tiny");
  EXPECT_EQ(job["state"], "RUNNING") << "nothing has said otherwise yet";
  EXPECT_EQ(job["epoch"], 1);
  EXPECT_EQ(driver.get("/api/v1/jobs/tiny/events")["items"].size(), 5u);
  EXPECT_EQ(driver.get("/api/v1/workers")["items"][0]["name"], "w0");
}

TEST(DriverTest, TheEndpointsFileTellsWhereItListens) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  const auto text = read_file(scratch.path() / "endpoints.json", 1 << 16);
  ASSERT_TRUE(text.ok());
  const Json endpoints = Json::parse(*text);
  EXPECT_GT(endpoints["http_port"].get<int>(), 0);
  EXPECT_EQ(endpoints["control"], driver.control_endpoint());
  EXPECT_EQ(endpoints["pid"], getpid());
}

TEST(DriverTest, ADirectoryInUseIsAConflict) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  DriverOptions options;
  options.state_dir = scratch.path();
  options.http_port = 0;
  options.control_port = 0;
  const auto second = Driver::start(options);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kAlreadyExists);
  EXPECT_NE(second.status().message().find(scratch.path().string()), std::string::npos);
}

TEST(DriverTest, AStrangersMessageIsAnsweredWithTheQuestionWhoItIs) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  // A first message that only a registered worker may send: answered with the question who it is.
  EventLoop loop;
  std::promise<Registered> answered;
  DealerChannel::Handlers handlers;
  handlers.on_message = [&](const ControlMessage& message) {
    if (const auto* registered = std::get_if<Registered>(&message)) answered.set_value(*registered);
    loop.stop();
  };
  auto channel = DealerChannel::connect(loop, driver.control_endpoint(), {}, std::move(handlers));
  ASSERT_TRUE(channel.ok());
  Heartbeat stranger;
  stranger.worker = {9};
  stranger.incarnation = 1;
  stranger.sequence = 1;
  ASSERT_TRUE((*channel)->send(stranger).ok());
  loop.run();
  const Registered answer = answered.get_future().get();
  EXPECT_EQ(answer.worker, WorkerId{});
  EXPECT_TRUE(answer.refusal.empty());
  EXPECT_TRUE(driver.get("/api/v1/workers")["items"].empty());
  EXPECT_EQ(driver.call("GET", "/readyz").status, 200);
}

TEST(DriverTest, AJobWithoutCheckpointsListsNone) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  ScriptedWorker worker(driver.control_endpoint(), 4);
  ASSERT_TRUE(has_worker(driver));
  ASSERT_EQ(driver.call("POST", "/api/v1/jobs", std::string(kValidSpec)).status, 201);
  const Json list = driver.get("/api/v1/jobs/tiny/checkpoints");
  EXPECT_EQ(list["kind"], "CheckpointList");
  EXPECT_TRUE(list["items"].empty());
}

// Of a job whose checkpoint directory is on a network file system whose server is gone.
std::string stuck_spec(const Path& scratch) {
  std::string spec = edited("{name: tiny}", "{name: stuck}");
  const std::string directory = fmt::format("dir: {}/nfs/run", scratch.string());
  return spec.replace(spec.find("{interval: 20}"), 14, "{interval: 20, " + directory + "}");
}

TEST(DriverTest, ACheckpointDirectoryThatHangsHoldsUpItsOwnJobOnly) {
  const ScratchFolder scratch;
  const auto hung = HungFileSystem::mount_at(scratch.path() / "nfs");
  RunningDriver driver(scratch.path() / "state");
  ScriptedWorker worker(driver.control_endpoint(), 8);
  ASSERT_TRUE(has_worker(driver));
  ASSERT_EQ(driver.call("POST", "/api/v1/jobs", stuck_spec(scratch.path())).status, 201);
  hung->await_caller();

  ASSERT_EQ(driver.call("POST", "/api/v1/jobs", std::string(kValidSpec)).status, 201);
  EXPECT_TRUE(reaches(driver, "tiny", "RUNNING"));
  EXPECT_EQ(driver.get("/api/v1/jobs/tiny/checkpoints")["kind"], "CheckpointList");
  EXPECT_EQ(driver.get("/api/v1/jobs/stuck")["state"], "STARTING");
  EXPECT_EQ(driver.get("/api/v1/workers")["items"][0]["state"], "up");

  hung->release();
  EXPECT_TRUE(reaches(driver, "stuck", "RUNNING")) << "its saves will fail, and say so";
}

TEST(DriverTest, ACheckpointDirectoryThatHangsDoesNotKeepTheCoordinatorFromStopping) {
  const ScratchFolder scratch;
  const auto hung = HungFileSystem::mount_at(scratch.path() / "nfs");
  const Path state = scratch.path() / "state";
  SpawnOptions options;
  options.argv = {binary("penstock-coordinator").string(),
                  "--state-dir",
                  state.string(),
                  "--http-port",
                  "0",
                  "--control-port",
                  "0"};
  options.capture_output = false;
  auto coordinator = ChildProcess::spawn(options);
  ASSERT_TRUE(coordinator.ok()) << coordinator.status().to_string();
  const Path file = state / "endpoints.json";
  ASSERT_TRUE(wait_until([&] { return std::filesystem::exists(file); }, kPatience));
  const Json endpoints = Json::parse(*read_file(file, 1 << 16));
  ScriptedWorker worker(endpoints["control"], 4);
  HttpCall submit;
  submit.method = "POST";
  submit.url = endpoints["http"].get<std::string>() + "/api/v1/jobs";
  submit.body = stuck_spec(scratch.path());
  // Refused until the worker is there.
  ASSERT_TRUE(wait_until([&] { return http_call(submit)->status == 201; }, kPatience));
  hung->await_caller();
  ASSERT_TRUE(coordinator->send_signal(SIGTERM).ok());
  EXPECT_EQ(coordinator->wait().exit_code, 0);
}

TEST(DriverTest, FlagsOutOfBoundsAreAMatterOfUsageAndMBIsAMillion) {
  const auto refuses = [](const char* flag, const char* value) {
    // Where no state can be kept: with good flags that is what it says.
    const std::vector<std::string> argv = {binary("penstock-coordinator").string(), "--state-dir",
                                           "/proc/self/nowhere", flag, value};
    const ProgramRun run = run_program(argv);
    EXPECT_NE(run.exit_code, 0);
    return run.err.find(flag) != std::string::npos;
  };
  EXPECT_TRUE(refuses("--scrub-rate", "-1"));
  EXPECT_TRUE(refuses("--scrub-rate", "1100TiB")) << "above 1 PiB a second";
  EXPECT_FALSE(refuses("--scrub-rate", "1100TB"));
  EXPECT_TRUE(refuses("--scrub-pause-seconds", "0"));
  EXPECT_FALSE(refuses("--scrub-pause-seconds", "1"));
}

TEST(DriverTest, SegmentsThatAreNotOnDiskMakeTheCheckpointFailAndTheRunGoesOn) {
  const ScratchFolder scratch;
  RunningDriver driver(scratch.path());
  ScriptedWorker worker(driver.control_endpoint(), 4);
  ASSERT_TRUE(has_worker(driver));
  ASSERT_EQ(driver.call("POST", "/api/v1/jobs", std::string(kValidSpec)).status, 201);
  ASSERT_TRUE(reaches(driver, "tiny", "RUNNING"));
  for (int32_t rank = 0; rank < 4; ++rank) {
    SegmentSaved saved;
    saved.job = {1};
    saved.epoch = {1};
    saved.rank = {rank};
    saved.step = 20;
    saved.file = "e0000000001-r000000000" + std::to_string(rank) +
                 "-00000000000000000000000000000000.segment";
    saved.byte_count = 4096;
    worker.say(saved);
  }
  EXPECT_TRUE(wait_until(
      [&] {
        const Json events = driver.get("/api/v1/jobs/tiny/events")["items"];
        return events.back()["code"] == "checkpoint_failed";
      },
      seconds(20)));
  EXPECT_EQ(driver.get("/api/v1/jobs/tiny")["state"], "RUNNING");
  EXPECT_TRUE(driver.get("/api/v1/jobs/tiny")["checkpoint"].is_null());
}

TEST(DriverTest, ALeaseOfFewerThanFourHeartbeatsIsRefused) {
  const ScratchFolder scratch;
  const ProgramRun run =
      run_program({binary("penstock-coordinator"), "--state-dir", scratch.path().string(),
                   "--heartbeat-interval-ms", "1000", "--lease-ms", "3999"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("--lease-ms 3999 is less than four times"), std::string::npos) << run.err;
}

}  // namespace
}  // namespace penstock
