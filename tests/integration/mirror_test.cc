// Hosts that are lost while other hosts hold copies of what their ranks trained.
#include <gtest/gtest.h>
#include <signal.h>

#include <set>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

// The newest step of which every rank's state is copied.
int64_t wait_for_copies(const Cluster& cluster, const std::string& id) {
  int64_t step = 0;
  EXPECT_TRUE(wait_until(
      [&] {
        const Json mirrored = cluster.job(id).at("mirrored_step");
        step = mirrored.is_number() ? mirrored.get<int64_t>() : 0;
        return step > 0;
      },
      kPatience))
      << cluster.describe(id);
  return step;
}

TEST(MirrorTest, ALostHostsRanksGoOnFromCopiesWithoutAnyCheckpoint) {
  Cluster cluster({.worker_count = 3, .devices_per_worker = 2});
  // No checkpoint before the last step: what is not in memory would be trained from the beginning.
  const TinyJob job{.steps = 600, .checkpoint_interval = 0, .mirror = "auto"};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  const int64_t copied = wait_for_copies(cluster, id);
  const std::string lost = cluster.job(id).at("ranks")[0].at("worker");
  cluster.kill_worker(lost);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 1) << cluster.describe(id);
  const std::vector<std::string> sources = cluster.event_messages(id, "starting");
  ASSERT_EQ(sources.size(), 2u);
  EXPECT_NE(sources[1].find("rank 0 from a copy in the memory of w"), std::string::npos)
      << sources[1];
  EXPECT_GE(cluster.job(id).at("first_step"), copied + 1);
}

TEST(MirrorTest, WhenTheHostWithTheCopiesIsLostTooTheCheckpointIsLeft) {
  Cluster cluster({.worker_count = 4, .devices_per_worker = 2});
  const TinyJob job{.steps = 600, .checkpoint_interval = 5, .mirror = "auto"};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  wait_for_copies(cluster, id);
  ASSERT_TRUE(wait_until([&] { return cluster.job(id).at("checkpoint").is_object(); }, kPatience))
      << cluster.describe(id);
  const Json ranks = cluster.job(id).at("ranks");
  std::set<std::string> hosts;
  for (const Json& rank : ranks) hosts.insert(rank.at("worker"));
  ASSERT_EQ(hosts.size(), 2u);
  for (const std::string& host : hosts) cluster.kill_worker(host);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
  const std::vector<std::string> sources = cluster.event_messages(id, "starting");
  ASSERT_GE(sources.size(), 2u);
  EXPECT_NE(sources.back().find("the checkpoint of step"), std::string::npos) << sources.back();
}

TEST(MirrorTest, AKilledRankStillGoesOnFromTheNewestStepOfItsOwnHost) {
  Cluster cluster({.worker_count = 2, .devices_per_worker = 2});
  const TinyJob job{.steps = 600, .checkpoint_interval = 0, .mirror = "10"};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  wait_for_copies(cluster, id);
  ASSERT_EQ(kill(cluster.rank_pid(id, 1), 9), 0);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
  const std::vector<std::string> sources = cluster.event_messages(id, "starting");
  ASSERT_EQ(sources.size(), 2u);
  EXPECT_NE(sources[1].find("held in memory"), std::string::npos) << sources[1];
  EXPECT_EQ(sources[1].find("copy"), std::string::npos) << sources[1];
}

}  // namespace
}  // namespace penstock
