#include "checkpoint/saved_slice.h"

#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

TEST(SavedSliceTest, SlicesRoundTripThroughTheMessage) {
  const SegmentSlice entry = {{"w", DType::kBf16, {4, 6}, {{1, 0}, {2, 6}}}, 4096, 24, {1, 2}};
  const auto back = from_saved_slice(to_saved_slice(entry));
  ASSERT_TRUE(back.ok()) << back.status().to_string();
  EXPECT_EQ(back->slice, entry.slice);
  EXPECT_EQ(back->file_offset, entry.file_offset);
  EXPECT_EQ(back->byte_count, entry.byte_count);
  EXPECT_EQ(back->digest, entry.digest);
}

TEST(SavedSliceTest, WrongSlicesAreRefused) {
  const SavedSlice good = to_saved_slice({{"w", DType::kF32, {4}, {{0}, {4}}}, 4096, 16, {}});
  const auto refused = [&](auto change) {
    SavedSlice saved = good;
    change(saved);
    EXPECT_EQ(from_saved_slice(saved).status().code(), Code::kInvalidArgument);
  };
  refused([](SavedSlice& s) { s.dtype = "float"; });
  refused([](SavedSlice& s) { s.box_size = {5}; });
  refused([](SavedSlice& s) { s.box_offset.clear(); });
  refused([](SavedSlice& s) { s.byte_count = 17; });
}

TEST(SavedSliceTest, ASegmentBecomesAMessageAndAPartOfACommit) {
  TempDirectory directory;
  const SegmentIdentity identity = {JobId{7}, Epoch{3}, Rank{1}, 60};
  const SegmentSummary summary = save_segment(directory.path(), identity, model_slices(1, 1));
  SegmentSaved saved = to_segment_saved(identity, summary);
  EXPECT_EQ(saved.slices.size(), summary.slices.size());
  const auto segment = to_commit_segment(saved);
  ASSERT_TRUE(segment.ok());
  EXPECT_EQ(segment->file, summary.file);
  EXPECT_EQ(segment->footer_digest, summary.footer_digest);
  saved.rank = Rank{2};
  EXPECT_FALSE(to_commit_segment(saved).ok()) << "a rank may only report its own file";
  saved.file = "../../x";
  EXPECT_FALSE(to_commit_segment(saved).ok());
}

}  // namespace
}  // namespace penstock
