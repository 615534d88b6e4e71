// Every damage a file can suffer is detected, with an error that names it, and the checkpoint
// before it is used instead. Numbers K… are those of the list of faults a store must survive.
#include <sys/stat.h>

#include "checkpoint/scrub.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// A store with checkpoint 1 (step 10, contents 1) and checkpoint 2 (step 20, contents 2), which the
// test damages.
class CorruptionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    older_ = commit_model(*store, kJob, Epoch{1}, 10, 1);
    newer_ = commit_model(*store, kJob, Epoch{1}, 20, 2);
    manifest_ = read_manifest(path() / newer_.manifest_file)->manifest;
    segment_ = path() / manifest_.segments[0].file;
    older_segment_ =
        path() / read_manifest(path() / older_.manifest_file)->manifest.segments[0].file;
    const auto reader = SegmentReader::open(segment_);
    ASSERT_TRUE(reader.ok());
    data_end_ = reader->data_end();
    embed_ = reader->slices()[*reader->find("embed", {{0, 0}, {200, 64}})];
  }
  Path path() const { return directory_.path(); }

  // The damage shows without reading data: the older checkpoint is chosen and the reason names
  // `what`.
  void expect_refused(const std::string& what) {
    const NewestWhole newest = newest_whole(path(), kJob);
    ASSERT_TRUE(newest.checkpoint);
    EXPECT_EQ(newest.checkpoint->commit_seq, older_.commit_seq);
    ASSERT_FALSE(newest.refused.empty());
    EXPECT_EQ(newest.refused[0].commit_seq, newer_.commit_seq);
    EXPECT_NE(newest.refused[0].reason.message().find(what), std::string::npos)
        << newest.refused[0].reason.message();
    EXPECT_TRUE(load_model(path(), older_.manifest_file, 1).ok());
    expect_never_loaded();
  }
  // The damage is in the data: loading and verifying find it and name file, rank and tensor.
  void expect_found_in_data(const std::string& tensor) {
    const Status verified = verify_checkpoint(path(), manifest_);
    EXPECT_EQ(verified.code(), Code::kDataLoss);
    for (const std::string& part : {segment_.filename().string(), std::string("rank 0"), tensor}) {
      EXPECT_NE(verified.message().find(part), std::string::npos) << verified.message();
    }
    expect_never_loaded();
  }
  void expect_never_loaded() {
    // What `penstock checkpoint verify` goes by finds it, and nothing wrong with the older one.
    std::vector<uint64_t> damaged;
    const Status checked =
        check_checkpoints(path(), kJob, {}, {}, [&](const CheckedCheckpoint& checkpoint) {
          if (checkpoint.damaged()) damaged.push_back(checkpoint.commit_seq);
        });
    EXPECT_TRUE(checked.ok()) << checked.to_string();
    EXPECT_EQ(damaged, std::vector<uint64_t>{newer_.commit_seq});
    const Status loaded = load_model(path(), newer_.manifest_file, 2);
    EXPECT_FALSE(loaded.ok());
    EXPECT_NE(loaded.code(), Code::kInternal) << loaded.message();  // wrong bytes came back
  }

  TempDirectory directory_;
  CheckpointInfo older_;
  CheckpointInfo newer_;
  Manifest manifest_;
  Path segment_;
  Path older_segment_;
  uint64_t data_end_ = 0;
  SegmentSlice embed_;
};

TEST_F(CorruptionTest, UndamagedItLoads) {
  EXPECT_TRUE(verify_checkpoint(path(), manifest_).ok());
  EXPECT_TRUE(load_model(path(), newer_.manifest_file, 2).ok());
}

TEST_F(CorruptionTest, K1FlipInTheFirstByteOfATensor) {
  flip_byte(segment_, embed_.file_offset);
  expect_found_in_data("tensor embed [0:200, 0:64]");
}

TEST_F(CorruptionTest, K1FlipInTheMiddleOfATensor) {
  flip_byte(segment_, embed_.file_offset + embed_.byte_count / 2, 0x01);
  expect_found_in_data("tensor embed");
}

TEST_F(CorruptionTest, K1FlipInTheLastByteOfATensor) {
  flip_byte(segment_, embed_.file_offset + embed_.byte_count - 1, 0x80);
  expect_found_in_data("tensor embed");
}

