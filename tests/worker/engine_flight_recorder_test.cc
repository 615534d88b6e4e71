// What a rank says it does now, read by others while it writes, waits, is stopped or dead.
#include "worker/engine/flight_recorder.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <fstream>
#include <thread>

#include "comm/control/flight_reader.h"
#include "comm/data/loopback_transport.h"
#include "tests/worker/engine_test_support.h"
#include "worker/engine/measured_transport.h"

namespace penstock {
namespace {

TraceRecord operation(int64_t k) {
  return {.begin_ns = k,
          .microbatch = static_cast<int32_t>(k % 1000),
          .layer = static_cast<int16_t>(k % 1000),
          .kind = TraceKind::kSubOp,
          .what = static_cast<uint8_t>(k % kSubOpCount)};
}

// Whether all of a state was written by one operation(k).
bool is_whole(const FlightRecord& record) {
  const int64_t k = record.since_ns;
  return record.state.microbatch == k % 1000 && record.state.layer == k % 1000 &&
         record.state.what == k % kSubOpCount;
}

class FlightRecorderTest : public ::testing::Test {
 protected:
  Path file() const { return directory_.path() / "x.flight"; }
  // A process that writes operations for ever; returns when it has begun.
  pid_t busy_writer() const {
    const pid_t pid = ::fork();
    if (pid == 0) {
      FlightRecorder flight;
      if (!flight.keep_in(file(), JobId{3}, Epoch{2}, Rank{1}).ok()) ::_exit(1);
      for (int64_t k = 0;; ++k) flight.begin(operation(k));
    }
    for (;;) {
      const Result<FlightRecord> read = read_flight_record(file());
      if (read.ok() && read->state.kind == TraceKind::kSubOp) return pid;
      if (!read.ok() && read.status().code() == Code::kUnavailable) return pid;
    }
  }

  ScratchDirectory directory_;
};

TEST_F(FlightRecorderTest, TheFileSaysWhoseItIsAndWhatIsDone) {
  FlightRecorder flight;
  ASSERT_TRUE(flight.keep_in(file(), JobId{3}, Epoch{2}, Rank{1}).ok());
  Result<FlightRecord> read = read_flight_record(file());
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  EXPECT_EQ(read->job, JobId{3});
  EXPECT_EQ(read->epoch, Epoch{2});
  EXPECT_EQ(read->rank, Rank{1});
  EXPECT_EQ(read->state.phase, FlightPhase::kStarting);
  EXPECT_GT(read->since_ns, 0);

  flight.begin_phase(FlightPhase::kTraining, 37);
  flight.begin({.begin_ns = 1000,
                .microbatch = 5,
                .layer = 2,
                .kind = TraceKind::kSubOp,
                .what = static_cast<uint8_t>(SubOp::kCombine)});
  flight.begin_wait(3, false, 2000);
  read = read_flight_record(file());
  ASSERT_TRUE(read.ok());
  EXPECT_EQ(read->since_ns, 2000);
  EXPECT_EQ(read->state, flight.state());
  EXPECT_EQ(to_sentence(read->state),
            "in combine(F) of layer 2, micro-batch 5, step 37, waiting for a message of rank 3");
  flight.end_wait(3000);
  EXPECT_EQ(read_flight_record(file())->state.peer, -1);
  EXPECT_EQ(read_flight_record(file())->state.microbatch, 5) << "the operation goes on";
}

TEST_F(FlightRecorderTest, PhasesHaveWordsAndForgetTheOperationBefore) {
  FlightRecorder flight;
  flight.begin(operation(7));
  flight.begin_phase(FlightPhase::kSaving, 40);
  EXPECT_EQ(to_sentence(flight.state()), "saving after step 40");
  flight.begin({.layer = 1,
                .kind = TraceKind::kCollective,
                .what = static_cast<uint8_t>(Collective::kGatherDense)});
  flight.begin_wait(0, true, 1);
  EXPECT_EQ(to_sentence(flight.state()),
            "in gather dense of stage 1, saving after step 40, waiting for rank 0 to take a "
            "message");
  flight.begin_phase(FlightPhase::kLoading, 0);
  EXPECT_EQ(to_sentence(flight.state()), "loading");
}

TEST_F(FlightRecorderTest, AReaderSeesWholeStatesWhileTheRankWrites) {
  FlightRecorder flight;
  ASSERT_TRUE(flight.keep_in(file(), JobId{1}, Epoch{1}, Rank{0}).ok());
  flight.begin(operation(0));
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (int64_t k = 1; !stop; ++k) flight.begin(operation(k));
  });
  int whole = 0;
  for (int i = 0; i < 2000; ++i) {
    const Result<FlightRecord> read = read_flight_record(file());
    if (!read.ok()) {
      EXPECT_EQ(read.status().code(), Code::kUnavailable) << read.status().to_string();
      continue;
    }
    EXPECT_TRUE(is_whole(*read)) << read->since_ns;
    ++whole;
  }
  stop = true;
  writer.join();
  EXPECT_TRUE(is_whole(*read_flight_record(file())));
  RecordProperty("whole", whole);
}

