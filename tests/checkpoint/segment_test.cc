#include "checkpoint/segment.h"

#include "checkpoint/slice_digest.h"
#include "tests/checkpoint/simulated_disk.h"
#include "tests/checkpoint/support.h"
#include "tests/support/real_files.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr SegmentIdentity kIdentity = {JobId{7}, Epoch{3}, Rank{2}, 60};

// Changes the footer of a segment file and makes its digest and the trailer right again.
void forge_footer(const Path& path, const std::function<void(segment_format::Footer&)>& change) {
  const std::string text = file_text(path);
  const Bytes header_bytes = as_bytes(text).first(kSegmentHeaderBytes);
  const auto header = segment_format::decode_header(header_bytes);
  auto trailer = segment_format::decode_trailer(as_bytes(text).last(kSegmentTrailerBytes));
  ASSERT_TRUE(header.ok() && trailer.ok());
  auto footer = segment_format::decode_footer(
      *header, as_bytes(text).subspan(trailer->footer_offset, trailer->footer_byte_count));
  ASSERT_TRUE(footer.ok());
  change(*footer);
  const std::vector<std::byte> forged = segment_format::encode_footer(*header, *footer);
  DigestStream digest;
  digest.update(header_bytes);
  digest.update(forged);
  trailer->footer_digest = digest.finish();
  trailer->footer_byte_count = forged.size();
  trailer->file_byte_count = trailer->footer_offset + forged.size() + kSegmentTrailerBytes;
  const std::vector<std::byte> end = segment_format::encode_trailer(*trailer);
  replace_file(path, text.substr(0, trailer->footer_offset) + std::string(as_text(forged)) +
                         std::string(as_text(end)));
}

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
TEST(SegmentTest, DataIsWrittenOneBufferAtATime) {
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
  EXPECT_EQ(recorder.largest, kDiskBufferBytes);
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
    if (summary.ok()) {
      EXPECT_EQ(disk.call_count(), number - 1) << "a failed call was taken for a good one";
      break;
    }
    EXPECT_EQ(summary.status().code(), Code::kResourceExhausted) << number;
    EXPECT_NE(summary.status().message().find("injected"), std::string::npos);
    for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
      EXPECT_EQ(entry.path().filename(), "STORE") << "left behind by call " << number;
    }
  }
  EXPECT_GT(number, 8) << "create, reserve, writes, sync, close and directory sync all failed once";
}

TEST(WriteNewFileTest, AnyFailedCallLeavesNoFileAndIsSaid) {
  for (int64_t number = 1;; ++number) {
    TempDirectory directory;
    TempDirectory graves;
    SimulatedDisk disk(graves.path());
    disk.fail_call(number, Code::kResourceExhausted);
    const Status written = write_new_file(disk, directory.path() / "file", as_bytes("text"));
    if (written.ok()) {
      EXPECT_EQ(disk.call_count(), number - 1) << "a failed call was taken for a good one";
      break;
    }
    EXPECT_EQ(written.code(), Code::kResourceExhausted) << number;
    EXPECT_TRUE(std::filesystem::is_empty(directory.path())) << "left behind by call " << number;
  }
}

