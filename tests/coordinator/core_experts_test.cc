// Experts that move between ranks: asked for, by themselves, and whatever happens meanwhile.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

// Of ranks with four experts each, the first has 32 of 36 tokens.
const std::vector<double> kSkewed = {8, 8, 8, 8, 1, 1, 1, 1};
const std::vector<double> kEven(8, 4.0);

class CoreExpertsTest : public ::testing::Test {
 protected:
  CoreExpertsTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
  }
  void start(const JobSpec& spec) {
    job = h.submit_ok(spec);
    h.run(job);
  }
  void report(int64_t step, const std::vector<double>& loads) {
    ExpertLoadReport report{job, h.record(job).epoch, Rank{0}, step, {}};
    for (int64_t layer = 1; layer <= 3; ++layer) report.layers[layer] = loads;
    h.say(h.host_of(job, 0), report);
  }
  // Trains up to `step` and commits its checkpoint.
  void reach(int64_t step, const std::vector<double>& loads) {
    const auto& last = h.record(job).last_step;
    const bool here = last && last->epoch == h.record(job).epoch;
    h.train(job, (here ? last->step : h.record(job).restore_step) + 1, step);
    report(step, loads);
    h.checkpoint(job, step);
  }
  // The stop is confirmed, the checkpoint found: the next epoch's orders.
  std::vector<StartRank> restart() {
    h.confirm_stops(job);
    h.pass(seconds(2));
    if (!h.finds.empty()) h.answer_find();
    return h.sent<StartRank>();
  }
  bool has_moved(const std::vector<StartRank>& orders) const {
    return !orders.empty() && std::all_of(orders.begin(), orders.end(), [](const StartRank& order) {
      return order.seats.layers.size() == 3 && order.seats.layers.begin()->first == 1;
    });
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreExpertsTest, NoStepRecordedBeforeTheMoveIsTakenForOneTrainedAfterIt) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  h.train(job, 21, 45);  // on while the checkpoint of step 40 is written
  report(40, kSkewed);
  h.checkpoint(job, 40);
  ASSERT_EQ(h.record(job).reason.code, kRebalancing);
  h.train(job, 46, 47);  // was on its way
  EXPECT_EQ(h.record(job).highest_step, 45);
  h.confirm_stops(job);
  h.cancel(job);
  EXPECT_EQ(h.resume(job, 5).status.code(), Code::kFailedPrecondition);
  EXPECT_EQ(h.record(job).rebalanced_step, 45);
}

TEST_F(CoreExpertsTest, ARequestMovesExpertsWhenTheNextCheckpointIsCommitted) {
  start(four_rank_spec());
  EXPECT_TRUE(h.sent<StartRank>().at(0).seats.layers.empty());
  reach(20, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "not by itself";
  ASSERT_TRUE(h.rebalance(job).status.ok());
  EXPECT_TRUE(h.record(job).rebalance);
  EXPECT_TRUE(h.has_event("rebalance_requested"));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.clear();
  reach(40, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, kRebalancing);
  EXPECT_FALSE(h.record(job).rebalance);
  ASSERT_EQ(h.sent<StopRanks>().size(), 2u);
  EXPECT_EQ(h.sent<StopRanks>()[0].epoch, Epoch{1});
  const std::vector<StartRank> orders = restart();
  ASSERT_EQ(orders.size(), 4u);
  ASSERT_TRUE(has_moved(orders));
  for (const StartRank& order : orders) {
    EXPECT_EQ(order.epoch, Epoch{2});
    EXPECT_EQ(order.restore_step, 40);
    EXPECT_EQ(order.seats, orders[0].seats);
    for (const auto& [layer, experts] : order.seats.layers) {
      ASSERT_TRUE(is_permutation_of_experts(experts));
      EXPECT_EQ(std::count_if(experts.begin(), experts.begin() + 4, [](int e) { return e < 4; }),
                2);
    }
  }
  h.run(job);
  EXPECT_EQ(h.record(job).restarts, 0);
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_FALSE(h.record(job).last_failure);
  reach(60, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "once, not for ever";
}

TEST_F(CoreExpertsTest, ThePlanForecastsTheMove) {
  start(four_rank_spec());
  reach(20, kSkewed);
  const Result<ExpertBalance> plan = h.core().rebalance_plan(h.job(job));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_DOUBLE_EQ(plan->before(), 32.0 / 18.0);
  EXPECT_DOUBLE_EQ(plan->after(), 1.0);
  EXPECT_EQ(plan->moved(), 3 * 4);
}

TEST_F(CoreExpertsTest, OrdersThatAreRepeatedHaveTheSeatsOfTheirEpoch) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  reach(40, kSkewed);
  const std::vector<StartRank> orders = restart();
  ASSERT_TRUE(has_moved(orders));
  h.clear();
  h.pass(seconds(3));
  const std::vector<StartRank> repeated = h.sent<StartRank>();
  ASSERT_FALSE(repeated.empty());
  for (const StartRank& order : repeated) EXPECT_EQ(order.seats, orders[0].seats);
}

TEST_F(CoreExpertsTest, ARankThatDiesAfterTheMoveComesBackToTheSameSeats) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  reach(40, kSkewed);
  const std::vector<StartRank> moved = restart();
  h.run(job);
  h.clear();
  h.kill_rank(job, 1);
  const std::vector<StartRank> again = restart();
  ASSERT_EQ(again.size(), 4u);
  EXPECT_EQ(again[0].epoch, Epoch{3});
  EXPECT_EQ(again[0].seats, moved[0].seats);
  EXPECT_EQ(h.record(job).restarts, 1);
}

