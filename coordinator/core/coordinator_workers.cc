// Worker daemons: registration, heartbeats, silence, and the orders that are repeated until done.
#include <algorithm>

#include "comm/base/check.h"
#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

namespace penstock {
namespace {

constexpr int32_t kDevicesPerWorkerMax = 4096;
constexpr size_t kWorkerNameBytesMax = 255;
// Ticks may be that late without anybody's having been away; leases have a longer margin.
constexpr Duration kTickLateMin = std::chrono::milliseconds(500);
constexpr size_t kWorkersMax = 65'536;  // ever; each name is on record for good

int64_t to_milliseconds(Duration span) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(span).count();
}

}  // namespace

void Coordinator::on_event(const WorkerMessage& event) {
  arrived_ = event.arrived.value_or(now_);
  if (const auto* registration = std::get_if<Register>(&event.message)) {
    return on_register(event.peer, *registration);
  }
  const auto peer = worker_by_peer_.find(event.peer);
  if (peer == worker_by_peer_.end()) {
    // A worker that talked to the coordinator before this one: ask it to introduce itself.
    effects_.messages.push_back({event.peer, welcome({})});
    return;
  }
  Worker& worker = workers_.at(peer->second);
  if (worker.state != WorkerState::kUp) {
    // It was given up, and its ranks' devices with it: it must say anew what it runs.
    effects_.messages.push_back({event.peer, welcome({})});
    return;
  }
  hear(worker);
  std::visit(
      [&](const auto& message) {
        if constexpr (requires { this->on_message(worker, message); }) {
          on_message(worker, message);
        } else {
          effects_.log.push_back(
              {LogLevel::kWarning,
               fmt::format("worker {} sent a {}, which is not a worker's to send",
                           worker.record.name, message_name(event.message))});
        }
      },
      event.message);
}

std::string Coordinator::refusal_of(const Register& message) const {
  if (message.protocol_version != kProtocolVersion) {
    return fmt::format("the worker speaks protocol {} and this coordinator {}; install one version",
                       message.protocol_version, kProtocolVersion);
  }
  if (message.name.empty() || message.name.size() > kWorkerNameBytesMax) {
    return fmt::format("a worker's name has 1 to {} bytes", kWorkerNameBytesMax);
  }
  if (workers_.size() >= kWorkersMax && !worker_by_name_.contains(message.name)) {
    return fmt::format("{} workers are known already; give restarted daemons their old name",
                       kWorkersMax);
  }
  if (message.device_count < 1 || message.device_count > kDevicesPerWorkerMax) {
    return fmt::format("a worker has 1 to {} devices, not {}", kDevicesPerWorkerMax,
                       message.device_count);
  }
  return {};
}

