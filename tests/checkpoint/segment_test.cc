#include "checkpoint/segment.h"

#include "checkpoint/slice_digest.h"
#include "tests/checkpoint/simulated_disk.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr SegmentIdentity kIdentity = {JobId{7}, Epoch{3}, Rank{2}, 60};

TEST(SegmentTest, WhatIsWrittenIsReadBack) {
  TempDirectory directory;
  std::vector<OwnedSlice> slices = model_slices(0, 1);
  slices.push_back(known_slice("big", DType::kU8, {3'000'000}, {{0}, {3'000'000}}));
  const SegmentSummary summary = save_segment(directory.path(), kIdentity, slices);
  EXPECT_EQ(summary.rank, kIdentity.rank);
  EXPECT_EQ(size_of_file(directory.path() / summary.file), summary.byte_count);

  const auto reader = SegmentReader::open(directory.path() / summary.file);
  ASSERT_TRUE(reader.ok()) << reader.status().to_string();
  EXPECT_EQ(reader->header().identity, kIdentity);
  EXPECT_EQ(reader->header().store, *store_uuid(directory.path()));
  EXPECT_EQ(reader->footer_digest(), summary.footer_digest);
  EXPECT_TRUE(reader->verify().ok());
  for (const OwnedSlice& owned : slices) {
    const auto index = reader->find(owned.slice.name, owned.slice.box);
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    const SegmentSlice& entry = reader->slices()[*index];
    EXPECT_EQ(entry.slice, owned.slice);
    EXPECT_EQ(entry.digest, slice_digest(owned.slice, owned.bytes));
    std::vector<std::byte> bytes(owned.bytes.size());
    ASSERT_TRUE(reader->read_box(*index, entry.slice.box, entry.slice.box, bytes).ok());
    EXPECT_EQ(bytes, owned.bytes);
  }
}

TEST(SegmentTest, LargeSlicesStartOnPagesAndSmallOnesPackBehindThem) {
  TempDirectory directory;
  const std::vector<OwnedSlice> slices = {
      known_slice("small", DType::kF32, {3}, {{0}, {3}}),
      known_slice("large", DType::kF32, {40'000}, {{0}, {40'000}}),
      known_slice("tiny", DType::kF32, {1}, {{0}, {1}})};
  const SegmentSummary summary = save_segment(directory.path(), kIdentity, slices);
  ASSERT_EQ(summary.slices.size(), 3u);
  EXPECT_EQ(summary.slices[0].slice.name, "large");
  EXPECT_EQ(summary.slices[0].file_offset, 4096u);
  EXPECT_EQ(summary.slices[1].file_offset % 64, 0u);
  EXPECT_EQ(summary.slices[2].file_offset, summary.slices[1].file_offset + 64);
}

TEST(SegmentTest, ASubBoxIsReadIntoAStridedBuffer) {
  TempDirectory directory;
  const auto slices = std::vector{known_slice("w", DType::kF32, {500, 96}, {{100, 0}, {400, 96}})};
  const SegmentSummary summary = save_segment(directory.path(), kIdentity, slices);
  const auto reader = SegmentReader::open(directory.path() / summary.file);
  ASSERT_TRUE(reader.ok());
  const Box region = {{150, 10}, {30, 50}};
  // A buffer with rows of 64 elements whose element 0 is [150, 10].
  std::vector<std::byte> buffer(30 * 64 * 4, std::byte{0xee});
  const std::vector<int64_t> strides = {64, 1};
  ASSERT_TRUE(reader->read_box(0, region, region, buffer, strides).ok());
  const auto wanted = known_bytes({"w", DType::kF32, {500, 96}, region});
  for (int64_t row = 0; row < 30; ++row) {
    EXPECT_EQ(0, std::memcmp(buffer.data() + row * 256, wanted.data() + row * 200, 200)) << row;
    EXPECT_EQ(buffer[row * 256 + 200], std::byte{0xee}) << "the gap between rows is not touched";
  }
}

