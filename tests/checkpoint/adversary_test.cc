// Damage everywhere, not only where one expects it: every byte of a checkpoint, every file of the
// index. Oracle: damage is found or harmless; what was committed stays usable, or is refused.
#include <fmt/format.h>

#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

class AdversaryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    info_ = commit_model(*store, kJob, Epoch{1}, 10, 1);
    const auto stored = read_manifest(path() / info_.manifest_file);
    ASSERT_TRUE(stored.ok());
    manifest_ = stored->manifest;
    ASSERT_TRUE(verify_checkpoint(path(), manifest_).ok());
  }
  Path path() const { return directory_.path() / "job"; }

  TempDirectory directory_{memory_directory()};
  CheckpointInfo info_;
  Manifest manifest_;
};

TEST_F(AdversaryTest, EveryFlippedByteOfEverySegmentIsFound) {
  for (const ManifestSegment& segment : manifest_.segments) {
    const Path file = path() / segment.file;
    for (uint64_t offset = 0; offset < segment.byte_count; ++offset) {
      const auto bits = static_cast<uint8_t>(1 << offset % 8);
      flip_byte(file, offset, bits);
      EXPECT_EQ(verify_checkpoint(path(), manifest_).code(), Code::kDataLoss)
          << segment.file << " byte " << offset;
      flip_byte(file, offset, bits);
    }
  }
  EXPECT_TRUE(verify_checkpoint(path(), manifest_).ok());
}

TEST_F(AdversaryTest, EveryTruncationOfASegmentIsFoundWithoutReadingItsData) {
  const ManifestSegment& segment = manifest_.segments[0];
  const Path file = path() / segment.file;
  const std::string whole = file_text(file);
  for (uint64_t size = 0; size < whole.size(); ++size) {
    std::filesystem::resize_file(file, size);
    const NewestWhole newest = newest_whole(path(), kJob);
    ASSERT_FALSE(newest.checkpoint) << size;
    ASSERT_EQ(newest.refused.size(), 1u);
    replace_file(file, whole);
  }
  EXPECT_TRUE(newest_whole(path(), kJob).checkpoint);
}

TEST_F(AdversaryTest, SegmentsThatChangePlacesAreFound) {
  const Path first = path() / manifest_.segments[0].file;
  const Path second = path() / manifest_.segments[1].file;
  const Path aside = path() / "aside";
  std::filesystem::rename(first, aside);
  std::filesystem::rename(second, first);
  std::filesystem::rename(aside, second);
  EXPECT_FALSE(newest_whole(path(), kJob).checkpoint);
}

// The index is a convenience: whatever happens to its files, it opens again and is rebuilt from the
// manifests, and the job goes on saving.
class IndexAdversaryTest : public ::testing::Test {
 protected:
  void make() {
    auto index = CheckpointIndex::open(index_path());
    ASSERT_TRUE(index.ok());
    auto store = CheckpointStore::open(store_path(), kJob, index->get());
    ASSERT_TRUE(store.ok());
    rows_ = {commit_model(*store, kJob, Epoch{1}, 10, 1),
             commit_model(*store, kJob, Epoch{1}, 20, 2)};
  }
  // What is wrong; empty: nothing.
  std::string broken_promise() {
    auto index = CheckpointIndex::open(index_path());
    if (!index.ok()) return "it does not open: " + index.status().to_string();
    const auto report = (*index)->reconcile(kJob, store_path());
    if (!report.ok()) return "it is not rebuilt: " + report.status().to_string();
    const auto rows = (*index)->list(kJob);
    if (!rows.ok() || *rows != rows_) return "its rows are wrong: " + rows.status().to_string();
    auto store = CheckpointStore::open(store_path(), kJob, index->get());
    if (!store.ok()) return "the store does not open: " + store.status().to_string();
    const auto request = save_model(store_path(), kJob, Epoch{1}, 30, 3);
    const auto commit = store->commit(request.value());
    if (!commit.ok()) return "the next commit fails: " + commit.status().to_string();
    if (!commit->index.ok()) return "it is not indexed: " + commit->index.to_string();
    return commit->info.commit_seq == 3 ? "" : "a number was skipped or used twice";
  }
  std::vector<Path> files() const {
    std::vector<Path> files;
    const std::vector<std::string> names = file_names(index_path()).value();
    for (const std::string& name : names) files.push_back(index_path() / name);
    return files;
  }
  Path index_path() const { return directory_->path() / "index"; }
  Path store_path() const { return directory_->path() / "job"; }
  void begin_again() {
    directory_.emplace(memory_directory());
    make();
  }

  std::optional<TempDirectory> directory_;
  std::vector<CheckpointInfo> rows_;
};

TEST_F(IndexAdversaryTest, AnyFileOfTheIndexMayBeLostOrCutShort) {
  begin_again();
  const size_t file_count = files().size();
  ASSERT_GT(file_count, 4u);
  for (size_t i = 0; i < file_count; ++i) {
    for (const double left : {-1.0, 0.0, 0.5, 0.95}) {  // -1: removed
      begin_again();
      ASSERT_EQ(files().size(), file_count);
      const Path file = files()[i];
      if (left < 0) {
        std::filesystem::remove(file);
      } else {
        const auto size = static_cast<double>(size_of_file(file));
        std::filesystem::resize_file(file, static_cast<uint64_t>(size * left));
      }
      EXPECT_EQ(broken_promise(), "") << file.filename() << ", " << left << " of it left";
    }
  }
}

TEST_F(IndexAdversaryTest, AnyByteOfTheIndexMayFlip) {
  begin_again();
  const size_t file_count = files().size();
  Random random(1, 0);
  for (size_t i = 0; i < file_count; ++i) {
    for (int round = 0; round < 6; ++round) {
      begin_again();
      const Path file = files()[i];
      const uint64_t size = size_of_file(file);
      if (size == 0) break;
      const uint64_t offset = random.below(size);
      flip_byte(file, offset, static_cast<uint8_t>(1 << random.below(8)));
      EXPECT_EQ(broken_promise(), "") << file.filename() << ", byte " << offset << " of " << size;
    }
  }
}

}  // namespace
}  // namespace penstock
