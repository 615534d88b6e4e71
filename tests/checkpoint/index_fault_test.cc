// What RocksDB does not say: each way its files can lose what was written to them, as measured for
// RocksDB 7.8. Many of these open without an error and with commits missing. The index must notice
// every one, set the database aside before a byte of it is changed, and be made again from the
// manifests.
#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>

#include <algorithm>
#include <map>

#include "checkpoint/index_log.h"
#include "checkpoint/index_witness.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/simulated_rocksdb.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;
namespace fs = std::filesystem;

class IndexFaultTest : public ::testing::Test {
 protected:
  // Three commits in one session, a table each; the files after the second are kept as old().
  void SetUp() override {
    const auto index = CheckpointIndex::open(path());
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    for (int64_t step = 1; step <= 3; ++step) {
      commit(**index, step);
      if (step == 2) fs::copy(path(), old(), fs::copy_options::recursive);
    }
  }
  void commit(CheckpointIndex& index, int64_t step) {
    auto store = CheckpointStore::open(job(), kJob, &index);
    ASSERT_TRUE(store.ok());
    rows_.push_back(commit_model(*store, kJob, Epoch{1}, step, 1));
  }
  // A fifth commit whose record is only in the log: the process died before the table was made.
  void commit_to_the_log_only() {
    TempDirectory graves(memory_directory());
    SimulatedDisk disk(graves.path());
    const auto env = simulated_env(disk);
    auto index = CheckpointIndex::open(path(), disk, env.get());
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    const int64_t begin = disk.call_count();
    commit(**index, 4);
    const auto table = std::find_if(disk.calls().begin() + begin, disk.calls().end(),
                                    [](const auto& call) { return call.ends_with(".sst"); });
    disk.crash_at(disk.call_count() + (table - disk.calls().begin()) - begin + 1);
    auto store = CheckpointStore::open(job(), kJob, index->get());
    const auto request = save_model(job(), kJob, Epoch{1}, 5, 1);
    ASSERT_TRUE(request.ok());
    const auto report = store->commit(*request);
    ASSERT_TRUE(report.ok());
    ASSERT_FALSE(report->index.ok());
    rows_.push_back(report->info);
    PENSTOCK_CHECK(disk.calls().back().ends_with(".sst"), disk.calls().back());
  }
  // The largest file of the index whose name begins or ends so.
  Path file(std::string_view part) const {
    Path found;
    const std::vector<std::string> names = file_names(path()).value();
    for (const std::string& name : names) {
      if (!name.starts_with(part) && !name.ends_with(part)) continue;
      if (found.empty() || size_of_file(path() / name) > size_of_file(found)) {
        found = path() / name;
      }
    }
    PENSTOCK_CHECK(!found.empty(), std::string(part));
    return found;
  }
  std::vector<Path> set_aside() const {
    std::vector<Path> found;
    for (const auto& entry : fs::directory_iterator(directory_.path())) {
      if (entry.path().filename().string().starts_with("index.damaged-")) {
        found.push_back(entry.path());
      }
    }
    return found;
  }
  // Every file of a database but what opening it for reading makes: name and contents.
  static std::map<std::string, std::string> contents(const Path& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      if (!name.starts_with("LO")) files[name] = file_text(entry.path());
    }
    return files;
  }
  // Nothing is wrong but, at most, the newest commit missing: it was never acknowledged.
  void expect_mended_by_reconcile() {
    const auto index = CheckpointIndex::open(path());
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    EXPECT_EQ((*index)->opening_report(), "");
    ASSERT_TRUE((*index)->reconcile(kJob, job()).ok());
    EXPECT_EQ(*(*index)->list(kJob), rows_);
  }
  void expect_whole() {
    const auto index = CheckpointIndex::open(path());
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    EXPECT_EQ((*index)->opening_report(), "");
    EXPECT_TRUE(set_aside().empty());
    const auto report = (*index)->reconcile(kJob, job());
    ASSERT_TRUE(report.ok());
    EXPECT_FALSE(report->rebuilt) << report->reason;
    EXPECT_EQ(*(*index)->list(kJob), rows_);
  }
  // Noticed, said, set aside with not a byte changed, and made again.
  void expect_set_aside(const std::string& why) {
    const auto before = contents(path());
    {
      const auto index = CheckpointIndex::open(path());
      ASSERT_TRUE(index.ok()) << index.status().to_string();
      EXPECT_NE((*index)->opening_report().find(why), std::string::npos)
          << (*index)->opening_report();
      ASSERT_EQ(set_aside().size(), 1u);
      EXPECT_EQ(contents(set_aside()[0]), before) << "it was opened for writing";
      const auto report = (*index)->reconcile(kJob, job());
      ASSERT_TRUE(report.ok());
      EXPECT_TRUE(report->rebuilt);
      EXPECT_TRUE(report->lost.empty());
      EXPECT_EQ(*(*index)->list(kJob), rows_);
      EXPECT_EQ(*(*index)->highest_commit(kJob), rows_.back().commit_seq);
    }
    fs::remove_all(set_aside()[0]);
    expect_whole();  // and stays so
  }
  Path path() const { return directory_.path() / "index"; }
  Path old() const { return directory_.path() / "old"; }
  Path job() const { return directory_.path() / "job"; }

  TempDirectory directory_{memory_directory()};
  std::vector<CheckpointInfo> rows_;
};