TEST(SegmentTest, ASegmentWithoutSlicesIsLegal) {
  TempDirectory directory;
  const SegmentSummary summary = save_segment(directory.path(), kIdentity, {});
  const auto reader = SegmentReader::open(directory.path() / summary.file);
  ASSERT_TRUE(reader.ok()) << reader.status().to_string();
  EXPECT_EQ(reader->block_count(), 0u);
  EXPECT_TRUE(reader->verify().ok());
}

// The footer is one write however long it is: four bytes for each 16 KiB of data, and its slices.
TEST(SegmentTest, DataIsWrittenAtMostFourMebibytesAtATime) {
  class Recorder : public FileSystem {
   public:
    class File : public WritableFile {
     public:
      explicit File(uint64_t& largest) : largest_(largest) {}
      Status reserve(uint64_t) override { return {}; }
      Status write_at(uint64_t, Bytes bytes) override {
        largest_ = std::max<uint64_t>(largest_, bytes.size());
        return {};
      }
      Status sync() override { return {}; }
      Status close() override { return {}; }

     private:
      uint64_t& largest_;
    };
    Result<std::unique_ptr<WritableFile>> create(const Path&) override {
      return std::unique_ptr<WritableFile>(std::make_unique<File>(largest));
    }
    Status rename_no_replace(const Path&, const Path&) override { return {}; }
    Status remove(const Path&) override { return {}; }
    Status sync_directory(const Path&) override { return {}; }
    uint64_t largest = 0;
  };
  TempDirectory directory;
  ASSERT_TRUE(store_uuid(directory.path()).ok());
  Recorder recorder;
  save_segment(directory.path(), kIdentity,
               {known_slice("w", DType::kU8, {9'000'000}, {{0}, {9'000'000}})}, recorder);
  EXPECT_EQ(recorder.largest, uint64_t{4} << 20);
}

TEST(SegmentTest, WrongSourcesAreRefusedBeforeAnyFileIsMade) {
  TempDirectory directory;
  const auto refused = [&](std::vector<OwnedSlice> slices) {
    const auto summary = write_segment(directory.path(), kIdentity, sources_of(slices));
    EXPECT_EQ(summary.status().code(), Code::kInvalidArgument);
    EXPECT_NE(summary.status().message().find("tensor w"), std::string::npos)
        << summary.status().message();
  };
  const OwnedSlice good = known_slice("w", DType::kF32, {4}, {{0}, {4}});
  OwnedSlice shorter = good;
  shorter.bytes.pop_back();
  OwnedSlice outside = good;
  outside.slice.box.offset[0] = 1;
  refused({shorter});
  refused({outside});
  refused({good, good});
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(SegmentTest, AnyFailedCallRemovesTheFileAndSaysWhich) {
  TempDirectory graves;
  const std::vector<OwnedSlice> slices = model_slices(0, 1);
  int64_t number = 1;
  for (;; ++number) {
    TempDirectory directory;
    ASSERT_TRUE(store_uuid(directory.path()).ok());
    std::filesystem::remove_all(graves.path());
    std::filesystem::create_directory(graves.path());
    SimulatedDisk disk(graves.path());
    disk.fail_call(number, Code::kResourceExhausted);
    const auto summary = write_segment(directory.path(), kIdentity, sources_of(slices), disk);
    if (summary.ok()) break;
    EXPECT_EQ(summary.status().code(), Code::kResourceExhausted) << number;
    EXPECT_NE(summary.status().message().find("injected"), std::string::npos);
    for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
      EXPECT_EQ(entry.path().filename(), "STORE") << "left behind by call " << number;
    }
  }
  EXPECT_GT(number, 8) << "create, reserve, writes, sync, close and directory sync all failed once";
}

TEST(SegmentTest, TwoRanksNamingOneStoreAgreeOnItsUuid) {
  TempDirectory directory;
  const auto first = store_uuid(directory.path());
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(*store_uuid(directory.path()), *first);
  replace_file(directory.path() / "STORE", "garbage");
  EXPECT_EQ(store_uuid(directory.path()).status().code(), Code::kDataLoss);
}

