// Unreachable is not dead, with real processes: ranks go on while their coordinator is away, end by
// themselves when their lease is over, and only then is their job elsewhere.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>

#include "comm/control/lease_file.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

constexpr int kBeatMs = 200;  // and 15 of them are a lease

// The daemon of a process.
pid_t parent_of(pid_t pid) {
  const auto text = read_file(fmt::format("/proc/{}/stat", pid), 4096);
  if (!text.ok()) return 0;
  // pid (name) state parent …
  return static_cast<pid_t>(std::stoi(text->substr(text->rfind(')') + 4)));
}

// It does nothing any more, and never will.
bool has_ended(pid_t pid) {
  const ProcessState state = process_state(pid);
  return state == ProcessState::kUnknown || state == ProcessState::kEnded;
}

class LeaseTest : public ::testing::Test {
 protected:
  LeaseTest() {
    const TinyJob job{.steps = 300};
    expected_ = undisturbed(cluster_, job);
    id_ = cluster_.submit(tiny_job_yaml(cluster_.folder(), job));
    EXPECT_TRUE(cluster_.wait_for_step(id_, 20)) << cluster_.describe(id_);
    old_ = cluster_.rank_pids(id_);
    std::erase(old_, 0);  // devices without a rank
    EXPECT_EQ(old_.size(), 4U);
    worker_ = cluster_.job(id_).at("ranks")[0].at("worker");
  }
  int64_t epoch() const { return cluster_.job(id_).at("epoch"); }
  bool is_placed_anew() const {
    return wait_until([&] { return epoch() == 2; }, kPatience);
  }
  // Not after the first look at the new epoch: before it.
  bool old_ranks_have_ended() const { return std::all_of(old_.begin(), old_.end(), has_ended); }
  void cut_off(int64_t span_ms) const {
    const Json workers = cluster_.get("/api/v1/workers");
    for (const Json& worker : workers.at("items")) {
      if (worker.at("name") != worker_) continue;
      const auto reply =
          http_call({.method = "POST",
                     .url = fmt::format("http://{}/chaos/partition?for_ms={}",
                                        worker.at("http_address").get<std::string>(), span_ms),
                     .body = {}});
      ASSERT_TRUE(reply.ok() && reply->status == 200);
    }
  }
  // As its ranks see it.
  LeaseFile lease() const {
    const auto words = read_file(fmt::format("/proc/{}/cmdline", old_.at(0)), 1 << 16);
    const std::string flag = std::string("--lease-file") + '\0';
    const std::string path = words->substr(words->find(flag) + flag.size());
    return LeaseFile::open(path.c_str()).value();
  }
  void expect_it_ends_as_if_nothing_had_been(int restarts) const {
    EXPECT_EQ(outcome(cluster_, id_), expected_) << cluster_.describe(id_);
    EXPECT_EQ(cluster_.job(id_).at("restarts"), restarts) << cluster_.describe(id_);
  }

  // Each takes the whole job.
  Cluster cluster_{{.worker_count = 2,
                    .devices_per_worker = 4,
                    .heartbeat_interval_ms = kBeatMs,
                    .allow_chaos = true}};
  Outcome expected_;
  std::string id_;
  std::string worker_;
  std::vector<pid_t> old_;
};

TEST_F(LeaseTest, AGangThatIsCutOffHasEndedBeforeItsJobIsElsewhere) {
  cut_off(3'600'000);
  ASSERT_TRUE(is_placed_anew()) << cluster_.describe(id_);
  EXPECT_TRUE(old_ranks_have_ended());
  EXPECT_EQ(cluster_.job(id_).at("last_failure").at("worker"), worker_);
  expect_it_ends_as_if_nothing_had_been(/*restarts=*/1);
}

// Nobody is left there to tell them: they know by themselves.
TEST_F(LeaseTest, RanksOfADaemonThatIsStoppedEndWithTheirLease) {
  const pid_t daemon = parent_of(old_.at(0));
  ASSERT_GT(daemon, 1);
  ASSERT_EQ(kill(daemon, SIGSTOP), 0);
  EXPECT_TRUE(is_placed_anew()) << cluster_.describe(id_);
  EXPECT_TRUE(old_ranks_have_ended());
  expect_it_ends_as_if_nothing_had_been(/*restarts=*/1);
  EXPECT_EQ(kill(daemon, SIGCONT), 0);
}

TEST_F(LeaseTest, ACutThatIsShorterThanTheLeaseDisturbsNothing) {
  cut_off(5 * kBeatMs);
  expect_it_ends_as_if_nothing_had_been(/*restarts=*/0);
}

TEST_F(LeaseTest, ACoordinatorThatIsStoppedForLongerThanTheLeaseDisturbsNothing) {
  const LeaseFile lease = this->lease();
  const int64_t end_ns = lease.end_ns();
  const int64_t lease_ns = int64_t{15} * kBeatMs * 1'000'000;
  cluster_.signal_coordinator(SIGSTOP);
  EXPECT_TRUE(wait_until([&] { return lease.end_ns() > end_ns + 2 * lease_ns; }, kPatience));
  EXPECT_FALSE(std::any_of(old_.begin(), old_.end(), has_ended));
  cluster_.signal_coordinator(SIGCONT);
  expect_it_ends_as_if_nothing_had_been(/*restarts=*/0);
}

TEST_F(LeaseTest, ACoordinatorThatIsGoneForLongerThanTheLeaseDisturbsNothing) {
  const LeaseFile lease = this->lease();
  const int64_t end_ns = lease.end_ns();
  const int64_t lease_ns = int64_t{15} * kBeatMs * 1'000'000;
  cluster_.kill_coordinator();
  EXPECT_TRUE(wait_until([&] { return lease.end_ns() > end_ns + 2 * lease_ns; }, kPatience));
  EXPECT_FALSE(std::any_of(old_.begin(), old_.end(), has_ended));
  cluster_.start_coordinator();
  expect_it_ends_as_if_nothing_had_been(/*restarts=*/0);
}

}  // namespace
}  // namespace penstock
