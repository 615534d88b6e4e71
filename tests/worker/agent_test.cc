// Every behaviour of the worker daemon's decisions, without sockets, processes or clocks.
#include <signal.h>

#include <limits>

#include "tests/worker/agent_harness.h"

namespace penstock {
namespace {

TEST_F(AgentTest, RegistersAsSoonAsItIsConnected) {
  agent->on_connected(now);
  ASSERT_EQ(sent.size(), 1U);
  const auto& message = std::get<Register>(sent[0]);
  EXPECT_EQ(message.name, "w0");
  EXPECT_EQ(message.incarnation, 42U);
  EXPECT_EQ(message.device_count, 2);
  EXPECT_EQ(message.http_address, "127.0.0.1:9");
  EXPECT_EQ(message.protocol_version, kProtocolVersion);
  EXPECT_TRUE(message.ranks.empty());
}

TEST_F(AgentTest, RepeatsRegisterUntilItIsAnswered) {
  agent->on_connected(now);
  EXPECT_EQ(agent->on_tick(now), now + 500 * kMs);
  EXPECT_EQ(sent.size(), 1U);
  now += 500 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<Register>().size(), 2U);
  coordinator(Registered{{3}, 1000, ""});
  now += 600 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<Register>().size(), 2U);
}

TEST_F(AgentTest, SendsNothingButRegisterBeforeItIsRegistered) {
  agent->on_connected(now);
  now += 5000 * kMs;
  agent->on_tick(now);
  agent->on_rank_output(key(1, 0), 0, "line\n");
  agent->on_tick(now);
  EXPECT_EQ(sent_of<Register>().size(), sent.size());
}

TEST_F(AgentTest, BeatsAtTheIntervalItWasGiven) {
  agent->on_connected(now);
  coordinator(Registered{{3}, 200, ""});
  sent.clear();
  EXPECT_EQ(agent->on_tick(now), now + 200 * kMs);
  EXPECT_TRUE(sent.empty());
  now += 200 * kMs;
  EXPECT_EQ(agent->on_tick(now), now + 200 * kMs);
  now += 200 * kMs;
  agent->on_tick(now);
  const auto beats = sent_of<Heartbeat>();
  ASSERT_EQ(beats.size(), 2U);
  EXPECT_EQ(beats[0].worker, WorkerId{3});
  EXPECT_EQ(beats[0].incarnation, 42U);
  EXPECT_LT(beats[0].sequence, beats[1].sequence);
}

TEST_F(AgentTest, SleepsForeverWhileDisconnected) {
  EXPECT_EQ(agent->on_tick(now), std::numeric_limits<int64_t>::max());
  register_agent();
  agent->on_disconnected();
  EXPECT_EQ(agent->on_tick(now), std::numeric_limits<int64_t>::max());
  EXPECT_FALSE(agent->registered());
}

TEST_F(AgentTest, ARefusalEndsTheDaemonWithItsReason) {
  agent->on_connected(now);
  coordinator(Registered{{0}, 0, "install one version"});
  ASSERT_EQ(exits.size(), 1U);
  EXPECT_EQ(exits[0].first, ExitCode::kConflict);
  EXPECT_NE(exits[0].second.find("install one version"), std::string::npos);
}

TEST_F(AgentTest, ACoordinatorThatForgotItIsToldAgainWhatRuns) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(Registered{{0}, 1000, ""});
  EXPECT_FALSE(agent->registered());
  const auto registers = sent_of<Register>();
  ASSERT_EQ(registers.size(), 1U);
  ASSERT_EQ(registers[0].ranks.size(), 1U);
  EXPECT_EQ(registers[0].ranks[0].state, RankState::kReady);
}

TEST_F(AgentTest, ManySignsOfBeingForgottenGetOneRegister) {
  register_agent();
  for (int i = 0; i < 100; ++i) coordinator(Registered{{0}, 1000, ""});
  EXPECT_EQ(sent_of<Register>().size(), 1U);
  now += 500 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<Register>().size(), 2U);
}

