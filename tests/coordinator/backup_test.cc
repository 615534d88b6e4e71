// Backups of a coordinator's records, and coordinators that begin with one.
#include "coordinator/store/backup.h"

#include <gtest/gtest.h>

#include <fstream>

#include "coordinator/core/restored_records.h"
#include "coordinator/http/backups.h"
#include "coordinator/http/documents.h"
#include "coordinator/store/state_directory.h"
#include "tests/coordinator/core_harness.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

constexpr Instant kTakenAt{3'600'000'000'000};
constexpr Instant kRestoredAt{7'200'000'000'000};

using Records = std::map<std::string, std::string>;

std::string whole_text(const RecordStore& store, size_t piece_bytes = 1 << 20) {
  BackupText text(store.snapshot(), kTakenAt);
  std::string whole;
  while (!text.done()) whole += text.next(piece_bytes).value();
  return whole;
}

MemoryStore store_of(const CoreHarness& h) {
  MemoryStore store;
  store.map = h.store;
  return store;
}

// A file of that text, and what is read from it.
class BackupTest : public ::testing::Test {
 protected:
  Path write(const std::string& text) {
    const Path path = scratch.path() / "a.backup";
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
    return path;
  }
  Result<BackupContents> read(const std::string& text) {
    found.clear();
    return read_backup(write(text), [&](Record record) {
      found[record.key] = record.value;
      return Status();
    });
  }
  Records records_in(const Path& state_dir) const {
    const auto store = open_rocks_store(state_dir / kRecordsFolder);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    Records records;
    const std::vector<Record> all = (*store)->scan("", "", SIZE_MAX).value();
    for (const Record& record : all) {
      if (!record.key.starts_with(kStoreOwnPrefix)) records[record.key] = record.value;
    }
    return records;
  }

  ScratchFolder scratch;
  Records found;
};

