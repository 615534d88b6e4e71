// What Prometheus sees of a real run.
#include <gtest/gtest.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

Status put(const Path& path, const std::string& text) {
  return write_and_sync(path, as_bytes(text));
}

ProgramRun promtool_check(const std::string& metrics, const Path& folder) {
  EXPECT_TRUE(put(folder / "metrics.txt", metrics).ok());
  return run_program(
      {"/bin/sh", "-c", "promtool check metrics < '" + (folder / "metrics.txt").string() + "'"});
}

TEST(MonitoringTest, PromtoolHasNothingToComplainAbout) {
  const Cluster cluster;
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 2000}));
  ASSERT_TRUE(cluster.wait_for_step(id, 10)) << cluster.describe(id);
  const ProgramRun coordinator =
      promtool_check(cluster.call("GET", "/metrics").body, cluster.folder());
  EXPECT_EQ(coordinator.exit_code, 0) << coordinator.out << coordinator.err;
  EXPECT_EQ(coordinator.out + coordinator.err, "");
  const Json targets = cluster.get("/api/v1/prometheus/targets");
  ASSERT_EQ(targets.size(), 4u) << targets.dump();
  for (const Json& target : targets) {
    const std::string address = target.at("targets")[0];
    HttpCall call;
    call.url = "http://" + address + "/metrics";
    const auto reply = http_call(call);
    ASSERT_TRUE(reply.ok()) << reply.status().to_string();
    EXPECT_NE(reply->body.find("penstock_worker_step"), std::string::npos) << reply->body;
    const ProgramRun worker = promtool_check(reply->body, cluster.folder());
    EXPECT_EQ(worker.exit_code, 0) << worker.out << worker.err;
    EXPECT_EQ(worker.out + worker.err, "");
  }
}

TEST(MonitoringTest, ARealPrometheusScrapesTheClusterWithTheShippedConfiguration) {
  const Cluster cluster;
  const std::string id =
      cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 100'000, .checkpoint_interval = 0}));
  ASSERT_TRUE(cluster.wait_for_step(id, 5)) << cluster.describe(id);
  auto configuration =
      read_file(Path(PENSTOCK_SOURCE_DIR) / "ops/prometheus/prometheus.yml", 1 << 20);
  ASSERT_TRUE(configuration.ok());
  std::string text = *configuration;
  const std::string shipped = "127.0.0.1:7070";
  const std::string ours = cluster.server().substr(std::string("http://").size());
  ASSERT_NE(text.find(shipped), std::string::npos);
  for (size_t at = text.find(shipped); at != std::string::npos;
       at = text.find(shipped, at + ours.size())) {
    text.replace(at, shipped.size(), ours);
  }
  ASSERT_TRUE(put(cluster.folder() / "prometheus.yml", text).ok());
  ASSERT_EQ(run_program({"/usr/bin/promtool", "check", "config",
                         (cluster.folder() / "prometheus.yml").string()})
                .exit_code,
            0);

  // Prometheus cannot choose its own port; take one the system hands out just now.
  const ScratchFolder data;
  const int port = 20000 + static_cast<int>(getpid() % 20000);
  SpawnOptions options;
  options.argv = {"/usr/bin/prometheus",
                  "--config.file=" + (cluster.folder() / "prometheus.yml").string(),
                  "--storage.tsdb.path=" + data.path().string(),
                  "--web.listen-address=127.0.0.1:" + std::to_string(port), "--log.level=error"};
  options.capture_output = false;
  auto prometheus = ChildProcess::spawn(options);
  ASSERT_TRUE(prometheus.ok()) << prometheus.status().message();
  const auto value_of = [&](const std::string& query) {
    HttpCall call;
    call.url =
        "http://127.0.0.1:" + std::to_string(port) + "/api/v1/query?query=" + percent_encode(query);
    const auto reply = http_call(call);
    if (!reply.ok() || reply->status != 200) return 0.0;
    const Json json = Json::parse(reply->body, nullptr, false);
    if (json.is_discarded() || json["data"]["result"].empty()) return 0.0;
    return std::stod(json["data"]["result"][0]["value"][1].get<std::string>());
  };
  EXPECT_TRUE(wait_until([&] { return value_of("count(up == 1)") >= 5.0; }, kPatience))
      << "the coordinator and four workers are up: " << value_of("count(up == 1)");
  EXPECT_TRUE(wait_until([&] { return value_of("max(penstock_run_step)") >= 5.0; }, kPatience));
  EXPECT_TRUE(
      wait_until([&] { return value_of("count(penstock_worker_step)") >= 4.0; }, kPatience));
}

}  // namespace
}  // namespace penstock
