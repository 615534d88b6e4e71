#include "coordinator/core/records.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace penstock {
namespace {

JobRecord full_job() {
  JobRecord job;
  job.id = {7};
  job.name = "n\xC3\xA4me \"quoted\"";
  job.state = JobState::kStopping;
  job.reason = {"cancelled", "by the user"};
  job.outcome = JobState::kCancelled;
  job.created = {123456789012345678};
  job.started = Instant{5};
  job.target_steps = 100;
  job.epoch = {3};
  job.restarts = 2;
  job.failures = 1;
  job.failures_without_step = 1;
  job.highest_step = 60;
  job.placement = {{{1}, 0}, {{2}, 1}};
  job.checkpoint_dir = "/c/7";
  job.restore_manifest = "/c/7/40.manifest";
  job.restore_step = 40;
  job.suspend = true;
  job.scale_to = 4;
  job.rebalance = true;
  job.rebalanced_step = 20;
  job.saving = SavingRecord{{0.5, 0.1, 0.2, 3.0, 4, 5000.0, 2}, {340, 1e4, 0.005, "why"}, 6};
  job.proof = ProofRecord{50, {2}, 40, 60, 60, 12, 300, 60};
  job.checkpoint = CheckpointRecord{60, {2}, "/c/7/60.manifest", 1ull << 40, "00ff", {9}};
  job.last_failure = Failure{{"rank_killed", "rank 2", "a\nb\n"}, Rank{2}, "w1", 61, true, true};
  StepRecord step;
  step.job = {7};
  step.epoch = {3};
  step.step = 61;
  step.loss = std::numeric_limits<double>::quiet_NaN();
  step.grad_norm = std::numeric_limits<double>::infinity();
  job.last_step = step;
  return job;
}

TEST(RecordsTest, AJobReadsBackAsWritten) {
  const Record record = record_of(full_job());
  EXPECT_EQ(record.key, "job/0000000000000007");
  const auto job = decode_job(record.value);
  ASSERT_TRUE(job.ok()) << job.status().to_string();
  EXPECT_EQ(record_of(*job).value, record.value);
  EXPECT_EQ(job->name, full_job().name);
  EXPECT_EQ(job->outcome, JobState::kCancelled);
  EXPECT_EQ(job->placement, full_job().placement);
  EXPECT_EQ(job->last_failure, full_job().last_failure);
  EXPECT_EQ(job->checkpoint->bytes, 1ull << 40);
  EXPECT_TRUE(job->rebalance);
  EXPECT_EQ(job->rebalanced_step, 20);
  EXPECT_EQ(job->saving, full_job().saving);
  EXPECT_EQ(job->proof, full_job().proof);
  EXPECT_FALSE(job->finished.has_value());
  EXPECT_TRUE(std::isnan(job->last_step->loss));
  EXPECT_TRUE(std::isinf(job->last_step->grad_norm));
}

TEST(RecordsTest, ARecordOfBeforeExpertsMovedReadsAsNoneAskedFor) {
  std::string value = record_of(full_job()).value;
  const std::string key = "\"rebalance\":true,";
  ASSERT_NE(value.find(key), std::string::npos);
  value.erase(value.find(key), key.size());
  const auto job = decode_job(value);
  ASSERT_TRUE(job.ok()) << job.status().to_string();
  EXPECT_FALSE(job->rebalance);
}

TEST(RecordsTest, SeatsReadBackAsWritten) {
  const SeatsRecord seats = {{7}, {{{3, {1, 0, 2}}, {61, {2, 1, 0}}}}};
  const Record record = record_of(seats);
  EXPECT_EQ(record.key, "seats/0000000000000007");
  const auto read = decode_seats(record.value);
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  EXPECT_EQ(read->job, seats.job);
  EXPECT_EQ(read->seats, seats.seats);
  EXPECT_EQ(decode_seats("{\"job\":7}").status().code(), Code::kDataLoss);
  EXPECT_EQ(decode_seats(R"({"job":7,"layers":[{"layer":"x","experts":[]}]})").status().code(),
            Code::kDataLoss);
}

TEST(RecordsTest, DataReadsBackAsWritten) {
  const DataRecord data = {{7}, {{"/c/tr\xC3\xA4in", 1ll << 40, {~0ull, 1}}, {"/c/held", 5, {}}}};
  const Record record = record_of(data);
  EXPECT_EQ(record.key, "data/0000000000000007");
  const auto read = decode_data(record.value);
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  EXPECT_EQ(read->job, data.job);
  EXPECT_EQ(read->data, data.data);
  EXPECT_EQ(decode_data("{\"job\":7}").status().code(), Code::kDataLoss);
  EXPECT_EQ(
      decode_data(R"({"job":7,"data":[{"path":"/d","tokens":1,"digest":[1]}]})").status().code(),
      Code::kDataLoss);
}

TEST(RecordsTest, ALossReadsBackToTheLastBit) {
  StepRecord step;
  step.job = {1};
  step.epoch = {1};
  step.step = 1;
  step.loss = 5.4453125 + 1e-15;
  std::string value = record_of(step).value;
  EXPECT_EQ(decode_step(value)->loss, step.loss);
  for (const double loss : {-1e300, 5e-324, -0.0}) {
    step.loss = loss;
    EXPECT_EQ(std::signbit(decode_step(record_of(step).value)->loss), std::signbit(loss));
    EXPECT_EQ(decode_step(record_of(step).value)->loss, loss);
  }
  value.replace(value.find("5.44"), 1, "\"x\",\"was\":5");
  EXPECT_EQ(decode_step(value).status().code(), Code::kDataLoss) << value;
}

TEST(RecordsTest, StepKeysSortInTheOrderTrained) {
  StepRecord late;
  late.job = {1};
  late.epoch = {1};
  late.step = 4'000'000'000;
  StepRecord replayed = late;
  replayed.epoch = {2};
  replayed.step = 1;
  EXPECT_LT(record_of(late).key, record_of(replayed).key);
}

TEST(RecordsTest, AnEventIsStoredInOrderAndByJob) {
  JobEvent event;
  event.sequence = 16;
  event.job = {7};
  event.rank = Rank{2};
  event.from = JobState::kRunning;
  event.state = JobState::kRecovering;
  event.reason = {"rank_killed", "signal 9"};
  const auto records = records_of(event);
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].key, "event/0000000000000010");
  EXPECT_EQ(records[1].key, "job-event/0000000000000007/0000000000000010");
  const auto read = decode_event(records[1].value);
  ASSERT_TRUE(read.ok());
  EXPECT_EQ(read->from, JobState::kRunning);
  EXPECT_EQ(read->rank, Rank{2});
  event.job = {};
  EXPECT_EQ(records_of(event).size(), 1u);
}