TEST_F(CorruptionTest, K1FlipInPaddingIsFoundToo) {
  flip_byte(segment_, data_end_ - 1);
  const Status verified = verify_checkpoint(path(), manifest_);
  EXPECT_EQ(verified.code(), Code::kDataLoss) << "padding is covered by the block sums";
}

TEST_F(CorruptionTest, K2FlipAnywhereInTheHeader) {
  for (const uint64_t offset : {0, 9, 20, 30, 50, 60, 66, 70, 75, 100, 4000, 4095}) {
    flip_byte(segment_, offset);
    expect_refused(segment_.filename().string());
    flip_byte(segment_, offset);
  }
}

TEST_F(CorruptionTest, K2FlipAnywhereInFooterAndTrailer) {
  const uint64_t size = size_of_file(segment_);
  for (uint64_t offset = data_end_; offset < size; ++offset) {
    flip_byte(segment_, offset);
    ASSERT_FALSE(SegmentReader::open(segment_).ok()) << offset;
    flip_byte(segment_, offset);
  }
  flip_byte(segment_, size - 1);
  expect_refused(segment_.filename().string());
}

TEST_F(CorruptionTest, K3Truncation) {
  const uint64_t size = size_of_file(segment_);
  for (const uint64_t left :
       {size - 1, size - 64, size - 4096, data_end_, uint64_t{4096}, uint64_t{100}, uint64_t{0}}) {
    std::filesystem::resize_file(segment_, left);
    expect_refused(segment_.filename().string());
  }
}

TEST_F(CorruptionTest, K4ExtraTrailingBytes) {
  const uint64_t size = size_of_file(segment_);
  std::filesystem::resize_file(segment_, size + 1);
  expect_refused(segment_.filename().string());
  // A whole second trailer behind the first does not help.
  const std::string text = file_text(segment_).substr(0, size);
  replace_file(segment_, text + text.substr(size - 64));
  expect_refused("were written");
}

TEST_F(CorruptionTest, K5AFourKibibyteHole) {
  overwrite(segment_, embed_.file_offset + 8192, std::string(4096, '\0'));
  expect_found_in_data("tensor embed");
}

TEST_F(CorruptionTest, K6TwoBlocksOfOneTensorSwapped) {
  const std::string text = file_text(segment_);
  const uint64_t first = kSegmentHeaderBytes;
  const uint64_t second = first + kBlockBytes;
  overwrite(segment_, first, text.substr(second, kBlockBytes));
  overwrite(segment_, second, text.substr(first, kBlockBytes));
  expect_found_in_data("tensor embed");
}

TEST_F(CorruptionTest, K7ABlockOfTheOlderCheckpointAtTheSamePlace) {
  overwrite(segment_, kSegmentHeaderBytes,
            file_text(older_segment_).substr(kSegmentHeaderBytes, kBlockBytes));
  expect_found_in_data("tensor embed");
}

TEST_F(CorruptionTest, K7ABlockWithEqualBytesButAnotherSaltIsOnlyGoodWhereItBelongs) {
  // The stale block's checksum comes along; it was salted with the older segment's uuid.
  const std::string stale = file_text(older_segment_).substr(kSegmentHeaderBytes, kBlockBytes);
  const auto old = SegmentReader::open(older_segment_);
  const auto now = SegmentReader::open(segment_);
  EXPECT_NE(block_sum(old->header().segment, 0, as_bytes(stale)),
            block_sum(now->header().segment, 0, as_bytes(stale)));
  EXPECT_NE(block_sum(now->header().segment, 0, as_bytes(stale)),
            block_sum(now->header().segment, 1, as_bytes(stale)));
}

TEST_F(CorruptionTest, K8ABlockOfAnotherRank) {
  const Path other = path() / manifest_.segments[1].file;
  overwrite(segment_, kSegmentHeaderBytes,
            file_text(other).substr(kSegmentHeaderBytes, kBlockBytes));
  expect_found_in_data("tensor embed");
}

TEST_F(CorruptionTest, K9TheSegmentReplacedByAnotherAttemptsSameContents) {
  const SegmentSummary again =
      save_segment(path(), {kJob, Epoch{1}, Rank{0}, 20}, model_slices(0, 2));
  replace_file(segment_, file_text(path() / again.file));
  expect_refused("is not the one that was saved");
}

TEST_F(CorruptionTest, K9TheSegmentReplacedByTheOlderCheckpoints) {
  replace_file(segment_, file_text(older_segment_));
  expect_refused("step 10");
}

