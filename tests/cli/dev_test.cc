// The real program with a real cluster: dev up, a job from submission to its sample, dev down.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "ops/cli/local_process.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

// One cluster for all tests of this file: starting one takes longer than most of them.
class DevTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<ScratchFolder>();
    state_ = path("dev");
    const ProgramRun up = penstock({"dev", "up", "--workers", "4", "--port", "0"});
    ASSERT_EQ(up.exit_code, 0) << up.err;
  }
  static void TearDownTestSuite() {
    const ProgramRun down = penstock({"dev", "down", "-o", "json"});
    EXPECT_EQ(down.exit_code, 0) << down.err;
    EXPECT_EQ(document(down)["stopped"].size(), 5u);
    folder_.reset();
  }

  static ProgramRun penstock(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), binary("penstock").string());
    return run_program(arguments,
                       {"PENSTOCK_DEV_STATE_DIR=" + state_, "PENSTOCK_SERVER=", "NO_COLOR=1"});
  }
  static Json document(const ProgramRun& run) {
    Json json = Json::parse(run.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << run.out << run.err;
    return json;
  }
  static Json json_of(std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), {"-o", "json"});
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, 0) << arguments[0] << ": " << run.err;
    return document(run);
  }
  static std::string path(const std::string& name) { return (folder_->path() / name).string(); }
  static std::string spec(const TinyJob& job) {
    std::ofstream(path(job.name + ".yaml")) << tiny_job_yaml(folder_->path(), job);
    return path(job.name + ".yaml");
  }
  // The process of that name: "coordinator", "worker-0", …
  static LocalProcess process(const std::string& name) {
    const Json status = document(penstock({"dev", "status", "-o", "json"}));
    for (const Json& process : status.at("processes")) {
      if (process.at("name") != name) continue;
      const auto found = find_process(process.at("pid").get<pid_t>());
      if (found) return *found;
    }
    return {};
  }
  static void kill(const std::string& name) {
    const LocalProcess found = process(name);
    ASSERT_TRUE(send_signal(found, 9).ok()) << name;
    EXPECT_TRUE(wait_for_end(found, kPatience));
  }

  inline static std::unique_ptr<ScratchFolder> folder_;
  inline static std::string state_;  // the cluster's
};

TEST_F(DevTest, StartingAgainChangesNothing) {
  const Json before = json_of({"dev", "status"});
  const ProgramRun again = penstock({"dev", "up", "--workers", "4", "-o", "json"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_NE(again.err.find("runs already"), std::string::npos);
  EXPECT_EQ(document(again)["processes"], before["processes"]);
  EXPECT_EQ(penstock({"dev", "up", "--workers", "1"}).exit_code, 6);
  EXPECT_EQ(penstock({"dev", "up", "--devices-per-worker", "1"}).exit_code, 0) << "as it is";
  const ProgramRun wider = penstock({"dev", "up", "--devices-per-worker", "2"});
  EXPECT_EQ(wider.exit_code, 6);
  EXPECT_NE(wider.err.find("dev down; penstock dev up --devices-per-worker 2"), std::string::npos)
      << wider.err;
}

TEST_F(DevTest, APortThatAnotherFoldersCoordinatorHasIsSaidToBeThat) {
  const std::string server = json_of({"dev", "status"})["server"];
  const std::string port = server.substr(server.rfind(':') + 1);
  const ProgramRun run = penstock({"dev", "up", "--state-dir", path("other"), "--port", port});
  EXPECT_EQ(run.exit_code, 6) << run.err;
  EXPECT_NE(run.err.find("penstock ps --server " + server), std::string::npos) << run.err;
}

// A cluster of its own: the others' must stay up.
TEST_F(DevTest, AClusterThatWasDownComesBackAsItWasUnlessToldOtherwise) {
  const auto dev = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "dev");
    arguments.insert(arguments.end(), {"--state-dir", path("other"), "-o", "json"});
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, 0) << run.err;
    return document(run);
  };
  const Json first = dev({"up", "--workers", "1", "--devices-per-worker", "2", "--port", "0"});
  EXPECT_EQ(first["processes"].size(), 2u);
  dev({"down"});
  const Json again = dev({"up"});
  EXPECT_EQ(again["processes"].size(), 2u);
  EXPECT_EQ(again["server"], first["server"]);
  const ProgramRun workers =
      penstock({"workers", "--server", again["server"].get<std::string>(), "-o", "json"});
  EXPECT_EQ(document(workers)["items"][0]["devices"], 2) << workers.out;
  dev({"down"});
  EXPECT_EQ(dev({"up", "--workers", "2"})["processes"].size(), 3u);
  EXPECT_EQ(dev({"down"})["stopped"].size(), 3u);
}