TEST_F(AgentTest, WhoIsAskedWhetherItLivesRepeatsTheNumberOnce) {
  agent->on_connected(now);
  const Registered question = {{0}, 1000, "", 15'000, 0, 77};
  for (int i = 0; i < 100; ++i) coordinator(question);
  auto registers = sent_of<Register>();
  ASSERT_EQ(registers.size(), 2U);
  EXPECT_EQ(registers[0].challenge, 0U);
  EXPECT_EQ(registers[1].challenge, 77U);
  EXPECT_GT(registers[1].sequence, registers[0].sequence);
  now += 500 * kMs;
  agent->on_tick(now);  // the answer may have been lost
  registers = sent_of<Register>();
  ASSERT_EQ(registers.size(), 3U);
  EXPECT_EQ(registers[2].challenge, 77U);
  coordinator(Registered{{3}, 1000, ""});
  EXPECT_TRUE(agent->registered());
}

TEST_F(AgentTest, ReconnectionRegistersWithTheRanksThatRun) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), RankProgress{.job = kJob, .epoch = {1}, .rank = {0}, .step = 12});
  agent->on_disconnected();
  agent->on_connected(now);
  const auto registers = sent_of<Register>();
  ASSERT_EQ(registers.size(), 1U);
  ASSERT_EQ(registers[0].ranks.size(), 1U);
  EXPECT_EQ(registers[0].ranks[0].step, 12);
}

TEST_F(AgentTest, StartRankSpawnsAndTheHelloGetsTheSameStartRank) {
  register_agent();
  const StartRank start = start_rank(1, 0, 1);
  coordinator(start);
  ASSERT_EQ(spawned, (std::vector<RankKey>{key(1, 0)}));
  EXPECT_TRUE(agent->accepts({kJob, {1}, {0}, 1001}));
  agent->on_rank_bound(key(1, 0));
  ASSERT_EQ(sent_to_ranks.size(), 1U);
  EXPECT_EQ(sent_to_ranks[0].second, ControlMessage(start));
}

TEST_F(AgentTest, AHelloOfAnotherProcessOrRankIsNotAccepted) {
  register_agent();
  coordinator(start_rank(1, 0));
  EXPECT_FALSE(agent->accepts({kJob, {1}, {0}, 4711}));
  EXPECT_FALSE(agent->accepts({kJob, {1}, {1}, 1001}));
  EXPECT_FALSE(agent->accepts({kJob, {2}, {0}, 1001}));
}

TEST_F(AgentTest, ARepeatedStartRankSpawnsOnceAndRepeatsRankReady) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(start_rank(1, 0));
  EXPECT_EQ(spawned.size(), 1U);
  ASSERT_EQ(sent_of<RankReady>().size(), 1U);
  EXPECT_EQ(sent_of<RankReady>()[0].address, "address");
}

TEST_F(AgentTest, AStartRankOfAnExitedRankRepeatsItsEnd) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {14, 0}, "");
  sent.clear();
  coordinator(start_rank(1, 0));
  agent->on_tick(now);
  EXPECT_EQ(spawned.size(), 1U);
  EXPECT_EQ(sent_of<RankExited>().size(), 1U);
}

TEST_F(AgentTest, ADeviceThatDoesNotExistEndsTheRank) {
  register_agent();
  coordinator(start_rank(1, 0, 2));
  EXPECT_TRUE(spawned.empty());
  const auto exited = sent_of<RankExited>();
  ASSERT_EQ(exited.size(), 1U);
  EXPECT_EQ(exited[0].exit_code, static_cast<int>(ExitCode::kFailure));
  EXPECT_NE(exited[0].reason.find("no device 2"), std::string::npos);
}

TEST_F(AgentTest, ASpawnThatFailsEndsTheRankWithItsReason) {
  register_agent();
  spawn_result = not_found("no such program");
  coordinator(start_rank(1, 0));
  const auto exited = sent_of<RankExited>();
  ASSERT_EQ(exited.size(), 1U);
  EXPECT_NE(exited[0].reason.find("no such program"), std::string::npos);
  EXPECT_EQ(agent->rank_count(), 0U);
}

TEST_F(AgentTest, ANewerEpochKillsTheOlderAndStartsOnceItIsGone) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(start_rank(2, 0));
  ASSERT_EQ(signals.size(), 1U);
  EXPECT_EQ(signals[0], (std::pair(key(1, 0), SIGKILL)));
  EXPECT_EQ(spawned.size(), 1U) << "two epochs of a job never run side by side";
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  ASSERT_EQ(spawned.size(), 2U);
  EXPECT_EQ(spawned[1], key(2, 0));
}