TEST_F(IndexFaultTest, AnUntouchedIndexIsUsedAsItIs) {
  expect_whole();
}

TEST_F(IndexFaultTest, AFlipAnywhereInTheLogIsNoticed) {
  commit_to_the_log_only();
  const Path log = file(".log");
  ASSERT_GT(size_of_file(log), 100u);
  for (const uint64_t offset : {uint64_t{1}, size_of_file(log) / 2, size_of_file(log) - 1}) {
    TempDirectory keep(memory_directory());
    fs::copy(directory_.path(), keep.path(), fs::copy_options::recursive);
    flip_byte(log, offset);
    expect_set_aside("orrupt");
    fs::remove_all(directory_.path());
    fs::copy(keep.path(), directory_.path(), fs::copy_options::recursive);
  }
}

TEST_F(IndexFaultTest, ALogRecordCutShortIsACrashThatReconcileMends) {
  commit_to_the_log_only();
  fs::resize_file(file(".log"), size_of_file(file(".log")) - 10);
  expect_mended_by_reconcile();
}

TEST_F(IndexFaultTest, AnEmptiedOrMissingLogHoldsNothingThatWasAcknowledged) {
  fs::resize_file(file(".log"), 0);
  expect_whole();
  fs::remove(file(".log"));
  expect_whole();
  commit_to_the_log_only();
  fs::resize_file(file(".log"), 0);
  expect_mended_by_reconcile();
}

// A disk that wrote a block twice: RocksDB with assertions aborts when it reads that.
TEST_F(IndexFaultTest, ARecordThatALogHoldsTwiceIsNoticedBeforeRocksDbReadsIt) {
  commit_to_the_log_only();
  const Path log = file(".log");
  const std::string record = file_text(log);
  overwrite(log, record.size(), record);
  expect_set_aside("stands in it twice");
}

TEST_F(IndexFaultTest, RecordsThatAManifestHoldsTwiceAreNoticedBeforeRocksDbReadsThem) {
  const Path manifest = file("MANIFEST");
  const std::string records = file_text(manifest);
  overwrite(manifest, records.size(), records);
  expect_set_aside("stands in it twice");
}

TEST(IndexLogTest, ARecordOfSeveralBlocksIsFoundWhereverItIsCut) {
  const auto piece = [](uint8_t type, const std::string& bytes) {
    const std::string covered = static_cast<char>(type) + bytes;
    const uint32_t sum = crc32c(as_bytes(covered));
    ByteWriter writer;
    writer.put<uint32_t>(((sum >> 15) | (sum << 17)) + 0xa282ead8u);
    writer.put(static_cast<uint16_t>(bytes.size()));
    return std::string(as_text(writer.data())) + covered;
  };
  constexpr uint8_t kFirst = 2;
  constexpr uint8_t kLast = 4;
  const auto cut_at = [&](size_t count) {  // a record of 32 KiB
    return piece(kFirst, std::string(count, 'r')) + piece(kLast, std::string(32768 - count, 'r'));
  };
  EXPECT_TRUE(check_log({}).ok());
  const std::string once = cut_at(32768 - 7);  // up to the end of a block, and 14 bytes of the next
  EXPECT_TRUE(check_log(as_bytes(once)).ok());
  std::string again = once + cut_at(32768 - 14 - 7);
  EXPECT_EQ(check_log(as_bytes(again)).code(), Code::kDataLoss);
  again[once.size()] ^= 1;  // in the checksum of its first piece
  EXPECT_TRUE(check_log(as_bytes(again)).ok()) << "RocksDB says what is wrong with it";
}

