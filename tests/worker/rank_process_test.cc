// Real penstock-rank processes, talking to a daemon that the test plays.
#include "worker/rank/rank_process.h"

#include <gtest/gtest.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <regex>

#include "tests/worker/engine_test_support.h"
#include "tests/worker/rank_fake_daemon.h"
#include "worker/rank/trainer.h"

namespace penstock {
namespace {

int code(ExitCode code) {
  return static_cast<int>(code);
}

class RankProcessTest : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }

  FakeDaemonOptions options_of(const TinyLayout& layout, int64_t steps) {
    JobSpec spec = tiny_spec(directory_.path(), layout, steps);
    spec.checkpoint.interval = 2;
    spec.training.evaluation_interval = 2;
    FakeDaemonOptions options;
    options.programs = tiny_run(spec).programs;
    options.spec = std::move(spec);
    options.directory = directory_.path();
    options.checkpoint_dir = directory_.path() / "store";
    return options;
  }
  static bool is_step(const ControlMessage& message, int64_t step) {
    const auto* report = std::get_if<StepReport>(&message);
    return report != nullptr && report->step == step;
  }

  ScratchDirectory directory_;
};

TEST_F(RankProcessTest, AJobRunsFromHelloToTheCommittedLastCheckpoint) {
  FakeDaemon daemon(options_of({2, 2, 1, Schedule::kDualPipe}, 5));
  daemon.spawn_all();
  for (int32_t r = 0; r < 4; ++r) {
    const RankExit exit = daemon.wait_exit(r);
    EXPECT_EQ(exit.status, (ExitStatus{0, 0})) << exit.last_words;
  }
  const StandaloneReport expected =
      train_tiny(tiny_run(options_of({2, 2, 1, Schedule::kDualPipe}, 5).spec));
  const std::vector<StepReport> steps = daemon.all<StepReport>();
  ASSERT_EQ(steps.size(), 5u);  // rank 0's alone
  for (size_t i = 0; i < steps.size(); ++i) {
    EXPECT_EQ(steps[i].step, static_cast<int64_t>(i) + 1);
    EXPECT_EQ(steps[i].loss, expected.steps[i].loss);  // though the exits are on other ranks, too
    EXPECT_EQ(steps[i].grad_norm, expected.steps[i].grad_norm);
    EXPECT_EQ(steps[i].tokens, 512);
    EXPECT_GT(steps[i].step_seconds, 0.0);
    EXPECT_GT(steps[i].finished_at_ns, 0);
  }
  std::vector<int64_t> evaluated;
  for (const EvaluationReport& report : daemon.all<EvaluationReport>())
    evaluated.push_back(report.step);
  EXPECT_EQ(evaluated, (std::vector<int64_t>{0, 2, 4, 5}));
  EXPECT_EQ(daemon.all<RankProgress>().size(), 20u);
  EXPECT_EQ(daemon.all<SegmentSaved>().size(), 12u);  // 4 ranks, after steps 2, 4 and 5
  EXPECT_EQ(daemon.all<RankFinished>().size(), 4u);
  // The first rank of each stage, which DualPipe has once on either pipeline rank, per checkpoint.
  std::map<int64_t, std::set<int64_t>> loads;
  for (const ExpertLoadReport& report : daemon.all<ExpertLoadReport>()) {
    for (const auto& [layer, load] : report.layers) loads[report.step].insert(layer);
  }
  const std::set<int64_t> layers = {1, 2, 3, 4};
  EXPECT_EQ(loads, (std::map<int64_t, std::set<int64_t>>{{2, layers}, {4, layers}, {5, layers}}));
  for (const RankProgress& progress : daemon.all<RankProgress>()) {
    EXPECT_GT(progress.compute_seconds, 0.0);
    EXPECT_GT(progress.bytes_sent, 0u);
    EXPECT_GT(progress.arena_bytes, 0u);
  }
  EXPECT_EQ(list_checkpoints(directory_.path() / "store", FakeDaemon::kJob).checkpoints.size(), 3u);
}

TEST_F(RankProcessTest, EveryRankSaysWhichDataItOpened) {
  const FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 2);
  FakeDaemon daemon(options);
  daemon.spawn_all();
  for (int32_t r = 0; r < 2; ++r) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 0);
  std::vector<DataIdentity> expected;
  for (const auto* sources : {&options.spec.data.train, &options.spec.data.validation}) {
    for (const DataSource& source : *sources) {
      const auto data = IndexedDataset::open(source.path);
      ASSERT_TRUE(data.ok()) << data.status().message();
      expected.push_back({source.path, data->token_count(), data->digest()});
    }
  }
  EXPECT_EQ(expected.size(), 2u);
  const std::vector<RankReady> ready = daemon.all<RankReady>();
  ASSERT_EQ(ready.size(), 2u);
  for (const RankReady& rank : ready) EXPECT_EQ(rank.data, expected);
}