TEST_F(CoreExpertsTest, ARankThatDiesBeforeTheCheckpointDelaysTheMoveOnly) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  h.kill_rank(job, 1);
  const std::vector<StartRank> orders = restart();
  ASSERT_EQ(orders.size(), 4u);
  EXPECT_TRUE(orders[0].seats.layers.empty());
  EXPECT_TRUE(h.record(job).rebalance);
  h.run(job);
  h.clear();
  reach(40, kSkewed);
  EXPECT_EQ(h.record(job).reason.code, kRebalancing);
  EXPECT_TRUE(has_moved(restart()));
}

TEST_F(CoreExpertsTest, ARankThatDiesDuringTheStopChangesNothing) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  h.clear();
  reach(40, kSkewed);
  h.kill_rank(job, 1);
  h.exit_rank(job, 2, ExitCode::kPeerLost, "rank 1 is gone");
  EXPECT_EQ(h.record(job).reason.code, kRebalancing);
  EXPECT_TRUE(has_moved(restart()));
  EXPECT_EQ(h.record(job).failures, 0);
}

TEST_F(CoreExpertsTest, ARequestSurvivesTheCoordinator) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  h.restart_coordinator();
  for (const char* worker : {"w0", "w1"}) h.register_worker(worker);
  for (int32_t rank = 0; rank < 4; ++rank) h.ready(job, rank);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.clear();
  reach(40, kSkewed);
  EXPECT_EQ(h.record(job).reason.code, kRebalancing);
  EXPECT_TRUE(has_moved(restart()));
}

TEST_F(CoreExpertsTest, TheMoveSurvivesTheCoordinatorAtEveryPoint) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  reach(40, kSkewed);
  const auto come_back = [&] {
    h.restart_coordinator();
    for (const char* worker : {"w0", "w1"}) h.register_worker(worker);
  };
  come_back();  // ranks are ordered to stop
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.clear();
  h.pass(seconds(3));  // the order is repeated
  const std::vector<StartRank> orders = restart();
  ASSERT_TRUE(has_moved(orders));
  EXPECT_EQ(orders[0].epoch, Epoch{2});
  come_back();  // ranks are ordered to start
  h.clear();
  h.pass(seconds(3));
  ASSERT_FALSE(h.sent<StartRank>().empty());
  EXPECT_EQ(h.sent<StartRank>()[0].seats, orders[0].seats);
  h.run(job);
  come_back();  // they run
  EXPECT_EQ(h.job(job).seats, orders[0].seats);
  EXPECT_EQ(h.record(job).failures, 0);
}

TEST_F(CoreExpertsTest, AJobCancelledDuringTheMoveResumesOnItsNewSeats) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  reach(40, kSkewed);
  ASSERT_TRUE(h.cancel(job).status.ok());
  EXPECT_EQ(h.state(job), JobState::kStopping);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  h.clear();
  ASSERT_TRUE(h.resume(job).status.ok());
  h.answer_find();
  EXPECT_TRUE(has_moved(h.sent<StartRank>()));
}

TEST_F(CoreExpertsTest, ARequestEndsWithItsJob) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  ASSERT_TRUE(h.cancel(job).status.ok());
  h.confirm_stops(job);
  ASSERT_TRUE(h.resume(job).status.ok());
  EXPECT_FALSE(h.record(job).rebalance);
  h.answer_find();
  h.run(job);
  reach(40, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreExpertsTest, ARequestIsDroppedWhenTheNewestLoadNeedsNoMove) {
  start(four_rank_spec());
  reach(20, kSkewed);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  reach(40, kEven);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_TRUE(h.has_event("rebalance_dropped"));
  EXPECT_FALSE(h.record(job).rebalance);
}

