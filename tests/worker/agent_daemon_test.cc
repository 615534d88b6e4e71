// The real penstock-worker, with this test as its coordinator and agent_test_rank as its ranks.
#include "worker/agent/daemon.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <set>

#include "comm/control/http_client.h"
#include "tests/control/loop_support.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr JobId kJob{5};
constexpr int64_t kBeatMs = 100;

Path program(const std::string& name) {
  Result<Path> path = sibling_binary(name);
  PENSTOCK_CHECK(path.ok(), path.status().message());
  return std::move(path).value();
}

// What the test, as coordinator, has heard.
struct Heard {
  PeerId worker;  // of the newest Register
  std::vector<ControlMessage> messages;
  std::vector<int64_t> beat_times_ns;

  template <typename Message>
  std::vector<Message> of() const {
    std::vector<Message> found;
    for (const ControlMessage& message : messages) {
      if (const auto* kind = std::get_if<Message>(&message)) found.push_back(*kind);
    }
    return found;
  }
};

class AgentDaemonTest : public ::testing::Test {
 protected:
  AgentDaemonTest() {
    std::string pattern = ::testing::TempDir() + "/penstock_agent.XXXXXX";
    PENSTOCK_CHECK(mkdtemp(pattern.data()) != nullptr, pattern);
    folder_ = pattern;
    start_coordinator("tcp://127.0.0.1:0");
    endpoint_ = router_->endpoint();
  }
  ~AgentDaemonTest() override {
    daemon_.reset();
    std::filesystem::remove_all(folder_);
  }

  void start_coordinator(const std::string& endpoint) {
    auto router = RouterChannel::bind(
        loop_, endpoint,
        {[this](const PeerId& peer, const ControlMessage& message) { hear(peer, message); }, {}});
    PENSTOCK_CHECK(router.ok(), router.status().message());
    router_ = std::move(router).value();
  }

  void hear(const PeerId& peer, const ControlMessage& message) {
    if (std::holds_alternative<Register>(message)) {
      heard_.worker = peer;
      if (stop_first_) send(StopRanks{kJob, {1}, 0, "its peer is gone"});
      const Status sent = router_->send(peer, Registered{{1}, kBeatMs, refusal_});
      // A refused daemon may have asked twice and be gone at the first answer.
      EXPECT_TRUE(sent.ok() || !refusal_.empty()) << sent.to_string();
    }
    if (std::holds_alternative<Heartbeat>(message)) heard_.beat_times_ns.push_back(monotonic_ns());
    heard_.messages.push_back(message);
  }

  std::vector<std::string> daemon_argv() const {
    std::vector<std::string> argv = {program("penstock-worker").string(),
                                     "--coordinator",
                                     endpoint_,
                                     "--name",
                                     "w0",
                                     "--devices",
                                     "4",
                                     "--state-dir",
                                     (folder_ / "state").string(),
                                     "--no-check",
                                     "--rank-binary",
                                     program("agent_test_rank").string()};
    argv.insert(argv.end(), extra_flags_.begin(), extra_flags_.end());
    return argv;
  }

  // Starts the daemon and waits until it has registered.
  void start_daemon() {
    SpawnOptions options;
    options.argv = daemon_argv();
    options.capture_output = false;
    Result<ChildProcess> child = ChildProcess::spawn(options);
    ASSERT_TRUE(child.ok()) << child.status().to_string();
    daemon_.emplace(std::move(child).value());
    ASSERT_TRUE(run_until(loop_, [this] { return !heard_.of<Heartbeat>().empty(); }));
  }

  void send(const ControlMessage& message) {
    const Status sent = router_->send(heard_.worker, message);
    EXPECT_TRUE(sent.ok()) << sent.to_string();
  }

  // Starts a rank that behaves so, and lets it train.
  void run_rank(const std::string& behaviour, uint32_t epoch = 1, int32_t rank = 0) {
    StartRank start;
    start.job = kJob;
    start.epoch = {epoch};
    start.rank = {rank};
    start.device = rank;
    start.spec_json = behaviour;
    start.checkpoint_dir = "/checkpoints";
    send(start);
    ASSERT_TRUE(wait_for<RankReady>([&](const RankReady& ready) {
      return ready.epoch.value == epoch && ready.rank.value == rank;
    }));
    send(BeginTraining{kJob, {epoch}, {"address"}});
  }