TEST_F(FlightRecorderTest, AStateIsWholeWhereverItsRankWasStoppedOrKilled) {
  for (int round = 0; round < 20; ++round) {
    const pid_t pid = busy_writer();
    for (const int signal : {SIGSTOP, SIGKILL}) {
      ASSERT_EQ(::kill(pid, signal), 0);
      int status = 0;
      ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
      const Result<FlightRecord> read = read_flight_record(file());
      ASSERT_TRUE(read.ok()) << read.status().to_string();
      EXPECT_TRUE(is_whole(*read)) << read->since_ns;
      EXPECT_EQ(read->job, JobId{3});
    }
    std::filesystem::remove(file());
  }
}

TEST_F(FlightRecorderTest, WhoIsWaitedForIsThereUntilItsMessageIs) {
  FlightRecorder flight;
  ASSERT_TRUE(flight.keep_in(file(), JobId{1}, Epoch{1}, Rank{0}).ok());
  const auto ends = make_loopback(2, {.timeout = std::chrono::minutes(10)});
  MeasuredTransport transport(*ends[0], flight);
  std::thread rank([&] {
    std::array<std::byte, 8> bytes{};
    const TransferHandle handle = transport.receive(Rank{1}, Tag{7}, bytes);
    EXPECT_TRUE(transport.wait(handle, nullptr).ok());
  });
  Result<FlightRecord> read = read_flight_record(file());
  while (read.ok() && read->state.peer != 1) read = read_flight_record(file());
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  EXPECT_FALSE(read->state.sending);
  const std::array<std::byte, 8> bytes{};
  const TransferHandle sent = ends[1]->send(Rank{0}, Tag{7}, bytes);
  EXPECT_TRUE(ends[1]->wait(sent).ok());
  rank.join();
  EXPECT_EQ(read_flight_record(file())->state.peer, -1);
}

TEST_F(FlightRecorderTest, WhatIsNoFlightRecordIsRefused) {
  EXPECT_EQ(read_flight_record(file()).status().code(), Code::kNotFound);
  std::ofstream(file()) << "short";
  EXPECT_FALSE(read_flight_record(file()).ok());
  std::ofstream(file()) << std::string(sizeof(FlightFile), 'x');
  EXPECT_EQ(read_flight_record(file()).status().code(), Code::kDataLoss);
  FlightFile file_of_another;
  ++file_of_another.version;
  const auto write = [&] {
    std::ofstream(file(), std::ios::binary)
        .write(reinterpret_cast<const char*>(&file_of_another), sizeof(file_of_another));
  };
  write();
  EXPECT_EQ(read_flight_record(file()).status().code(), Code::kDataLoss);
  --file_of_another.version;
  write();
  EXPECT_TRUE(read_flight_record(file()).ok());
  file_of_another.slots[0].fill(~uint64_t{0});
  write();
  EXPECT_EQ(read_flight_record(file()).status().code(), Code::kDataLoss) << "nothing is like that";
}

TEST_F(FlightRecorderTest, WithoutAFolderTheRecordStaysInMemory) {
  FlightRecorder flight;
  EXPECT_FALSE(flight.keep_in("/no/such/folder/x.flight", JobId{1}, Epoch{1}, Rank{0}).ok());
  flight.begin(operation(1));
  EXPECT_EQ(flight.state().microbatch, 1);
}

}  // namespace
}  // namespace penstock