TEST(SegmentTest, ForgedFootersAreRefusedThoughTheirChecksumsAreRight) {
  SegmentHeader header;
  header.segment = {1, 2};
  const auto footer_with = [](std::vector<SegmentSlice> slices) {
    return segment_format::Footer{3 * 4096, std::move(slices), {0}};
  };
  const auto entry = [](uint64_t offset, int64_t elements) {
    const TensorSlice slice = whole_tensor("w", DType::kF32, {elements});
    return SegmentSlice{slice, offset, byte_count(slice), {}};
  };
  const auto code = [&](const segment_format::Footer& footer) {
    const auto bytes = segment_format::encode_footer(header, footer);
    return segment_format::decode_footer(header, bytes).status().code();
  };
  const SegmentSlice good = entry(4096, 100);
  EXPECT_EQ(code(footer_with({good})), Code::kOk);
  EXPECT_EQ(code(footer_with({entry(4096 * 3 - 4, 2)})), Code::kDataLoss) << "past the data";
  EXPECT_EQ(code(footer_with({entry(100, 1)})), Code::kDataLoss) << "inside the header";
  EXPECT_EQ(code(footer_with({entry(UINT64_MAX - 3, 2)})), Code::kDataLoss) << "sum overflows";
  EXPECT_EQ(code(footer_with({entry(4096, int64_t{1} << 61)})), Code::kDataLoss) << "huge";
  EXPECT_EQ(code(footer_with({good, entry(4096 + 396, 1)})), Code::kDataLoss) << "overlap";
  SegmentSlice negative = good;
  negative.slice.box.offset[0] = -1;
  EXPECT_EQ(code(footer_with({negative})), Code::kDataLoss);
  SegmentSlice shorter = good;
  shorter.byte_count = 4;
  EXPECT_EQ(code(footer_with({shorter})), Code::kDataLoss) << "length is not the box's";
  segment_format::Footer too_far = footer_with({good});
  too_far.data_end = uint64_t{1} << 63;
  EXPECT_EQ(code(too_far), Code::kDataLoss) << "more blocks than checksums";
}

TEST(SegmentTest, FileNamesRoundTripAndNothingElseParses) {
  const Uuid uuid = random_uuid();
  const std::string name = segment_file_name(Epoch{4'000'000'000}, Rank{2'000'000'000}, uuid);
  const auto parsed = parse_segment_file_name(name);
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed->epoch, Epoch{4'000'000'000});
  EXPECT_EQ(parsed->rank, Rank{2'000'000'000});
  EXPECT_EQ(parsed->uuid, uuid);
  for (const std::string& bad :
       {std::string("../") + name, name + "x", std::string(), std::string("e1-r2-x.segment"),
        "/" + name, name.substr(1), "e9999999999" + name.substr(11)}) {
    EXPECT_FALSE(parse_segment_file_name(bad).ok()) << bad;
  }
}

TEST(SegmentTest, StridesThatOverlapOrLeaveTheBufferAreRefused) {
  const TensorSlice slice = whole_tensor("w", DType::kF32, {4, 6});
  EXPECT_TRUE(check_destination(slice, {}, 96).ok());
  EXPECT_FALSE(check_destination(slice, {}, 95).ok());
  const auto with = [&](std::vector<int64_t> strides, uint64_t bytes) {
    return check_destination(slice, strides, bytes).code();
  };
  EXPECT_EQ(with({6, 1}, 96), Code::kOk);
  EXPECT_EQ(with({1, 4}, 96), Code::kOk);
  EXPECT_EQ(with({5, 1}, 960), Code::kInvalidArgument) << "rows overlap";
  EXPECT_EQ(with({0, 1}, 960), Code::kInvalidArgument);
  EXPECT_EQ(with({-6, 1}, 960), Code::kInvalidArgument);
  EXPECT_EQ(with({7, 1}, 4 * 27), Code::kOk);
  EXPECT_EQ(with({7, 1}, 4 * 27 - 1), Code::kInvalidArgument);
  EXPECT_EQ(with({INT64_MAX, 1}, 960), Code::kInvalidArgument);
  EXPECT_EQ(with({6}, 96), Code::kInvalidArgument);
}

}  // namespace
}  // namespace penstock
