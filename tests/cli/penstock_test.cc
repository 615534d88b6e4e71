// The real program without a coordinator: usage, specs, data, an address where nobody listens.
#include <gtest/gtest.h>

#include <atomic>
#include <csignal>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "comm/control/event_loop.h"
#include "comm/control/http_server.h"
#include "comm/run/job_spec.h"
#include "tests/run/spec_text.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

class PenstockTest : public testing::Test {
 protected:
  ProgramRun penstock(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), binary("penstock").string());
    // Nothing listens on port 1, and no cluster runs in the scratch folder.
    return run_program(arguments, {"PENSTOCK_DEV_STATE_DIR=" + path("dev"),
                                   "PENSTOCK_SERVER=http://127.0.0.1:1", "NO_COLOR=1"});
  }
  // stdout as the one JSON document it must be.
  static Json document(const ProgramRun& run) {
    Json json = Json::parse(run.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << run.out << run.err;
    return json;
  }
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  std::string write(const std::string& name, std::string_view text) const {
    std::ofstream(path(name)) << text;
    return path(name);
  }
  ScratchFolder folder_;
};

TEST_F(PenstockTest, VersionWorksWithoutACoordinator) {
  const ProgramRun run = penstock({"version", "-o", "json"});
  EXPECT_EQ(run.exit_code, 0);
  const Json json = document(run);
  EXPECT_FALSE(json["client"]["version"].get<std::string>().empty());
  EXPECT_TRUE(json["server"].is_null());
}

TEST_F(PenstockTest, HelpStartsWithExamples) {
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"--help"},
                                                    {"submit", "--help"},
                                                    {"dev", "up", "--help"},
                                                    {"help"},
                                                    {"help", "wait"}}) {
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, 0);
    EXPECT_EQ(run.out.find("Examples:\n  "), 0u) << run.out;
  }
  const std::string admin = penstock({"admin", "--help"}).out;
  EXPECT_EQ(admin.find("Examples:\n  penstock admin "), 0u) << admin;
}

TEST_F(PenstockTest, HelpSaysWhatAValueIsInsteadOfWhichTypeHoldsIt) {
  std::vector<std::vector<std::string>> verbs = {{}};
  for (size_t i = 0; i < verbs.size(); ++i) {
    std::vector<std::string> arguments = verbs[i];
    arguments.push_back("--help");
    const ProgramRun run = penstock(arguments);
    ASSERT_EQ(run.exit_code, 0) << run.err;
    for (const char* type : {" TEXT", " INT", " UINT", " FLOAT", "NONNEGATIVE", " in ["}) {
      EXPECT_EQ(run.out.find(type), std::string::npos) << type << "\n" << run.out;
    }
    std::istringstream lines(
        run.out.substr(std::min(run.out.find("Subcommands:"), run.out.size())));
    for (std::string line; std::getline(lines, line) && !line.empty();) {
      if (!line.starts_with("  ") || line[2] == ' ') continue;
      verbs.push_back(verbs[i]);
      verbs.back().push_back(line.substr(2, line.find_first_of(", ", 2) - 2));
    }
  }
  EXPECT_GT(verbs.size(), 40u);
  const std::string slow = penstock({"chaos", "slow", "--help"}).out;
  for (const char* option : {"--rank RANK REQUIRED", "--for TIME=10s", "--factor FACTOR=4",
                             "--output {table, json}=table", "  job REQUIRED  "}) {
    EXPECT_NE(slow.find(option), std::string::npos) << option << "\n" << slow;
  }
  EXPECT_NE(penstock({"wait", "--help"}).out.find("--for CONDITION"), std::string::npos);
}