TEST_F(RankProcessTest, ARestoredJobGoesOnBitForBit) {
  const TinyLayout layout{2, 1, 1, Schedule::kDualPipe};
  std::vector<StepReport> whole;
  {
    FakeDaemon daemon(options_of(layout, 4));
    daemon.spawn_all();
    for (int32_t r = 0; r < 2; ++r) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 0);
    whole = daemon.all<StepReport>();
  }
  ASSERT_EQ(whole.size(), 4u);
  FakeDaemonOptions options = options_of(layout, 4);
  options.restore_manifest = (options.checkpoint_dir / manifest_file_name(1)).string();
  options.restore_step = 2;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  for (int32_t r = 0; r < 2; ++r) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 0);
  const std::vector<StepReport> rest = daemon.all<StepReport>();
  ASSERT_EQ(rest.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(rest[i].step, whole[i + 2].step);
    EXPECT_EQ(rest[i].loss, whole[i + 2].loss);
    EXPECT_EQ(rest[i].grad_norm, whole[i + 2].grad_norm);
  }
}

TEST_F(RankProcessTest, ARankThatTheDaemonsMemoryIsClosedToTrainsInItsOwn) {
  FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 2);
  options.state_file = (directory_.path() / "not there").string();
  FakeDaemon daemon(options);
  daemon.spawn_all();
  for (int32_t r = 0; r < 2; ++r) {
    const RankExit exit = daemon.wait_exit(r);
    EXPECT_EQ(exit.status, (ExitStatus{0, 0})) << exit.last_words;
  }
  EXPECT_EQ(daemon.all<StepReport>().size(), 2u);
}

TEST_F(RankProcessTest, EveryRankSavesAfterTheSameStepsWhenTheCoordinatorChoosesThem) {
  FakeDaemonOptions options = options_of({2, 2, 1, Schedule::kDualPipe}, 8);
  options.spec.checkpoint.interval = 0;
  options.spec.checkpoint.automatic = true;
  options.save_interval = 3;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  for (int32_t r = 0; r < 4; ++r) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 0);
  std::map<int64_t, int> saved;
  for (const SegmentSaved& segment : daemon.all<SegmentSaved>()) ++saved[segment.step];
  EXPECT_EQ(saved, (std::map<int64_t, int>{{3, 4}, {6, 4}, {8, 4}}));
  const StandaloneReport expected =
      train_tiny(tiny_run(options_of({2, 2, 1, Schedule::kDualPipe}, 8).spec));
  const std::vector<StepReport> steps = daemon.all<StepReport>();
  ASSERT_EQ(steps.size(), 8u);
  for (size_t i = 0; i < steps.size(); ++i) {
    EXPECT_EQ(steps[i].loss, expected.steps[i].loss) << "when the state is saved changes nothing";
    EXPECT_EQ(steps[i].grad_norm, expected.steps[i].grad_norm);
    EXPECT_EQ(steps[i].checkpoint_seconds > 0.0, saved.contains(steps[i].step)) << steps[i].step;
  }
}

TEST_F(RankProcessTest, ANewIntervalTakesEffectWhileARunGoesOn) {
  FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 100'000);
  options.spec.checkpoint.interval = 0;
  options.spec.checkpoint.automatic = true;
  options.save_interval = 100'000;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for([](const ControlMessage& m) { return is_step(m, 3); }));
  EXPECT_TRUE(daemon.all<SegmentSaved>().empty());
  for (const int32_t r : {0, 1}) {
    daemon.send_to(r, SaveInterval{FakeDaemon::kJob, FakeDaemon::kEpoch, 2});
  }
  for (const int32_t r : {0, 1}) {
    ASSERT_TRUE(daemon.wait_for([&](const ControlMessage& message) {
      const auto* saved = std::get_if<SegmentSaved>(&message);
      return saved != nullptr && saved->rank == Rank{r};
    }));
  }
  for (const int32_t r : {0, 1}) EXPECT_TRUE(daemon.child(r).send_signal(SIGKILL).ok());
  for (const int32_t r : {0, 1}) daemon.wait_exit(r);
}