TEST_F(CorruptionTest, K10SegmentMissing) {
  std::filesystem::remove(segment_);
  expect_refused(segment_.filename().string());
}

TEST_F(CorruptionTest, K11ASegmentUnderAnotherNameThanItsOwnIsRefused) {
  const std::string other = segment_file_name(Epoch{1}, Rank{0}, random_uuid());
  std::filesystem::rename(segment_, path() / other);
  manifest_.segments[0].file = other;
  replace_file(path() / newer_.manifest_file, *encode_manifest(manifest_));
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint->commit_seq, older_.commit_seq);
  EXPECT_NE(newest.refused[0].reason.message().find("under another name"), std::string::npos);
}

TEST_F(CorruptionTest, K13AGapForgedIntoTheManifest) {
  ASSERT_EQ(manifest_.tensors[1].name, "embed");
  manifest_.tensors[1].pieces.pop_back();
  replace_file(path() / newer_.manifest_file, *encode_manifest(manifest_));
  expect_refused("tensor embed");
}

TEST_F(CorruptionTest, K14ManifestFlipped) {
  flip_byte(path() / newer_.manifest_file, 300);
  expect_refused(newer_.manifest_file);
}

TEST_F(CorruptionTest, K14ManifestTruncated) {
  const Path manifest = path() / newer_.manifest_file;
  for (const uint64_t left : {size_of_file(manifest) - 1, uint64_t{100}, uint64_t{0}}) {
    std::filesystem::resize_file(manifest, left);
    expect_refused(newer_.manifest_file);
  }
}

TEST_F(CorruptionTest, K14AnOlderManifestPutInItsPlace) {
  replace_file(path() / newer_.manifest_file, file_text(path() / older_.manifest_file));
  expect_refused("copy of commit 1");
}

TEST_F(CorruptionTest, K14AManifestOfAnotherFormatThanItsSegmentsIsRefused) {
  manifest_.version = 1;
  replace_file(path() / newer_.manifest_file, *encode_manifest(manifest_));
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint->commit_seq, older_.commit_seq);
  EXPECT_NE(newest.refused[0].reason.message().find("different versions"), std::string::npos);
}

TEST_F(CorruptionTest, K18AllFilesOfOneRankMissing) {
  for (const ManifestSegment& segment : manifest_.segments) {
    if (segment.rank == Rank{1}) std::filesystem::remove(path() / segment.file);
  }
  expect_refused("rank 1");
}

TEST_F(CorruptionTest, K21ASegmentOfAnotherStoreIsRefused) {
  TempDirectory elsewhere;
  const SegmentSummary foreign =
      save_segment(elsewhere.path(), {kJob, Epoch{1}, Rank{0}, 20}, model_slices(0, 2));
  std::filesystem::copy(elsewhere.path() / foreign.file, path() / foreign.file);
  manifest_.segments[0] = {foreign.file, Rank{0}, foreign.byte_count, foreign.footer_digest};
  std::sort(manifest_.segments.begin(), manifest_.segments.end(),
            [](const auto& a, const auto& b) { return a.file < b.file; });
  replace_file(path() / newer_.manifest_file, *encode_manifest(manifest_));
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint->commit_seq, older_.commit_seq);
  EXPECT_NE(newest.refused[0].reason.message().find("of store"), std::string::npos);
}

TEST_F(CorruptionTest, K23SymbolicLinksDirectoriesAndPipesAreRefused) {
  const Path real = path() / "real";
  std::filesystem::rename(segment_, real);
  std::filesystem::create_symlink(real, segment_);
  expect_refused("symbolic link");
  std::filesystem::remove(segment_);
  std::filesystem::create_directory(segment_);
  expect_refused(segment_.filename().string());
  std::filesystem::remove(segment_);
  ASSERT_EQ(::mkfifo(segment_.c_str(), 0600), 0);
  expect_refused("not a regular file");
}

TEST_F(CorruptionTest, BothDamagedLeavesNothingButTwoReasons) {
  std::filesystem::remove(segment_);
  std::filesystem::remove(older_segment_);
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_FALSE(newest.checkpoint);
  ASSERT_EQ(newest.refused.size(), 2u);
  EXPECT_EQ(newest.refused[0].commit_seq, 2u);
  EXPECT_EQ(newest.refused[1].commit_seq, 1u);
}

}  // namespace
}  // namespace penstock