TEST_F(PenstockTest, WhatIsWrongPointsToTheHelpOfItsVerb) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> wrong = {
      {{"--bogus"}, "; see penstock --help"},
      {{"ps", "--bogus"}, "; see penstock ps --help"},
      {{"checkpoint", "prune", "x", "--keep-last", "no"}, "; see penstock checkpoint prune --help"},
      {{"chaos", "kill", "x", "--rank", "-1"},
       "--rank: Value -1 not in range 0 to 1048575; see penstock chaos kill --help"},
      {{"chaos", "--state-dir", "x", "kill"}, "; see penstock chaos kill --help"},
      {{"chaos", "zzzzzzzzz"}, "; penstock chaos --help lists all"}};
  for (const auto& [arguments, hint] : wrong) {
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, 2);
    EXPECT_NE(run.err.find(hint + "\n"), std::string::npos) << run.err;
  }
}

TEST_F(PenstockTest, ACoordinatorThatDoesNotAnswerIsNamedOnce) {
  const std::string error = penstock({"ps", "--server", "http://127.0.0.1:1"}).err;
  const size_t first = error.find("127.0.0.1:1");
  ASSERT_NE(first, std::string::npos) << error;
  EXPECT_EQ(first, error.rfind("127.0.0.1:1")) << error;
  EXPECT_NE(error.find("penstock dev up"), std::string::npos) << error;
}

TEST_F(PenstockTest, TheHelpOfAVerbEndsWithTheOptionsOfTheVerbsAboveIt) {
  const std::string ps = penstock({"ps", "--help"}).out;
  const size_t global = ps.find("Global options:");
  ASSERT_NE(global, std::string::npos) << ps;
  for (const char* option : {"-o,--output", "--server", "--no-headers"}) {
    EXPECT_NE(ps.find(option, global), std::string::npos) << option << ps;
  }
  const std::string up = penstock({"dev", "up", "--help"}).out;
  EXPECT_LT(up.find("--state-dir"), up.find("Global options:")) << up;
  const std::string exported = penstock({"export", "--help"}).out;
  EXPECT_EQ(exported.find("-o,--output"), exported.rfind("-o,--output")) << "its own -o\n"
                                                                         << exported;
  const std::string top = penstock({"--help"}).out;
  EXPECT_EQ(top.find("Global options:"), std::string::npos) << top;
}

TEST_F(PenstockTest, EveryVerbThatNeedsACoordinatorExitsFiveAndPrintsOneDocument) {
  const std::string spec = tiny_job_yaml(folder_.path(), {});
  const std::vector<std::vector<std::string>> verbs = {{"ps"},
                                                       {"describe", "x"},
                                                       {"doctor", "x"},
                                                       {"chaos", "kill", "x", "--rank", "0"},
                                                       {"logs", "x"},
                                                       {"events"},
                                                       {"events", "x"},
                                                       {"metrics", "x"},
                                                       {"cancel", "x"},
                                                       {"resume", "x"},
                                                       {"resume", "x", "--prove", "5"},
                                                       {"rm", "x"},
                                                       {"checkpoint", "scrub", "x"},
                                                       {"checkpoint", "export", "x", "-o", "y"},
                                                       {"rebalance", "x"},
                                                       {"wait", "x"},
                                                       {"sample", "x"},
                                                       {"checkpoint", "ls", "x"},
                                                       {"workers"},
                                                       {"dev", "kill-rank", "x", "--rank", "0"},
                                                       {"submit", write("job.yaml", spec)}};
  for (std::vector<std::string> arguments : verbs) {
    arguments.insert(arguments.end(), {"-o", "json"});
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, 5) << arguments[0] << run.err;
    EXPECT_EQ(document(run)["error"]["code"], "unavailable") << arguments[0];
    EXPECT_NE(run.err.find("penstock dev up"), std::string::npos) << run.err;
  }
}