TEST_F(CoreExpertsTest, ExpertsMoveByThemselvesWhereTheSpecSaysSo) {
  JobSpec spec = four_rank_spec();
  spec.parallelism.rebalance = {.threshold = 1.5, .every_checkpoints = 2};
  start(spec);
  reach(20, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "every second checkpoint";
  h.clear();
  reach(40, kSkewed);
  EXPECT_EQ(h.record(job).reason.code, kRebalancing);
  ASSERT_TRUE(has_moved(restart()));
  h.run(job);
  reach(60, kSkewed);
  reach(80, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "the load is even on the new seats";
}

TEST_F(CoreExpertsTest, ExpertsStayBelowTheThreshold) {
  JobSpec spec = four_rank_spec();
  spec.parallelism.rebalance = {.threshold = 1.8, .every_checkpoints = 1};
  start(spec);
  reach(20, kSkewed);  // 32 of 36 tokens: 1.78 times the mean
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreExpertsTest, TheLastCheckpointMovesNothing) {
  JobSpec spec = four_rank_spec();
  spec.parallelism.rebalance = {.threshold = 1.2, .every_checkpoints = 5};
  start(spec);
  for (const int64_t step : {20, 40, 60, 80}) reach(step, kSkewed);
  reach(100, kSkewed);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.finish_ranks(job);
  EXPECT_EQ(h.record(job).outcome, JobState::kSucceeded);
}

TEST_F(CoreExpertsTest, NothingMovesWhenEveryStepIsTrained) {
  JobSpec spec = four_rank_spec();
  spec.parallelism.rebalance = {.threshold = 1.2, .every_checkpoints = 4};
  start(spec);
  report(80, kSkewed);
  h.save_all(job, 80);
  h.train(job, 81, 100);
  h.finish_commit();  // of step 80, late
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreExpertsTest, ARequestThatCanDoNothingIsRefusedAndSaysWhy) {
  const auto refusal = [&](JobId id) {
    const Answer answer = h.rebalance(id);
    EXPECT_EQ(answer.status.code(), Code::kFailedPrecondition) << answer.status.message();
    EXPECT_FALSE(h.core().find_job(id)->record.rebalance);
    return answer.status.message();
  };
  EXPECT_EQ(h.rebalance({99}).status.code(), Code::kNotFound);
  job = h.submit_ok(four_rank_spec());
  EXPECT_NE(refusal(job).find("is STARTING"), std::string::npos);
  h.run(job);
  EXPECT_NE(refusal(job).find("no measured load"), std::string::npos);
  reach(20, kEven);
  EXPECT_NE(refusal(job).find("gain nothing"), std::string::npos);
  for (const int64_t step : {40, 60, 80}) reach(step, kSkewed);
  EXPECT_NE(refusal(job).find("no further checkpoint"), std::string::npos);
  h.cancel(job, 0);
  h.confirm_stops(job);

  const JobId alone = h.submit_ok(flat_spec("alone", 2));
  h.run(alone);
  EXPECT_NE(refusal(alone).find("parallelism.expert 1"), std::string::npos);
  h.cancel(alone, 0);
  h.confirm_stops(alone);

  JobSpec dense = four_rank_spec("dense");
  dense.model.first_k_dense_replace = dense.model.num_hidden_layers;
  const JobId without = h.submit_ok(dense);
  h.run(without);
  EXPECT_NE(refusal(without).find("no layer with routed experts"), std::string::npos);
}

TEST_F(CoreExpertsTest, LoadReportsThatFitNothingAreDropped) {
  start(four_rank_spec());
  const std::string host = h.host_of(job, 0);
  h.say(host, ExpertLoadReport{job, Epoch{1}, Rank{0}, 20, {{0, kSkewed}}});     // a dense layer
  h.say(host, ExpertLoadReport{job, Epoch{1}, Rank{0}, 20, {{4, kSkewed}}});     // none
  h.say(host, ExpertLoadReport{job, Epoch{1}, Rank{0}, 20, {{1, {1.0, 2.0}}}});  // two experts
  h.say(host, ExpertLoadReport{job, Epoch{2}, Rank{0}, 20, {{1, kSkewed}}});     // no such epoch
  h.say(host, ExpertLoadReport{job, Epoch{1}, Rank{3}, 20, {{1, kSkewed}}});     // not its rank
  h.say(host, ExpertLoadReport{{77}, Epoch{1}, Rank{0}, 20, {{1, kSkewed}}});    // no such job
  h.say(host, ExpertLoadReport{job, Epoch{1}, Rank{0}, 101, {{1, kSkewed}}});    // past the end
  EXPECT_TRUE(h.job(job).loads.empty());
  report(20, kSkewed);
  EXPECT_EQ(h.job(job).loads.size(), 3u);
  EXPECT_EQ(h.job(job).loads_step, 20);
}

TEST_F(CoreExpertsTest, LoadsOfStagesAreCollectedFromTheirRanks) {
  JobSpec spec = four_rank_spec();
  spec.parallelism.schedule = Schedule::kOneForwardOneBackward;
  start(spec);
  h.train(job, 1, 20);
  h.say(h.host_of(job, 0), ExpertLoadReport{job, Epoch{1}, Rank{0}, 20, {{1, kSkewed}}});
  h.say(h.host_of(job, 2),
        ExpertLoadReport{job, Epoch{1}, Rank{2}, 20, {{2, kSkewed}, {3, kEven}}});
  ASSERT_TRUE(h.rebalance(job).status.ok());
  h.clear();
  reach(40, kSkewed);
  // Each rank is told of the layers of its own stage.
  for (const StartRank& order : restart()) {
    const bool first = order.rank.value < 2;
    EXPECT_EQ(order.seats.layers.contains(1), first);
    EXPECT_EQ(order.seats.layers.contains(2), !first);
    EXPECT_EQ(order.seats.layers.contains(3), !first);
  }
}

TEST_F(CoreExpertsTest, RoutingGroupsStayOnOneHostWhereAnExpertGroupSpansSeveral) {
  JobSpec spec = four_rank_spec();
  spec.parallelism.schedule = Schedule::kOneForwardOneBackward;
  spec.parallelism.pipeline = 1;
  spec.parallelism.expert = 4;
  start(spec);
  ASSERT_EQ(h.host_of(job, 0), h.host_of(job, 1));
  ASSERT_NE(h.host_of(job, 1), h.host_of(job, 2));
  // Four groups of two. Without regard to hosts, experts 0 and 1 would part.
  const std::vector<double> loads = {9, 8, 7, 6, 4, 3, 2, 1};
  reach(20, loads);
  ASSERT_TRUE(h.rebalance(job).status.ok());
  h.clear();
  reach(40, loads);
  const std::vector<StartRank> orders = restart();
  ASSERT_TRUE(has_moved(orders));
  const std::vector<int32_t>& experts = orders[0].seats.layers.at(1);
  for (int32_t group = 0; group < 4; ++group) {
    const auto host_of = [&](int32_t expert) {
      return (std::find(experts.begin(), experts.end(), expert) - experts.begin()) / 4;
    };
    EXPECT_EQ(host_of(2 * group), host_of(2 * group + 1)) << group;
  }
}

// Two routing groups on the two ranks of an expert group: where those are two hosts, they stay.
TEST(CoreExpertHostsTest, WorkersOfOneHostAreOneHost) {
  JobSpec spec = four_rank_spec();
  spec.model.n_group = 2;
  spec.model.topk_group = 1;
  for (const bool one_host : {true, false}) {
    CoreHarness h;
    for (const char* worker : {"w0", "w1", "w2", "w3"}) {
      h.add_worker(worker, 1, one_host ? "laptop" : "");
    }
    const JobId job = h.submit_ok(spec);
    h.run(job);
    h.train(job, 1, 20);
    h.say(h.host_of(job, 0), ExpertLoadReport{job, Epoch{1}, Rank{0}, 20, {{1, kSkewed}}});
    EXPECT_EQ(h.core().rebalance_plan(h.job(job)).ok(), one_host);
  }
}

TEST_F(CoreExpertsTest, StoredSeatsThatAreNotOfTheModelStopTheCoordinator) {
  start(four_rank_spec());
  StoredState stored;
  for (const auto& [key, value] : h.store) {
    if (!key.starts_with("event") && !key.starts_with("job-event")) {
      stored.records.push_back({key, value});
    }
  }
  stored.records.push_back(record_of(SeatsRecord{job, {{{1, {0, 1, 2, 3, 4, 5, 6, 6}}}}}));
  Coordinator core(CoreHarness::test_config());
  const Status status = core.start(h.now(), stored).status();
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("layer 1"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace penstock
