#include "checkpoint/tiling.h"

#include <gtest/gtest.h>

#include <rapidcheck.h>

namespace penstock {
namespace {

const Box kSquare = {{0, 0}, {6, 6}};

TEST(TilingTest, AGridTiles) {
  const std::vector<Box> boxes = {
      {{0, 0}, {2, 3}}, {{0, 3}, {2, 3}}, {{2, 0}, {4, 3}}, {{2, 3}, {4, 3}}};
  EXPECT_TRUE(prove_tiling(kSquare, boxes).ok());
}

TEST(TilingTest, AGapIsNamed) {
  const std::vector<Box> boxes = {{{0, 0}, {2, 6}}, {{4, 0}, {2, 6}}};
  const Status status = prove_tiling(kSquare, boxes);
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("[2:4, 0:6]"), std::string::npos) << status.message();
}

TEST(TilingTest, NoBoxesAtAllIsAGapOfEverything) {
  EXPECT_NE(prove_tiling(kSquare, {}).message().find("[0:6, 0:6]"), std::string::npos);
}

TEST(TilingTest, AnOverlapOfEqualVolumeToAGapIsFound) {
  // Volumes add up to the whole; only disjointness tells.
  const std::vector<Box> boxes = {{{0, 0}, {3, 6}}, {{2, 0}, {3, 6}}};
  const Status status = prove_tiling(kSquare, boxes);
  EXPECT_EQ(status.code(), Code::kDataLoss);
}

TEST(TilingTest, TheSameBoxTwiceIsAnOverlap) {
  const std::vector<Box> boxes = {kSquare, kSquare};
  EXPECT_NE(prove_tiling(kSquare, boxes).message().find("overlap"), std::string::npos);
}

TEST(TilingTest, APinwheelNoStraightCutSeparatesTiles) {
  const Box region = {{0, 0}, {3, 3}};
  std::vector<Box> boxes = {
      {{0, 0}, {1, 2}}, {{0, 2}, {2, 1}}, {{2, 1}, {1, 2}}, {{1, 0}, {2, 1}}, {{1, 1}, {1, 1}}};
  EXPECT_TRUE(prove_tiling(region, boxes).ok());
  boxes.pop_back();
  const Status hole = prove_tiling(region, boxes);
  EXPECT_NE(hole.message().find("[1:2, 1:2]"), std::string::npos) << hole.message();
}

TEST(TilingTest, ScalarsAndEmptyTensorsTile) {
  EXPECT_TRUE(prove_tiling({{}, {}}, std::vector<Box>{{{}, {}}}).ok());
  EXPECT_FALSE(prove_tiling({{}, {}}, std::vector<Box>{{{}, {}}, {{}, {}}}).ok());
  EXPECT_FALSE(prove_tiling({{}, {}}, {}).ok());
  EXPECT_TRUE(prove_tiling({{0, 0}, {0, 4}}, {}).ok());
}

TEST(TilingTest, ABoxWithoutElementsCountsForNothing) {
  const std::vector<Box> boxes = {kSquare, {{3, 3}, {0, 2}}};
  EXPECT_TRUE(prove_tiling(kSquare, boxes).ok());
}

TEST(TilingTest, AQuarterMillionShardsAreProvenQuickly) {
  std::vector<Box> boxes;
  for (int64_t row = 0; row < 512; ++row) {
    for (int64_t column = 0; column < 512; ++column) boxes.push_back({{row, column}, {1, 1}});
  }
  EXPECT_TRUE(prove_tiling({{0, 0}, {512, 512}}, boxes).ok());
  boxes[70'000].size[1] = 0;
  EXPECT_FALSE(prove_tiling({{0, 0}, {512, 512}}, boxes).ok());
}

TEST(TilingTest, AHostileShapeIsRefusedInsteadOfCheckedForever) {
  // Overlapping bars in both dimensions: no cut separates any two.
  std::vector<Box> boxes;
  const int64_t size = 40'000;
  for (int64_t i = 0; i + 2 < size; i += 2) {
    boxes.push_back({{i, 0}, {3, size}});
    boxes.push_back({{0, i}, {size, 3}});
  }
  EXPECT_EQ(prove_tiling({{0, 0}, {size, size}}, boxes).code(), Code::kDataLoss);
}

TEST(TilingTest, ASpiralDeeperThanAnyLayoutIsRefused) {
  std::vector<Box> boxes;
  int64_t low = 0;
  int64_t high = 4000;
  for (; high - low > 2; ++low, --high) {
    boxes.push_back({{low, low}, {1, high - low - 1}});
    boxes.push_back({{low, high - 1}, {high - low - 1, 1}});
    boxes.push_back({{high - 1, low + 1}, {1, high - low - 1}});
    boxes.push_back({{low + 1, low}, {high - low - 1, 1}});
  }
  boxes.push_back({{low, low}, {high - low, high - low}});
  const Status status = prove_tiling({{0, 0}, {4000, 4000}}, boxes);
  EXPECT_NE(status.message().find("too irregular"), std::string::npos) << status.message();
}

// Ground truth by painting every element.
bool tiles_by_painting(const Box& region, const std::vector<Box>& boxes) {
  std::vector<int> paint(element_count(region), 0);
  for (const Box& box : boxes) {
    for_each_run(box, region, box, dense_strides(box.size), [&](const Run& run) {
      for (int64_t i = 0; i < run.count; ++i) ++paint[run.source + i];
    });
  }
  return std::all_of(paint.begin(), paint.end(), [](int count) { return count == 1; });
}

TEST(TilingTest, TheProofAgreesWithPaintingEveryElement) {
  EXPECT_TRUE(rc::check("cut a region at random, disturb some, compare with painting", [] {
    const int dimensions = *rc::gen::inRange(1, 4);
    Box region;
    for (int d = 0; d < dimensions; ++d) {
      region.offset.push_back(0);
      region.size.push_back(*rc::gen::inRange(1, 6));
    }
    std::vector<Box> boxes = {region};
    const int cuts = *rc::gen::inRange(0, 12);
    for (int i = 0; i < cuts; ++i) {
      Box& box = boxes[*rc::gen::inRange<size_t>(0, boxes.size())];
      const int d = *rc::gen::inRange(0, dimensions);
      if (box.size[d] < 2) continue;
      const int64_t cut = *rc::gen::inRange<int64_t>(1, box.size[d]);
      Box rest = box;
      rest.offset[d] += cut;
      rest.size[d] -= cut;
      box.size[d] = cut;
      boxes.push_back(rest);
    }
    const int disturbances = *rc::gen::inRange(0, 3);
    for (int i = 0; i < disturbances; ++i) {
      Box& box = boxes[*rc::gen::inRange<size_t>(0, boxes.size())];
      const int d = *rc::gen::inRange(0, dimensions);
      box.offset[d] = *rc::gen::inRange<int64_t>(0, region.size[d]);
      box.size[d] = *rc::gen::inRange<int64_t>(0, region.size[d] - box.offset[d] + 1);
    }
    RC_ASSERT(prove_tiling(region, boxes).ok() == tiles_by_painting(region, boxes));
  }));
}

}  // namespace
}  // namespace penstock