TEST_F(PenstockTest, ARemovalThatTheCoordinatorIsNotDoneWithGoesOnWithoutTheCommand) {
  EventLoop loop;
  std::vector<HttpResponder> unanswered;
  HttpServerOptions options;
  options.answer_timeout = std::chrono::milliseconds(50);
  auto server = HttpServer::start(
      loop.io_context(), options, [&](const HttpRequest& request, HttpResponder respond) {
        if (request.method == "DELETE") return unanswered.push_back(std::move(respond));
        respond(json_response(R"({"apiVersion":"penstock/v1","kind":"Job","id":7})"));
      });
  ASSERT_TRUE(server.ok()) << server.status().to_string();
  std::thread thread([&] { loop.run(); });
  const ProgramRun run = penstock({"rm", "large", "--checkpoints", "-o", "json", "--server",
                                   fmt::format("127.0.0.1:{}", (*server)->port())});
  loop.stop();
  thread.join();
  EXPECT_EQ(run.exit_code, 7) << run.err;
  const Json error = document(run)["error"];
  EXPECT_EQ(error["code"], "deadline_exceeded");
  const std::string message = error["message"];
  EXPECT_NE(message.find("job 7 are still being removed, which goes on"), std::string::npos)
      << message;
  EXPECT_NE(message.find("penstock describe 7"), std::string::npos) << message;
}

// Another service on the port, whose answers are JSON or not.
class WrongServerTest : public PenstockTest {
 protected:
  WrongServerTest() {
    HttpServerOptions options;
    auto started = HttpServer::start(loop_.io_context(), options,
                                     [this](const HttpRequest&, HttpResponder respond) {
                                       ++asked_;
                                       respond({200, "application/json", answer_});
                                     });
    EXPECT_TRUE(started.ok()) << started.status().to_string();
    server_ = *std::move(started);
    thread_ = std::thread([this] { loop_.run(); });
  }
  ~WrongServerTest() override {
    loop_.stop();
    thread_.join();
  }
  void answer_with(const std::string& answer) {
    std::promise<void> done;
    loop_.post([&] {
      answer_ = answer;
      done.set_value();
    });
    done.get_future().wait();
  }
  uint16_t port() const { return server_->port(); }
  int asked() const { return asked_; }
  ProgramRun ask(std::vector<std::string> arguments) {
    arguments.insert(arguments.end(),
                     {"-o", "json", "--server", fmt::format("127.0.0.1:{}", port())});
    return penstock(arguments);
  }

 private:
  std::string answer_;
  std::atomic<int> asked_{0};
  EventLoop loop_;
  std::unique_ptr<HttpServer> server_;
  std::thread thread_;
};

TEST_F(WrongServerTest, IsNamedAndNotTakenForACoordinator) {
  for (const char* answer : {"", "<html>hello</html>", "[]", "7", "{}", "{\"items\": []}",
                             "{\"apiVersion\": \"v1\", \"items\": [1]}"}) {
    answer_with(answer);
    for (const std::vector<std::string>& verb : {std::vector<std::string>{"ps"},
                                                 {"describe", "x"},
                                                 {"logs", "x"},
                                                 {"events"},
                                                 {"workers"},
                                                 {"wait", "x"},
                                                 {"resume", "x", "--prove", "5"},
                                                 {"rm", "x"},
                                                 {"cancel", "x"}}) {
      const ProgramRun run = ask(verb);
      EXPECT_EQ(run.exit_code, 1) << verb[0] << ", " << answer << run.err;
      EXPECT_EQ(document(run)["error"]["code"], "internal") << answer;
      EXPECT_NE(run.err.find("does not answer like a coordinator"), std::string::npos) << run.err;
    }
  }
}

TEST_F(WrongServerTest, MembersOfOtherKindsAreAnErrorAndNotACrash) {
  for (const char* members :
       {"\"items\": [1, \"x\", null]", "\"items\": [{\"reason\": 3}]", "\"items\": 7",
        "\"items\": [[]], \"terminal\": 1", "\"state\": 5, \"evaluations\": [2]"}) {
    answer_with(fmt::format("{{\"apiVersion\": \"penstock/v1\", \"kind\": \"Job\", {}}}", members));
    for (const std::vector<std::string>& verb : {std::vector<std::string>{"ps", "-a"},
                                                 {"describe", "x"},
                                                 {"logs", "x"},
                                                 {"events"},
                                                 {"metrics", "x"},
                                                 {"workers"},
                                                 {"wait", "x", "--timeout", "10ms"},
                                                 {"checkpoint", "ls", "x"}}) {
      const ProgramRun run = ask(verb);
      EXPECT_TRUE(run.exit_code >= 0 && run.exit_code <= 15) << run.exit_code << members << run.err;
      document(run);
    }
  }
}