TEST_F(AgentTest, WaitingRanksThatCannotStartEndOnceEach) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(start_rank(2, 0));
  coordinator(start_rank(2, 1));
  spawn_result = not_found("no such program");
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  size_t ended = 0;
  for (const RankExited& exited : sent_of<RankExited>()) ended += exited.epoch.value == 2 ? 1 : 0;
  EXPECT_EQ(ended, 2U);
  EXPECT_EQ(agent->rank_count(), 0U);
}

TEST_F(AgentTest, OneWaitingRankThatCannotStartLeavesTheOtherAlone) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(start_rank(2, 0));
  coordinator(start_rank(2, 1));
  spawn_failures = 1;
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  EXPECT_EQ(spawned.size(), 2U);
  EXPECT_EQ(spawned.back(), key(2, 1));
  EXPECT_EQ(agent->rank_count(), 1U);
}

TEST_F(AgentTest, ARankThatWaitsToStartIsListedAsStarting) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(start_rank(2, 0));
  now += 1000 * kMs;
  agent->on_tick(now);
  const auto beats = sent_of<Heartbeat>();
  ASSERT_EQ(beats.size(), 1U);
  ASSERT_EQ(beats[0].ranks.size(), 2U);
  EXPECT_EQ(beats[0].ranks[1].epoch, Epoch{2});
  EXPECT_EQ(beats[0].ranks[1].state, RankState::kStarting);
}

TEST_F(AgentTest, AnEpochThatIsOverIsNotStarted) {
  register_agent();
  coordinator(StopRanks{kJob, {3}, 0, "fenced"});
  coordinator(start_rank(3, 0));
  coordinator(start_rank(2, 0));
  EXPECT_TRUE(spawned.empty());
  coordinator(start_rank(4, 0));
  EXPECT_EQ(spawned.size(), 1U);
}

TEST_F(AgentTest, RankReadyIsPassedOn) {
  register_agent();
  coordinator(start_rank(1, 0));
  agent->on_rank_bound(key(1, 0));
  const RankReady ready = {kJob, {1}, {0}, "ucx address"};
  rank_says(key(1, 0), ready);
  ASSERT_EQ(sent_of<RankReady>().size(), 1U);
  EXPECT_EQ(sent_of<RankReady>()[0], ready);
}

TEST_F(AgentTest, BeginTrainingGoesToEveryRankOfTheEpochOnce) {
  register_agent();
  run_rank(key(1, 0));
  run_rank(key(1, 1));
  const BeginTraining begin = {kJob, {1}, {"a", "b"}};
  coordinator(begin);
  coordinator(begin);
  ASSERT_EQ(sent_to_ranks.size(), 2U);
  EXPECT_EQ(sent_to_ranks[0], (std::pair(key(1, 0), ControlMessage(begin))));
  EXPECT_EQ(sent_to_ranks[1].first, key(1, 1));
  now += 1000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<Heartbeat>().back().ranks[0].state, RankState::kTraining);
}

TEST_F(AgentTest, BeginTrainingOfAnotherEpochIsForNobody) {
  register_agent();
  run_rank(key(2, 0));
  coordinator(BeginTraining{kJob, {1}, {"a"}});
  EXPECT_TRUE(sent_to_ranks.empty());
}

TEST_F(AgentTest, BeginTrainingWaitsForARankThatHasNotConnected) {
  register_agent();
  coordinator(start_rank(1, 0));
  coordinator(BeginTraining{kJob, {1}, {"a"}});
  EXPECT_TRUE(sent_to_ranks.empty());
  agent->on_rank_bound(key(1, 0));
  ASSERT_EQ(sent_to_ranks.size(), 2U);
  EXPECT_TRUE(std::holds_alternative<StartRank>(sent_to_ranks[0].second));
  EXPECT_TRUE(std::holds_alternative<BeginTraining>(sent_to_ranks[1].second));
}

TEST_F(AgentTest, CheckpointOutcomesGoToTheRanksOfTheirEpoch) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(CheckpointOutcome{kJob, {1}, 10, true, ""});
  coordinator(CheckpointOutcome{kJob, {2}, 10, true, ""});
  ASSERT_EQ(sent_to_ranks.size(), 1U);
  EXPECT_EQ(std::get<CheckpointOutcome>(sent_to_ranks[0].second).step, 10);
}

