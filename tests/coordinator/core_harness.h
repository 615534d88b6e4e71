// A coordinator core with a store in memory and workers that do what the test says: orders are
// obeyed only when a helper below is called. Time moves only in pass().
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "comm/base/exit_codes.h"
#include "coordinator/core/coordinator.h"
#include "tests/coordinator/memory_store.h"
#include "tests/run/spec_text.h"

namespace penstock {

// 4 ranks: pipeline 2, expert 2. 100 steps, a checkpoint every 20, at most 5 restarts.
inline JobSpec four_rank_spec(const std::string& name = "tiny") {
  JobSpec spec = parse_job_spec(kValidSpec, "s.yaml").value();
  spec.name = name;
  return spec;
}
// 1F1B on `ranks` ranks.
inline JobSpec flat_spec(const std::string& name, int64_t ranks) {
  JobSpec spec = four_rank_spec(name);
  spec.parallelism.schedule = Schedule::kOneForwardOneBackward;
  spec.parallelism.pipeline = 1;
  spec.parallelism.expert = 1;
  spec.parallelism.data = ranks;
  return spec;
}

class CoreHarness {
 public:
  struct FakeWorker {
    std::string name;
    std::string host;  // empty: one of its own
    int32_t devices = 0;
    uint64_t incarnation = 1;
    uint64_t sequence = 0;
    uint64_t challenge = 0;
    bool takes_copies = true;
    bool alive = true;  // sends heartbeats in pass()
    bool sound = true;  // its host passes checks
    bool answers_checks = true;
    Duration clock_ahead = {};
    std::map<std::tuple<JobId, Epoch, Rank>, RankStatus> ranks;
  };

  explicit CoreHarness(CoreConfig config = test_config()) : config_(config) {
    core_.emplace(config_);
    apply(core_->start(now_, {}).value());
    events.clear();
  }

  static CoreConfig test_config() {
    CoreConfig config;
    config.checkpoint_root = "/state/checkpoints";
    // A silent worker is lost after three beats.
    config.lease = std::chrono::seconds(2);
    config.lease_margin = std::chrono::seconds(1);
    return config;
  }

  // ---- driving