TEST_F(WrongServerTest, ANameThatLeadsToAnotherDocumentIsNoJob) {
  answer_with("{\"apiVersion\": \"penstock/v1\", \"kind\": \"JobList\", \"items\": []}");
  for (const char* name : {"", "x/steps"}) EXPECT_EQ(ask({"describe", name}).exit_code, 3) << name;
}

TEST_F(WrongServerTest, CtrlCLeavesTheJobAndIsNotForWhoRunsInTheBackground) {
  answer_with(
      R"({"apiVersion": "penstock/v1", "kind": "Job", "id": 3, "name": "x", "state": "RUNNING"})");
  const std::string wait =
      fmt::format("exec '{}' wait x --server 127.0.0.1:{}", binary("penstock").string(), port());
  SpawnOptions options;
  options.argv = {"/bin/sh", "-c", wait};
  auto child = ChildProcess::spawn(options);
  ASSERT_TRUE(child.ok());
  ASSERT_TRUE(wait_until([&] { return asked() >= 3; }, kPatience));
  ASSERT_TRUE(child->send_signal(SIGINT).ok());
  EXPECT_EQ(child->wait().exit_code, 130);
  char text[512] = {};
  ASSERT_GT(::read(child->take_stderr().get(), text, sizeof text - 1), 0);
  EXPECT_NE(std::string(text).find("job x goes on"), std::string::npos) << text;

  options.argv.back() = "trap '' INT; " + wait;  // as a shell starts what ends in "&"
  child = ChildProcess::spawn(options);
  ASSERT_TRUE(child.ok());
  const int before = asked();
  ASSERT_TRUE(wait_until([&] { return asked() >= before + 3; }, kPatience));
  ASSERT_TRUE(child->send_signal(SIGINT).ok());
  const int then = asked();
  EXPECT_TRUE(wait_until([&] { return asked() >= then + 3; }, kPatience));
  ASSERT_TRUE(child->send_signal(SIGTERM).ok());
  EXPECT_EQ(child->wait().signal, SIGTERM);
}

TEST_F(PenstockTest, AStateFolderThatCannotBeMadeIsNamedWithAWayOut) {
  const std::string file = write("file", "");
  const ProgramRun run = penstock({"dev", "up", "--state-dir", file + "/dev", "-o", "json"});
  EXPECT_NE(run.exit_code, 0);
  EXPECT_EQ(document(run)["kind"], "Error");
  EXPECT_NE(run.err.find(file), std::string::npos) << run.err;
  EXPECT_NE(run.err.find("--state-dir"), std::string::npos) << run.err;
}

TEST_F(PenstockTest, OutputThatCannotBeWrittenIsAnError) {
  const std::string program = "'" + binary("penstock").string() + "'";
  const ProgramRun full = run_program({"/bin/sh", "-c", program + " exit-codes > /dev/full"});
  EXPECT_EQ(full.exit_code, 1);
  EXPECT_NE(full.err.find("write to standard output"), std::string::npos) << full.err;
  const ProgramRun pipe = run_program({"/bin/sh", "-c", program + " exit-codes | head -1"});
  EXPECT_EQ(pipe.out, "CODE  MEANING\n");
  EXPECT_EQ(pipe.err, "") << "a reader that has enough is no error";
}