TEST_F(AgentTest, ANewIntervalBetweenSavesGoesToTheRanksOfItsEpoch) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(SaveInterval{kJob, {1}, 25});
  coordinator(SaveInterval{kJob, {2}, 50});
  ASSERT_EQ(sent_to_ranks.size(), 1U);
  EXPECT_EQ(std::get<SaveInterval>(sent_to_ranks[0].second).steps, 25);
}

TEST_F(AgentTest, WhatRanksDoIsToldOfThoseThatHaveAProcessInTheAttemptAskedFor) {
  register_agent();
  run_rank(key(1, 0));
  run_rank(key(1, 1));
  coordinator(InspectRanks{kJob, {1}, 77});
  ASSERT_EQ(sent.size(), 1U);
  const auto& answer = std::get<RanksInspected>(sent[0]);
  EXPECT_EQ(answer.request, 77U);
  EXPECT_EQ(answer.epoch, Epoch{1});
  ASSERT_EQ(answer.ranks.size(), 2U);
  EXPECT_EQ(answer.ranks[1].rank, Rank{1});
  EXPECT_EQ(answer.ranks[1].process, ProcessState::kStopped);
  EXPECT_EQ(answer.ranks[1].quiet_ms, 7000);
  EXPECT_TRUE(sent_to_ranks.empty()) << "the ranks are not asked";
  coordinator(InspectRanks{kJob, {2}, 78});
  ASSERT_EQ(sent.size(), 2U);
  EXPECT_TRUE(std::get<RanksInspected>(sent[1]).ranks.empty());
}

TEST_F(AgentTest, ReportsOfRanksArePassedOnInOrder) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), step_report(1));
  rank_says(key(1, 0), step_report(2));
  rank_says(key(1, 0), EvaluationReport{kJob, {1}, 2, 3.0, 100});
  rank_says(key(1, 0), ExpertLoadReport{kJob, {1}, {0}, 2, {{1, {3.0, 4.0}}}});
  rank_says(key(1, 0), segment_saved(2));
  rank_says(key(1, 0), SaveFailed{kJob, {1}, {0}, 4, "disk full"});
  rank_says(key(1, 0), RankFinished{kJob, {1}, {0}, 5});
  ASSERT_EQ(sent.size(), 7U);
  EXPECT_EQ(std::get<StepReport>(sent[1]).step, 2);
  EXPECT_TRUE(std::holds_alternative<ExpertLoadReport>(sent[3]));
  EXPECT_TRUE(std::holds_alternative<RankFinished>(sent[6]));
}

TEST_F(AgentTest, ProgressIsKeptForHeartbeatsAndNotPassedOn) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), RankProgress{.job = kJob, .epoch = {1}, .rank = {0}, .step = 9});
  EXPECT_TRUE(sent.empty());
  now += 1000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<Heartbeat>().back().ranks[0].step, 9);
}

TEST_F(AgentTest, ARankCannotSpeakForAnother) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), segment_saved(2, 1));
  rank_says(key(1, 0), step_report(1, 2));
  rank_says(key(1, 5), step_report(1));
  EXPECT_TRUE(sent.empty());
}

TEST_F(AgentTest, ARankCannotGiveOrders) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), StopRanks{kJob, {1}, 0, "mutiny"});
  rank_says(key(1, 0), RankExited{kJob, {1}, {0}, 0, 0, ""});
  EXPECT_TRUE(sent.empty());
  EXPECT_TRUE(signals.empty());
}

TEST_F(AgentTest, ACoordinatorsWrongMessageIsIgnored) {
  register_agent();
  coordinator(step_report(1));
  EXPECT_TRUE(sent.empty());
  EXPECT_TRUE(exits.empty());
}

TEST_F(AgentTest, ReportsWaitForTheCoordinatorToComeBack) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_disconnected();
  for (int64_t step = 1; step <= 500; ++step) rank_says(key(1, 0), step_report(step));
  EXPECT_TRUE(sent.empty());
  agent->on_connected(now);
  EXPECT_TRUE(sent_of<StepReport>().empty()) << "not before the answer to Register";
  coordinator(Registered{{3}, 1000, ""});
  const auto reports = sent_of<StepReport>();
  ASSERT_EQ(reports.size(), 500U);
  for (int64_t step = 1; step <= 500; ++step) EXPECT_EQ(reports[step - 1].step, step);
}