  template <typename Message>
  bool wait_for(const std::function<bool(const Message&)>& matches, Duration limit = seconds(240)) {
    return run_until(
        loop_,
        [&] {
          for (const Message& message : heard_.of<Message>()) {
            if (matches(message)) return true;
          }
          return false;
        },
        limit);
  }
  template <typename Message>
  bool wait_for() {
    return wait_for<Message>([](const Message&) { return true; });
  }

  // The pid a rank printed first of all.
  pid_t rank_pid() {
    std::string text;
    EXPECT_TRUE(wait_for<LogChunk>([&](const LogChunk& chunk) {
      text = chunk.text;
      return text.find("runs as process ") != std::string::npos;
    }));
    return static_cast<pid_t>(std::stoi(text.substr(text.find("process ") + 8)));
  }

  int end_daemon(int signal) {
    EXPECT_TRUE(daemon_->send_signal(signal).ok());
    std::optional<ExitStatus> status;
    EXPECT_TRUE(run_until(loop_, [&] {
      status = daemon_->try_wait();
      return status.has_value();
    }));
    return status->exit_code;
  }

  std::string metrics() const {
    const auto registers = heard_.of<Register>();
    HttpCall call;
    call.method = "GET";
    call.url = "http://" + registers.back().http_address + "/metrics";
    const auto reply = http_call(call);
    EXPECT_TRUE(reply.ok()) << reply.status().to_string();
    return reply.ok() ? reply->body : "";
  }

  // Runs the daemon's program to its end: {exit code, what it wrote to stderr}.
  std::pair<int, std::string> run_to_end(const std::vector<std::string>& argv) {
    SpawnOptions options;
    options.argv = argv;
    Result<ChildProcess> child = ChildProcess::spawn(options);
    PENSTOCK_CHECK(child.ok(), child.status().message());
    const FileDescriptor err = child->take_stderr();
    EXPECT_TRUE(run_until(loop_, [&] { return child->try_wait().has_value(); }));
    std::string text(16 << 10, '\0');
    const ssize_t count = read(err.get(), text.data(), text.size());
    text.resize(static_cast<size_t>(std::max<ssize_t>(count, 0)));
    return {child->wait().exit_code, text};
  }

  Path folder_;
  EventLoop loop_;
  std::unique_ptr<RouterChannel> router_;
  std::string endpoint_;
  std::string refusal_;
  std::vector<std::string> extra_flags_;
  bool stop_first_ = false;  // before a Register is answered
  Heard heard_;
  std::optional<ChildProcess> daemon_;
};

TEST_F(AgentDaemonTest, RegistersAndBeats) {
  start_daemon();
  const auto registers = heard_.of<Register>();
  ASSERT_FALSE(registers.empty());
  EXPECT_EQ(registers[0].name, "w0");
  EXPECT_EQ(registers[0].device_count, 4);
  EXPECT_NE(registers[0].incarnation, 0U);
  EXPECT_EQ(registers[0].http_address.rfind("127.0.0.1:", 0), 0U);
  EXPECT_TRUE(run_until(loop_, [this] { return heard_.of<Heartbeat>().size() >= 5; }));
}

TEST_F(AgentDaemonTest, ARankRunsFromItsStartToItsEnd) {
  start_daemon();
  run_rank("finish");
  ASSERT_TRUE(wait_for<SegmentSaved>());
  const auto steps = heard_.of<StepReport>();
  ASSERT_EQ(steps.size(), 10U);
  for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i].step, static_cast<int64_t>(i) + 1);
  send(CheckpointOutcome{kJob, {1}, 10, true, ""});
  ASSERT_TRUE(wait_for<RankExited>());
  EXPECT_EQ(heard_.of<RankFinished>().size(), 1U);
  const auto exited = heard_.of<RankExited>();
  EXPECT_EQ(exited[0].exit_code, 0) << exited[0].reason;
  EXPECT_EQ(exited[0].signal, 0);
}

TEST_F(AgentDaemonTest, SeveralRanksRunSideBySide) {
  start_daemon();
  for (int32_t rank = 0; rank < 4; ++rank) run_rank("steps", 1, rank);
  EXPECT_TRUE(wait_for<Heartbeat>([](const Heartbeat& beat) {
    size_t training = 0;
    for (const RankStatus& status : beat.ranks) {
      training += status.state == RankState::kTraining && status.step > 0 ? 1 : 0;
    }
    return training == 4;
  }));
}

