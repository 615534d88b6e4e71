#include "tests/worker/rank_fake_daemon.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>

#include "checkpoint/saved_slice.h"
#include "comm/base/clock.h"
#include "comm/run/layout.h"
#include "worker/agent/rank_output.h"

namespace penstock {

FakeDaemon::FakeDaemon(FakeDaemonOptions options)
    : options_(std::move(options)),
      world_size_(static_cast<int32_t>(options_.spec.parallelism.world_size())) {
  RouterChannel::Handlers handlers;
  handlers.on_message = [this](const PeerId& peer, ControlMessage message) {
    on_message(peer, std::move(message));
  };
  handlers.on_rejected = [](const Rejection& rejection) {
    ADD_FAILURE() << "a rank sent what is no message: " << rejection.reason.to_string();
  };
  Result<std::unique_ptr<RouterChannel>> channel = RouterChannel::bind(
      loop_, "ipc://" + (options_.directory / "daemon.sock").string(), std::move(handlers));
  PENSTOCK_CHECK(channel.ok(), channel.status().message());
  channel_ = *std::move(channel);
  Result<CheckpointStore> store =
      CheckpointStore::open(options_.directory / "store", kJob, nullptr);
  if (options_.checkpoint_dir == options_.directory / "store" && store.ok())
    store_ = *std::move(store);
  thread_ = std::thread([this] { loop_.run(); });
}

FakeDaemon::~FakeDaemon() {
  loop_.post([this] {
    channel_.reset();
    loop_.stop();
  });
  thread_.join();
  children_.clear();  // kills what still runs
}

void FakeDaemon::spawn_all() {
  const std::lock_guard lock(mutex_);  // a rank may say hello before the last one is spawned
  for (int32_t r = 0; r < world_size_; ++r) {
    const Result<Path> binary = sibling_binary("penstock-rank");
    ASSERT_TRUE(binary.ok()) << binary.status().to_string();
    SpawnOptions spawn;
    spawn.argv = {binary->string(),        "--daemon", channel_->endpoint(),      "--job",
                  fmt::format("{}", kJob), "--epoch",  fmt::format("{}", kEpoch), "--rank",
                  std::to_string(r)};
    if (!options_.state_file.empty()) {
      spawn.argv.insert(spawn.argv.end(), {"--state-file", options_.state_file});
    }
    Result<ChildProcess> child = ChildProcess::spawn(spawn);
    ASSERT_TRUE(child.ok()) << child.status().to_string();
    outputs_.push_back(child->take_stderr());
    children_.push_back(std::make_unique<ChildProcess>(*std::move(child)));
  }
}

ChildProcess& FakeDaemon::child(int32_t rank) {
  const std::lock_guard lock(mutex_);
  return *children_[static_cast<size_t>(rank)];
}

void FakeDaemon::send_to(int32_t rank, const ControlMessage& message) {
  loop_.post([this, rank, message] {
    EXPECT_TRUE(peers_.contains(rank) && channel_->send(peers_[rank], message).ok());
  });
}

void FakeDaemon::send_all(const ControlMessage& message) {
  for (const auto& [rank, peer] : peers_) EXPECT_TRUE(channel_->send(peer, message).ok()) << rank;
}

void FakeDaemon::on_message(const PeerId& peer, ControlMessage message) {
  if (const auto* hello = std::get_if<RankHello>(&message)) {
    const int32_t rank = hello->rank.value;
    EXPECT_EQ(hello->pid, child(rank).pid());
    peers_[rank] = peer;
    const GridPosition position = grid_position(options_.spec.parallelism, hello->rank);
    StartRank start;
    start.job = kJob;
    start.epoch = kEpoch;
    start.rank = hello->rank;
    start.spec_json = options_.spec_json.value_or(to_json(options_.spec));
    start.program = options_.programs[static_cast<size_t>(position.pipeline_index)];
    start.checkpoint_dir = options_.checkpoint_dir.string();
    start.restore_manifest = options_.restore_manifest;
    start.restore_step = options_.restore_step;
    start.state_from = options_.state_from;
    start.from_memory = !start.state_from.address.empty();
    start.save_interval = options_.save_interval;
    EXPECT_TRUE(channel_->send(peer, start).ok());
  } else if (const auto* ready = std::get_if<RankReady>(&message)) {
    on_ready(*ready);
  } else if (const auto* saved = std::get_if<SegmentSaved>(&message)) {
    const Result<CommitSegment> segment = to_commit_segment(*saved);
    EXPECT_TRUE(segment.ok()) << segment.status().to_string();
    on_saved(saved->step, *segment, "");
  } else if (const auto* failed = std::get_if<SaveFailed>(&message)) {
    on_saved(failed->step, std::nullopt, failed->reason);
  }
  const std::lock_guard lock(mutex_);
  messages_.push_back(std::move(message));
  changed_.notify_all();
}

void FakeDaemon::on_ready(const RankReady& ready) {
  addresses_[ready.rank.value] = ready.address;
  if (std::ssize(addresses_) < world_size_ || !options_.begin) return;
  if (options_.before_begin) options_.before_begin();
  BeginTraining begin{.job = kJob, .epoch = kEpoch, .addresses = {}};
  for (const auto& [rank, address] : addresses_) begin.addresses.push_back(address);
  send_all(begin);
}

void FakeDaemon::on_saved(int64_t step, std::optional<CommitSegment> segment,
                          const std::string& reason) {
  if (segment) segments_[step].push_back(*segment);
  if (++reported_[step] < world_size_ || step < options_.first_answered_step) return;
  CheckpointOutcome outcome{
      .job = kJob, .epoch = kEpoch, .step = step, .committed = false, .reason = reason};
  if (std::ssize(segments_[step]) == world_size_ && store_) {
    const Result<CommitReport> committed = store_->commit({.epoch = kEpoch,
                                                           .step = step,
                                                           .created_at = wall_now(),
                                                           .spec_json = to_json(options_.spec),
                                                           .layout = "test",
                                                           .segments = segments_[step]});
    outcome.committed = committed.ok();
    if (!committed.ok()) outcome.reason = committed.status().to_string();
  }
  // A rank that was stopped may be gone.
  for (const auto& [rank, peer] : peers_) static_cast<void>(channel_->send(peer, outcome).ok());
}

bool FakeDaemon::wait_for(const std::function<bool(const ControlMessage&)>& wanted) {
  std::unique_lock lock(mutex_);
  const bool found = changed_.wait_for(lock, std::chrono::seconds(60), [&] {
    return std::any_of(messages_.begin(), messages_.end(), wanted);
  });
  EXPECT_TRUE(found) << "the message did not come within 60 s";
  return found;
}

RankExit FakeDaemon::wait_exit(int32_t rank) {
  const int fd = outputs_[static_cast<size_t>(rank)].get();
  RankOutput output;
  char bytes[4096];
  for (;;) {  // until the process closes its end
    pollfd readable{fd, POLLIN, 0};
    if (::poll(&readable, 1, 60000) <= 0) {
      ADD_FAILURE() << "rank " << rank << " neither writes nor ends";
      break;
    }
    const ssize_t count = ::read(fd, bytes, sizeof(bytes));
    if (count == 0) break;
    if (count > 0) output.add(RankOutput::kStderr, {bytes, static_cast<size_t>(count)});
  }
  output.finish();
  return {child(rank).wait(), output.last_words()};
}

std::vector<ControlMessage> FakeDaemon::messages() const {
  const std::lock_guard lock(mutex_);
  return messages_;
}

}  // namespace penstock