TEST_F(AgentTest, WhatMayNotHaveBeenStoredIsSentAgainAfterAReconnection) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), step_report(1));
  rank_says(key(1, 0), segment_saved(1));
  agent->on_disconnected();
  sent.clear();
  agent->on_connected(now);
  coordinator(Registered{{3}, 1000, ""});
  EXPECT_EQ(sent_of<RankReady>().size(), 1U);
  EXPECT_EQ(sent_of<StepReport>().size(), 1U);
  EXPECT_EQ(sent_of<SegmentSaved>().size(), 1U);
}

TEST_F(AgentTest, AnsweredReportsAreNotSentAgain) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(BeginTraining{kJob, {1}, {"a"}});
  rank_says(key(1, 0), segment_saved(10));
  rank_says(key(1, 0), segment_saved(20));
  coordinator(CheckpointOutcome{kJob, {1}, 10, true, ""});
  agent->on_disconnected();
  sent.clear();
  agent->on_connected(now);
  coordinator(Registered{{3}, 1000, ""});
  EXPECT_TRUE(sent_of<RankReady>().empty());
  ASSERT_EQ(sent_of<SegmentSaved>().size(), 1U);
  EXPECT_EQ(sent_of<SegmentSaved>()[0].step, 20);
}

TEST_F(AgentTest, BeyondTheBoundTheOldestReportsAreDroppedAndCounted) {
  ReportQueueLimits limits;
  limits.count_max = 10;
  make_agent(limits);
  register_agent();
  run_rank(key(1, 0));
  coordinator(BeginTraining{kJob, {1}, {"a"}});
  agent->on_disconnected();
  for (int64_t step = 1; step <= 15; ++step) rank_says(key(1, 0), step_report(step));
  EXPECT_EQ(agent->reports_dropped(), 5U);
  agent->on_connected(now);
  coordinator(Registered{{3}, 1000, ""});
  ASSERT_EQ(sent_of<StepReport>().size(), 10U);
  EXPECT_EQ(sent_of<StepReport>()[0].step, 6);
}

TEST_F(AgentTest, AFullConnectionQueueIsTriedAgainLater) {
  register_agent();
  run_rank(key(1, 0));
  send_result = resource_exhausted("queue full");
  rank_says(key(1, 0), step_report(1));
  send_result = Status();
  EXPECT_TRUE(sent.empty());
  agent->on_tick(now);
  EXPECT_EQ(sent_of<StepReport>().size(), 1U);
}

TEST_F(AgentTest, AnExitIsReportedAtOnceWithCodeAndLastWords) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {14, 0}, "data corrupt: checksum of block 3", "a\nb\n");
  const auto exited = sent_of<RankExited>();
  ASSERT_EQ(exited.size(), 1U);
  EXPECT_EQ(exited[0].exit_code, 14);
  EXPECT_EQ(exited[0].signal, 0);
  EXPECT_EQ(exited[0].reason, "exited with code 14: data corrupt: checksum of block 3");
  EXPECT_EQ(exited[0].log_tail, "a\nb\n");
  EXPECT_EQ(agent->rank_count(), 0U);
}

TEST_F(AgentTest, ASignalIsReported) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  const auto exited = sent_of<RankExited>();
  ASSERT_EQ(exited.size(), 1U);
  EXPECT_EQ(exited[0].exit_code, -1);
  EXPECT_EQ(exited[0].signal, SIGKILL);
  EXPECT_NE(exited[0].reason.find("SIGKILL"), std::string::npos);
}

TEST_F(AgentTest, ReasonsFitTheirBound) {
  register_agent();
  run_rank(key(1, 0));
  const std::string endless(10'000, 'w');
  agent->on_rank_exit(now, key(1, 0), {1, 0}, endless, endless);
  EXPECT_EQ(sent_of<RankExited>()[0].reason.size(), kNameBytesMax);
  EXPECT_EQ(sent_of<RankExited>()[0].log_tail.size(), kLogTailBytesMax);
}

TEST_F(AgentTest, AnExitIsRepeatedUntilItIsAcknowledged) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {1, 0}, "");
  now += 1000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<RankExited>().size(), 2U);
  coordinator(StopRanks{kJob, {1}, 0, "seen"});
  now += 5000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<RankExited>().size(), 2U);
}

