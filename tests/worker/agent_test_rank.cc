// Stands in for penstock-rank in tests of the worker daemon: speaks the rank's side of the protocol
// (agent.h), but instead of training does what StartRank.spec_json asks for:
//   finish   ten steps, one segment, waits for its outcome, says it finished, exits 0
//   crash    one line on stderr, exits 14
//   steps    a step every 2 ms, for ever
//   stubborn for ever, and deaf to SIGTERM
//   flood    prints 20 MB, then goes on as `steps`
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "comm/control/channel.h"
#include "comm/control/event_loop.h"

namespace penstock {
namespace {

constexpr int64_t kSteps = 10;

class TestRank {
 public:
  TestRank(RankHello hello, const std::string& endpoint) : hello_(hello) {
    DealerChannel::Handlers handlers;
    handlers.on_message = [this](const ControlMessage& message) { on_message(message); };
    auto channel = DealerChannel::connect(loop_, endpoint, {}, std::move(handlers));
    PENSTOCK_CHECK(channel.ok(), channel.status().message());
    channel_ = std::move(channel).value();
    send(hello_);
  }

  void run() { loop_.run(); }

 private:
  // False when a daemon that is held up leaves no room.
  bool send(const ControlMessage& message) {
    const Status sent = channel_->send(message);
    PENSTOCK_CHECK(sent.ok() || sent.code() == Code::kResourceExhausted, sent.message());
    return sent.ok();
  }

  void on_message(const ControlMessage& message) {
    if (const auto* start = std::get_if<StartRank>(&message)) {
      behaviour_ = start->spec_json;
      std::printf("rank %d runs as process %d\n", hello_.rank.value, hello_.pid);
      std::fflush(stdout);
      if (behaviour_ == "stubborn") ::signal(SIGTERM, SIG_IGN);
      send(RankReady{hello_.job, hello_.epoch, hello_.rank, "address"});
    } else if (std::holds_alternative<BeginTraining>(message)) {
      begin();
    } else if (std::holds_alternative<CheckpointOutcome>(message)) {
      send(RankFinished{hello_.job, hello_.epoch, hello_.rank, kSteps});
      channel_.reset();
      loop_.stop();
    }
  }

  void begin() {
    if (behaviour_ == "crash") {
      std::fprintf(stderr, "penstock-rank: the matrix caught fire\n");
      std::exit(14);
    }
    if (behaviour_ == "flood") {
      const std::string line(99, '#');
      for (int i = 0; i < 200'000; ++i) std::puts(line.c_str());
      std::fflush(stdout);
    }
    if (behaviour_ == "finish") {
      while (step_ < kSteps) finish_step();
      save();
    } else if (behaviour_ != "stubborn") {
      loop_.call_every(std::chrono::milliseconds(2), [this] { finish_step(); });
    }
  }

  void finish_step() {
    StepReport report = {.job = hello_.job, .epoch = hello_.epoch, .step = step_ + 1};
    report.loss = 1.0 / static_cast<double>(report.step);
    if (!send(report)) return;  // the step ends when there is room
    ++step_;
    RankProgress progress = {
        .job = hello_.job, .epoch = hello_.epoch, .rank = hello_.rank, .step = step_};
    progress.step_seconds = 0.25;
    progress.compute_seconds = 0.125;
    progress.bytes_sent = static_cast<uint64_t>(step_) * 1000;
    send(progress);  // the newest wins: one without room is no loss
  }

  void save() {
    SegmentSaved saved;
    saved.job = hello_.job;
    saved.epoch = hello_.epoch;
    saved.rank = hello_.rank;
    saved.step = kSteps;
    saved.file = "segment";
    send(saved);
  }

  const RankHello hello_;
  EventLoop loop_;
  std::unique_ptr<DealerChannel> channel_;
  std::string behaviour_;
  int64_t step_ = 0;
};

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  CLI::App app("Test rank", "agent_test_rank");
  penstock::RankHello hello;
  std::string endpoint;
  app.add_option("--daemon", endpoint)->required();
  app.add_option("--job", hello.job.value)->required();
  app.add_option("--epoch", hello.epoch.value)->required();
  app.add_option("--rank", hello.rank.value)->required();
  std::string trace_file;
  app.add_option("--trace-file", trace_file);
  std::string state_file;
  app.add_option("--state-file", state_file);
  std::string flight_file;
  app.add_option("--flight-file", flight_file);
  std::string lease_file;
  app.add_option("--lease-file", lease_file);
  CLI11_PARSE(app, argc, argv);
  hello.pid = getpid();
  penstock::TestRank(hello, endpoint).run();
}