  void feed(const Event& event) { apply(core_->step(now_, event)); }
  void say(const std::string& worker, ControlMessage message) {
    feed(WorkerMessage{"peer-" + worker, std::move(message)});
  }
  void add_worker(const std::string& name, int32_t devices, const std::string& host = "") {
    workers[name].name = name;
    workers[name].host = host;
    workers[name].devices = devices;
    register_worker(name);
  }
  // As often as it is asked to.
  void register_worker(const std::string& name) {
    FakeWorker& worker = workers.at(name);
    say(name, registration_of(worker));
    for (const OutgoingMessage& out : std::vector<OutgoingMessage>(messages)) {
      const auto* answer = std::get_if<Registered>(&out.message);
      if (answer == nullptr || out.peer != "peer-" + name) continue;
      if (answer->challenge == 0 || answer->challenge == worker.challenge) continue;
      worker.challenge = answer->challenge;
      say(name, registration_of(worker));
    }
  }
  static Register registration_of(FakeWorker& worker) {
    const std::string& name = worker.name;
    Register message;
    message.name = name;
    message.incarnation = worker.incarnation;
    message.host = worker.host.empty() ? "host-" + name : worker.host;
    message.device_count = worker.devices;
    message.device_kind = "cpu";
    message.http_address = "127.0.0.1:9" + name.substr(1);
    message.state_address = worker.takes_copies ? "host-" + name + ":77" : "";
    message.state_key = {worker.incarnation, 7};
    message.sequence = ++worker.sequence;
    message.challenge = worker.challenge;
    for (const auto& [key, status] : worker.ranks) message.ranks.push_back(status);
    return message;
  }
  // The daemon process is replaced by a new one; its ranks are gone.
  void restart_worker(const std::string& name) {
    ++workers.at(name).incarnation;
    workers.at(name).sequence = 0;
    workers.at(name).challenge = 0;
    workers.at(name).ranks.clear();
    register_worker(name);
  }
  void heartbeat(const std::string& name) {
    FakeWorker& worker = workers.at(name);
    Heartbeat beat;
    beat.incarnation = worker.incarnation;
    beat.sequence = ++worker.sequence;
    beat.sent_at_ns = (now_ + worker.clock_ahead).nanoseconds;
    for (const auto& [key, status] : worker.ranks) beat.ranks.push_back(status);
    say(name, beat);
  }
  void pass(Duration span) {
    const Instant end = now_ + span;
    while (now_ < end) {
      now_ = now_ + std::chrono::milliseconds(500);
      for (const auto& [name, worker] : workers) {
        if (worker.alive) heartbeat(name);
      }
      feed(Tick{});
      check_hosts();
    }
  }
  // Every host that was asked to is checked.
  void check_hosts() {
    for (const OutgoingMessage& out : std::vector<OutgoingMessage>(messages)) {
      const auto* asked = std::get_if<CheckHost>(&out.message);
      const std::string name = out.peer.substr(5);
      if (asked == nullptr || !workers.at(name).answers_checks) continue;
      const bool sound = workers.at(name).sound;
      say(name, HostChecked{asked->request, sound, sound ? "all fine" : "memory: a word changed"});
    }
    std::erase_if(messages, [&](const OutgoingMessage& out) {
      return std::holds_alternative<CheckHost>(out.message) &&
             workers.at(out.peer.substr(5)).answers_checks;
    });
  }
  // Time passes and nothing runs.
  void jump(Duration span) { now_ = now_ + span; }
  Answer submit(const JobSpec& spec) {
    feed(SubmitJob{{++request_}, spec});
    return last_answer();
  }
  JobId submit_ok(const JobSpec& spec) {
    const Answer answer = submit(spec);
    EXPECT_TRUE(answer.status.ok()) << answer.status.to_string();
    return answer.job;
  }
  Answer cancel(JobId job, int64_t grace_ms = 5000) {
    feed(CancelJob{{++request_}, job, grace_ms});
    return last_answer();
  }
  Answer resume(JobId job, int64_t prove_steps = 0, std::optional<JobSpec> spec = {}) {
    feed(ResumeJob{{++request_}, job, prove_steps, std::move(spec)});
    return last_answer();
  }
  Answer remove(JobId job, bool checkpoints = false) {
    feed(RemoveJob{{++request_}, job, checkpoints});
    return last_answer();
  }
  Answer suspend(JobId job) {
    feed(SuspendJob{{++request_}, job});
    return last_answer();
  }
  Answer drain(const std::string& worker, const std::string& reason) {
    feed(DrainWorker{{++request_}, worker, reason});
    return last_answer();
  }
  Answer undrain(const std::string& worker) {
    feed(DrainWorker{{++request_}, worker, {}});
    return last_answer();
  }
  Answer quarantine(const std::string& worker, const std::string& reason) {
    feed(QuarantineWorker{{++request_}, worker, reason});
    return last_answer();
  }
  Answer release(const std::string& worker) {
    feed(QuarantineWorker{{++request_}, worker, {}});
    return last_answer();
  }
  Answer scale(JobId job, int64_t data) {
    feed(ScaleJob{{++request_}, job, data});
    return last_answer();
  }
  Answer rebalance(JobId job) {
    feed(RebalanceJob{{++request_}, job});
    return last_answer();
  }
  // A new coordinator process over the same store.
  void restart_coordinator() {
    core_.emplace(config_);
    StoredState stored;
    for (const auto& [key, value] : store) {
      for (const std::string_view prefix : kStatePrefixes) {
        if (key.starts_with(prefix)) stored.records.push_back({key, value});
      }
      if (key.starts_with(kEventPrefix)) stored.last_event_sequence = decode_event(value)->sequence;
    }
    Result<Effects> effects = core_->start(now_, stored);
    ASSERT_TRUE(effects.ok()) << effects.status().to_string();
    apply(*std::move(effects));
  }

  // ---- what workers do