TEST_F(AgentTest, ANewerEpochAcknowledgesExitsToo) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {1, 0}, "");
  coordinator(start_rank(2, 0));
  sent.clear();
  now += 5000 * kMs;
  agent->on_tick(now);
  EXPECT_TRUE(sent_of<RankExited>().empty());
}

TEST_F(AgentTest, AnExitWhileTheCoordinatorIsAwayIsToldLater) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_disconnected();
  agent->on_rank_exit(now, key(1, 0), {1, 0}, "");
  for (size_t told = 1; told <= 2; ++told) {  // the first may be lost on its way
    agent->on_connected(now);
    if (told == 2) coordinator(StopRanks{kJob, {1}, 0, "said a peer, heard first"});
    coordinator(Registered{{3}, 1000, ""});
    EXPECT_EQ(sent_of<RankExited>().size(), told);
    agent->on_disconnected();
  }
}

TEST_F(AgentTest, AFinishedRanksEndFollowsItsRankFinished) {
  register_agent();
  run_rank(key(1, 0));
  rank_says(key(1, 0), RankFinished{kJob, {1}, {0}, 100});
  agent->on_rank_exit(now, key(1, 0), {0, 0}, "");
  ASSERT_EQ(sent.size(), 2U);
  EXPECT_TRUE(std::holds_alternative<RankFinished>(sent[0]));
  EXPECT_EQ(std::get<RankExited>(sent[1]).exit_code, 0);
}

// The process and its socket are watched apart: its end may be seen before its last message.
TEST_F(AgentTest, ACleanExitWaitsForRankFinished) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {0, 0}, "");
  EXPECT_TRUE(sent.empty());
  EXPECT_TRUE(agent->knows(key(1, 0)));
  rank_says(key(1, 0), RankFinished{kJob, {1}, {0}, 100});
  ASSERT_EQ(sent.size(), 2U);
  EXPECT_TRUE(std::holds_alternative<RankFinished>(sent[0]));
  EXPECT_EQ(std::get<RankExited>(sent[1]).exit_code, 0);
  EXPECT_FALSE(agent->knows(key(1, 0)));
}

TEST_F(AgentTest, ACleanExitThatNeverFinishedIsAFailure) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_rank_exit(now, key(1, 0), {0, 0}, "");
  now += 2000 * kMs;
  agent->on_tick(now);
  const auto exited = sent_of<RankExited>();
  ASSERT_EQ(exited.size(), 1U);
  EXPECT_EQ(exited[0].exit_code, static_cast<int>(ExitCode::kFailure));
  EXPECT_NE(exited[0].reason.find("without saying that it finished"), std::string::npos);
}

TEST_F(AgentTest, StopRanksWithoutGraceKills) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(StopRanks{kJob, {1}, 0, "fenced"});
  ASSERT_EQ(signals.size(), 1U);
  EXPECT_EQ(signals[0].second, SIGKILL);
}

TEST_F(AgentTest, StopRanksWithGraceAsksFirst) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(StopRanks{kJob, {1}, 2000, "cancelled"});
  ASSERT_EQ(signals.size(), 1U);
  EXPECT_EQ(signals[0].second, SIGTERM);
  now += 1999 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(signals.size(), 1U);
  now += 1 * kMs;
  agent->on_tick(now);
  ASSERT_EQ(signals.size(), 2U);
  EXPECT_EQ(signals[1].second, SIGKILL);
  now += 1000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(signals.size(), 2U);
}