// Each with a cluster of its own.
class OwnClusterTest : public DevTest {
 protected:
  static void SetUpTestSuite() { folder_ = std::make_unique<ScratchFolder>(); }
  static void TearDownTestSuite() { folder_.reset(); }
  void SetUp() override { state_ = path("own-" + std::to_string(++count_)); }
  void TearDown() override { EXPECT_EQ(penstock({"dev", "down"}).exit_code, 0); }

  inline static int count_ = 0;
};

TEST_F(OwnClusterTest, WorkersThatTakeNoRanksHaveRegisteredToo) {
  ASSERT_EQ(penstock({"dev", "up", "--workers", "3", "--port", "0"}).exit_code, 0);
  ASSERT_EQ(penstock({"drain", "worker-1", "--wait"}).exit_code, 0);
  ASSERT_EQ(penstock({"quarantine", "worker-2", "--reason", "ECC errors"}).exit_code, 0);
  const ProgramRun more = penstock({"dev", "up", "--workers", "4"});
  EXPECT_EQ(more.exit_code, 0) << more.err;
  ASSERT_EQ(penstock({"dev", "down"}).exit_code, 0);
  const ProgramRun again = penstock({"dev", "up"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  const Json workers = json_of({"workers"});
  EXPECT_EQ(workers.at("items").size(), 4u);
  for (const Json& worker : workers.at("items")) {
    EXPECT_EQ(worker.at("drain_reason").is_string(), worker.at("name") == "worker-1") << worker;
    EXPECT_EQ(worker.at("quarantine").is_object(), worker.at("name") == "worker-2") << worker;
  }
}

TEST_F(OwnClusterTest, AStartThatFailsLeavesWhatRanksNeed) {
  ASSERT_EQ(penstock({"dev", "up", "--workers", "4", "--port", "0"}).exit_code, 0);
  ASSERT_EQ(penstock({"submit", spec({.name = "steady", .steps = 1'000'000})}).exit_code, 0);
  ASSERT_EQ(penstock({"wait", "steady", "--for", "step=5", "--timeout", "240s"}).exit_code, 0);
  kill("coordinator");
  const ProgramRun status = penstock({"dev", "status"});
  EXPECT_EQ(status.exit_code, 3);
  EXPECT_NE(status.err.find("its coordinator does not run; penstock dev up starts it"),
            std::string::npos)
      << status.err;
  std::ofstream(state_ + "/worker-4") << "no folder";
  const ProgramRun up = penstock({"dev", "up", "--workers", "5"});
  EXPECT_NE(up.exit_code, 0);
  EXPECT_NE(up.err.find("worker-4"), std::string::npos) << up.err;
  EXPECT_NE(up.err.find("coordinator stays"), std::string::npos) << up.err;
  EXPECT_TRUE(is_alive(process("coordinator")));
  const auto goes_on = [&] {
    const Json job = document(penstock({"describe", "steady", "-o", "json"}));
    return job.value("state", "") == "RUNNING" && job.value("restarts", -1) == 0;
  };
  EXPECT_TRUE(wait_until(goes_on, kPatience)) << penstock({"describe", "steady"}).out;
  EXPECT_EQ(penstock({"cancel", "steady", "--grace", "0s"}).exit_code, 0);
}

TEST_F(DevTest, AWorkerThatDiedIsStartedAgainByDevUp) {
  const auto incarnation = [] {
    const Json workers = json_of({"workers"});
    for (const Json& worker : workers["items"]) {
      if (worker["name"] == "worker-3") return worker["incarnation"].get<std::string>();
    }
    return std::string();
  };
  const std::string old = incarnation();
  kill("worker-3");
  const ProgramRun again = penstock({"dev", "up", "--workers", "4"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_NE(again.err.find("started worker-3"), std::string::npos) << again.err;
  EXPECT_EQ(json_of({"workers"})["items"].size(), 4u);
  // It has registered when dev up returns, although nobody had noticed yet that the old one died.
  EXPECT_NE(incarnation(), old);
}

TEST_F(DevTest, AFollowedJobIsShownToItsEndAndCanBeSampled) {
  const ProgramRun run = penstock(
      {"submit",
       spec({.name = "followed", .steps = 12, .microbatch_ramp = "[{from_step: 7, value: 6}]"}),
       "--follow"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_NE(run.err.find("step 12/12  loss "), std::string::npos) << run.err;
  EXPECT_NE(run.err.find("SUCCEEDED"), std::string::npos) << run.err;
  EXPECT_NE(run.err.find("held-out loss"), std::string::npos) << run.err;
  EXPECT_EQ(run.out.find_first_not_of("0123456789\n"), std::string::npos) << run.out;

  const Json job = json_of({"describe", "followed"});
  EXPECT_EQ(job["state"], "SUCCEEDED");
  const Json steps = json_of({"metrics", "followed"})["items"];
  ASSERT_EQ(steps.size(), 12u);
  EXPECT_EQ(steps[5]["tokens"], 256);  // 4 micro-batches of 2 x 32
  EXPECT_EQ(steps[6]["tokens"], 384);
  EXPECT_EQ(job["tokens"], 6 * 256 + 6 * 384);
  const std::string table = penstock({"metrics", "followed"}).out;
  EXPECT_NE(table.find("TOKENS"), std::string::npos) << table;
  EXPECT_NE(table.find(" 384 "), std::string::npos) << table;
  EXPECT_FALSE(json_of({"events", "followed"})["items"].empty());
  EXPECT_FALSE(json_of({"checkpoint", "ls", "followed"})["items"].empty());
  const std::string checkpoints = penstock({"checkpoint", "ls", "followed"}).out;
  EXPECT_NE(checkpoints.find("FILES"), std::string::npos) << checkpoints;
  EXPECT_NE(checkpoints.find(" complete "), std::string::npos) << checkpoints;
  EXPECT_EQ(json_of({"logs", "followed"})["items"].size(), 4u);
  EXPECT_EQ(json_of({"wait", "followed"})["state"], "SUCCEEDED");

  const std::vector<std::string> sample = {"sample",   "followed", "--prompt", "ab",
                                           "--tokens", "20",       "--seed",   "3"};
  const Json first = json_of(sample);
  EXPECT_EQ(first["tokens"].size(), 20u);
  EXPECT_EQ(first["step"], 12);
  EXPECT_EQ(json_of(sample), first);

  // Checkpoints are of steps 5, 10 and 12.
  const auto sample_of = [&](const char* step) {
    std::vector<std::string> arguments = sample;
    arguments.insert(arguments.end(), {"--step", step, "-o", "json"});
    return penstock(arguments);
  };
  EXPECT_EQ(document(sample_of("12")), first);
  const Json earlier = document(sample_of("10"));
  EXPECT_EQ(earlier["step"], 10);
  const ProgramRun none = sample_of("11");
  EXPECT_EQ(none.exit_code, 3);
  EXPECT_NE(none.err.find("no checkpoint of step 11"), std::string::npos) << none.err;
}

TEST_F(DevTest, AWatchedListIsJsonLinesUntilTheJobEnds) {
  ASSERT_EQ(penstock({"submit", spec({.name = "watched", .steps = 8})}).exit_code, 0);
  for (const auto& [verb, kind] : {std::pair{"events", "Event"}, {"metrics", "Step"}}) {
    const ProgramRun run = penstock({verb, "watched", "-w", "-o", "json"});
    EXPECT_EQ(run.exit_code, 0) << run.err;
    const Json whole = json_of({verb, "watched"});
    Json items = Json::array();
    std::istringstream lines(run.out);
    for (std::string line; std::getline(lines, line);) {
      Json item = Json::parse(line, nullptr, false);
      ASSERT_TRUE(item.is_object()) << line;
      EXPECT_EQ(item["apiVersion"], "penstock/v1");
      EXPECT_EQ(item["kind"], kind);
      item.erase("apiVersion");
      item.erase("kind");
      items.push_back(item);
    }
    EXPECT_EQ(items, whole["items"]) << "each item once, in order";
  }
  const ProgramRun unknown = penstock({"events", "nobody", "-w", "-o", "json"});
  EXPECT_EQ(unknown.exit_code, 3);
  EXPECT_EQ(document(unknown)["kind"], "Error");
}

TEST_F(DevTest, EveryRankTellsInItsLogWhatItDid) {
  ASSERT_EQ(penstock({"submit", spec({.name = "told", .steps = 4}), "--follow"}).exit_code, 0);
  const ProgramRun log = penstock({"logs", "told", "--rank", "3"});
  ASSERT_EQ(log.exit_code, 0) << log.err;
  size_t at = 0;  // in this order
  for (const char* line :
       {"rank 3 of 4 on ", "initial weights from seed", "training from step 1 to 4",
        "saved the checkpoint of step 4", "step 4 is committed", "finished"}) {
    at = log.out.find(line, at);
    ASSERT_NE(at, std::string::npos) << line << " is missing in\n" << log.out;
  }
  const ProgramRun followed = penstock({"logs", "told", "--rank", "3", "--follow"});
  EXPECT_EQ(followed.exit_code, 0) << "the job has ended: there is nothing to wait for";
  EXPECT_EQ(followed.out, log.out);
}

// Steps come faster than the coordinator answers a question for more.
TEST_F(DevTest, TheLogOfATrainingJobIsFollowedWhileItTrains) {
  ASSERT_EQ(penstock({"submit", spec({.name = "chatty", .steps = 100000})}).exit_code, 0);
  SpawnOptions options;
  options.argv = {binary("penstock").string(), "logs", "chatty", "--rank", "0", "--follow"};
  options.environment = {"PENSTOCK_DEV_STATE_DIR=" + state_, "PENSTOCK_SERVER="};
  auto follower = ChildProcess::spawn(options);
  ASSERT_TRUE(follower.ok()) << follower.status().to_string();
  const FileDescriptor out = follower->take_stdout();
  std::string seen;
  const auto read_more = [&] {
    char buffer[4096];
    const ssize_t count = ::read(out.get(), buffer, sizeof(buffer));
    if (count > 0) seen.append(buffer, static_cast<size_t>(count));
    return std::count(seen.begin(), seen.end(), '\n') >= 20;
  };
  EXPECT_TRUE(wait_until(read_more, kPatience)) << seen;
  EXPECT_EQ(json_of({"describe", "chatty"})["state"], "RUNNING");
  EXPECT_EQ(penstock({"cancel", "chatty"}).exit_code, 0);
}

TEST_F(DevTest, StepsThatAreYetToComeAreTracedAndStillThereWhenTheJobHasEnded) {
  ASSERT_EQ(penstock({"submit", spec({.name = "traced", .steps = 12})}).exit_code, 0);
  const std::string file = path("t.json");
  const ProgramRun run = penstock({"trace", "traced", "--steps", "9:10", "-o", "json", "-o", file});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json summary = document(run);
  EXPECT_EQ(summary["kind"], "TraceSummary");
  EXPECT_EQ(summary["ranks"], 4);
  EXPECT_EQ(summary["first_step"], 9);
  EXPECT_EQ(summary["last_step"], 10);
  double parts = 0.0;
  for (const auto& [name, seconds] : summary["seconds"].items()) {
    if (name != "step") parts += seconds.get<double>();
  }
  EXPECT_NEAR(parts, summary["seconds"]["step"].get<double>(), 1e-9);
  const ProgramRun device = penstock({"trace", "traced", "-o", "/dev/null"});
  EXPECT_EQ(device.exit_code, 2) << device.err;
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
  std::ifstream stream(file);
  const Json chrome = Json::parse(stream, nullptr, false);
  ASSERT_TRUE(chrome.is_object());
  std::set<int> ranks;
  std::set<std::string> names;
  for (const Json& event : chrome["traceEvents"]) {
    ranks.insert(event["pid"].get<int>());
    names.insert(event["name"].get<std::string>());
  }
  EXPECT_EQ(ranks, (std::set<int>{0, 1, 2, 3}));
  for (const char* name : {"attn(F)", "mlp(W)", "dispatch(B)", "combine(F)", "optimizer"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }

  ASSERT_EQ(penstock({"wait", "traced", "--timeout", "240s"}).exit_code, 0);
  EXPECT_EQ(json_of({"trace", "traced"})["last_step"], 12);
  EXPECT_EQ(penstock({"trace", "traced", "--steps", "12:13"}).exit_code, 3);
  EXPECT_EQ(penstock({"trace", "traced", "--steps", "3:2"}).exit_code, 2);
}

TEST_F(DevTest, AKilledRankIsReplacedAndTheJobSucceeds) {
  const std::string name = "killed";
  ASSERT_EQ(penstock({"submit", spec({.name = name, .steps = 200})}).exit_code, 0);
  ASSERT_EQ(penstock({"wait", name, "--for", "step=7", "--timeout", "240s"}).exit_code, 0);
  const ProgramRun kill = penstock({"dev", "kill-rank", name, "--rank", "2"});
  ASSERT_EQ(kill.exit_code, 0) << kill.err;
  EXPECT_EQ(penstock({"wait", name, "--timeout", "240s"}).exit_code, 0);
  EXPECT_GE(json_of({"describe", name})["restarts"], 1);
}

TEST_F(DevTest, ACancelledJobExitsElevenAndItsNameStillWorks) {
  ASSERT_EQ(penstock({"submit", spec({.name = "endless", .steps = 1'000'000})}).exit_code, 0);
  ASSERT_EQ(penstock({"wait", "endless", "--for", "state=RUNNING", "--timeout", "240s"}).exit_code,
            0);
  EXPECT_EQ(penstock({"wait", "endless", "--timeout", "100ms"}).exit_code, 7);
  EXPECT_EQ(penstock({"submit", path("endless.yaml")}).exit_code, 6);  // the name is taken
  ASSERT_EQ(penstock({"submit", path("endless.yaml"), "--name", "waiting"}).exit_code, 0);
  const ProgramRun trace = penstock({"trace", "waiting"});
  EXPECT_EQ(trace.exit_code, 6) << "there is nothing to wait for that must come";
  EXPECT_NE(trace.err.find("it is QUEUED: "), std::string::npos) << trace.err;
  ASSERT_EQ(penstock({"cancel", "waiting"}).exit_code, 0);
  ASSERT_EQ(penstock({"cancel", "endless"}).exit_code, 0);
  EXPECT_EQ(penstock({"wait", "endless", "--timeout", "240s"}).exit_code, 11);
  EXPECT_EQ(penstock({"cancel", "endless"}).exit_code, 6);
  EXPECT_EQ(json_of({"describe", "endless"})["state"], "CANCELLED");
}

TEST_F(DevTest, AnUnknownJobExitsThreeAndNamesTheNearest) {
  ASSERT_EQ(penstock({"submit", spec({.name = "nearest", .steps = 2}), "--follow"}).exit_code, 0);
  const ProgramRun run = penstock({"describe", "neerest", "-o", "json"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_EQ(document(run)["error"]["code"], "not_found");
  EXPECT_NE(run.err.find("did you mean \"nearest\"?"), std::string::npos) << run.err;
}

TEST_F(DevTest, MoreRanksThanDevicesExitsTwoWithThePlaceInTheSpec) {
  const std::string file = spec({.name = "wide", .data = 4});
  const ProgramRun run = penstock({"submit", file});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find(file + ":"), std::string::npos) << run.err;
  EXPECT_NE(run.err.find("16 ranks"), std::string::npos) << run.err;
}

TEST_F(DevTest, FinishedJobsAreListedOnRequest) {
  ASSERT_EQ(penstock({"submit", spec({.name = "listed", .steps = 2}), "--follow"}).exit_code, 0);
  const auto lists = [&](const Json& list) {
    for (const Json& job : list["items"]) {
      if (job["name"] == "listed") return true;
    }
    return false;
  };
  EXPECT_FALSE(lists(json_of({"ps"})));
  EXPECT_TRUE(lists(json_of({"ps", "-a"})));
}

}  // namespace
}  // namespace penstock