  std::string host_of(JobId job, int32_t rank) const {
    return core_->find_worker(record(job).placement.at(rank).worker)->record.name;
  }
  // Every placed rank's process appears in its daemon's next heartbeat.
  void spawn_ranks(JobId job) {
    std::set<std::string> hosts;
    for (int32_t rank = 0; rank < std::ssize(record(job).placement); ++rank) {
      FakeWorker& worker = workers.at(host_of(job, rank));
      worker.ranks[{job, record(job).epoch, Rank{rank}}] = {job, record(job).epoch, Rank{rank}};
      hosts.insert(worker.name);
    }
    for (const std::string& host : hosts) heartbeat(host);
  }
  void ready(JobId job, int32_t rank) {
    say(host_of(job, rank),
        RankReady{job, record(job).epoch, Rank{rank}, "addr" + std::to_string(rank), data});
  }
  // From QUEUED with room to RUNNING.
  void run(JobId job) {
    spawn_ranks(job);
    const auto ranks = static_cast<int32_t>(record(job).placement.size());
    for (int32_t rank = 0; rank < ranks; ++rank) ready(job, rank);
    for (auto& [name, worker] : workers) {
      for (auto& [key, status] : worker.ranks) {
        if (std::get<0>(key) == job) status.state = RankState::kTraining;
      }
    }
    ASSERT_EQ(state(job), JobState::kRunning);
  }
  void train(JobId job, int64_t first, int64_t last,
             const std::function<void(StepReport&)>& change = {}) {
    for (int64_t step = first; step <= last; ++step) {
      StepReport report;
      report.job = job;
      report.epoch = record(job).epoch;
      report.step = step;
      report.loss = 5.0 - 0.01 * static_cast<double>(step);
      report.tokens = 1024;
      report.step_seconds = 0.5;
      if (change) change(report);
      say(host_of(job, 0), report);
    }
  }
  void save_segment(JobId job, int32_t rank, int64_t step, bool pauses = false) {
    SegmentSaved saved;
    saved.job = job;
    saved.epoch = record(job).epoch;
    saved.rank = Rank{rank};
    saved.step = step;
    saved.file = "segment-" + std::to_string(rank);
    saved.pauses = pauses;
    say(host_of(job, rank), saved);
  }
  void save_all(JobId job, int64_t step, bool pauses = false) {
    for (int32_t rank = 0; rank < std::ssize(record(job).placement); ++rank) {
      save_segment(job, rank, step, pauses);
    }
  }
  // Every rank pauses after `step`, whose checkpoint is committed.
  void pause(JobId job, int64_t step) {
    save_all(job, step, true);
    finish_commit();
  }
  // The newest CommitCheckpoint effect ends like this.
  void finish_commit(Status status = {}, const std::function<void(CheckpointDone&)>& change = {}) {
    ASSERT_FALSE(commits.empty());
    const CommitCheckpoint commit = commits.back();
    commits.pop_back();
    CheckpointDone done;
    done.job = commit.job;
    done.epoch = commit.epoch;
    done.step = commit.step;
    done.compared = commit.compare;
    done.status = std::move(status);
    done.checkpoint.manifest = commit.directory + "/" + std::to_string(commit.step) + ".manifest";
    done.checkpoint.bytes = 4096;
    done.checkpoint.weights_digest = "00ff";
    if (change) change(done);
    feed(done);
  }
  void checkpoint(JobId job, int64_t step) {
    save_all(job, step);
    finish_commit();
  }
  void exit_rank(JobId job, int32_t rank, ExitCode code, const std::string& reason = {}) {
    rank_exited(job, rank, static_cast<int32_t>(code), 0, reason);
  }
  void kill_rank(JobId job, int32_t rank) { rank_exited(job, rank, -1, 9, {}); }
  void crash_rank(JobId job, int32_t rank, int32_t signal = 11) {
    rank_exited(job, rank, -1, signal, {});
  }
  // Its daemon ends it.
  void stop_rank(JobId job, int32_t rank) {
    rank_exited(job, rank, -1, 9, std::string(kStoppedByDaemon) + "this attempt is over");
  }
  // Likewise, because it ends itself.
  void rank_ended_by_daemon(JobId job, int32_t rank) {
    rank_exited(job, rank, 12, 0, std::string(kStoppedByDaemon) + "the worker daemon is stopping");
  }
  // Workers with a StopRanks order confirm it, and those that are to keep it say that they hold
  // `held` of the ranks they ran.
  void confirm_stops(JobId job, const std::vector<int64_t>& held = {}) {
    const std::vector<RankPlacement> placement = record(job).placement;
    const std::vector<OutgoingMessage> orders = std::exchange(messages, {});
    for (const OutgoingMessage& order : orders) {
      const auto* stop = std::get_if<StopRanks>(&order.message);
      if (!stop || stop->job != job) continue;
      const std::string name = order.peer.substr(5);
      std::erase_if(workers.at(name).ranks, [&](const auto& rank) {
        return std::get<0>(rank.first) == job && std::get<1>(rank.first) <= stop->epoch;
      });
      RanksStopped answer{job, stop->epoch, {}};
      for (int32_t rank = 0; rank < std::ssize(placement); ++rank) {
        const bool here = core_->find_worker(placement[rank].worker)->record.name == name;
        if (here && stop->keep_state && !held.empty()) answer.held.push_back({Rank{rank}, held});
      }
      say(name, answer);
    }
  }
  // A FindCheckpoint is answered with the newest checkpoint committed, or with `found`.
  void answer_find() {
    ASSERT_FALSE(finds.empty());
    CheckpointFound found;
    found.job = finds.back().job;
    if (const auto& newest = record(found.job).checkpoint) {
      found.step = newest->step;
      found.manifest = newest->manifest;
    }
    answer_find(found);
  }
  void answer_find(CheckpointFound found) {
    ASSERT_FALSE(finds.empty());
    found.number = finds.back().number;
    finds.pop_back();
    feed(found);
  }
  // The oldest ReadSteps, and those that follow from its answer.
  void answer_reads() {
    while (!reads.empty()) {
      const ReadSteps read = reads.front();
      reads.erase(reads.begin());
      MemoryStore records;
      records.map = store;
      feed(read_steps(records, read));
    }
  }
  void finish_ranks(JobId job) {
    const auto count = static_cast<int32_t>(record(job).placement.size());
    for (int32_t rank = 0; rank < count; ++rank) {
      say(host_of(job, rank), RankFinished{job, record(job).epoch, Rank{rank}, 100});
    }
  }

