#include "checkpoint/slice.h"

#include <gtest/gtest.h>

#include "checkpoint/names.h"
#include "checkpoint/uuid.h"

namespace penstock {
namespace {

TensorSlice slice_of(std::vector<int64_t> shape, Box box) {
  return {"w", DType::kF32, std::move(shape), std::move(box)};
}

TEST(DTypeTest, EveryTypeHasANameAndANumberThatLeadBackToIt) {
  for (uint8_t number = 1; number <= 15; ++number) {
    const auto dtype = dtype_from_number(number);
    ASSERT_TRUE(dtype.ok());
    EXPECT_EQ(static_cast<uint8_t>(*dtype), number);
    EXPECT_EQ(*parse_dtype(dtype_name(*dtype)), *dtype);
    EXPECT_GE(dtype_bytes(*dtype), 1u);
  }
  EXPECT_EQ(dtype_bytes(DType::kBf16), 2u);
  EXPECT_EQ(dtype_bytes(DType::kI64), 8u);
}

TEST(DTypeTest, UnknownNamesAndNumbersAreRefused) {
  EXPECT_EQ(dtype_from_number(0).status().code(), Code::kDataLoss);
  EXPECT_EQ(dtype_from_number(16).status().code(), Code::kDataLoss);
  EXPECT_EQ(parse_dtype("float").status().code(), Code::kInvalidArgument);
}

TEST(SliceTest, ScalarsAndEmptyTensorsAreLegal) {
  EXPECT_TRUE(check_slice(whole_tensor("s", DType::kI64, {})).ok());
  EXPECT_EQ(byte_count(whole_tensor("s", DType::kI64, {})), 8u);
  EXPECT_TRUE(check_slice(whole_tensor("e", DType::kF32, {0, 8})).ok());
  EXPECT_EQ(byte_count(whole_tensor("e", DType::kF32, {0, 8})), 0u);
}

TEST(SliceTest, ABoxOutsideTheShapeIsRefusedWithItsDimension) {
  EXPECT_TRUE(check_slice(slice_of({4, 6}, {{0, 2}, {4, 4}})).ok());
  const Status over = check_slice(slice_of({4, 6}, {{0, 3}, {4, 4}}));
  EXPECT_EQ(over.code(), Code::kInvalidArgument);
  EXPECT_NE(over.message().find("tensor w"), std::string::npos) << over.message();
  EXPECT_NE(over.message().find("dimension 1"), std::string::npos) << over.message();
  EXPECT_FALSE(check_slice(slice_of({4}, {{-1}, {2}})).ok());
  EXPECT_FALSE(check_slice(slice_of({4}, {{2}, {INT64_MAX}})).ok());
  EXPECT_FALSE(check_slice(slice_of({4}, {{0}, {-1}})).ok());
  EXPECT_FALSE(check_slice(slice_of({4, 4}, {{0}, {4}})).ok());
}

TEST(SliceTest, ShapesThatOverflowAreRefusedEvenBesideAZero) {
  const int64_t huge = int64_t{1} << 62;
  EXPECT_FALSE(check_slice(whole_tensor("w", DType::kF32, {huge, 4})).ok());
  EXPECT_FALSE(check_slice(whole_tensor("w", DType::kF32, {huge})).ok());
  EXPECT_FALSE(check_slice(whole_tensor("w", DType::kF32, {0, huge, huge})).ok());
  EXPECT_FALSE(check_slice(whole_tensor("w", DType::kF32, {-4, -4})).ok());
  EXPECT_FALSE(check_slice(whole_tensor("w", DType::kF32, std::vector<int64_t>(9, 1))).ok());
}

TEST(SliceTest, NamesMustBePrintableAndBounded) {
  EXPECT_FALSE(check_slice(whole_tensor("", DType::kF32, {1})).ok());
  EXPECT_FALSE(check_slice(whole_tensor("a\nb", DType::kF32, {1})).ok());
  EXPECT_TRUE(check_slice(whole_tensor(std::string(1024, 'a'), DType::kF32, {1})).ok());
  EXPECT_FALSE(check_slice(whole_tensor(std::string(1025, 'a'), DType::kF32, {1})).ok());
}

TEST(BoxTest, IntersectionIsTheCommonPartOrNothing) {
  const Box a = {{0, 2}, {4, 4}};
  EXPECT_EQ(intersect(a, {{2, 0}, {4, 3}}), (Box{{2, 2}, {2, 1}}));
  EXPECT_EQ(intersect(a, {{4, 2}, {1, 1}}), std::nullopt);
  EXPECT_EQ(intersect({{}, {}}, {{}, {}}), (Box{{}, {}}));
  EXPECT_EQ(to_string(a), "[0:4, 2:6]");
  EXPECT_EQ(to_string(Box{}), "[]");
}

std::vector<Run> runs_of(const Box& region, const Box& source, const Box& destination,
                         std::vector<int64_t> strides) {
  std::vector<Run> runs;
  for_each_run(region, source, destination, strides, [&](const Run& r) { runs.push_back(r); });
  return runs;
}

TEST(RunTest, WholeRowsBecomeOneRun) {
  const Box source = {{0, 0}, {4, 6}};
  const auto runs = runs_of({{1, 0}, {2, 6}}, source, {{1, 0}, {3, 6}}, {6, 1});
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_EQ(runs[0].source, 6);
  EXPECT_EQ(runs[0].destination, 0);
  EXPECT_EQ(runs[0].count, 12);
}

TEST(RunTest, ColumnsBecomeOneRunPerRow) {
  const auto runs = runs_of({{0, 2}, {3, 2}}, {{0, 0}, {3, 6}}, {{0, 2}, {3, 2}}, {2, 1});
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_EQ(runs[2].source, 14);
  EXPECT_EQ(runs[2].destination, 4);
  EXPECT_EQ(runs[2].count, 2);
}

TEST(RunTest, ScalarsAreOneElementAndEmptyRegionsNone) {
  EXPECT_EQ(runs_of({{}, {}}, {{}, {}}, {{}, {}}, {}).size(), 1u);
  EXPECT_EQ(runs_of({{0}, {0}}, {{0}, {4}}, {{0}, {4}}, {1}).size(), 0u);
}

TEST(RunTest, AStridedDestinationGetsOneRunPerContiguousPart) {
  const auto runs = runs_of({{0, 0}, {2, 3}}, {{0, 0}, {2, 3}}, {{0, 0}, {2, 3}}, {10, 1});
  ASSERT_EQ(runs.size(), 2u);
  EXPECT_EQ(runs[1].destination, 10);
  const auto transposed = runs_of({{0, 0}, {2, 3}}, {{0, 0}, {2, 3}}, {{0, 0}, {2, 3}}, {1, 2});
  EXPECT_EQ(transposed.size(), 6u);
}

TEST(NamesTest, EveryKindRoundTrips) {
  for (const TensorKind kind : {TensorKind::kWeight, TensorKind::kMaster, TensorKind::kExpAvg,
                                TensorKind::kExpAvgSq, TensorKind::kEma, TensorKind::kState}) {
    const std::string name = logical_name("model.norm.weight", kind);
    EXPECT_EQ(parse_logical_name(name).tensor, "model.norm.weight");
    EXPECT_EQ(parse_logical_name(name).kind, kind);
  }
  EXPECT_EQ(weight_name("a.weight"), "a.weight");
  EXPECT_EQ(exp_avg_sq_name("a.weight"), "a.weight|exp_avg_sq");
  EXPECT_EQ(state_name("step"), "state|step");
}

TEST(NamesTest, AnUnknownSuffixStaysInTheName) {
  EXPECT_EQ(parse_logical_name("a|new_kind").tensor, "a|new_kind");
  EXPECT_EQ(parse_logical_name("a|new_kind").kind, TensorKind::kWeight);
}

TEST(UuidTest, TextRoundTripsAndNothingElseParses) {
  const Uuid uuid = random_uuid();
  EXPECT_NE(uuid, random_uuid());
  EXPECT_EQ(*parse_uuid(to_hex(uuid)), uuid);
  EXPECT_FALSE(parse_uuid("").ok());
  EXPECT_FALSE(parse_uuid(std::string(32, 'A')).ok());
  EXPECT_FALSE(parse_uuid(std::string(33, 'a')).ok());
  EXPECT_FALSE(parse_uuid(std::string(31, 'a') + "/").ok());
}

}  // namespace
}  // namespace penstock