TEST_F(AgentTest, AShorterGraceReplacesALongerOne) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(StopRanks{kJob, {1}, 60'000, "cancelled"});
  coordinator(StopRanks{kJob, {1}, 0, "now"});
  ASSERT_EQ(signals.size(), 2U);
  EXPECT_EQ(signals[1].second, SIGKILL);
}

TEST_F(AgentTest, StopRanksLeavesNewerEpochsAndOtherJobsAlone) {
  register_agent();
  run_rank(key(5, 0));
  coordinator(StopRanks{kJob, {4}, 0, "old"});
  coordinator(StopRanks{JobId{8}, {9}, 0, "other"});
  EXPECT_TRUE(signals.empty());
}

TEST_F(AgentTest, RanksStoppedFollowsTheLastProcess) {
  register_agent();
  run_rank(key(1, 0));
  run_rank(key(1, 1));
  coordinator(StopRanks{kJob, {1}, 0, "fenced"});
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  EXPECT_TRUE(sent_of<RanksStopped>().empty());
  agent->on_rank_exit(now, key(1, 1), {-1, SIGKILL}, "");
  ASSERT_EQ(sent_of<RanksStopped>().size(), 1U);
  EXPECT_EQ(sent_of<RanksStopped>()[0], (RanksStopped{kJob, {1}}));
  EXPECT_NE(sent_of<RankExited>()[0].reason.find("fenced"), std::string::npos);
}

TEST_F(AgentTest, EveryStopRanksIsAnsweredAlsoOfUnknownJobs) {
  register_agent();
  coordinator(StopRanks{kJob, {1}, 0, ""});
  coordinator(StopRanks{kJob, {1}, 0, ""});
  EXPECT_EQ(sent_of<RanksStopped>().size(), 2U);
}

TEST_F(AgentTest, ARankThatWaitsToStartIsForgottenByStopRanks) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(start_rank(2, 0));
  coordinator(StopRanks{kJob, {2}, 0, "cancelled"});
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  EXPECT_EQ(spawned.size(), 1U);
  ASSERT_EQ(sent_of<RanksStopped>().size(), 1U);
  EXPECT_EQ(sent_of<RanksStopped>()[0].epoch, Epoch{2});
}

TEST_F(AgentTest, AFencedRanksReportsAreNotPassedOn) {
  register_agent();
  run_rank(key(1, 0));
  coordinator(StopRanks{kJob, {1}, 5000, "cancelled"});
  rank_says(key(1, 0), step_report(3));
  EXPECT_TRUE(sent_of<StepReport>().empty());
}

TEST_F(AgentTest, OutputBecomesLogChunks) {
  register_agent();
  agent->on_rank_output(key(1, 0), 17, "a line\n");
  agent->on_tick(now);
  const auto chunks = sent_of<LogChunk>();
  ASSERT_EQ(chunks.size(), 1U);
  EXPECT_EQ(chunks[0], (LogChunk{kJob, {1}, {0}, 17, "a line\n"}));
}

TEST_F(AgentTest, OutputIsBoundedWhileTheCoordinatorIsAway) {
  for (uint64_t i = 0; i < 30; ++i) agent->on_rank_output(key(1, 0), 10 * i, "123456789\n");
  EXPECT_EQ(agent->log_lines_dropped(), 20U);
  agent->on_connected(now);
  coordinator(Registered{{3}, 1000, ""});
  const auto chunks = sent_of<LogChunk>();
  ASSERT_EQ(chunks.size(), 10U);
  EXPECT_EQ(chunks[0].offset, 200U);
}

TEST_F(AgentTest, ShutdownWithoutRanksEndsAtOnce) {
  register_agent();
  agent->shut_down(now);
  ASSERT_EQ(exits.size(), 1U);
  EXPECT_EQ(exits[0].first, ExitCode::kOk);
}

TEST_F(AgentTest, ShutdownLetsRanksSaveAndEndsWhenNothingIsNeededAnyMore) {
  register_agent();
  run_rank(key(1, 0));
  agent->shut_down(now);
  agent->on_tick(now);
  EXPECT_TRUE(signals.empty()) << "its ranks train on";
  ASSERT_EQ(sent_of<WorkerLeaving>().size(), 1U);
  EXPECT_EQ(sent_of<WorkerLeaving>()[0], (WorkerLeaving{42, false}));
  now += 1000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(sent_of<WorkerLeaving>().size(), 2U) << "until it is answered";
  coordinator(WorkerReleased{{3}});
  EXPECT_TRUE(exits.empty()) << "a rank runs";
  coordinator(StopRanks{kJob, {1}, 5000, "saved"});
  agent->on_rank_exit(now, key(1, 0), {12, 0}, "");
  EXPECT_TRUE(exits.empty()) << "what it left in memory may be needed";
  coordinator(WorkerReleased{{3}});
  ASSERT_EQ(exits.size(), 1U);
  EXPECT_EQ(exits[0].first, ExitCode::kOk);
  EXPECT_TRUE(sent_of<WorkerLeaving>().back().left);
}