TEST_F(PenstockTest, WrongUseExitsTwoAndNamesTheNearestVerb) {
  const ProgramRun run = penstock({"sumbit", "x"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_EQ(run.out, "");
  EXPECT_NE(run.err.find("unknown command \"sumbit\"; did you mean \"submit\"?"),
            std::string::npos);
  EXPECT_EQ(penstock({}).exit_code, 2);
  EXPECT_EQ(penstock({"ps", "--colour"}).exit_code, 2);
  EXPECT_EQ(penstock({"dev", "up", "--workers", "0"}).exit_code, 2);
  EXPECT_EQ(penstock({"wait", "x", "--for", "moon"}).exit_code, 2);
  EXPECT_EQ(penstock({"wait", "x", "--timeout", "soon"}).exit_code, 2);
}

TEST_F(PenstockTest, AMistypedValueOfAFlagIsGivenTheNearest) {
  const auto error = [&](std::vector<std::string> arguments) {
    const ProgramRun run = penstock(std::move(arguments));
    EXPECT_EQ(run.exit_code, 2) << run.err;
    return run.err;
  };
  EXPECT_NE(error({"ps", "-o", "jsn"}).find("jsn is none of table, json; did you mean \"json\"?"),
            std::string::npos);
  EXPECT_NE(error({"export", "x", "-o", "y", "--dtype", "fp23"}).find("did you mean \"fp32\"?"),
            std::string::npos);
  EXPECT_NE(error({"wait", "x", "--for", "state=runing"}).find("did you mean \"RUNNING\"?"),
            std::string::npos);
}

TEST_F(PenstockTest, WhatIsNotExpectedIsNamedAndANumberThatIsNoneToo) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> wrong = {
      {{"ps", "--state", "RUNNING"}, "unknown flag --state; see penstock ps --help"},
      {{"ps", "--al"}, "unknown flag --al; did you mean --all?; see penstock ps --help"},
      {{"describe", "a", "b"}, "unexpected \"b\"; see penstock describe --help"},
      {{"events", "--tail", "x"},
       "--tail: \"x\" is no whole number; expected one from 0 to 1000000000; "},
      {{"sample", "x", "--temperature", "hot"}, "\"hot\" is no number; expected one from 0.0"},
      {{"jobs"}, "unknown command \"jobs\"; did you mean \"ps\"?"},
      {{"kill", "x"}, "unknown command \"kill\"; did you mean \"cancel\" or \"dev kill-rank\"?"}};
  for (const auto& [arguments, error] : wrong) {
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, 2);
    EXPECT_NE(run.err.find(error), std::string::npos) << error << " in " << run.err;
  }
}

TEST_F(PenstockTest, WrongUseInJsonIsADocumentToo) {
  const ProgramRun run = penstock({"ps", "--colour", "-o", "json"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_EQ(document(run)["kind"], "Error");
}

TEST_F(PenstockTest, AWrongSpecExitsTwoWithItsPlace) {
  const std::string spec = write("job.yaml", edited("hidden_size", "hiden_size"));
  const ProgramRun run = penstock({"submit", spec});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_EQ(run.out, "");
  EXPECT_EQ(run.err,
            "penstock: " + spec +
                ":6:3: unknown key \"hiden_size\" in model; did you mean \"hidden_size\"?\n");
}

TEST_F(PenstockTest, AnImpossibleLayoutExitsTwo) {
  const ProgramRun run =
      penstock({"submit", write("job.yaml", edited("pipeline: 2", "pipeline: 3"))});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("must be even with schedule dualpipe"), std::string::npos);
}

TEST_F(PenstockTest, AMissingSpecFileExitsThree) {
  EXPECT_EQ(penstock({"submit", "/nonexistent.yaml"}).exit_code, 3);
}

TEST_F(PenstockTest, MissingTrainingDataExitsTwoBeforeAnythingIsSent) {
  const ProgramRun run = penstock({"submit", write("job.yaml", kValidSpec)});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("job.yaml:23:18: data.train[0]: open /data/corpus_train.idx"),
            std::string::npos)
      << run.err;
}