TEST_F(BackupTest, WhatIsReadIsWhatWasThere) {
  const auto store = open_rocks_store(scratch.path() / "state");
  ASSERT_TRUE(store.ok());
  Records written;
  for (int i = 0; i < 1000; ++i) {
    written["step/" + key_number(i)] = std::string(i % 97, 'x') + "\"\n\\ü";
  }
  std::vector<Record> records;
  for (const auto& [key, value] : written) records.push_back({key, value});
  ASSERT_TRUE((*store)->write(records, false).ok());
  for (const size_t piece_bytes : {size_t{1}, size_t{10'000}, size_t{1} << 20}) {
    const auto contents = read(whole_text(**store, piece_bytes));
    ASSERT_TRUE(contents.ok()) << contents.status().to_string();
    EXPECT_EQ(contents->records, written.size());
    EXPECT_EQ(contents->taken_at, kTakenAt);
    EXPECT_EQ(found, written);
  }
}

TEST_F(BackupTest, WhatIsWrittenWhileItIsTakenIsNotInIt) {
  MemoryStore store;
  for (int i = 0; i < 500; ++i) store.map["job/" + key_number(i)] = "before";
  const Records before = store.map;
  BackupText text(store.snapshot(), kTakenAt);
  std::string whole;
  for (int i = 0; !text.done(); ++i) {
    whole += text.next(100).value();
    store.map["job/" + key_number(499 - i)] = "after";
    store.map["zzz/" + key_number(i)] = "after";
  }
  ASSERT_TRUE(read(whole).ok());
  EXPECT_EQ(found, before);
}

TEST_F(BackupTest, APieceIsNoLongerThanWasAskedForAndOneRecord) {
  constexpr size_t kValueBytes = 100'000;
  constexpr size_t kPieceBytes = 150'000;
  MemoryStore store;
  for (int i = 0; i < 70; ++i) store.map["job/" + key_number(i)] = std::string(kValueBytes, 'x');
  BackupText text(store.snapshot(), kTakenAt);
  std::string whole;
  while (!text.done()) {
    const std::string piece = text.next(kPieceBytes).value();
    EXPECT_LT(piece.size(), kPieceBytes + kValueBytes + 200);
    whole += piece;
  }
  ASSERT_TRUE(read(whole).ok());
  EXPECT_EQ(found, store.map);
}

TEST_F(BackupTest, AnyOtherTextIsRefused) {
  MemoryStore store;
  for (int i = 0; i < 3; ++i) store.map["job/" + key_number(i)] = "v" + std::to_string(i);
  const std::string whole = whole_text(store);
  ASSERT_TRUE(read(whole).ok());
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    EXPECT_EQ(read(whole.substr(0, bytes)).status().code(), Code::kDataLoss) << bytes;
    std::string flipped = whole;
    flipped[bytes] = static_cast<char>(flipped[bytes] ^ 1);
    EXPECT_EQ(read(flipped).status().code(), Code::kDataLoss) << bytes;
  }
  EXPECT_EQ(read(whole + "{}\n").status().code(), Code::kDataLoss);
  EXPECT_EQ(read(whole + whole).status().code(), Code::kDataLoss);
  const std::string long_line(size_t{66} << 20, 'x');
  EXPECT_NE(read(long_line).status().message().find("too long"), std::string::npos);
  EXPECT_NE(read("hello\n").status().message().find("line 1"), std::string::npos);
}

TEST_F(BackupTest, ADamagedBackupMakesNoStore) {
  CoreHarness h;
  h.add_worker("w0", 4);
  h.submit_ok(four_rank_spec());
  std::string text = whole_text(store_of(h));
  text[text.size() / 2] ^= 1;
  const Path state_dir = scratch.path() / "new";
  EXPECT_EQ(restore_backup(write(text), state_dir, kRestoredAt).status().code(), Code::kDataLoss);
  EXPECT_EQ(file_names(state_dir).value(), std::vector<std::string>{"LOCK"});
}

TEST_F(BackupTest, RecordsThatNoCoordinatorCanStartOnMakeNoStore) {
  CoreHarness h;
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.store.erase(spec_key(job));
  const Path state_dir = scratch.path() / "new";
  const auto restored = restore_backup(write(whole_text(store_of(h))), state_dir, kRestoredAt);
  EXPECT_EQ(restored.status().code(), Code::kDataLoss);
  EXPECT_FALSE(std::filesystem::exists(state_dir / kRecordsFolder));
}

TEST_F(BackupTest, ADirectoryInUseOrWithRecordsIsLeftAlone) {
  CoreHarness h;
  h.add_worker("w0", 4);
  h.submit_ok(four_rank_spec());
  const Path file = write(whole_text(store_of(h)));
  const Path state_dir = scratch.path() / "new";
  const auto restored = restore_backup(file, state_dir, kRestoredAt);
  ASSERT_TRUE(restored.ok()) << restored.status().to_string();
  EXPECT_EQ(restored->jobs, 1u);
  EXPECT_EQ(restored->open_jobs, 1u);
  const Records before = records_in(state_dir);
  EXPECT_EQ(restore_backup(file, state_dir, kRestoredAt).status().code(),
            Code::kFailedPrecondition);
  EXPECT_EQ(records_in(state_dir), before);
  const auto lock = lock_state_directory(scratch.path() / "used");
  EXPECT_EQ(restore_backup(file, scratch.path() / "used", kRestoredAt).status().code(),
            Code::kAlreadyExists);
}

// ---- what a restored coordinator does

// The records go back to what they were; the workers do not.
class RestoredTest : public ::testing::Test {
 protected:
  void restore() {
    StoredState stored;
    for (const auto& [key, value] : backup) {
      stored.records.push_back({key, value});
      if (key.starts_with(kEventPrefix)) stored.last_event_sequence = decode_event(value)->sequence;
    }
    const auto changed = restored_records(stored, kTakenAt, h.now());
    ASSERT_TRUE(changed.ok()) << changed.status().to_string();
    h.store = backup;
    for (const Record& record : *changed) h.store[record.key] = record.value;
    h.clear();
    h.restart_coordinator();
  }

  void register_workers() {
    for (const auto& [name, worker] : h.workers) h.register_worker(name);
  }
  // The epoch up to which the job's ranks are ordered to end, by each worker that is.
  std::map<std::string, Epoch> stops(JobId job) const {
    std::map<std::string, Epoch> stops;
    for (const OutgoingMessage& out : h.messages) {
      const auto* stop = std::get_if<StopRanks>(&out.message);
      if (!stop || stop->job != job) continue;
      Epoch& epoch = stops[out.peer.substr(5)];
      epoch = std::max(epoch, stop->epoch);
    }
    return stops;
  }

  CoreHarness h;
  Records backup;
};

TEST_F(RestoredTest, RanksOfLaterAttemptsEndAndTheJobGoesOnFromItsNewestCheckpoint) {
  for (int i = 0; i < 4; ++i) h.add_worker("w" + std::to_string(i), 1);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.train(job, 1, 30);
  h.checkpoint(job, 20);
  backup = h.store;
  h.kill_rank(job, 1);
  h.confirm_stops(job);
  h.answer_find();
  h.run(job);
  h.train(job, 21, 45);
  ASSERT_EQ(h.record(job).epoch, Epoch{2});
  restore();
  EXPECT_EQ(h.record(job).reason.code, "restored");
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(Json::parse(job_document(h.core(), h.job(job))).at("step"), 20)
      << "not where the attempt before the backup began";
  register_workers();
  const std::map<std::string, Epoch> ordered = stops(job);
  ASSERT_EQ(ordered.size(), 4u);
  for (const auto& [worker, epoch] : ordered) EXPECT_GT(epoch, Epoch{2}) << worker;
  EXPECT_TRUE(h.finds.empty()) << "not while ranks run";
  h.confirm_stops(job);
  CheckpointFound found;
  found.job = job;
  found.step = 40;  // of a later attempt
  found.manifest = "/state/checkpoints/1/40.manifest";
  h.answer_find(found);
  ASSERT_EQ(h.sent<StartRank>().size(), 4u);
  for (const StartRank& start : h.sent<StartRank>()) {
    EXPECT_EQ(start.restore_step, 40);
    EXPECT_GT(start.epoch, Epoch{1000});
  }
  h.run(job);
  EXPECT_EQ(h.record(job).restarts, 0) << "no failure of the job's";
}

TEST_F(RestoredTest, WhatCameLaterIsStoppedAndItsIdIsNotGivenAgain) {
  h.add_worker("w0", 2);
  backup = h.store;
  const JobId later = h.submit_ok(flat_spec("later", 2));
  h.run(later);
  restore();
  register_workers();
  ASSERT_EQ(stops(later).size(), 1u);
  h.workers.at("w0").ranks.clear();
  h.say("w0", RanksStopped{later, stops(later).begin()->second, {}});
  const JobId next = h.submit_ok(flat_spec("next", 2));
  EXPECT_GT(next, later);
  h.run(next);
}

TEST_F(RestoredTest, JobsThatHaveNoRanksStayWhatTheyWere) {
  h.add_worker("w0", 2);
  h.run(h.submit_ok(flat_spec("running", 2)));
  const JobId queued = h.submit_ok(flat_spec("queued", 2));
  const JobId cancelled = h.submit_ok(flat_spec("cancelled", 2));
  h.cancel(cancelled);
  backup = h.store;
  restore();
  EXPECT_EQ(h.state(queued), JobState::kQueued);
  EXPECT_EQ(h.record(queued).epoch, Epoch{kRestoredEpochGap}) << "it may have run since";
  EXPECT_EQ(h.state(cancelled), JobState::kCancelled);
}

TEST_F(RestoredTest, EventsGoOnWithoutAGap) {
  h.add_worker("w0", 2);
  h.run(h.submit_ok(flat_spec("running", 2)));
  backup = h.store;
  restore();
  uint64_t sequence = 0;
  for (const auto& [key, value] : h.store) {
    if (key.starts_with(kEventPrefix)) {
      EXPECT_EQ(decode_event(value)->sequence, ++sequence);
    }
  }
  EXPECT_GT(sequence, 3u);
}

// ---- over HTTP

class BackupsTest : public ::testing::Test {
 protected:
  BackupsTest() {
    for (int i = 0; i < 5000; ++i) store.map["step/" + key_number(i)] = std::string(200, 'x');
  }
  MemoryStore store;
  Backups backups;
};

TEST_F(BackupsTest, PiecesFollowEachOtherToTheEnd) {
  BackupPiece piece = backups.begin(store, kTakenAt).value();
  std::string whole = piece.text;
  while (!piece.done) {
    piece = backups.next(piece.id, whole.size(), kTakenAt).value();
    whole += piece.text;
  }
  EXPECT_EQ(whole, whole_text(store));
  EXPECT_EQ(backups.next(piece.id, whole.size(), kTakenAt).status().code(), Code::kNotFound);
}

TEST_F(BackupsTest, AnotherOffsetIsRefusedAndTheBackupGoesOn) {
  const BackupPiece first = backups.begin(store, kTakenAt).value();
  EXPECT_EQ(backups.next(first.id, 0, kTakenAt).status().code(), Code::kFailedPrecondition);
  EXPECT_TRUE(backups.next(first.id, first.next_offset, kTakenAt).ok());
}

TEST_F(BackupsTest, TooManyAreRefusedAndForgottenOnesGivenUp) {
  std::vector<uint64_t> ids;
  for (size_t i = 0; i < kBackupsMax; ++i) ids.push_back(backups.begin(store, kTakenAt)->id);
  EXPECT_EQ(backups.begin(store, kTakenAt).status().code(), Code::kResourceExhausted);
  const Instant later = kTakenAt + kBackupIdleMax;
  EXPECT_TRUE(backups.begin(store, later).ok());
  EXPECT_EQ(backups.next(ids[0], 1, later).status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace penstock
