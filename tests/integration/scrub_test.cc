// The coordinator reads the checkpoints of its jobs over, and says what it finds.
#include <gtest/gtest.h>

#include <fstream>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

// Of a run, or of a series without labels.
double metric(const Cluster& cluster, const std::string& name, const std::string& run = {}) {
  const std::string text = cluster.call("GET", "/metrics").body;
  const std::string series = "\n" + name + (run.empty() ? " " : "{run=\"" + run + "\"} ");
  const size_t at = text.find(series);
  return at == std::string::npos ? -1.0 : std::stod(text.substr(at + series.size()));
}

void flip_byte(const Path& path, int64_t offset) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(offset);
  const int byte = file.get();
  file.seekp(offset);
  file.put(static_cast<char>(byte ^ 0x10));
  ASSERT_TRUE(file.good()) << path;
}

// Flips a byte in a segment of the job's first checkpoint; its path.
Path damage_first_checkpoint(const Cluster& cluster, const std::string& id) {
  const Path directory = cluster.folder() / "coordinator" / "checkpoints" / id;
  std::ifstream manifest(directory / "000000000001.manifest");
  const std::string text{std::istreambuf_iterator<char>(manifest), {}};
  const size_t name = text.find("e0000000001-r");
  EXPECT_NE(name, std::string::npos) << text.substr(0, 1000);
  const Path segment = directory / text.substr(name, text.find('"', name) - name);
  flip_byte(segment, 5000);
  return segment;
}

TEST(ScrubTest, ADamagedCheckpointOfARunningJobIsAnEventThatSaysWhere) {
  Cluster cluster({.worker_count = 2, .devices_per_worker = 2});
  std::string yaml =
      tiny_job_yaml(cluster.folder(), {.steps = 1'000'000, .checkpoint_interval = 500});
  const std::string interval = "interval: 500";
  yaml.replace(yaml.find(interval), interval.size(), interval + ", keep_last: 1000");
  const std::string id = cluster.submit(yaml);
  EXPECT_EQ(metric(cluster, "penstock_checkpoint_scrubbed_bytes_total", id), 0.0);
  EXPECT_EQ(metric(cluster, "penstock_checkpoint_damaged_total", id), 0.0);
  EXPECT_EQ(metric(cluster, "penstock_checkpoint_scrub_last_pass_timestamp_seconds", id), 0.0);
  ASSERT_TRUE(wait_until(
      [&] {
        return metric(cluster, "penstock_checkpoint_scrub_last_pass_timestamp_seconds", id) > 0.0;
      },
      kPatience))
      << cluster.describe(id);
  EXPECT_GT(metric(cluster, "penstock_checkpoint_scrubbed_bytes_total", id), 0.0);
  EXPECT_EQ(metric(cluster, "penstock_checkpoint_damaged_total", id), 0.0);

  cluster.kill_coordinator();  // the next one reads everything anew
  const Path segment = damage_first_checkpoint(cluster, id);
  cluster.start_coordinator();
  ASSERT_TRUE(wait_until([&] { return cluster.has_event(id, "checkpoint_damaged"); }, kPatience))
      << cluster.describe(id);
  const std::string message = cluster.event_messages(id, "checkpoint_damaged").back();
  for (const std::string& part :
       {segment.filename().string(), std::string("(rank "), std::string("bytes 4096:")}) {
    EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
  }
  EXPECT_EQ(metric(cluster, "penstock_checkpoint_damaged_total", id), 1.0);
  EXPECT_EQ(cluster.job(id).at("state"), "RUNNING") << "it is known, and nothing more";
}

TEST(ScrubTest, ADamagedCheckpointOfAFinishedJobIsAnEventToo) {
  Cluster cluster({.worker_count = 2, .devices_per_worker = 2});
  const std::string id =
      cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 10, .checkpoint_interval = 5}));
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  const std::string name = "penstock_coordinator_finished_";
  ASSERT_TRUE(
      wait_until([&] { return metric(cluster, name + "scrub_last_pass_timestamp_seconds") > 0.0; },
                 kPatience));
  EXPECT_GT(metric(cluster, name + "scrubbed_bytes_total"), 0.0);
  EXPECT_EQ(metric(cluster, name + "damaged_total"), 0.0);

  cluster.kill_coordinator();
  const Path segment = damage_first_checkpoint(cluster, id);
  cluster.start_coordinator();
  ASSERT_TRUE(wait_until([&] { return cluster.has_event(id, "checkpoint_damaged"); }, kPatience))
      << cluster.describe(id);
  EXPECT_NE(
      cluster.event_messages(id, "checkpoint_damaged").back().find(segment.filename().string()),
      std::string::npos);
  EXPECT_EQ(metric(cluster, name + "damaged_total"), 1.0);
  EXPECT_EQ(cluster.job(id).at("state"), "SUCCEEDED");
}

}  // namespace
}  // namespace penstock
