// A batch of garbage in the data of a real job, and what its guards make of it.
#include <gtest/gtest.h>
#include <signal.h>

#include <fstream>

#include "comm/base/random.h"
#include "tests/support/cluster.h"
#include "worker/data/sampler.h"

namespace penstock {
namespace {

constexpr int64_t kPoisoned = 60;

// What one step of the job reads becomes random bytes.
void poison(const Cluster& cluster, const std::string& yaml) {
  const Result<JobSpec> spec = parse_job_spec(yaml, "tiny");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  const Result<Sampler> sampler = open_training_sampler(*spec);
  ASSERT_TRUE(sampler.ok()) << sampler.status().message();
  const Path file = spec->data.train[0].path + ".bin";
  ASSERT_EQ(file.parent_path(), cluster.folder());
  std::fstream tokens(file, std::ios::in | std::ios::out | std::ios::binary);
  Random random(5, 5);
  for (int64_t i = 0; i < sampler->sequences_per_step(); ++i) {
    tokens.seekp((sampler->window(kPoisoned, i).first_token + 1) * 2);
    for (int64_t t = 1; t < sampler->seq_length(); ++t) {
      const auto token = static_cast<uint16_t>(random.below(256));
      tokens.write(reinterpret_cast<const char*>(&token), sizeof token);
    }
  }
  ASSERT_TRUE(tokens.good());
}

std::string guarded(const Cluster& cluster, const TinyJob& job, const std::string& guards) {
  return tiny_job_yaml(cluster.folder(), job) + "\nguards: {" + guards + "}\n";
}

std::vector<int64_t> left_out(const Cluster& cluster, const std::string& id) {
  std::map<int64_t, bool> newest;  // record of each step
  const Json steps = cluster.get("/api/v1/jobs/" + id + "/steps?limit=10000");
  for (const Json& step : steps.at("items")) {
    newest[step.at("step")] = step.at("guard").is_object() && step["guard"]["action"] == "skip";
  }
  std::vector<int64_t> found;
  for (const auto& [step, skipped] : newest) {
    if (skipped) found.push_back(step);
  }
  return found;
}

TEST(GuardsTest, ARollbackLeavesOutTheSameStepsInEveryLaterEpoch) {
  const Cluster cluster(kTwoByTwo);
  const TinyJob job{.name = "back", .steps = 100, .checkpoint_interval = 5};
  const std::string yaml = guarded(
      cluster, job, "loss_spike: {policy: rollback, sigmas: 8, window: 32}, rollback_steps: 4");
  poison(cluster, yaml);
  const std::string id = cluster.submit(yaml);
  ASSERT_TRUE(wait_until([&] { return cluster.has_event(id, "rolled_back"); }, kPatience))
      << cluster.describe(id);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(left_out(cluster, id), (std::vector<int64_t>{57, 58, 59, 60})) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("failures"), 0);
  EXPECT_EQ(cluster.job(id).at("restarts"), 0);
  EXPECT_EQ(cluster.job(id).at("guards").at("rollbacks"),
            Json::parse(R"([{"first":57,"last":60}])"));
  const ProgramRun shown = penstock(cluster, {"describe", id});
  EXPECT_NE(shown.out.find("steps 57 to 60 left out by a rollback"), std::string::npos)
      << shown.out;
  const std::string metrics = cluster.call("GET", "/metrics").body;
  EXPECT_NE(metrics.find(fmt::format("penstock_run_rollbacks_total{{run=\"{}\"}} 1", id)),
            std::string::npos);

  // The same with a rank killed after it, and while it goes on: the same weights.
  std::string again = yaml;
  again.replace(again.find("name: back"), 10, "name: twice");
  const std::string killed = cluster.submit(again);
  ASSERT_TRUE(wait_until([&] { return cluster.has_event(killed, "rolled_back"); }, kPatience));
  ASSERT_TRUE(wait_until(
      [&] {
        const pid_t pid = cluster.rank_pid(killed, 1);
        return pid != 0 && kill(pid, SIGKILL) == 0;
      },
      kPatience));
  ASSERT_TRUE(cluster.wait_for_state(killed, "SUCCEEDED")) << cluster.describe(killed);
  EXPECT_EQ(left_out(cluster, killed), left_out(cluster, id));
  EXPECT_EQ(cluster.job(killed).at("checkpoint").at("weights_digest"),
            cluster.job(id).at("checkpoint").at("weights_digest"));
}

TEST(GuardsTest, ASkipIsAnEventACountAndAMarkedStep) {
  const Cluster cluster(kTwoByTwo);
  const TinyJob job{.name = "over", .steps = 100, .checkpoint_interval = 5};
  const std::string yaml =
      guarded(cluster, job, "loss_spike: {policy: skip, sigmas: 8, window: 32}");
  poison(cluster, yaml);
  const std::string id = cluster.submit(yaml);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(left_out(cluster, id), std::vector<int64_t>{kPoisoned}) << cluster.describe(id);
  EXPECT_TRUE(cluster.has_event(id, "loss_spike"));
  EXPECT_EQ(cluster.job(id).at("guards").at("skipped_steps"), 1);
  const std::string metrics = cluster.call("GET", "/metrics").body;
  EXPECT_NE(metrics.find(fmt::format("penstock_run_guard_actions_total{{action=\"skip\",run=\"{}\","
                                     "signal=\"loss_spike\"}} 1",
                                     id)),
            std::string::npos)
      << metrics;
  const ProgramRun steps = penstock(cluster, {"metrics", id, "--tail", "100"});
  EXPECT_NE(steps.out.find("skip: loss_spike"), std::string::npos) << steps.out;
}

TEST(GuardsTest, PolicyStopFailsTheJobWithWhatIsUsual) {
  const Cluster cluster(kTwoByTwo);
  const TinyJob job{.name = "end", .steps = 100, .checkpoint_interval = 5};
  const std::string yaml =
      guarded(cluster, job, "loss_spike: {policy: stop, sigmas: 8, window: 32}");
  poison(cluster, yaml);
  const std::string id = cluster.submit(yaml);
  ASSERT_TRUE(cluster.wait_for_state(id, "FAILED")) << cluster.describe(id);
  const Json failure = cluster.job(id).at("last_failure");
  EXPECT_EQ(failure.at("code"), "diverged");
  const std::string message = failure.at("message");
  EXPECT_NE(message.find("step 60: loss "), std::string::npos) << message;
  EXPECT_NE(message.find("whose median is "), std::string::npos) << message;
  EXPECT_NE(message.find("the last good checkpoint is of step "), std::string::npos) << message;
}

}  // namespace
}  // namespace penstock