TEST_F(AgentTest, ShutdownEndsRanksThatHaveNotSavedInTime) {
  register_agent();
  run_rank(key(1, 0));
  agent->shut_down(now);
  now += 25'000 * kMs;
  agent->on_tick(now);
  EXPECT_TRUE(exits.empty());
  ASSERT_EQ(signals.size(), 1U);
  EXPECT_EQ(signals[0].second, SIGTERM);
  now += 3000 * kMs;
  agent->on_tick(now);
  EXPECT_EQ(signals.back().second, SIGKILL);
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  ASSERT_EQ(exits.size(), 1U);
  EXPECT_EQ(exits[0].first, ExitCode::kPreempted);
  EXPECT_EQ(sent_of<RankExited>().size(), 1U) << "the coordinator learns it before";
}

TEST_F(AgentTest, WithoutACoordinatorShutdownEndsRanksAtOnce) {
  register_agent();
  run_rank(key(1, 0));
  agent->on_disconnected();
  agent->shut_down(now);
  ASSERT_EQ(signals.size(), 1U) << "nobody could commit what they save";
  EXPECT_EQ(signals[0].second, SIGTERM);
  agent->on_rank_exit(now, key(1, 0), {12, 0}, "");
  ASSERT_EQ(exits.size(), 1U);
  EXPECT_EQ(exits[0].first, ExitCode::kPreempted);
}

TEST_F(AgentTest, ASecondShutdownKillsAtOnce) {
  register_agent();
  run_rank(key(1, 0));
  agent->shut_down(now);
  agent->shut_down(now);
  ASSERT_EQ(signals.size(), 1U);
  EXPECT_EQ(signals[0].second, SIGKILL);
}

TEST_F(AgentTest, NothingStartsDuringShutdown) {
  register_agent();
  run_rank(key(1, 0));
  agent->shut_down(now);
  agent->shut_down(now);
  coordinator(start_rank(1, 1));
  EXPECT_EQ(spawned.size(), 1U);
  ASSERT_EQ(sent_of<RankExited>().size(), 1U);
  EXPECT_EQ(sent_of<RankExited>()[0].exit_code, static_cast<int32_t>(ExitCode::kPreempted));
  EXPECT_TRUE(sent_of<RankExited>()[0].reason.starts_with(kStoppedByDaemon));
}

TEST_F(AgentTest, TheLeaseCountsFromTheFirstRegisterThatWasNotAnswered) {
  agent->on_connected(now);
  const int64_t asked = now;
  now += 700 * kMs;
  agent->on_tick(now);  // says it again
  ASSERT_EQ(sent_of<Register>().size(), 2U);
  coordinator(Registered{{3}, 1000, "", 15'000});
  ASSERT_EQ(registrations.size(), 1U);
  EXPECT_EQ(registrations[0].worker, WorkerId{3});
  EXPECT_EQ(registrations[0].lease, std::chrono::seconds(15));
  EXPECT_EQ(registrations[0].asked_ns, asked) << "which of the two was answered nobody can say";
}

TEST_F(AgentTest, AHeartbeatThatWasHeardCountsFromWhenItWasSent) {
  register_agent();
  std::vector<int64_t> sent_at = {0, now};  // by sequence, of which Register had the first
  for (int i = 0; i < 70; ++i) {
    now += 1000 * kMs;
    agent->on_tick(now);
    sent_at.push_back(now);
  }
  const auto hear = [&](uint64_t sequence) {
    coordinator(Registered{{3}, 1000, "", 15'000, sequence});
  };
  hear(71);
  hear(69);
  EXPECT_EQ(heard_ns, (std::vector<int64_t>{sent_at[71], sent_at[69]}));
  hear(72);  // not sent yet
  hear(1);   // so old that it is forgotten
  EXPECT_EQ(heard_ns.size(), 2U);
  EXPECT_EQ(registrations.size(), 1U) << "it is not registered anew by this";
}

}  // namespace
}  // namespace penstock