void Coordinator::on_register(const std::string& peer, const Register& message) {
  const auto turn_away = [&](const std::string& whom, std::string refusal) {
    Registered answer = welcome({});
    answer.refusal = std::move(refusal);
    effects_.messages.push_back({whom, std::move(answer)});
  };
  if (std::string refusal = refusal_of(message); !refusal.empty()) {
    note_cluster("worker " + message.name.substr(0, kWorkerNameBytesMax),
                 {"worker_refused", refusal});
    return turn_away(peer, std::move(refusal));
  }
  const auto known = worker_by_name_.find(message.name);
  const bool is_new = known == worker_by_name_.end();
  const WorkerId id = !is_new            ? known->second
                      : workers_.empty() ? WorkerId{1}
                                         : WorkerId{workers_.rbegin()->first.value + 1};
  Worker& worker = workers_[id];
  worker.record.id = id;
  worker.record.name = message.name;
  worker_by_name_[message.name] = id;
  const bool restarted = !is_new && worker.record.incarnation != message.incarnation;
  const std::string successor = fmt::format(
      "another daemon named \"{}\" has registered since; names must be unique among workers",
      message.name);
  if (restarted && worker.was_replaced(message.incarnation)) return turn_away(peer, successor);
  if (restarted && !proves_alive(worker, peer, message)) return;
  const bool late = !is_new && !restarted && message.sequence <= worker.heard_sequence;
  if (late) return;  // of an older connection of the same daemon, or repeated
  const bool replaced = restarted && worker.state == WorkerState::kUp && worker.peer != peer;
  if (replaced) turn_away(worker.peer, successor);
  if (restarted) worker.note_replaced();
  if (worker.state != WorkerState::kUp || restarted) {
    note_cluster(
        "worker " + message.name,
        {"worker_up", fmt::format("{} on {} with {} ({})", message.name, message.host,
                                  counted(message.device_count, "device"), message.device_kind)});
  }
  const bool cluster_restarted = restarted && worker.state == WorkerState::kExpected;
  adopt_connection(worker, peer, message);
  send(id, welcome(id));
  if (restarted) on_new_incarnation(worker, cluster_restarted);
  observe_ranks(worker, message.ranks);
  for (const JobId job_id : std::set<JobId>(open_jobs_)) {
    Job& job = jobs_.at(job_id);
    if (job.awaiting.contains(id)) send_stop(job, id);
    if (hosts(job).contains(id)) heard_of(job);  // it may have had more to say
  }
  stop_stale(worker);
  schedule_needed_ = true;
}

Registered Coordinator::welcome(WorkerId id, uint64_t heard_sequence) const {
  return {id,
          to_milliseconds(config_.heartbeat_interval),
          {},
          to_milliseconds(config_.lease),
          heard_sequence};
}

// What a daemon said before it ended may come after its successor's first words, and by itself does
// not tell which of them is the one that ended: only who lives can repeat what it is asked.
bool Coordinator::proves_alive(Worker& worker, const std::string& peer, const Register& message) {
  Worker::Challenge& challenge = worker.challenge;
  if (challenge.incarnation != message.incarnation) {
    challenge = {message.incarnation, static_cast<uint64_t>(now_.nanoseconds)};
  } else if (challenge.number == message.challenge) {
    challenge = {};
    return true;
  }
  Registered question = welcome({});
  question.challenge = challenge.number;
  effects_.messages.push_back({peer, std::move(question)});
  return false;
}

void Coordinator::stop_stale(Worker& worker) {
  worker.stale_ordered_at = now_;
  for (const auto& [job, epoch] : worker.stale) {
    send(worker.record.id, StopRanks{job, epoch, 0, "this attempt is over"});
  }
}

void Coordinator::adopt_connection(Worker& worker, const std::string& peer,
                                   const Register& message) {
  const WorkerId id = worker.record.id;
  if (!worker.peer.empty()) worker_by_peer_.erase(worker.peer);
  if (const auto other = worker_by_peer_.find(peer); other != worker_by_peer_.end()) {
    workers_.at(other->second).peer.clear();
  }
  worker_by_peer_[peer] = id;
  WorkerRecord record = worker.record;
  record.incarnation = message.incarnation;
  record.device_count = message.device_count;
  record.lost = false;
  const bool record_changed = worker.record.incarnation != record.incarnation ||
                              worker.record.device_count != record.device_count ||
                              worker.record.lost;
  if (worker.record.incarnation != record.incarnation) {
    worker.stale.clear();
    worker.leaving = false;
  }
  worker.record = record;
  worker.heard_sequence = message.sequence;
  if (record_changed) effects_.workers.push_back(record);
  worker.state = WorkerState::kUp;
  worker.peer = peer;
  worker.host = message.host;
  worker.device_kind = message.device_kind;
  worker.http_address = message.http_address;
  worker.state_place = {message.state_address, message.state_key};
  worker.last_seen = now_;
}