TEST(SegmentTest, OfTwoRanksThatNameAStoreAtOnceTheFirstOnesUuidCounts) {
  class RacingFiles : public RealFiles {
   public:
    Status rename_no_replace(const Path& from, const Path& to) override {
      first = store_uuid(to.parent_path()).value();
      return RealFiles::rename_no_replace(from, to);
    }
    Uuid first;
  };
  TempDirectory directory;
  RacingFiles files;
  const auto second = store_uuid(directory.path(), files);
  ASSERT_TRUE(second.ok()) << second.status().to_string();
  EXPECT_EQ(*second, files.first);
  EXPECT_EQ(*file_names(directory.path()), std::vector<std::string>{"STORE"});
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

TEST(SegmentTest, ForgedHeadersAreRefusedThoughTheirChecksumIsRight) {
  const auto code = [](size_t offset, uint32_t value) {
    std::vector<std::byte> bytes =
        segment_format::encode_header({.segment = {1, 2}, .store = {3, 4}, .identity = kIdentity});
    std::memcpy(bytes.data() + offset, &value, sizeof(value));
    const uint32_t sum = crc32c(Bytes(bytes).first(bytes.size() - sizeof(sum)));
    std::memcpy(bytes.data() + bytes.size() - sizeof(sum), &sum, sizeof(sum));
    return segment_format::decode_header(bytes).status().code();
  };
  EXPECT_EQ(code(8, kSegmentFormat), Code::kOk);
  EXPECT_EQ(code(8, kSegmentFormat + 1), Code::kDataLoss) << "format";
  EXPECT_EQ(code(12, 8192), Code::kDataLoss) << "header bytes";
  for (const uint32_t bytes : {0u, 2048u, 3u * 4096, 2u << 20}) {
    EXPECT_EQ(code(16, bytes), Code::kDataLoss) << bytes << " to a block";
  }
  EXPECT_EQ(code(20, 1), Code::kDataLoss) << "reserved";
  EXPECT_EQ(code(68, 1u << 31), Code::kDataLoss) << "a negative rank";
  EXPECT_EQ(code(76, 1u << 31), Code::kDataLoss) << "a negative step";
  for (const size_t offset : {80, 4088}) {
    EXPECT_EQ(code(offset, 1u << 24), Code::kDataLoss) << "filler at " << offset;
  }
}

TEST(SegmentTest, ForgedTrailersAreRefusedThoughTheirChecksumIsRight) {
  using Trailer = segment_format::Trailer;
  TempDirectory directory;
  const SegmentSummary summary = save_segment(directory.path(), kIdentity, model_slices(0, 1));
  const Path path = directory.path() / summary.file;
  const std::string text = file_text(path);
  const auto whole = segment_format::decode_trailer(as_bytes(text).last(kSegmentTrailerBytes));
  ASSERT_TRUE(whole.ok());
  const auto code = [&](auto change) {
    Trailer trailer = *whole;
    change(trailer);
    const std::vector<std::byte> forged = segment_format::encode_trailer(trailer);
    overwrite(path, text.size() - kSegmentTrailerBytes, as_text(forged));
    return SegmentReader::open(path).status().code();
  };
  EXPECT_EQ(code([](Trailer&) {}), Code::kOk);
  EXPECT_EQ(code([](Trailer& t) { t.footer_offset = 100; }), Code::kDataLoss);
  EXPECT_EQ(code([](Trailer& t) { t.footer_offset = UINT64_MAX; }), Code::kDataLoss);
  EXPECT_EQ(code([](Trailer& t) { t.footer_byte_count = UINT64_MAX; }), Code::kDataLoss);
  EXPECT_EQ(code([](Trailer& t) { t.file_byte_count += 1; }), Code::kDataLoss);
  EXPECT_EQ(code([](Trailer& t) { t.footer_digest.low ^= 1; }), Code::kDataLoss);
  EXPECT_EQ(code([](Trailer& t) { t.format = 1; }), Code::kDataLoss) << "not the header's";
  Trailer newer = *whole;
  newer.format = kSegmentFormat + 1;
  EXPECT_FALSE(segment_format::decode_trailer(segment_format::encode_trailer(newer)).ok());
}

TEST(SegmentTest, AFooterThatDoesNotFitItsFileIsRefused) {
  const auto code = [](const std::function<void(segment_format::Footer&)>& change) {
    TempDirectory directory;
    const SegmentSummary summary = save_segment(directory.path(), kIdentity,
                                                {known_slice("a", DType::kF32, {4}, {{0}, {4}}),
                                                 known_slice("b", DType::kF32, {4}, {{0}, {4}})});
    forge_footer(directory.path() / summary.file, change);
    return SegmentReader::open(directory.path() / summary.file).status().code();
  };
  using segment_format::Footer;
  EXPECT_EQ(code([](Footer&) {}), Code::kOk);
  EXPECT_EQ(code([](Footer& f) { f.slices[1].slice.name = "a"; }), Code::kDataLoss) << "twice";
  const auto longer = [](Footer& f) {
    f.data_end += kSliceAlignment;
    f.block_sums.resize(segment_format::block_count(f.data_end, kBlockBytes));
  };
  EXPECT_EQ(code(longer), Code::kDataLoss) << "it does not follow its data";
}

TEST(SegmentTest, AWrongDigestUnderRightChecksumsIsFoundByReadingEverything) {
  TempDirectory directory;
  const SegmentSummary summary = save_segment(directory.path(), kIdentity, model_slices(0, 1));
  const Path path = directory.path() / summary.file;
  forge_footer(path, [](segment_format::Footer& footer) { footer.slices[0].digest.low ^= 1; });
  const auto reader = SegmentReader::open(path);
  ASSERT_TRUE(reader.ok()) << reader.status().to_string();
  const Status found = reader->verify();
  EXPECT_EQ(found.code(), Code::kDataLoss);
  EXPECT_NE(found.message().find("tensor embed"), std::string::npos) << found.message();
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
