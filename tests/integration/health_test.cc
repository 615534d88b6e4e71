// Hosts that are not trusted: jobs move off them, and the reason is there to be read.
#include <gtest/gtest.h>
#include <signal.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

class HealthTest : public ::testing::Test {
 protected:
  std::string submit(const std::string& name) const {
    return cluster_.submit(
        tiny_job_yaml(cluster_.folder(), {.name = name, .steps = 300, .checkpoint_interval = 10}));
  }
  std::string final_weights(const std::string& id) const {
    EXPECT_TRUE(cluster_.wait_for_state(id, "SUCCEEDED")) << cluster_.describe(id);
    return cluster_.job(id).at("checkpoint").at("weights_digest");
  }
  Json worker(const std::string& name) const {
    const Json workers = cluster_.get("/api/v1/workers");
    for (const Json& worker : workers.at("items")) {
      if (worker.at("name") == name) return worker;
    }
    return {};
  }
  std::string host_of(const std::string& id, int rank) const {
    return cluster_.job(id).at("ranks").at(rank).at("worker");
  }
  // A rank on that worker ends by a crash, and the job goes on.
  void crash_on(const std::string& id, const std::string& host) const {
    const int64_t step = cluster_.job(id).at("highest_step");
    ASSERT_TRUE(cluster_.wait_for_step(id, step + 2)) << cluster_.describe(id);
    int rank = 0;
    while (host_of(id, rank) != host) ++rank;
    const int64_t restarts = cluster_.job(id).at("restarts");
    ASSERT_EQ(kill(cluster_.rank_pid(id, rank), SIGSEGV), 0);
    ASSERT_TRUE(wait_until([&] { return cluster_.job(id).at("restarts") > restarts; }, kPatience));
    ASSERT_TRUE(cluster_.wait_for_state(id, "RUNNING")) << cluster_.describe(id);
  }

  Cluster cluster_{{.worker_count = 3, .devices_per_worker = 2}};
};

TEST_F(HealthTest, AJobMovesOffAHostWhereItsRanksCrashAndEndsWithTheSameWeights) {
  const std::string id = submit("crashing");
  ASSERT_TRUE(cluster_.wait_for_step(id, 5)) << cluster_.describe(id);
  const std::string host = host_of(id, 0);
  for (int i = 0; i < 3; ++i) crash_on(id, host);
  EXPECT_EQ(worker(host).at("state"), "quarantined") << worker(host).dump(2);
  EXPECT_EQ(worker(host).at("quarantine").at("code"), "host_failures");
  EXPECT_EQ(worker(host).at("host_failures").size(), 3u);
  for (const Json& rank : cluster_.job(id).at("ranks")) EXPECT_NE(rank.at("worker"), host);
  const ProgramRun table = penstock(cluster_, {"workers"});
  EXPECT_NE(table.out.find("3 failures that point to this host"), std::string::npos) << table.out;
  const std::string metrics = cluster_.call("GET", "/metrics").body;
  EXPECT_NE(metrics.find("penstock_coordinator_quarantined_workers{cause=\"host_failures\"} 1"),
            std::string::npos);

  cluster_.kill_coordinator();
  cluster_.start_coordinator();
  EXPECT_TRUE(worker(host).at("quarantine").is_object()) << "on record";
  const std::string weights = final_weights(id);
  ASSERT_EQ(penstock(cluster_, {"release", host}).exit_code, 0);
  EXPECT_TRUE(wait_until([&] { return worker(host).at("state") == "up"; }, kPatience));
  EXPECT_EQ(weights, final_weights(submit("undisturbed")));
}

// Its hosts fail their checks while a file is there.
TEST(HostCheckTest, AHostThatFailsItsCheckAfterACrashGetsNoRanksBeforeItPassesOne) {
  const ScratchFolder folder;
  const Path broken = folder.path() / "broken";
  Cluster cluster(
      {.worker_count = 3,
       .rank_program = fmt::format("if [ \"$1\" = check-host ] && [ -e {} ]; then\n"
                                   "  echo 'memory: a word changed'; exit 19\nfi\nexec {} \"$@\"\n",
                                   broken.string(), binary("penstock-rank").string())});
  const auto workers = [&] { return cluster.get("/api/v1/workers").at("items"); };
  const std::string id = cluster.submit(tiny_job_yaml(
      cluster.folder(), {.expert = 1, .steps = 300, .checkpoint_interval = 10}));
  ASSERT_TRUE(cluster.wait_for_step(id, 15)) << cluster.describe(id);
  const std::string host = cluster.job(id).at("ranks").at(0).at("worker");
  const auto named = [&](const Json& worker) { return worker.at("name") == host; };
  const auto state = [&] {
    const Json all = workers();
    return std::find_if(all.begin(), all.end(), named)->at("state").get<std::string>();
  };
  ASSERT_TRUE(replace_file_durably(broken, {}).ok());
  ASSERT_EQ(kill(cluster.rank_pid(id, 0), SIGSEGV), 0);
  ASSERT_TRUE(wait_until([&] { return state() == "quarantined"; }, kPatience)) << workers().dump(1);
  EXPECT_NE(penstock(cluster, {"workers"}).out.find("failed a check: memory: a word changed"),
            std::string::npos);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  ASSERT_EQ(penstock(cluster, {"release", host}).exit_code, 0);
  ASSERT_TRUE(wait_until(
      [&] {
        const Json events = cluster.get("/api/v1/events?limit=10000");
        return std::count_if(
                   events.at("items").begin(), events.at("items").end(),
                   [](const Json& event) { return event.at("code") == "worker_quarantined"; }) == 2;
      },
      kPatience))
      << "it fails again";
  std::filesystem::remove(broken);
  ASSERT_EQ(penstock(cluster, {"release", host}).exit_code, 0);
  EXPECT_TRUE(wait_until([&] { return state() == "up"; }, kPatience)) << workers().dump(1);
}

TEST_F(HealthTest, AUserQuarantinesAWorkerAndReleasesIt) {
  EXPECT_EQ(penstock(cluster_, {"quarantine", "worker-1"}).exit_code, 2) << "why?";
  const ProgramRun run = penstock(cluster_, {"quarantine", "worker-1", "--reason", "ECC errors"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.out, "worker-1\n");
  EXPECT_NE(penstock(cluster_, {"workers"}).out.find("ECC errors"), std::string::npos);
  EXPECT_NE(penstock(cluster_, {"undrain", "worker-1"}).err.find("penstock release worker-1"),
            std::string::npos);
  ASSERT_EQ(penstock(cluster_, {"release", "worker-1"}).exit_code, 0);
  EXPECT_TRUE(wait_until([&] { return worker("worker-1").at("state") == "up"; }, kPatience));
  const ProgramRun again = penstock(cluster_, {"release", "worker-1"});
  EXPECT_EQ(again.exit_code, 6) << again.err;
  EXPECT_EQ(penstock(cluster_, {"quarantine", "worker-7", "--reason", "x"}).exit_code, 3);
}

}  // namespace
}  // namespace penstock