TEST_F(PenstockTest, ASpecIsReadFromStandardInput) {
  const auto submit = [&](const std::string& input, const std::string& arguments) {
    const std::string command = fmt::format("'{}' submit - {} < '{}'", binary("penstock").string(),
                                            arguments, write("input", input));
    return run_program({"/bin/sh", "-c", command}, {"PENSTOCK_DEV_STATE_DIR=" + path("dev"),
                                                    "PENSTOCK_SERVER=http://127.0.0.1:1"});
  };
  const ProgramRun whole = submit(tiny_job_yaml(folder_.path(), {}), "--dry-run -o json");
  EXPECT_EQ(whole.exit_code, 0) << whole.err;
  EXPECT_EQ(document(whole)["metadata"]["name"], "tiny");
  const ProgramRun wrong = submit(edited("hidden_size", "hiden_size"), "");
  EXPECT_EQ(wrong.exit_code, 2);
  EXPECT_EQ(wrong.err.find("penstock: <stdin>:6:3: unknown key"), 0u) << wrong.err;
  const ProgramRun missing = submit(std::string(kValidSpec), "");
  EXPECT_EQ(missing.err.find("penstock: <stdin>:23:18: data.train[0]: open "), 0u) << missing.err;
  const ProgramRun endless = submit(std::string(1 << 20, '#'), "");
  EXPECT_EQ(endless.exit_code, 2);
  EXPECT_NE(endless.err.find("<stdin>:1:1: larger than 256 KiB"), std::string::npos) << endless.err;
  const ProgramRun drawn =
      run_program({"/bin/sh", "-c",
                   fmt::format("'{}' program - < '{}'", binary("penstock").string(),
                               write("job.yaml", kValidSpec))});
  EXPECT_EQ(drawn.out.find("dualpipe, 2 ranks"), 0u) << drawn.out << drawn.err;
}

TEST_F(PenstockTest, ADamagedDataSetExitsFourteen) {
  const std::string spec = write("job.yaml", tiny_job_yaml(folder_.path(), {}));
  std::filesystem::resize_file(path("tiny-train.bin"), 1000);
  const ProgramRun run = penstock({"submit", spec});
  EXPECT_EQ(run.exit_code, 14);
  EXPECT_NE(run.err.find("tiny-train.bin: 1000 bytes"), std::string::npos) << run.err;
}

