// A rank that is slowed down is found and named, and its job moves off its host where it asks for
// that. A run that is left alone raises no alarm.
#include <gtest/gtest.h>
#include <signal.h>

#include <optional>

#include "ops/cli/local_process.h"
#include "ops/cli/stop_cycle.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

class SlowRankTest : public ::testing::Test {
 protected:
  // Four data replicas, with steps of some ten milliseconds.
  std::string submit(const std::string& name, bool replace_slow) const {
    std::string yaml = tiny_job_yaml(cluster_.folder(), {.name = name,
                                                         .pipeline = 1,
                                                         .expert = 1,
                                                         .data = 4,
                                                         .microbatches = 2,
                                                         .steps = 100'000,
                                                         .checkpoint_interval = 0,
                                                         .hidden_size = 128,
                                                         .seq_length = 64});
    const auto insert = [&](const std::string& after, const std::string& text) {
      yaml.replace(yaml.find(after), after.size(), after + text);
    };
    insert("parallelism: {", "schedule: 1f1b, ");
    insert("recovery: {", fmt::format("replace_slow: {}, ", replace_slow));
    return cluster_.submit(yaml);
  }
  // The rank runs for a quarter of the time, as long as this exists.
  std::unique_ptr<StopCycle> slow_down(const std::string& id, int rank) const {
    const auto process = find_process(cluster_.rank_pid(id, rank));
    EXPECT_TRUE(process.has_value());
    using std::chrono::milliseconds;
    return std::make_unique<StopCycle>(
        *process, StopRhythm{.stopped = milliseconds(75), .running = milliseconds(25)},
        Duration(kPatience));
  }
  void cancel(const std::string& id) const {
    EXPECT_EQ(cluster_.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
    EXPECT_TRUE(cluster_.wait_for_state(id, "CANCELLED")) << cluster_.describe(id);
  }

  Cluster cluster_{{.worker_count = 5, .devices_per_worker = 1}};
};

TEST_F(SlowRankTest, ASlowedRankIsNamedAndAQuietRunOfTheSameLengthRaisesNoAlarm) {
  const std::string id = submit("slowed", false);
  ASSERT_TRUE(cluster_.wait_for_step(id, 20)) << cluster_.describe(id);
  const int64_t begin_ns = monotonic_ns();
  {
    const auto slowed = slow_down(id, 2);
    ASSERT_TRUE(wait_until([&] { return cluster_.has_event(id, "slow_rank"); }, kPatience))
        << cluster_.describe(id);
  }
  const Duration took(monotonic_ns() - begin_ns);
  const Json job = cluster_.job(id);
  ASSERT_EQ(job.at("slow_ranks").size(), 1u) << job.dump(1);
  const Json& slow = job.at("slow_ranks").at(0);
  EXPECT_EQ(slow.at("rank"), 2);
  EXPECT_EQ(slow.at("worker"), job.at("ranks").at(2).at("worker"));
  EXPECT_GT(slow.at("ratio"), 1.5);
  EXPECT_GT(slow.at("since_step"), 0);
  const std::string message = slow.at("message");
  EXPECT_NE(message.find("rank 2 on worker-"), std::string::npos) << message;
  EXPECT_NE(penstock(cluster_, {"status", id}).out.find(message), std::string::npos);
  EXPECT_NE(penstock(cluster_, {"doctor", id}).out.find(message), std::string::npos);
  EXPECT_NE(cluster_.call("GET", "/metrics").body.find("penstock_run_slow_rank_ratio{"),
            std::string::npos);
  EXPECT_EQ(job.at("state"), "RUNNING");
  EXPECT_EQ(job.at("epoch"), 1) << "nothing is done about it unless the spec says so";
  ASSERT_TRUE(wait_until([&] { return cluster_.has_event(id, "slow_rank_over"); }, kPatience))
      << cluster_.describe(id);
  cancel(id);

  const std::string quiet = submit("quiet", true);
  ASSERT_TRUE(cluster_.wait_for_step(quiet, 20)) << cluster_.describe(quiet);
  const auto alarmed = [&] { return cluster_.has_event(quiet, "slow_rank"); };
  EXPECT_FALSE(wait_until(alarmed, std::chrono::ceil<std::chrono::milliseconds>(took)))
      << cluster_.describe(quiet);
  EXPECT_EQ(cluster_.job(quiet).at("epoch"), 1);
  cancel(quiet);
}

TEST_F(SlowRankTest, AJobThatAsksForItMovesOffTheHostOfASlowRankWithoutLosingAStep) {
  const std::string id = submit("replaced", true);
  ASSERT_TRUE(cluster_.wait_for_step(id, 20)) << cluster_.describe(id);
  const std::string host = cluster_.job(id).at("ranks").at(1).at("worker");
  std::optional<std::unique_ptr<StopCycle>> slowed = slow_down(id, 1);
  ASSERT_TRUE(wait_until([&] { return cluster_.job(id).at("epoch") == 2; }, kPatience))
      << cluster_.describe(id);
  slowed.reset();
  ASSERT_TRUE(cluster_.wait_for_state(id, "RUNNING")) << cluster_.describe(id);
  const Json job = cluster_.job(id);
  for (const Json& rank : job.at("ranks")) EXPECT_NE(rank.at("worker"), host);
  EXPECT_EQ(job.at("restarts"), 0);
  EXPECT_EQ(job.at("failures"), 0);
  const Json workers = cluster_.get("/api/v1/workers");
  for (const Json& worker : workers.at("items")) {
    if (worker.at("name") != host) continue;
    EXPECT_EQ(worker.at("quarantine").at("code"), "slow_rank") << worker.dump(1);
    EXPECT_NE(worker.at("quarantine").at("reason").get<std::string>().find("rank 1 on " + host),
              std::string::npos);
  }
  const int64_t step = job.at("step");
  ASSERT_TRUE(cluster_.wait_for_step(id, step + 5)) << cluster_.describe(id);
  const Json steps = cluster_.get("/api/v1/jobs/" + id + "/steps?limit=10000");
  int64_t expected = 0;
  for (const Json& item : steps.at("items")) {
    ASSERT_EQ(item.at("step"), ++expected) << "each is trained once";
  }
  cancel(id);
}

}  // namespace
}  // namespace penstock