TEST_F(AgentDaemonTest, OutputReachesTheCoordinatorAndTheLogFile) {
  start_daemon();
  run_rank("crash");
  ASSERT_TRUE(wait_for<RankExited>());
  std::string text;
  ASSERT_TRUE(run_until(loop_, [&] {
    text.clear();
    for (const LogChunk& chunk : heard_.of<LogChunk>()) {
      EXPECT_EQ(chunk.offset, text.size());
      text += chunk.text;
    }
    return text.find("the matrix caught fire\n") != std::string::npos;
  }));
  const Path log = folder_ / "state" / "logs" / "job-5" / "epoch-1.rank-0.log";
  EXPECT_TRUE(run_until(loop_, [&] {
    const Result<std::string> file = read_file(log, 1 << 20);
    return file.ok() && *file == text;
  })) << text;
}

TEST_F(AgentDaemonTest, ACrashIsReportedWithItsCodeAndLastWords) {
  start_daemon();
  run_rank("crash");
  ASSERT_TRUE(wait_for<RankExited>());
  const RankExited exited = heard_.of<RankExited>()[0];
  EXPECT_EQ(exited.exit_code, 14);
  EXPECT_NE(exited.reason.find("the matrix caught fire"), std::string::npos) << exited.reason;
}

TEST_F(AgentDaemonTest, AKilledRankIsReportedWithItsSignal) {
  start_daemon();
  run_rank("steps");
  ASSERT_EQ(kill(rank_pid(), SIGKILL), 0);
  ASSERT_TRUE(wait_for<RankExited>());
  EXPECT_EQ(heard_.of<RankExited>()[0].signal, SIGKILL);
}

TEST_F(AgentDaemonTest, AStoppedRankIsSeenWithoutAWordFromIt) {
  start_daemon();
  run_rank("steps");
  const pid_t pid = rank_pid();
  ASSERT_EQ(kill(pid, SIGSTOP), 0);
  uint64_t request = 0;
  ASSERT_TRUE(run_until(loop_, [&] {
    const auto answers = heard_.of<RanksInspected>();
    const bool seen = !answers.empty() && answers.back().ranks.size() == 1 &&
                      answers.back().ranks[0].process == ProcessState::kStopped;
    if (!seen && answers.size() == request) send(InspectRanks{kJob, {1}, ++request});
    return seen;
  }));
  EXPECT_FALSE(heard_.of<RanksInspected>().back().ranks[0].recorded) << "this rank keeps none";
  ASSERT_EQ(kill(pid, SIGKILL), 0);
}

TEST_F(AgentDaemonTest, AMissingRankBinaryIsReportedAsAnExit) {
  std::filesystem::create_directories(folder_);
  SpawnOptions options;
  options.argv = daemon_argv();
  options.argv.back() = (folder_ / "no-such-rank").string();
  options.capture_output = false;
  Result<ChildProcess> child = ChildProcess::spawn(options);
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  daemon_.emplace(std::move(child).value());
  ASSERT_TRUE(wait_for<Register>());
  StartRank start;
  start.job = kJob;
  start.epoch = {1};
  start.spec_json = "{}";
  start.checkpoint_dir = "/checkpoints";
  send(start);
  ASSERT_TRUE(wait_for<RankExited>());
  EXPECT_NE(heard_.of<RankExited>()[0].reason.find("no-such-rank"), std::string::npos);
}

TEST_F(AgentDaemonTest, AFencedRankThatIgnoresSigtermIsKilledAfterItsGrace) {
  start_daemon();
  run_rank("stubborn");
  const int64_t begin = monotonic_ns();
  send(StopRanks{kJob, {1}, 200, "fenced"});
  ASSERT_TRUE(wait_for<RanksStopped>());
  EXPECT_GE(monotonic_ns() - begin, 200'000'000);
  EXPECT_EQ(heard_.of<RankExited>()[0].signal, SIGKILL);
}

TEST_F(AgentDaemonTest, ANewerEpochReplacesTheOlder) {
  start_daemon();
  run_rank("stubborn", 1);
  run_rank("steps", 2);
  EXPECT_TRUE(wait_for<Heartbeat>([](const Heartbeat& beat) {
    return beat.ranks.size() == 1 && beat.ranks[0].epoch.value == 2 && beat.ranks[0].step > 0;
  }));
}