TEST_F(PenstockTest, ADryRunPrintsTheSpecWithEveryDefault) {
  const std::string spec = write("job.yaml", tiny_job_yaml(folder_.path(), {}));
  const ProgramRun run = penstock({"submit", spec, "--dry-run", "--name", "other", "-o", "json"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  const Json json = document(run);
  EXPECT_EQ(json["metadata"]["name"], "other");
  EXPECT_EQ(json["optimizer"]["betas"], Json::array({0.9, 0.95}));
}

TEST_F(PenstockTest, ProgramDrawsAStepWithoutACoordinator) {
  const ProgramRun run = penstock({"program", write("job.yaml", kValidSpec)});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.out.find("dualpipe, 2 ranks, 2 stages, 4 micro-batches; 2 such pipelines\n"), 0u);
  EXPECT_NE(run.out.find("rank 0  F0FaF1Ba--FbB0==Bb--b1W1   0.0%\n"), std::string::npos)
      << run.out;
}

TEST_F(PenstockTest, ProgramOfOneRankIsNotCalledRanks) {
  const std::string spec =
      write("one.yaml", edited("{pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4}",
                               "{schedule: 1f1b, microbatches: 1}"));
  EXPECT_EQ(penstock({"program", spec}).out.find("1f1b, 1 rank, 1 stage, 1 micro-batch\n"), 0u);
}

TEST_F(PenstockTest, ProgramListsWhatARankDoes) {
  const std::string spec = write("job.yaml", kValidSpec);
  const ProgramRun run = penstock({"program", spec, "--rank", "3", "--no-headers"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.out.find("0   0   1   F1.0\n1   1   1   sendF1.0>0\n"), 0u) << run.out;
  const ProgramRun forward = penstock({"program", spec, "--rank", "3", "--evaluation"});
  EXPECT_EQ(forward.out.find("recvB"), std::string::npos) << forward.out;
}

TEST_F(PenstockTest, ProgramInJsonHasEveryInstructionAndItsTime) {
  const std::string spec = write("job.yaml", kValidSpec);
  const Json all = document(penstock({"program", spec, "--pair", "2.5", "-o", "json"}));
  EXPECT_EQ(all["kind"], "ProgramSet");
  EXPECT_EQ(all["bubble"], 0.0);
  EXPECT_EQ(all["costs"]["pair"], 2.5);
  ASSERT_EQ(all["pipeline_ranks"].size(), 2u);
  EXPECT_EQ(all["pipeline_ranks"][1]["ranks"], Json::array({2, 3}));
  EXPECT_EQ(all["pipeline_ranks"][1]["stages"], Json::array({1, 0}));
  const Json first = all["pipeline_ranks"][1]["training"][0];
  EXPECT_EQ(first["op"], "forward");
  EXPECT_EQ(first["text"], "F1.0");
  EXPECT_EQ(first["end"], 1.0);
  const Json one = document(penstock({"program", spec, "--rank", "1", "-o", "json"}));
  ASSERT_EQ(one["pipeline_ranks"].size(), 1u);
  EXPECT_EQ(one["pipeline_ranks"][0]["pipeline_index"], 0);
}

TEST_F(PenstockTest, ProgramLetsResultsLeaveBeforeTheTailOfAPass) {
  const std::string spec =
      write("one.yaml", edited("{pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4}",
                               "{pipeline: 2, schedule: 1f1b, microbatches: 4}"));
  const Json json = document(
      penstock({"program", spec, "--backward-tail", "0.5", "--pair-tail", "0.25", "-o", "json"}));
  EXPECT_EQ(json["bubble"], 2.5);
  EXPECT_EQ(json["bubble_by_formula"], 2.5);
  EXPECT_EQ(json["costs"]["backward_tail"], 0.5);
  EXPECT_EQ(json["costs"]["pair_tail"], 0.25);
  const ProgramRun run = penstock({"program", spec, "--backward-tail", "0.5"});
  EXPECT_NE(run.out.find("by formula (P-1)(F+B-tail) = 2.5"), std::string::npos) << run.out;
}

TEST_F(PenstockTest, ProgramShowsTheStepsOfARampWhoseEvaluationsKeepTheFirstSize) {
  const std::string spec = write(
      "ramp.yaml",
      edited("microbatches: 4}", "microbatches: 4, microbatch_ramp: [{from_step: 3, value: 6}]}"));
  for (const auto& [step, microbatches] : {std::pair{"2", 4}, {"3", 6}}) {
    const Json json = document(penstock({"program", spec, "--step", step, "-o", "json"}));
    EXPECT_EQ(json["microbatches"], microbatches);
    const Json& rank = json["pipeline_ranks"][0];
    int forwards = 0, evaluated = 0;
    for (const Json& i : rank["training"])
      forwards += i["op"] == "forward" || i["op"] == "overlapped";
    for (const Json& i : rank["evaluation"]) evaluated += i["op"] == "forward";
    EXPECT_EQ(forwards, microbatches);
    EXPECT_EQ(evaluated, 4);
  }
  EXPECT_EQ(penstock({"program", spec, "--step", "0"}).exit_code, 2);
}

TEST_F(PenstockTest, ProgramMistakesHaveTheirExitCodes) {
  const std::string spec = write("job.yaml", kValidSpec);
  EXPECT_EQ(penstock({"program", path("none.yaml")}).exit_code, 3);
  EXPECT_EQ(penstock({"program", spec, "--rank", "4"}).exit_code, 3);
  EXPECT_EQ(penstock({"program", spec, "--rank", "-1"}).exit_code, 2);
  EXPECT_EQ(penstock({"program", spec, "--pair", "0"}).exit_code, 2);
  EXPECT_EQ(penstock({"program", spec, "--weight", "2"}).exit_code, 2);
  EXPECT_EQ(penstock({"program", spec, "--send", "-1"}).exit_code, 2);
  EXPECT_EQ(penstock({"program", spec, "--pair-tail", "1.5"}).exit_code, 2);
  const ProgramRun wrong =
      penstock({"program", write("odd.yaml", edited("pipeline: 2", "pipeline: 3"))});
  EXPECT_EQ(wrong.exit_code, 2);
  EXPECT_NE(wrong.err.find("odd.yaml:27:25: parallelism.pipeline must be even"), std::string::npos)
      << wrong.err;
}

TEST_F(PenstockTest, DataIsPreparedAndInspected) {
  const std::string text =
      write("text", "to be or not to be\n%\nthat is the question\n%\nwhether\n");
  const ProgramRun prepared = penstock(
      {"data", "prepare", "--split", "percent", "--output", path("corpus"), text, "-o", "json"});
  ASSERT_EQ(prepared.exit_code, 0) << prepared.err;
  const Json report = document(prepared);
  EXPECT_EQ(report["train"]["documents"].get<int>() + report["heldout"]["documents"].get<int>(), 3);

  const ProgramRun inspected =
      penstock({"data", "inspect", path("corpus_heldout.bin"), "-o", "json"});
  ASSERT_EQ(inspected.exit_code, 0) << inspected.err;
  const Json facts = document(inspected);
  EXPECT_EQ(facts["tokens"], report["heldout"]["tokens"]);
  EXPECT_EQ(facts["unigram_entropy"], report["unigram_entropy"]);
  EXPECT_EQ(facts["largest_token"], 256);
}

TEST_F(PenstockTest, DataMistakesHaveTheirExitCodes) {
  const std::string output = path("corpus");
  EXPECT_EQ(penstock({"data", "prepare", "--output", output, path("none")}).exit_code, 3);
  EXPECT_EQ(penstock({"data", "prepare", "--output", output, write("e", "")}).exit_code, 2);
  EXPECT_EQ(penstock({"data", "prepare", "--output", output, write("b", "\xff\xfe")}).exit_code, 2);
  EXPECT_EQ(
      penstock({"data", "prepare", "--output", output, "--split", "x", write("t", "a")}).exit_code,
      2);
  EXPECT_EQ(penstock({"data", "inspect", path("none")}).exit_code, 3);
  write("d.idx", "MMIDIDX");
  write("d.bin", "xx");
  EXPECT_EQ(penstock({"data", "inspect", path("d")}).exit_code, 14);
}

TEST_F(PenstockTest, ARestoreFromABadFileLeavesNothing) {
  const std::string file = write("a.backup", "no backup\n");
  const ProgramRun run = penstock({"admin", "restore", file, "--state", path("restored")});
  EXPECT_EQ(run.exit_code, 14) << run.err;
  EXPECT_FALSE(std::filesystem::exists(path("restored")));
}

TEST_F(PenstockTest, ARestoreIntoADevClustersFolderNamesItsCoordinators) {
  std::filesystem::create_directories(path("dev/coordinator"));
  const ProgramRun run =
      penstock({"admin", "restore", write("a.backup", "no backup\n"), "--state", path("dev")});
  EXPECT_EQ(run.exit_code, 6) << run.err;
  EXPECT_NE(run.err.find(path("dev/coordinator")), std::string::npos) << run.err;
  EXPECT_FALSE(std::filesystem::exists(path("dev/state")));
}

TEST_F(PenstockTest, ADevClusterThatDoesNotRunIsStatusThreeAndNothingToStop) {
  const ProgramRun status = penstock({"dev", "status", "-o", "json"});
  EXPECT_EQ(status.exit_code, 3);
  EXPECT_EQ(document(status)["running"], false);
  const ProgramRun down = penstock({"dev", "down", "-o", "json"});
  EXPECT_EQ(down.exit_code, 0);
  EXPECT_EQ(document(down)["stopped"], Json::array());
}

TEST_F(PenstockTest, ExitCodesAreListed) {
  const Json json = document(penstock({"exit-codes", "-o", "json"}));
  EXPECT_EQ(json["items"].size(), 19u);
  EXPECT_EQ(penstock({"help", "exit-codes"}).out.find("CODE  MEANING\n0 "), 0u);
}

TEST_F(PenstockTest, TheQuickstartSpecIsValid) {
  const auto spec = read_file(Path(PENSTOCK_SOURCE_DIR) / "docs/examples/quickstart.yaml", 1 << 20);
  ASSERT_TRUE(spec.ok());
  const auto parsed = parse_job_spec(*spec, "quickstart.yaml");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(parsed->parallelism.world_size(), 4);
}

}  // namespace
}  // namespace penstock
