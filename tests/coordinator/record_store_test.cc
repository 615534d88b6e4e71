#include "coordinator/store/record_store.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <map>

#include "tests/coordinator/memory_store.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

std::vector<std::string> keys(const std::vector<Record>& records) {
  std::vector<std::string> keys;
  for (const Record& record : records) keys.push_back(record.key);
  return keys;
}

// What both stores promise.
void check_contract(RecordStore& store) {
  ASSERT_TRUE(store.write({{"a/1", "x"}, {"a/2", "y"}, {"b/1", "z"}}, true).ok());
  ASSERT_TRUE(store.write({{"a/2", "new"}, {"a/3", ""}}, false).ok());
  EXPECT_EQ(keys(store.scan("a/", "a/", 100).value()),
            (std::vector<std::string>{"a/1", "a/2", "a/3"}));
  EXPECT_EQ(store.scan("a/", "a/2", 1).value().at(0).value, "new");
  EXPECT_TRUE(store.scan("a/", "a/4", 100).value().empty());
  EXPECT_TRUE(store.scan("c/", "c/", 100).value().empty());
  EXPECT_EQ(store.last("a/").value()->key, "a/3");
  EXPECT_EQ(store.last("b/").value()->key, "b/1");
  EXPECT_FALSE(store.last("0/").value().has_value());
  EXPECT_FALSE(store.last("c/").value().has_value());
  const auto before = store.snapshot();
  ASSERT_TRUE(store.write({{"a/4", "z"}, {"c/1", "q"}}, {"a/", "b/1", "none/"}, true).ok());
  EXPECT_EQ(keys(before->scan("a/", "a/", 100).value()),
            (std::vector<std::string>{"a/1", "a/2", "a/3"}))
      << "whatever is written later";
  EXPECT_EQ(before->last("b/").value()->value, "z");
  EXPECT_EQ(keys(store.scan("a/", "a/", 100).value()), std::vector<std::string>{"a/4"})
      << "erased first, then written";
  EXPECT_TRUE(store.scan("b/", "b/", 100).value().empty());
  EXPECT_EQ(store.last("c/").value()->key, "c/1");
}

TEST(RecordStoreTest, TheStoreOnDiskKeepsTheContract) {
  const ScratchFolder scratch;
  const auto store = open_rocks_store(scratch.path() / "state");
  ASSERT_TRUE(store.ok()) << store.status().to_string();
  check_contract(**store);
}

TEST(RecordStoreTest, TheStoreInMemoryKeepsTheContract) {
  MemoryStore store;
  check_contract(store);
}

TEST(RecordStoreTest, WhatWasWrittenIsThereWhenItIsOpenedAgain) {
  const ScratchFolder scratch;
  const Path path = scratch.path() / "state";
  ASSERT_TRUE((*open_rocks_store(path))->write({{"job/1", "v"}}, true).ok());
  EXPECT_EQ((*open_rocks_store(path))->scan("job/", "job/", 9).value().at(0).value, "v");
}

// Names and sizes, of all but the directory itself.
std::map<std::string, uint64_t> files_in(const Path& folder) {
  std::map<std::string, uint64_t> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    files[entry.path().filename()] = entry.file_size();
  }
  return files;
}

TEST(RecordStoreTest, ItIsReadWhileACoordinatorHasItAndNothingOnDiskChanges) {
  const ScratchFolder scratch;
  const Path path = scratch.path() / "state";
  const auto store = open_rocks_store(path);
  ASSERT_TRUE(store.ok()) << store.status().to_string();
  ASSERT_TRUE((*store)->write({{"job/1", "v"}}, false).ok());
  const auto before = files_in(path);
  {
    const auto reader = open_rocks_store_for_reading(path);
    ASSERT_TRUE(reader.ok()) << reader.status().to_string();
    EXPECT_EQ((*reader)->scan("job/", "job/", 9).value().at(0).value, "v");
    EXPECT_FALSE((*reader)->write({{"job/2", "w"}}, true).ok());
  }
  EXPECT_EQ(files_in(path), before);
  EXPECT_TRUE((*store)->write({{"job/2", "w"}}, true).ok()) << "its owner goes on";
}

TEST(RecordStoreTest, AStoreThatIsNotThereIsNotMadeByReading) {
  const ScratchFolder scratch;
  const auto reader = open_rocks_store_for_reading(scratch.path() / "state");
  EXPECT_EQ(reader.status().code(), Code::kNotFound);
  EXPECT_FALSE(std::filesystem::exists(scratch.path() / "state"));
}