// Whatever the old coordinator had not read when it ended is sent again to the new one.
TEST_F(AgentDaemonTest, NoStepIsLostOverACoordinatorRestart) {
  start_daemon();
  run_rank("steps");
  ASSERT_TRUE(wait_for<StepReport>([](const StepReport& report) { return report.step >= 20; }));
  router_.reset();
  run_for(loop_, milliseconds(300));  // the rank goes on meanwhile
  const size_t before = heard_.of<Register>().size();
  start_coordinator(endpoint_);
  ASSERT_TRUE(run_until(loop_, [&] { return heard_.of<Register>().size() > before; }));
  const Register again = heard_.of<Register>().back();
  ASSERT_EQ(again.ranks.size(), 1U);
  EXPECT_EQ(again.ranks[0].state, RankState::kTraining);
  ASSERT_TRUE(wait_for<StepReport>(
      [&](const StepReport& report) { return report.step > again.ranks[0].step; }));
  std::set<int64_t> steps;
  for (const StepReport& report : heard_.of<StepReport>()) steps.insert(report.step);
  EXPECT_EQ(static_cast<int64_t>(steps.size()), *steps.rbegin()) << "a gap in the steps";
  EXPECT_TRUE(heard_.of<RankExited>().empty());
}

HttpReply cut_off(const std::string& http_address, const std::string& query) {
  auto reply = http_call({.method = "POST",
                          .url = "http://" + http_address + "/chaos/partition?" + query,
                          .body = {}});
  EXPECT_TRUE(reply.ok()) << reply.status().to_string();
  return reply.ok() ? *reply : HttpReply{};
}

TEST_F(AgentDaemonTest, CutOffForATimeItKeepsItsRanksAndEveryReport) {
  extra_flags_ = {"--allow-chaos"};
  start_daemon();
  run_rank("steps");
  ASSERT_TRUE(wait_for<StepReport>([](const StepReport& report) { return report.step >= 20; }));
  const std::string address = heard_.of<Register>()[0].http_address;
  for (const char* wrong : {"", "for_ms=0", "for_ms=-5", "for_ms=1x", "for_ms=86400001"}) {
    EXPECT_EQ(cut_off(address, wrong).status, 400) << wrong;
  }
  EXPECT_EQ(cut_off(address, "for_ms=700").status, 200);
  run_for(loop_, milliseconds(100));  // what was on its way arrives
  const size_t before = heard_.messages.size();
  const size_t registered = heard_.of<Register>().size();
  run_for(loop_, milliseconds(300));
  EXPECT_EQ(heard_.messages.size(), before) << "not a word";
  ASSERT_TRUE(run_until(loop_, [&] { return heard_.of<Register>().size() > registered; }));
  const int64_t step = heard_.of<Register>().back().ranks.at(0).step;
  ASSERT_TRUE(wait_for<StepReport>([&](const StepReport& report) { return report.step > step; }));
  std::set<int64_t> steps;
  for (const StepReport& report : heard_.of<StepReport>()) steps.insert(report.step);
  EXPECT_EQ(static_cast<int64_t>(steps.size()), *steps.rbegin()) << "a gap in the steps";
  EXPECT_TRUE(heard_.of<RankExited>().empty());
}

TEST_F(AgentDaemonTest, ADaemonThatWasNotToldToAllowChaosRefusesIt) {
  start_daemon();
  const HttpReply reply = cut_off(heard_.of<Register>()[0].http_address, "for_ms=700");
  EXPECT_EQ(reply.status, 403);
  EXPECT_NE(reply.body.find("--allow-chaos"), std::string::npos) << reply.body;
}

// The coordinator heard of a failure from others first, and stops all; this rank is the cause.
TEST_F(AgentDaemonTest, TheEndOfARankIsToldAlsoWhenTheOrderToStopComesFirst) {
  start_daemon();
  run_rank("steps");
  const pid_t pid = rank_pid();
  router_.reset();
  ASSERT_EQ(kill(pid, SIGKILL), 0);
  EXPECT_TRUE(run_until(loop_, [&] { return process_state(pid) == ProcessState::kUnknown; }));
  stop_first_ = true;
  start_coordinator(endpoint_);
  ASSERT_TRUE(wait_for<RankExited>());
  send(StopRanks{kJob, {1}, 0, "its peer is gone"});  // the first was not to be answered yet
  ASSERT_TRUE(wait_for<RanksStopped>());
  const auto exits = heard_.of<RankExited>();
  ASSERT_EQ(exits.size(), 1U) << "told once";
  EXPECT_EQ(exits[0].signal, SIGKILL);
  EXPECT_FALSE(exits[0].reason.starts_with(kStoppedByDaemon)) << exits[0].reason;
}