  // ---- looking

  const JobRecord& record(JobId job) const { return core_->find_job(job)->record; }
  JobState state(JobId job) const { return record(job).state; }
  const Job& job(JobId id) const { return *core_->find_job(id); }
  Coordinator& core() { return *core_; }
  Instant now() const { return now_; }
  // Messages of one kind since the last clear().
  template <typename Message>
  std::vector<Message> sent() const {
    std::vector<Message> found;
    for (const OutgoingMessage& out : messages) {
      if (const auto* message = std::get_if<Message>(&out.message)) found.push_back(*message);
    }
    return found;
  }
  bool has_event(const std::string& code) const {
    for (const JobEvent& event : events) {
      if (event.reason.code == code) return true;
    }
    return false;
  }
  // "QUEUED>PLACING>STARTING": the transitions of a job since the start.
  std::string path(JobId job) const {
    std::string text;
    for (const JobEvent& event : events) {
      if (event.job != job || !event.from) continue;
      text += (text.empty() ? "" : ">") + std::string(job_state_name(*event.state));
    }
    return text;
  }
  void clear() { messages.clear(); }

  std::map<std::string, FakeWorker> workers;
  std::map<std::string, std::string> store;
  std::vector<DataIdentity> data;  // what ranks find
  std::vector<OutgoingMessage> messages;
  std::vector<JobEvent> events;
  std::vector<Answer> answers;
  std::vector<CommitCheckpoint> commits;
  std::vector<FindCheckpoint> finds;
  std::vector<RemoveCheckpoints> removals;
  std::vector<ReadSteps> reads;
  bool answers_reads = true;  // at once
  std::vector<LogChunk> log_chunks;

 private:
  void rank_exited(JobId job, int32_t rank, int32_t code, int32_t signal,
                   const std::string& reason) {
    FakeWorker& worker = workers.at(host_of(job, rank));
    worker.ranks.erase({job, record(job).epoch, Rank{rank}});
    say(worker.name, RankExited{job, record(job).epoch, Rank{rank}, code, signal, reason});
  }
  void apply(Effects effects) {
    for (const JobId job : effects.removed_jobs) {
      for (const std::string& prefix : prefixes_of(job)) {
        std::erase_if(store, [&](const auto& entry) { return entry.first.starts_with(prefix); });
      }
    }
    for (const Record& written : records_of(effects)) store[written.key] = written.value;
    const auto append = [](auto& to, auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    append(messages, effects.messages);
    append(events, effects.events);
    append(answers, effects.answers);
    append(commits, effects.commits);
    append(finds, effects.finds);
    append(removals, effects.removals);
    append(log_chunks, effects.log_chunks);
    append(reads, effects.reads);
    if (answers_reads) answer_reads();
  }
  Answer last_answer() {
    EXPECT_FALSE(answers.empty());
    return answers.empty() ? Answer{} : answers.back();
  }

  const CoreConfig config_;
  Instant now_{1'000'000'000'000};
  uint64_t request_ = 0;
  std::optional<Coordinator> core_;
};

}  // namespace penstock