// The daemon's process is a new one: every rank of the old one died with it.
void Coordinator::on_new_incarnation(Worker& worker, bool cluster_restarted) {
  const std::string& name = worker.record.name;
  for (const JobId id : std::set<JobId>(open_jobs_)) {
    Job& job = jobs_.at(id);
    forget_held(job, worker.record.id);
    if (!hosts(job).contains(worker.record.id)) continue;
    Failure failure;
    failure.reason = {cluster_restarted ? kCauseClusterRestarted : "worker_restarted",
                      fmt::format("{}worker {} was restarted, which ended its ranks",
                                  cluster_restarted ? "like the coordinator, " : "", name)};
    failure.worker = name;
    fail(job, std::move(failure));
    worker_stopped(job, worker.record.id);
  }
}

void Coordinator::on_message(Worker& worker, const Heartbeat& message) {
  if (message.incarnation != worker.record.incarnation) return;
  if (message.sequence <= worker.heard_sequence) return;  // late or repeated
  worker.heard_sequence = message.sequence;
  send(worker.record.id, welcome(worker.record.id, message.sequence));
  if (message.sent_at_ns != 0) compare_clock(worker, {message.sent_at_ns});
  observe_ranks(worker, message.ranks);
  if (!worker.stale.empty() && now_ - worker.stale_ordered_at >= two_beats()) stop_stale(worker);
}

bool Coordinator::hears(WorkerId id, uint64_t incarnation) const {
  const Worker* const worker = find_worker(id);
  return worker != nullptr && worker->state == WorkerState::kUp &&
         worker->record.incarnation == incarnation;
}

// It says nothing about the worker's ranks: that is for heartbeats.
void Coordinator::on_event(const WorkerPulse& pulse) {
  if (hears(pulse.worker, pulse.incarnation)) hear(workers_.at(pulse.worker));
}

void Coordinator::on_event(const WorkerGone& gone) {
  if (!hears(gone.worker, gone.incarnation)) return;
  Worker& worker = workers_.at(gone.worker);
  lose_worker(worker, fmt::format("the daemon of worker {} has ended, and its ranks with it: "
                                  "its host refuses connections to it",
                                  worker.record.name));
}

void Coordinator::observe_ranks(Worker& worker, const std::vector<RankStatus>& ranks) {
  std::set<JobId> touched;
  for (const HostedRank& hosted : worker.hosted) {
    Job& job = jobs_.at(hosted.job);
    RankView& rank = job.ranks[hosted.rank.value];
    const bool must_run = wants_ranks(job.record.state) && !rank.finished &&
                          (rank.seen || job.record.state != JobState::kStarting);
    if (must_run) {  // unless it is listed, below
      if (!rank.missing_since) rank.missing_since = now_;
      ++rank.missing_beats;
    }
    touched.insert(hosted.job);
  }
  for (const RankStatus& status : ranks) observe_rank(worker, status);
  for (const JobId id : touched) {
    Job& job = jobs_.at(id);
    if (wants_ranks(job.record.state)) advance(job);
    check_finished(job);
  }
}

void Coordinator::observe_rank(Worker& worker, const RankStatus& status) {
  Job* job = current_epoch(status.job, status.epoch);
  RankView* rank = job ? hosted_rank(*job, status.rank, worker.record.id) : nullptr;
  if (!rank) {
    const auto newer = jobs_.find(status.job);
    if (newer != jobs_.end() && newer->second.record.epoch < status.epoch) {
      effects_.log.push_back(
          {LogLevel::kError,
           fmt::format(
               "worker {} runs epoch {} of job {}, which has only reached epoch {} here; was "
               "the state directory replaced by an older copy?",
               worker.record.name, status.epoch, status.job, newer->second.record.epoch)});
    }
    Epoch& stale = worker.stale[status.job];
    if (stale < status.epoch) worker.stale_ordered_at = {};  // its stop is due at once
    stale = std::max(stale, status.epoch);
    return;
  }
  rank->seen = true;
  rank->missing_since.reset();
  rank->missing_beats = 0;
  if (status.state != rank->state || status.step > rank->step) heard_of(*job);
  rank->state = status.state;
  rank->step = std::max(rank->step, status.step);
  if (status.pace.steps > rank->pace.steps) rank->pace = status.pace;
  if (status.state == RankState::kFinished) rank->finished = true;
}