bool is_pause(const ControlMessage& message, int32_t rank) {
  const auto* saved = std::get_if<SegmentSaved>(&message);
  return saved != nullptr && saved->pauses && saved->rank == Rank{rank};
}

TEST_F(RankProcessTest, APauseThatOneRankHearsOfMakesAllSaveAfterTheSameStepAndWait) {
  FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 100'000);
  options.spec.checkpoint.interval = 0;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for([](const ControlMessage& m) { return is_step(m, 3); }));
  daemon.send_to(1, PauseRanks{FakeDaemon::kJob, FakeDaemon::kEpoch});
  for (const int32_t r : {0, 1}) {
    ASSERT_TRUE(daemon.wait_for([&](const ControlMessage& m) { return is_pause(m, r); }));
  }
  for (const int32_t r : {0, 1}) {
    daemon.send_to(r, StopRanks{FakeDaemon::kJob, FakeDaemon::kEpoch, 5000, "paused"});
  }
  for (const int32_t r : {0, 1}) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 12);
  const std::vector<SegmentSaved> saved = daemon.all<SegmentSaved>();
  ASSERT_EQ(saved.size(), 2u);
  EXPECT_EQ(saved[0].step, saved[1].step);
  EXPECT_EQ(daemon.all<StepReport>().back().step, saved[0].step) << "no step is trained after it";
}

TEST_F(RankProcessTest, RanksWhosePauseCannotBeSavedTrainOn) {
  FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 40);
  options.spec.checkpoint.interval = 0;
  options.first_answered_step = 40;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for([](const ControlMessage& m) { return is_step(m, 3); }));
  daemon.send_to(0, PauseRanks{FakeDaemon::kJob, FakeDaemon::kEpoch});
  for (const int32_t r : {0, 1}) {
    ASSERT_TRUE(daemon.wait_for([&](const ControlMessage& m) { return is_pause(m, r); }));
  }
  const int64_t step = daemon.all<SegmentSaved>()[0].step;
  for (const int32_t r : {0, 1}) {
    daemon.send_to(
        r, CheckpointOutcome{FakeDaemon::kJob, FakeDaemon::kEpoch, step, false, "disk full"});
  }
  for (const int32_t r : {0, 1}) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 0);
  EXPECT_EQ(daemon.all<StepReport>().size(), 40u);
}

std::map<int64_t, int> saves_by_step(const FakeDaemon& daemon) {
  std::map<int64_t, int> saved;
  for (const SegmentSaved& segment : daemon.all<SegmentSaved>()) ++saved[segment.step];
  return saved;
}

TEST_F(RankProcessTest, SavesThatNobodyCommitsAreBoundedAndTheRunGoesOn) {
  for (const bool automatic : {false, true}) {
    FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 20);
    options.spec.checkpoint.interval = automatic ? 0 : 2;
    options.spec.checkpoint.automatic = automatic;
    options.save_interval = 2;
    options.first_answered_step = 20;
    FakeDaemon daemon(options);
    daemon.spawn_all();
    for (int32_t r = 0; r < 2; ++r) EXPECT_EQ(daemon.wait_exit(r).status.exit_code, 0);
    EXPECT_EQ(daemon.all<StepReport>().size(), 20u);
    std::map<int64_t, int> wanted = {{20, 2}};  // the last is saved whatever happens
    for (size_t i = 1; i <= kUncommittedMax; ++i) wanted[2 * static_cast<int64_t>(i)] = 2;
    EXPECT_EQ(saves_by_step(daemon), wanted);
  }
}

TEST_F(RankProcessTest, SavesGoOnWhenThoseBeforeAreCommittedAfterAll) {
  FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 100'000);
  options.first_answered_step = 100'000;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const int64_t interval = options.spec.checkpoint.interval;
  const int64_t last = interval * static_cast<int64_t>(kUncommittedMax);
  const auto saved_after = [&](int64_t step) {
    for (const int32_t r : {0, 1}) {
      ASSERT_TRUE(daemon.wait_for([&](const ControlMessage& message) {
        const auto* saved = std::get_if<SegmentSaved>(&message);
        return saved != nullptr && saved->rank == Rank{r} && saved->step > step;
      }));
    }
  };
  saved_after(last - interval);
  ASSERT_TRUE(daemon.wait_for([&](const ControlMessage& m) { return is_step(m, last + 10); }));
  EXPECT_EQ(saves_by_step(daemon).size(), kUncommittedMax);
  for (const int32_t r : {0, 1}) {
    daemon.send_to(r, CheckpointOutcome{FakeDaemon::kJob, FakeDaemon::kEpoch, interval, true, ""});
  }
  saved_after(last);
  for (const int32_t r : {0, 1}) EXPECT_TRUE(daemon.child(r).send_signal(SIGKILL).ok());
  for (const int32_t r : {0, 1}) daemon.wait_exit(r);
  EXPECT_EQ(saves_by_step(daemon).size(), kUncommittedMax + 1) << "one was answered, one is saved";
}