// Whether it is taken for a torn record or for damage: no commit that was acknowledged is missing
// from an index that says nothing, and one that is set aside is whole.
TEST_F(IndexFaultTest, GarbageBehindTheLogIsIgnoredOrNoticed) {
  commit_to_the_log_only();
  const Path log = file(".log");
  const std::string record = file_text(log);
  for (const std::string& garbage :
       {std::string(64, 'g'), std::string(70'000, 'g'), std::string(3, '\0'),
        std::string(70'000, '\0'), record.substr(0, record.size() / 2)}) {
    TempDirectory keep(memory_directory());
    fs::copy(directory_.path(), keep.path(), fs::copy_options::recursive);
    overwrite(log, record.size(), garbage);
    const auto before = contents(path());
    {
      const auto index = CheckpointIndex::open(path());
      ASSERT_TRUE(index.ok()) << index.status().to_string();
      const auto rows = (*index)->list(kJob);
      ASSERT_TRUE(rows.ok()) << rows.status().to_string();
      if ((*index)->opening_report().empty()) {
        EXPECT_TRUE(set_aside().empty());
        EXPECT_GE(rows->size(), rows_.size() - 1);  // the newest was not acknowledged
        EXPECT_TRUE(std::equal(rows->begin(), rows->end(), rows_.begin()));
      } else {
        ASSERT_EQ(set_aside().size(), 1u);
        EXPECT_EQ(contents(set_aside()[0]), before);
      }
      const auto report = (*index)->reconcile(kJob, job());
      ASSERT_TRUE(report.ok());
      EXPECT_TRUE(report->lost.empty());
      EXPECT_EQ(*(*index)->list(kJob), rows_);
    }
    fs::remove_all(directory_.path());
    fs::copy(keep.path(), directory_.path(), fs::copy_options::recursive);
  }
}

TEST_F(IndexFaultTest, AMissingTableIsNoticed) {
  fs::remove(file(".sst"));
  expect_set_aside("No such file");
}

TEST_F(IndexFaultTest, ATableCutShortIsNoticed) {
  fs::resize_file(file(".sst"), size_of_file(file(".sst")) - 1);
  expect_set_aside("orrupt");
}

TEST_F(IndexFaultTest, AFlipInTheFooterOfATableIsNoticed) {
  flip_byte(file(".sst"), size_of_file(file(".sst")) - 3);
  expect_set_aside("orrupt");
}

TEST_F(IndexFaultTest, AFlipInTheDataOfATableIsNoticedWhenOpening) {
  std::vector<Path> tables;
  for (const auto& entry : fs::directory_iterator(path())) {
    if (entry.path().extension() == ".sst") tables.push_back(entry.path());
  }
  ASSERT_GE(tables.size(), 2u) << "the newest has the chain's link, which is read anyway";
  flip_byte(*std::min_element(tables.begin(), tables.end()), 20);
  expect_set_aside("orrupt");
}

TEST_F(IndexFaultTest, AFlipInTheDataOfATableThatIsOpenIsNoticedByItsReader) {
  const auto index = CheckpointIndex::open(path());
  ASSERT_TRUE(index.ok()) << index.status().to_string();
  flip_byte(file(".sst"), 20);
  EXPECT_EQ((*index)->list(kJob).status().code(), Code::kDataLoss);
  const auto report = (*index)->reconcile(kJob, job());
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_TRUE(report->rebuilt);
  EXPECT_EQ(set_aside().size(), 1u);
  EXPECT_EQ(*(*index)->list(kJob), rows_);
}

TEST_F(IndexFaultTest, AFlipInTheManifestOfTheDatabaseIsNoticed) {
  flip_byte(file("MANIFEST"), size_of_file(file("MANIFEST")) / 2);
  expect_set_aside("orrupt");
}

// Both open without an error; the second has forgotten tables.
TEST_F(IndexFaultTest, AManifestCutShortIsHarmlessOrNoticedByTheChain) {
  const Path manifest = file("MANIFEST");
  fs::resize_file(manifest, size_of_file(manifest) - 10);
  expect_mended_by_reconcile();
  const Path rewritten = file("MANIFEST");
  fs::resize_file(rewritten, size_of_file(rewritten) / 2);
  expect_set_aside("damaged");
}

// Opens without an error, all newer tables forgotten and soon deleted.
TEST_F(IndexFaultTest, AnOlderManifestPutBackIsNoticedByTheChain) {
  const Path manifest = file("MANIFEST");
  fs::copy_file(old() / manifest.filename(), manifest, fs::copy_options::overwrite_existing);
  expect_set_aside("it ends with change 2");
}

TEST_F(IndexFaultTest, TheWholeDatabaseRolledBackIsNoticedByTheChain) {
  fs::remove_all(path());
  fs::rename(old(), path());
  expect_set_aside("but change 3");
}

TEST_F(IndexFaultTest, AnotherDatabaseOfEqualLengthIsNoticedByTheChain) {
  {
    const auto other = CheckpointIndex::open(directory_.path() / "elsewhere" / "index");
    ASSERT_TRUE(other.ok());
    for (const uint64_t job : {1, 2, 3}) {
      CheckpointInfo row = rows_[0];
      row.job = JobId{job};
      ASSERT_TRUE((*other)->record_commit(row).ok());
    }
  }
  fs::remove_all(path());
  fs::rename(directory_.path() / "elsewhere" / "index", path());
  expect_set_aside("it ends with change 3");
}

TEST_F(IndexFaultTest, AMissingOrDanglingCurrentFileIsNoticed) {
  const std::string text = file_text(path() / "CURRENT");
  replace_file(path() / "CURRENT", "MANIFEST-999999\n");
  expect_set_aside("MANIFEST-999999");
  fs::remove(path() / "CURRENT");
  expect_set_aside("CURRENT");
}

TEST_F(IndexFaultTest, ARowUnderAnotherRowsKeyIsNoticed) {
  {
    rocksdb::DB* opened = nullptr;
    ASSERT_TRUE(rocksdb::DB::Open(rocksdb::Options(), path().string(), &opened).ok());
    const std::unique_ptr<rocksdb::DB> db(opened);
    const std::unique_ptr<rocksdb::Iterator> row(db->NewIterator(rocksdb::ReadOptions()));
    row->Seek("c");
    ASSERT_TRUE(row->Valid());
    std::string key = row->key().ToString();  // ends with the commit's number
    key.back() = 9;
    ASSERT_TRUE(db->Put(rocksdb::WriteOptions(), key, row->value()).ok());
  }
  const auto index = CheckpointIndex::open(path());
  ASSERT_TRUE(index.ok()) << index.status().to_string();
  EXPECT_EQ((*index)->list(kJob).status().code(), Code::kDataLoss);
  const auto report = (*index)->reconcile(kJob, job());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->rebuilt);
  EXPECT_EQ(*(*index)->list(kJob), rows_);
}

TEST_F(IndexFaultTest, ADeletedIndexIsSaidToBeGoneAndMadeAgain) {
  fs::remove_all(path());
  const auto index = CheckpointIndex::open(path());
  ASSERT_TRUE(index.ok());
  EXPECT_NE((*index)->opening_report().find("is gone"), std::string::npos);
  ASSERT_TRUE((*index)->reconcile(kJob, job()).ok());
  EXPECT_EQ(*(*index)->list(kJob), rows_);
}

TEST_F(IndexFaultTest, ALostWitnessIsNoticed) {
  for (const auto& entry : fs::directory_iterator(directory_.path())) {
    if (entry.path().filename().string().starts_with("index.head-")) fs::remove(entry.path());
  }
  expect_set_aside("older contents were put back");
}

TEST_F(IndexFaultTest, OneWitnessIsKeptAndFilesThatAreNoneAreLeftAlone) {
  const Path stranger = directory_.path() / "index.head-0000000000000000000x-00";
  replace_file(stranger, "");
  {
    const auto index = CheckpointIndex::open(path());
    commit(**index, 4);
  }
  size_t witnesses = 0;
  for (const auto& entry : fs::directory_iterator(directory_.path())) {
    witnesses += entry.path().filename().string().starts_with("index.head-");
  }
  EXPECT_EQ(witnesses, 2u);
  EXPECT_EQ(read_witness(path())->count, 4u);
}

// The witness went back with the index: what is left to notice it are the manifests.
TEST_F(IndexFaultTest, AStateDirectoryRolledBackAsAWholeIsNoticedByTheManifests) {
  TempDirectory keep(memory_directory());
  fs::copy(directory_.path(), keep.path(), fs::copy_options::recursive);
  {
    const auto index = CheckpointIndex::open(path());
    for (const int64_t step : {4, 5}) commit(**index, step);
  }
  for (const auto& entry : fs::directory_iterator(directory_.path())) {
    if (entry.path() != job()) fs::remove_all(entry.path());
  }
  for (const auto& entry : fs::directory_iterator(keep.path())) {
    if (entry.path().filename() == "job") continue;
    fs::copy(entry.path(), directory_.path() / entry.path().filename(),
             fs::copy_options::recursive);
  }
  const auto index = CheckpointIndex::open(path());
  ASSERT_TRUE(index.ok());
  const auto report = (*index)->reconcile(kJob, job());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->rebuilt);
  EXPECT_NE(report->reason.find("had 3 rows up to commit 3, the directory has 5"),
            std::string::npos)
      << report->reason;
  EXPECT_EQ(*(*index)->list(kJob), rows_);
}

}  // namespace
}  // namespace penstock