TEST(RecordsTest, AQuarantineAndItsEvidenceReadBackAsWritten) {
  WorkerRecord worker;
  worker.id = {3};
  worker.name = "w3";
  worker.quarantine = Quarantine{{kQuarantineFailures, "3 failures"}, true, {5}, Instant{9}, true};
  worker.check_due = true;
  worker.evidence = {{{4}, "rank_killed", {7}, {2}, Rank{1}, 60, "signal 11"},
                     {{5}, "start_timeout", {8}, {1}, {}, 0, "did not start"}};
  const auto read = decode_worker(record_of(worker).value);
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  EXPECT_EQ(read->quarantine, worker.quarantine);
  EXPECT_EQ(read->evidence, worker.evidence);
  EXPECT_TRUE(read->check_due);
  worker.quarantine->until.reset();
  EXPECT_EQ(decode_worker(record_of(worker).value)->quarantine, worker.quarantine);
}

TEST(RecordsTest, WorkersAndEvaluationsReadBackAsWritten) {
  const auto worker =
      decode_worker(record_of(WorkerRecord{{3}, "w3", ~0ull, 8, true, "fan", true}).value);
  EXPECT_EQ(worker->drain, "fan");
  EXPECT_TRUE(worker->drain_done);
  EXPECT_EQ(worker->incarnation, ~0ull);
  EXPECT_EQ(worker->device_count, 8);
  const auto evaluation =
      decode_evaluation(record_of(EvaluationRecord{{1}, {2}, 50, 2.5, 4096, {6}}).value);
  EXPECT_EQ(evaluation->step, 50);
  EXPECT_EQ(evaluation->loss, 2.5);
}

TEST(RecordsTest, DamagedValuesAreDataLossNamingWhatIsWrong) {
  const std::string whole = record_of(full_job()).value;
  for (size_t cut = 0; cut < whole.size(); cut += 7) {
    EXPECT_EQ(decode_job(whole.substr(0, cut)).status().code(), Code::kDataLoss) << cut;
  }
  std::string wrong_state = whole;
  wrong_state.replace(wrong_state.find("STOPPING"), 8, "SLEEPING");
  EXPECT_NE(decode_job(wrong_state).status().message().find("SLEEPING"), std::string::npos);
  EXPECT_NE(decode_worker("{\"id\":1}").status().message().find("name"), std::string::npos);
  EXPECT_EQ(decode_event("[]").status().code(), Code::kDataLoss);
  for (const char* number : {"1.5", "18446744073709551616", "-1e300", "\"7\""}) {
    const std::string text = std::string("{\"id\":") + number + "}";
    EXPECT_EQ(decode_last_job(text).status().code(), Code::kDataLoss) << number;
  }
}

TEST(RecordsTest, TextThatIsNotUtf8IsStoredAllTheSame) {
  JobEvent event;
  event.sequence = 1;
  event.reason = {"rank_exited", "\xFF\xFE"};
  EXPECT_TRUE(decode_event(records_of(event)[0].value).ok());
}

TEST(RecordsTest, EveryStateHasItsName) {
  for (const JobState state : kJobStates) EXPECT_EQ(job_state_of(job_state_name(state)), state);
  EXPECT_FALSE(job_state_of("SLEEPING").has_value());
}

TEST(RecordsTest, SpecKeysGiveTheirJob) {
  EXPECT_EQ(job_of_spec_key(spec_key(JobId{255})), JobId{255});
  EXPECT_FALSE(job_of_spec_key("job/00000000000000ff").has_value());
  EXPECT_FALSE(job_of_spec_key("spec/zz").has_value());
}

}  // namespace
}  // namespace penstock
