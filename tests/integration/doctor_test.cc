// penstock doctor on a real failure: the same verdict from the coordinator, from its store while it
// runs, and from what it left behind.
#include <gtest/gtest.h>
#include <signal.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

Json verdict(const Cluster& cluster, std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "doctor");
  arguments.insert(arguments.end(), {"-o", "json"});
  const ProgramRun run = penstock(cluster, arguments);
  EXPECT_EQ(run.exit_code, 0) << run.err;
  return Json::parse(run.out);
}

// What does not depend on who was asked, and on how far the job has come since.
Json lasting(const Json& verdict) {
  Json part;
  for (const char* key : {"job", "name", "failures", "verdict", "recovery"}) {
    part[key] = verdict.at(key);
  }
  part["failure"] = verdict.at("failure");
  part["failure"].erase("host");
  return part;
}

TEST(DoctorTest, TheVerdictOnAKilledRankIsTheSameWithAndWithoutACoordinator) {
  Cluster cluster;
  const std::string id =
      cluster.submit(tiny_job_yaml(cluster.folder(), {.name = "sick", .steps = 1'000'000}));
  ASSERT_TRUE(cluster.wait_for_step(id, 20)) << cluster.describe(id);
  ASSERT_EQ(kill(cluster.rank_pid(id, 2), SIGKILL), 0);
  ASSERT_TRUE(wait_until([&] { return cluster.job(id).at("epoch") == 2; }, kPatience));
  ASSERT_TRUE(cluster.wait_for_state(id, "RUNNING")) << cluster.describe(id);

  const Json asked = verdict(cluster, {"sick"});
  const Json& failure = asked.at("failure");
  EXPECT_EQ(failure.at("code"), "rank_killed") << asked.dump(1);
  EXPECT_EQ(failure.at("rank"), 2);
  EXPECT_GT(failure.at("step"), 0);
  EXPECT_NE(failure.at("operation"), Json()) << asked.dump(1);
  EXPECT_FALSE(failure.at("host").get<std::string>().empty());
  EXPECT_FALSE(failure.at("log").empty());
  EXPECT_GT(asked.at("recovery").at("seconds"), 0.0) << asked.dump(1);
  EXPECT_EQ(asked.at("failures").size(), 1u);

  const std::string state = (cluster.folder() / "coordinator").string();
  const Json beside = verdict(cluster, {id, "--state", state});
  EXPECT_EQ(lasting(beside), lasting(asked)) << "of a coordinator that runs";
  EXPECT_EQ(beside.at("offline"), true);
  const int64_t step = cluster.job(id).at("step");
  ASSERT_TRUE(cluster.wait_for_step(id, step + 10)) << "which is not disturbed";
  cluster.kill_coordinator();
  EXPECT_EQ(lasting(verdict(cluster, {"sick", "--state", state})), lasting(asked));
  EXPECT_EQ(penstock(cluster, {"doctor", "sick"}).exit_code, 5);
}

TEST(DoctorTest, AJobOrAFolderThatIsNotThereIsNotFound) {
  const Cluster cluster;
  EXPECT_EQ(penstock(cluster, {"doctor", "nobody"}).exit_code, 3);
  const std::string state = (cluster.folder() / "coordinator").string();
  EXPECT_EQ(penstock(cluster, {"doctor", "nobody", "--state", state}).exit_code, 3);
  const ProgramRun elsewhere = penstock(cluster, {"doctor", "1", "--state", "/nowhere"});
  EXPECT_EQ(elsewhere.exit_code, 3);
  EXPECT_NE(elsewhere.err.find("no state directory"), std::string::npos) << elsewhere.err;
}

}  // namespace
}  // namespace penstock