TEST_F(RankProcessTest, AKilledRankTakesItsPeersWithItAsLostPeers) {
  FakeDaemon daemon(options_of({4, 1, 1, Schedule::kDualPipe}, 100000));
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for([](const ControlMessage& m) { return is_step(m, 3); }));
  EXPECT_TRUE(daemon.child(2).send_signal(SIGKILL).ok());
  EXPECT_EQ(daemon.wait_exit(2).status.signal, SIGKILL);
  for (const int32_t r : {0, 1, 3}) {
    const RankExit exit = daemon.wait_exit(r);
    EXPECT_EQ(exit.status.exit_code, code(ExitCode::kPeerLost)) << exit.last_words;
    EXPECT_NE(exit.last_words.find("unavailable"), std::string::npos) << exit.last_words;
  }
}

TEST_F(RankProcessTest, ATrainingThatDivergesEndsWithACodeOfItsOwn) {
  FakeDaemonOptions options = options_of({2, 1, 1, Schedule::kDualPipe}, 100000);
  options.spec.optimizer.lr = 100.0;  // every step multiplies the weights by about -10,000
  options.spec.optimizer.weight_decay = 100.0;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  int diverged = 0;
  for (int32_t r = 0; r < 2; ++r) {
    const RankExit exit = daemon.wait_exit(r);
    if (exit.status.exit_code == code(ExitCode::kPeerLost)) continue;  // before it could tell
    EXPECT_EQ(exit.status.exit_code, code(ExitCode::kDiverged)) << exit.last_words;
    EXPECT_TRUE(
        std::regex_search(exit.last_words, std::regex("^step [0-9]+: loss .*, gradient norm ")))
        << exit.last_words;
    ++diverged;
  }
  EXPECT_GE(diverged, 1);
  for (const StepReport& report : daemon.all<StepReport>()) {
    EXPECT_TRUE(std::isfinite(report.loss) && std::isfinite(report.grad_norm)) << report.step;
  }
}

TEST_F(RankProcessTest, SigtermEndsARankBetweenTwoSteps) {
  FakeDaemon daemon(options_of({1, 1, 1, Schedule::kOneForwardOneBackward}, 100000));
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for([](const ControlMessage& m) { return is_step(m, 2); }));
  EXPECT_TRUE(daemon.child(0).send_signal(SIGTERM).ok());
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kPreempted)) << exit.last_words;
  EXPECT_EQ(daemon.all<StepReport>().size(), daemon.all<RankProgress>().size());
}

TEST_F(RankProcessTest, StopRanksEndsEveryRankOfAJob) {
  FakeDaemon daemon(options_of({2, 1, 1, Schedule::kDualPipe}, 100000));
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for([](const ControlMessage& m) { return is_step(m, 2); }));
  for (int32_t r = 0; r < 2; ++r) {
    daemon.send_to(r, StopRanks{FakeDaemon::kJob, FakeDaemon::kEpoch, 1000, "cancelled"});
  }
  for (int32_t r = 0; r < 2; ++r) {
    const RankExit exit = daemon.wait_exit(r);
    EXPECT_EQ(exit.status.exit_code, code(ExitCode::kPreempted)) << exit.last_words;
  }
}

TEST_F(RankProcessTest, SigtermBeforeTrainingBeginsEndsTheWait) {
  FakeDaemonOptions options = options_of({1, 1, 1, Schedule::kOneForwardOneBackward}, 5);
  options.begin = false;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  ASSERT_TRUE(daemon.wait_for(
      [](const ControlMessage& m) { return std::holds_alternative<RankReady>(m); }));
  EXPECT_TRUE(daemon.child(0).send_signal(SIGTERM).ok());
  EXPECT_EQ(daemon.wait_exit(0).status.exit_code, code(ExitCode::kPreempted));
}