void Coordinator::on_event(const Tick&) {
  // A long time since the last tick means that this process did not run: the silence was ours, not
  // theirs.
  const Duration away = now_ - last_tick_;
  last_tick_ = now_;
  if (away > std::max(config_.heartbeat_interval, kTickLateMin)) {
    // Workers have been told all the while that this host can be reached: their leases are whole.
    for (auto& [id, worker] : workers_) hear(worker);
    for (const JobId id : open_jobs_) {
      Job& job = jobs_.at(id);
      job.heard_at = std::min(now_, job.heard_at + away);
      job.inquiry.reset();  // what was answered is old
    }
  }
  for (auto& [id, worker] : workers_) {
    if (lease_is_over(worker)) {
      lose_worker(worker, fmt::format("no word from worker {} for {:.1f} s", worker.record.name,
                                      to_seconds(now_ - worker.last_seen)));
    }
    const bool stop_due = !worker.stale.empty() && now_ - worker.stale_ordered_at >= two_beats();
    if (stop_due && worker.state == WorkerState::kUp) stop_stale(worker);
    conclude_drain(worker);
    watch_health(worker);
  }
  for (const JobId id : std::set<JobId>(open_jobs_)) {
    Job& job = jobs_.at(id);
    check_deadlines(job);
    watch_for_hang(job);
    watch_pace(job);
    do_without_silent(job);
    pause_when_wanted(job);
    keep_mirroring(job);
    repeat_orders(job);
    if (!job.placed() && now_ >= job.place_after && job.restore == Restore::kUnknown) {
      schedule_needed_ = true;
    }
  }
}

void Coordinator::hear(Worker& worker) {
  if (is_silent(worker)) {
    schedule_needed_ = true;       // it gets ranks again
    worker.stale_ordered_at = {};  // and hears at once what it did not
  }
  worker.last_seen = now_;
}

bool Coordinator::is_silent(const Worker& worker) const {
  return worker.state == WorkerState::kUp &&
         now_ - worker.last_seen > config_.silent_beats * config_.heartbeat_interval;
}

bool Coordinator::lease_is_over(const Worker& worker) const {
  const Duration lease = config_.lease + config_.lease_margin;
  const Duration silence = now_ - worker.last_seen;
  if (worker.state == WorkerState::kUp) return silence > lease;
  // The coordinator before this one may have heard it until it went down.
  return worker.state == WorkerState::kExpected && silence > std::max(lease, config_.startup_grace);
}

Failure Coordinator::failure_of_silent(const Worker& worker) const {
  Failure failure;
  failure.reason = {kCauseWorkerLost,
                    fmt::format("no word from worker {} for {:.1f} s, and ranks elsewhere lost it",
                                worker.record.name, to_seconds(now_ - worker.last_seen))};
  failure.worker = worker.record.name;
  return failure;
}

// Of an epoch that ends: those it awaits no longer have stopped their ranks, which proves that it
// makes no progress.
void Coordinator::do_without_silent(Job& job) {
  if (job.awaiting.empty() || job.awaiting.size() == hosts(job).size()) return;
  for (const WorkerId id : std::set<WorkerId>(job.awaiting)) {
    Worker& worker = workers_.at(id);
    if (!is_silent(worker)) continue;
    worker.stale[job.record.id] = job.record.epoch;
    fail(job, failure_of_silent(worker));  // nothing, where a cause is known
    worker_stopped(job, id);
    if (!job.placed()) return;
  }
}

