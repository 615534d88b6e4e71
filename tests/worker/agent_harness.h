// An agent without sockets, processes or clocks: its actions are recorded.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "worker/agent/agent.h"

namespace penstock {

inline constexpr int64_t kMs = 1'000'000;
inline constexpr JobId kJob{7};

inline RankKey key(uint32_t epoch, int32_t rank) {
  return {kJob, {epoch}, {rank}};
}

inline StartRank start_rank(uint32_t epoch, int32_t rank, int32_t device = 0) {
  StartRank start;
  start.job = kJob;
  start.epoch = {epoch};
  start.rank = {rank};
  start.device = device;
  start.spec_json = "{}";
  start.checkpoint_dir = "/checkpoints";
  return start;
}

inline StepReport step_report(int64_t step, uint32_t epoch = 1) {
  return {.job = kJob, .epoch = {epoch}, .step = step, .loss = 1.0, .grad_norm = 1.0};
}

inline SegmentSaved segment_saved(int64_t step, int32_t rank = 0) {
  SegmentSaved saved;
  saved.job = kJob;
  saved.epoch = {1};
  saved.rank = {rank};
  saved.step = step;
  saved.file = "segment";
  return saved;
}

// An agent whose actions are recorded. `sent` is what reached the coordinator.
class AgentTest : public ::testing::Test {
 protected:
  AgentTest() { make_agent({}); }

  void make_agent(const ReportQueueLimits& limits) {
    AgentConfig config;
    config.name = "w0";
    config.incarnation = 42;
    config.host = "host";
    config.device_count = 2;
    config.http_address = "127.0.0.1:9";
    config.log_bytes_max = 100;
    config.reports = limits;
    AgentActions actions;
    actions.send_to_coordinator = [this](const ControlMessage& message) {
      if (!send_result.ok()) return send_result;
      sent.push_back(message);
      return Status();
    };
    actions.send_to_rank = [this](const RankKey& to, const ControlMessage& message) {
      sent_to_ranks.emplace_back(to, message);
      return Status();
    };
    actions.spawn_rank = [this](const StartRank& start) -> Result<int32_t> {
      if (spawn_failures > 0) {
        --spawn_failures;
        return resource_exhausted("no process left");
      }
      if (!spawn_result.ok()) return spawn_result;
      spawned.push_back({start.job, start.epoch, start.rank});
      return 1000 + static_cast<int32_t>(spawned.size());
    };
    actions.signal_rank = [this](const RankKey& to, int signal) {
      signals.emplace_back(to, signal);
    };
    actions.held_state = [this](JobId job) { return job == kJob ? held : std::vector<HeldRank>(); };
    actions.drop_state_before = [this](JobId job, Epoch epoch) { dropped.push_back({job, epoch}); };
    actions.mirror = [this](const MirrorRanks& order) { mirrored.push_back(order); };
    actions.held_copies = [this](JobId job, Epoch epoch) {
      EXPECT_GE(copies_fenced, epoch) << "one more may be added to those that are listed";
      return job == kJob ? copies[epoch] : std::vector<HeldRank>();
    };
    actions.fence_copies = [this](JobId job, Epoch epoch) {
      if (job == kJob) copies_fenced = epoch;
    };
    actions.begin_pulses = [this](const PulseThread::Registration& registration) {
      registrations.push_back(registration);
    };
    actions.heard = [this](int64_t sent_ns) { heard_ns.push_back(sent_ns); };
    actions.inspect_rank = [](const RankKey& of) {
      return RankActivity{
          .rank = of.rank, .process = ProcessState::kStopped, .state = {}, .quiet_ms = 7000};
    };
    actions.check_host = [this] {
      ++checks_begun;
      return check_result;
    };
    actions.wall_clock = [this] { return wall; };
    actions.exit = [this](ExitCode code, const std::string& why) { exits.emplace_back(code, why); };
    agent = std::make_unique<Agent>(config, actions);
  }

  void coordinator(const ControlMessage& message) { agent->on_coordinator_message(now, message); }
  void rank_says(const RankKey& from, const ControlMessage& message) {
    agent->on_rank_message(now, from, message);
  }
  void register_agent() {
    agent->on_connected(now);
    coordinator(Registered{{3}, 1000, ""});
    sent.clear();
  }
  // A rank that was started, connected and is loaded.
  void run_rank(const RankKey& rank) {
    coordinator(start_rank(rank.epoch.value, rank.rank.value));
    const int32_t pid = 1000 + static_cast<int32_t>(spawned.size());
    ASSERT_TRUE(agent->accepts({rank.job, rank.epoch, rank.rank, pid}));
    agent->on_rank_bound(rank);
    rank_says(rank, RankReady{rank.job, rank.epoch, rank.rank, "address"});
    sent.clear();
    sent_to_ranks.clear();
  }

  template <typename Message>
  std::vector<Message> sent_of() const {
    std::vector<Message> found;
    for (const ControlMessage& message : sent) {
      if (const auto* kind = std::get_if<Message>(&message)) found.push_back(*kind);
    }
    return found;
  }

  int64_t now = 1000 * kMs;
  Status send_result;
  Status spawn_result;
  int checks_begun = 0;
  Status check_result;
  Instant wall{1'700'000'000'000'000'000};
  int spawn_failures = 0;  // so many fail first
  std::vector<ControlMessage> sent;
  std::vector<std::pair<RankKey, ControlMessage>> sent_to_ranks;
  std::vector<RankKey> spawned;
  std::vector<std::pair<RankKey, int>> signals;
  std::vector<std::pair<ExitCode, std::string>> exits;
  std::vector<PulseThread::Registration> registrations;
  std::vector<int64_t> heard_ns;
  std::vector<HeldRank> held;                     // in memory, of kJob
  std::map<Epoch, std::vector<HeldRank>> copies;  // likewise
  Epoch copies_fenced;
  std::vector<MirrorRanks> mirrored;  // orders
  std::vector<std::pair<JobId, Epoch>> dropped;
  std::unique_ptr<Agent> agent;
};

}  // namespace penstock