TEST_F(RankProcessTest, AFailedSaveIsReportedAndTheRunGoesOn) {
  FakeDaemonOptions options = options_of({1, 1, 1, Schedule::kOneForwardOneBackward}, 6);
  options.checkpoint_dir = directory_.path() / "lost";
  std::filesystem::create_directory(options.checkpoint_dir);
  options.before_begin = [&] { std::filesystem::remove(options.checkpoint_dir); };
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(daemon.all<StepReport>().size(), 6u);
  const std::vector<SaveFailed> failed = daemon.all<SaveFailed>();
  ASSERT_EQ(failed.size(), 3u);  // after steps 2, 4 and 6
  EXPECT_EQ(failed[0].step, 2);
  EXPECT_NE(failed[0].reason.find("lost"), std::string::npos) << failed[0].reason;
  // Only the last one is needed: without it the job has not ended.
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kFailure));
  EXPECT_NE(exit.last_words.find("the last checkpoint, of step 6, was not committed"),
            std::string::npos)
      << exit.last_words;
  EXPECT_TRUE(daemon.all<RankFinished>().empty());
}

TEST_F(RankProcessTest, ACheckpointDirectoryThatIsNotThereEndsTheStart) {
  FakeDaemonOptions options = options_of({1, 1, 1, Schedule::kOneForwardOneBackward}, 6);
  options.checkpoint_dir = directory_.path() / "missing";
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kNotFound)) << exit.last_words;
  EXPECT_NE(exit.last_words.find(options.checkpoint_dir.string()), std::string::npos)
      << exit.last_words;
  EXPECT_TRUE(daemon.all<RankReady>().empty());
}

TEST_F(RankProcessTest, ASpecThatDoesNotParseEndsWithTheUsageCode) {
  FakeDaemonOptions options = options_of({}, 2);
  options.spec_json = "{\"name\": \"x\"}";
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kUsage)) << exit.last_words;
}

TEST_F(RankProcessTest, MissingDataEndsWithItsPath) {
  FakeDaemonOptions options = options_of({}, 2);
  options.spec.data.train[0].path = (directory_.path() / "nowhere").string();
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kNotFound)) << exit.last_words;
  EXPECT_NE(exit.last_words.find("nowhere"), std::string::npos) << exit.last_words;
}

TEST_F(RankProcessTest, AMissingCheckpointEndsWithItsPath) {
  FakeDaemonOptions options = options_of({}, 2);
  options.restore_manifest = (directory_.path() / "store" / manifest_file_name(9)).string();
  options.restore_step = 2;
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kNotFound)) << exit.last_words;
  EXPECT_NE(exit.last_words.find("000000000009"), std::string::npos) << exit.last_words;
}

// It has no peers yet that could be lost.
TEST_F(RankProcessTest, ADaemonThatCannotBeAskedForStateIsNoLostPeer) {
  FakeDaemonOptions options = options_of({1, 1, 1, Schedule::kOneForwardOneBackward}, 6);
  options.state_file = (directory_.path() / "memory").string();
  ASSERT_TRUE(replace_file_durably(options.state_file, {}).ok());
  options.restore_step = 2;
  options.state_from = {"127.0.0.1:1", {}};  // where nobody listens
  FakeDaemon daemon(options);
  daemon.spawn_all();
  const RankExit exit = daemon.wait_exit(0);
  EXPECT_EQ(exit.status.exit_code, code(ExitCode::kFailure)) << exit.last_words;
  EXPECT_NE(
      exit.last_words.find("fetch the state of step 2 from the daemon at 127.0.0.1:1: connect"),
      std::string::npos)
      << exit.last_words;
}

TEST(ExitCodeTest, APeerThatWentAwayIsNeverTheRanksOwnFault) {
  EXPECT_EQ(exit_code_of({}, false), ExitCode::kOk);
  EXPECT_EQ(exit_code_of(unavailable("x"), false), ExitCode::kPeerLost);
  EXPECT_EQ(exit_code_of(deadline_exceeded("x"), false), ExitCode::kPeerLost);
  EXPECT_EQ(exit_code_of(data_loss("x"), false), ExitCode::kDataCorrupt);
  EXPECT_EQ(exit_code_of(internal_error("x"), false), ExitCode::kFailure);
  EXPECT_EQ(exit_code_of(not_found("x"), false), ExitCode::kNotFound);
  EXPECT_EQ(exit_code_of(invalid_argument("x"), false), ExitCode::kUsage);
}

TEST(ExitCodeTest, AskedToStopIsPreemptedWhateverFailedMeanwhile) {
  EXPECT_EQ(exit_code_of(unavailable("x"), true), ExitCode::kPreempted);
  EXPECT_EQ(exit_code_of(aborted("x"), true), ExitCode::kPreempted);
}

}  // namespace
}  // namespace penstock