TEST(RecordStoreTest, OfStepsTrainedSeveralTimesTheNewestRecordIsReadUpToAnEpoch) {
  MemoryStore store;
  const auto trained = [&](uint32_t epoch, int64_t first, int64_t last) {
    for (int64_t step = first; step <= last; ++step) {
      const StepRecord record{.job = {7},
                              .epoch = {epoch},
                              .step = step,
                              .loss = epoch + 0.001 * static_cast<double>(step)};
      ASSERT_TRUE(store.write({record_of(record)}, false).ok());
    }
  };
  trained(1, 1, 30);
  trained(2, 21, 25);
  trained(3, 23, 40);
  trained(4, 1, 100);  // the replay itself
  const StepsRead read = read_steps(store, {{7}, {3}, 19, 32});
  ASSERT_TRUE(read.status.ok());
  ASSERT_EQ(read.steps.size(), 14u);
  for (const StepRecord& step : read.steps) {
    const uint32_t epoch = step.step >= 23 ? 3 : step.step >= 21 ? 2 : 1;
    EXPECT_EQ(step.epoch, Epoch{epoch}) << step.step;
  }
  EXPECT_TRUE(read_steps(store, {{8}, {3}, 1, 9}).steps.empty());
}

TEST(RecordStoreTest, ADamagedStepRecordIsReportedAndNotPassedOver) {
  MemoryStore store;
  Record record = record_of(StepRecord{.job = {7}, .epoch = {1}, .step = 4});
  record.value = "{";
  ASSERT_TRUE(store.write({record}, false).ok());
  EXPECT_EQ(read_steps(store, {{7}, {1}, 1, 9}).status.code(), Code::kDataLoss);
}

TEST(RecordStoreTest, ASecondOpenIsAConflict) {
  const ScratchFolder scratch;
  const auto first = open_rocks_store(scratch.path() / "state");
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(open_rocks_store(scratch.path() / "state").status().code(), Code::kAlreadyExists);
}

TEST(RecordStoreTest, ADamagedStoreIsDataLossAndSaysWhatToDo) {
  const ScratchFolder scratch;
  const Path path = scratch.path() / "state";
  ASSERT_TRUE((*open_rocks_store(path))->write({{"job/1", "v"}}, true).ok());
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().filename().string().starts_with("MANIFEST")) {
      std::ofstream(entry.path(), std::ios::trunc) << "not a manifest";
    }
  }
  const Status status = open_rocks_store(path).status();
  EXPECT_EQ(status.code(), Code::kDataLoss) << status.to_string();
  EXPECT_NE(status.message().find("restore the directory"), std::string::npos);
}

TEST(RecordStoreTest, AStoreOfAnotherFormatIsRefused) {
  const ScratchFolder scratch;
  const Path path = scratch.path() / "state";
  ASSERT_TRUE((*open_rocks_store(path))->write({{"meta/format", "999"}}, true).ok());
  EXPECT_EQ(open_rocks_store(path).status().code(), Code::kFailedPrecondition);
}

TEST(RecordStoreTest, TheStoredStateHasEverythingAStartNeedsAndNoSteps) {
  MemoryStore store;
  JobEvent event;
  event.sequence = 41;
  ASSERT_TRUE(store.write(records_of(event), true).ok());
  event.sequence = 42;
  ASSERT_TRUE(store.write(records_of(event), true).ok());
  StepRecord step;
  step.job = {1};
  ASSERT_TRUE(store
                  .write({record_of(step),
                          {"job/1", "j"},
                          {"spec/1", "s"},
                          {"seats/1", "t"},
                          {"worker/1", "w"},
                          {"evaluation/1/1", "e"}},
                         true)
                  .ok());
  const auto stored = read_stored_state(store);
  ASSERT_TRUE(stored.ok());
  EXPECT_EQ(stored->last_event_sequence, 42u);
  EXPECT_EQ(keys(stored->records),
            (std::vector<std::string>{"job/1", "spec/1", "seats/1", "worker/1", "evaluation/1/1"}));
}

TEST(RecordStoreTest, ADamagedLastEventIsNamed) {
  MemoryStore store;
  store.map["event/0000000000000001"] = "{";
  const Status status = read_stored_state(store).status();
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("event/0000000000000001"), std::string::npos);
}

}  // namespace
}  // namespace penstock