void Coordinator::lose_worker(Worker& worker, const std::string& why) {
  worker.state = WorkerState::kLost;
  worker.record.lost = true;
  effects_.workers.push_back(worker.record);
  for (const HostedRank& hosted : worker.hosted) {
    worker.stale[hosted.job] = jobs_.at(hosted.job).record.epoch;
  }
  const std::string& name = worker.record.name;
  note_cluster("coordinator", {kCauseWorkerLost, why});
  for (const JobId id : std::set<JobId>(open_jobs_)) {
    Job& job = jobs_.at(id);
    if (!hosts(job).contains(worker.record.id)) continue;
    Failure failure;
    failure.reason = {kCauseWorkerLost, why};
    failure.worker = name;
    fail(job, std::move(failure));
    worker_stopped(job, worker.record.id);
  }
  schedule_needed_ = true;
}

void Coordinator::check_deadlines(Job& job) {
  JobRecord& record = job.record;
  if (!wants_ranks(record.state)) return;
  for (size_t i = 0; i < job.ranks.size(); ++i) {
    const RankView& rank = job.ranks[i];
    // One heartbeat may be from before the rank was, and be the last word for long.
    const bool said_again = rank.missing_beats > 1;
    if (!said_again || now_ - *rank.missing_since < two_beats()) continue;
    Failure failure;
    failure.rank = Rank{static_cast<int32_t>(i)};
    failure.worker = worker_name(record.placement[i].worker);
    failure.reason = {
        "rank_missing",
        fmt::format("rank {} on {} is gone, and its daemon has not said why", i, failure.worker)};
    return fail(job, std::move(failure));
  }
  if (record.state == JobState::kStarting && now_ - job.epoch_began > config_.start_timeout) {
    const auto unseen = std::find_if(job.ranks.begin(), job.ranks.end(),
                                     [](const RankView& rank) { return !rank.seen; });
    const auto index = static_cast<int32_t>(unseen - job.ranks.begin());
    Failure failure;
    failure.rank = Rank{index};
    failure.worker = worker_name(record.placement[index].worker);
    failure.reason = {"start_timeout",
                      fmt::format("rank {} on {} did not start within {:.0f} s", index,
                                  failure.worker, to_seconds(config_.start_timeout))};
    failure.host_suspect = true;
    return blame_host(job, std::move(failure));
  }
  for (const auto& [step, round] : std::map<int64_t, CheckpointRound>(job.rounds)) {
    if (round.committing || now_ - round.opened <= config_.checkpoint_timeout) continue;
    fail_round(job, step,
               fmt::format("{} of {} ranks had saved after {:.0f} s", round.segments.size(),
                           job.ranks.size(), to_seconds(config_.checkpoint_timeout)));
  }
}

// Orders may be lost with a connection; what workers report says which ones were.
void Coordinator::repeat_orders(Job& job) {
  if (!job.placed() || now_ - job.ordered_at < two_beats()) return;
  job.ordered_at = now_;
  for (const WorkerId worker : job.awaiting) send_stop(job, worker);
  if (!wants_ranks(job.record.state)) return;
  const bool running = job.record.state == JobState::kRunning;
  const bool all_addresses =
      std::all_of(job.ranks.begin(), job.ranks.end(),
                  [](const RankView& rank) { return rank.address.has_value(); });
  std::set<WorkerId> not_begun;
  for (size_t i = 0; i < job.ranks.size(); ++i) {
    const RankView& rank = job.ranks[i];
    const WorkerId worker = job.record.placement[i].worker;
    if (running && rank.state == RankState::kReady) not_begun.insert(worker);
    // A repeated StartRank makes the daemon start the rank, or repeat what it said of it.
    const bool report_missing = !rank.seen || rank.state == RankState::kReady;
    if (!running && !rank.address && report_missing) send_start(job, Rank{static_cast<int32_t>(i)});
  }
  if (not_begun.empty()) return;
  if (all_addresses) {
    for (const WorkerId worker : not_begun) send_begin(job, worker);
    return;
  }
  for (size_t i = 0; i < job.ranks.size(); ++i) {
    if (!job.ranks[i].address) send_start(job, Rank{static_cast<int32_t>(i)});
  }
}

}  // namespace penstock