TEST_F(AgentDaemonTest, RanksDieWithTheDaemon) {
  start_daemon();
  run_rank("stubborn");
  const FileDescriptor rank(static_cast<int>(syscall(SYS_pidfd_open, rank_pid(), 0)));
  ASSERT_TRUE(rank.valid());
  end_daemon(SIGKILL);
  pollfd ended = {rank.get(), POLLIN, 0};
  EXPECT_EQ(poll(&ended, 1, 20'000), 1);
}

TEST_F(AgentDaemonTest, SigtermEndsRanksThatCannotSaveInTimeAndSaysSo) {
  extra_flags_ = {"--grace", "0"};
  start_daemon();
  run_rank("steps");
  const FileDescriptor rank(static_cast<int>(syscall(SYS_pidfd_open, rank_pid(), 0)));
  EXPECT_EQ(end_daemon(SIGTERM), 12);
  pollfd ended = {rank.get(), POLLIN, 0};
  EXPECT_EQ(poll(&ended, 1, 0), 1);
  ASSERT_TRUE(wait_for<RankExited>());
  EXPECT_NE(heard_.of<RankExited>()[0].reason.find("daemon is stopping"), std::string::npos);
}

TEST_F(AgentDaemonTest, ARefusedDaemonExitsWithTheReason) {
  refusal_ = "install one version";
  const auto [code, text] = run_to_end(daemon_argv());
  EXPECT_EQ(code, static_cast<int>(ExitCode::kConflict));
  EXPECT_NE(text.find("install one version"), std::string::npos) << text;
}

TEST_F(AgentDaemonTest, ASecondDaemonInTheSameStateDirectoryIsRefused) {
  start_daemon();
  const auto [code, text] = run_to_end(daemon_argv());
  EXPECT_EQ(code, static_cast<int>(ExitCode::kConflict));
  EXPECT_NE(text.find((folder_ / "state").string()), std::string::npos) << text;
  EXPECT_NE(text.find("--state-dir"), std::string::npos) << text;
}

TEST_F(AgentDaemonTest, AnHttpPortInUseIsRefused) {
  start_daemon();
  const std::string address = heard_.of<Register>()[0].http_address;
  std::vector<std::string> argv = daemon_argv();
  argv[8] = (folder_ / "other").string();
  argv.insert(argv.end(), {"--http-port", address.substr(address.find(':') + 1)});
  const auto [code, text] = run_to_end(argv);
  EXPECT_EQ(code, static_cast<int>(ExitCode::kConflict));
  EXPECT_NE(text.find(address.substr(address.find(':') + 1)), std::string::npos) << text;
}

TEST_F(AgentDaemonTest, WrongFlagsAreUsageErrors) {
  const std::string worker = program("penstock-worker").string();
  for (const std::vector<std::string>& flags : std::vector<std::vector<std::string>>{
           {"--devices", "0"},
           {"--name", "two words"},
           {"--no-such-flag"},
           {"--http-port", "99999"},
           {"--coordinator", "nowhere", "--state-dir", (folder_ / "x").string(), "--rank-binary",
            "/bin/true"}}) {
    std::vector<std::string> argv = {worker};
    argv.insert(argv.end(), flags.begin(), flags.end());
    const auto [code, text] = run_to_end(argv);
    EXPECT_EQ(code, static_cast<int>(ExitCode::kUsage)) << flags[0] << ": " << text;
  }
}

TEST_F(AgentDaemonTest, AHostThatFailsItsCheckDoesNotRegister) {
  const Path failing = folder_ / "failing";
  std::ofstream(failing) << "#!/bin/sh\necho \"$1 in $3: memory FAILED\" >&2\nexit 19\n";
  std::filesystem::permissions(failing, std::filesystem::perms::owner_all);
  const std::string state = (folder_ / "unhealthy").string();
  const auto [code, text] =
      run_to_end({program("penstock-worker").string(), "--coordinator", endpoint_, "--state-dir",
                  state, "--rank-binary", failing.string()});
  EXPECT_EQ(code, static_cast<int>(ExitCode::kUnhealthy)) << text;
  EXPECT_NE(text.find("check-host in " + state + ": memory FAILED"), std::string::npos) << text;
  EXPECT_NE(text.find("takes no ranks"), std::string::npos) << text;
}

// A process that is not the one the daemon spawned gets no orders and cannot report.
TEST_F(AgentDaemonTest, AnImpostorIsIgnored) {
  start_daemon();
  run_rank("stubborn");
  bool answered = false;
  DealerChannel::Handlers handlers;
  handlers.on_message = [&](const ControlMessage&) { answered = true; };
  auto impostor = DealerChannel::connect(
      loop_, "ipc://" + (folder_ / "state" / "ranks.socket").string(), {}, std::move(handlers));
  ASSERT_TRUE(impostor.ok()) << impostor.status().to_string();
  ASSERT_TRUE((*impostor)->send(RankHello{kJob, {1}, {0}, getpid()}).ok());
  ASSERT_TRUE((*impostor)->send(RankFinished{kJob, {1}, {0}, 99}).ok());
  const size_t beats = heard_.of<Heartbeat>().size();
  ASSERT_TRUE(run_until(loop_, [&] { return heard_.of<Heartbeat>().size() >= beats + 5; }));
  EXPECT_FALSE(answered);
  EXPECT_TRUE(heard_.of<RankFinished>().empty());
}

TEST_F(AgentDaemonTest, HeartbeatsKeepTimeWhileARankFloodsItsLog) {
  start_daemon();
  run_rank("flood");
  ASSERT_TRUE(wait_for<StepReport>([](const StepReport& report) { return report.step >= 100; }));
  int64_t longest_ns = 0;
  for (size_t i = 1; i < heard_.beat_times_ns.size(); ++i) {
    longest_ns = std::max(longest_ns, heard_.beat_times_ns[i] - heard_.beat_times_ns[i - 1]);
  }
  // Generous, because other tests share the cores; a loop held up by 20 MB of log shows far more.
  EXPECT_LT(longest_ns, 2'000'000'000);
}

// A state directory where no log can be written costs log lines, nothing else.
TEST_F(AgentDaemonTest, ADiskThatTakesNoLogsStopsNothing) {
  std::filesystem::create_directories(folder_ / "state");
  std::ofstream(folder_ / "state" / "logs") << "a file where the folder should be";
  start_daemon();
  run_rank("crash");
  ASSERT_TRUE(wait_for<RankExited>());
  EXPECT_EQ(heard_.of<RankExited>()[0].exit_code, 14);
  EXPECT_TRUE(wait_for<LogChunk>());
  EXPECT_TRUE(run_until(loop_, [this] {
    return metrics().find("penstock_worker_log_lines_dropped_total{node=\"w0\"} 2") !=
           std::string::npos;
  })) << metrics();
}

TEST_F(AgentDaemonTest, MetricsShowTheRanksWork) {
  start_daemon();
  EXPECT_NE(metrics().find("penstock_worker_fatal_errors_total{kind=\"signal\",node=\"w0\"} 0"),
            std::string::npos)
      << metrics();
  run_rank("finish");
  ASSERT_TRUE(wait_for<SegmentSaved>());
  const std::string labels = "{rank=\"0\",run=\"5\"}";
  const std::string page = metrics();
  for (const std::string& line :
       {"penstock_worker_step" + labels + " 10", "penstock_worker_steps_total" + labels + " 10",
        "penstock_worker_step_seconds_total" + labels + " 2.5",
        "penstock_worker_bytes_sent_total" + labels + " 10000",
        std::string("penstock_worker_phase_seconds_total{phase=\"compute\",rank=\"0\",run=\"5\"} "
                    "1.25"),
        std::string("penstock_worker_phase_seconds_total{phase=\"ckpt\",rank=\"0\",run=\"5\"} 0"),
        std::string("penstock_worker_registered{node=\"w0\"} 1"),
        "penstock_worker_oom_total" + labels + " 0"}) {
    EXPECT_NE(page.find(line + "\n"), std::string::npos) << line << "\n" << page;
  }
  EXPECT_EQ(page.find("penstock_worker_host_memory_bytes" + labels + " 0\n"), std::string::npos);
}

}  // namespace
}  // namespace penstock
