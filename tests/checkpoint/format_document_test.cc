// docs/checkpoint-format.md shows a segment and a manifest byte by byte. These tests make the same
// ones and compare, so that the document stays true; on a difference they print what it must say.
#include <fmt/format.h>

#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr SegmentIdentity kIdentity = {JobId{7}, Epoch{3}, Rank{0}, 60};
constexpr Uuid kSegment = {.low = 0x1716151413121110, .high = 0x1f1e1d1c1b1a1918};
constexpr Uuid kStore = {.low = 0x2726252423222120, .high = 0x2f2e2d2c2b2a2928};

std::string document() {
  return file_text(Path(PENSTOCK_SOURCE_DIR) / "docs" / "checkpoint-format.md");
}

// The fenced block after "<!-- example: NAME -->".
std::string example(const std::string& name) {
  const std::string text = document();
  const size_t marker = text.find("<!-- example: " + name + " -->");
  const size_t begin = text.find("```", marker);
  const size_t first_line = text.find('\n', begin) + 1;
  const size_t end = text.find("```", first_line);
  EXPECT_NE(end, std::string::npos) << "no example " << name;
  return marker == std::string::npos ? "" : text.substr(first_line, end - first_line);
}

// Like hexdump -C: equal lines in a row are one "*".
std::string hex_dump(std::string_view bytes) {
  std::string dump;
  std::string_view previous;
  bool starred = false;
  for (size_t offset = 0; offset < bytes.size(); offset += 16) {
    const std::string_view line = bytes.substr(offset, 16);
    if (line == previous) {
      if (!starred) dump += "*\n";
      starred = true;
      continue;
    }
    starred = false;
    previous = line;
    std::string text;
    dump += fmt::format("{:06x} ", offset);
    for (const char c : line) {
      dump += fmt::format(" {:02x}", static_cast<uint8_t>(c));
      text += c >= ' ' && c <= '~' ? c : '.';
    }
    dump += std::string(3 * (16 - line.size()), ' ') + "  " + text + "\n";
  }
  return dump;
}

// 1.0, 2.0, … 6.0 as one f32 tensor of two rows and three columns, and the step as an i64.
std::vector<OwnedSlice> example_slices() {
  const float weights[] = {1, 2, 3, 4, 5, 6};
  const int64_t step[] = {60};
  const auto bytes_of = [](auto& values) {
    const auto bytes = std::as_bytes(std::span(values));
    return std::vector<std::byte>(bytes.begin(), bytes.end());
  };
  return {{whole_tensor("w", DType::kF32, {2, 3}), bytes_of(weights)},
          {whole_tensor("state|step", DType::kI64, {}), bytes_of(step)}};
}

// The file write_segment makes of them, with uuids that are known instead of random.
std::string example_file(const SegmentSummary& written) {
  SegmentHeader header;
  header.segment = kSegment;
  header.store = kStore;
  header.identity = kIdentity;
  std::string data(4096, '\0');
  const std::vector<OwnedSlice> slices = example_slices();
  for (size_t i = 0; i < slices.size(); ++i) {
    data.replace(written.slices[i].file_offset - kSegmentHeaderBytes, slices[i].bytes.size(),
                 as_text(slices[i].bytes));
  }
  const auto header_bytes = segment_format::encode_header(header);
  const auto footer = segment_format::encode_footer(
      header, {8192, written.slices, {block_sum(kSegment, 0, as_bytes(data))}});
  std::string text = std::string(as_text(header_bytes));
  text += as_text(footer);
  segment_format::Trailer trailer;
  trailer.footer_offset = 8192;
  trailer.footer_byte_count = footer.size();
  trailer.file_byte_count = 8192 + footer.size() + kSegmentTrailerBytes;
  trailer.footer_digest = digest_of(as_bytes(text));
  return std::string(as_text(header_bytes)) + data + std::string(as_text(footer)) +
         std::string(as_text(segment_format::encode_trailer(trailer)));
}

class FormatDocumentTest : public ::testing::Test {
 protected:
  void SetUp() override {
    written_ = save_segment(directory_.path(), kIdentity, example_slices());
    text_ = example_file(written_);
    name_ = segment_file_name(kIdentity.epoch, kIdentity.rank, kSegment);
    replace_file(directory_.path() / name_, text_);
  }
  TempDirectory directory_;
  SegmentSummary written_;
  std::string text_;
  std::string name_;
};

TEST_F(FormatDocumentTest, TheExampleSegmentIsWhatTheReaderReads) {
  const auto reader = SegmentReader::open(directory_.path() / name_);
  ASSERT_TRUE(reader.ok()) << reader.status().to_string();
  EXPECT_TRUE(reader->verify().ok());
  EXPECT_EQ(reader->byte_count(), written_.byte_count) << "and as long as the writer makes it";
  for (const OwnedSlice& owned : example_slices()) {
    const auto index = reader->find(owned.slice.name, owned.slice.box);
    ASSERT_TRUE(index.ok());
    std::vector<std::byte> bytes(owned.bytes.size());
    ASSERT_TRUE(reader->read_box(*index, owned.slice.box, owned.slice.box, bytes).ok());
    EXPECT_EQ(bytes, owned.bytes);
  }
}

TEST_F(FormatDocumentTest, TheDocumentShowsTheSegmentByteByByte) {
  EXPECT_EQ(example("segment"), hex_dump(text_));
}

TEST_F(FormatDocumentTest, TheDocumentShowsTheManifest) {
  const auto reader = SegmentReader::open(directory_.path() / name_);
  ASSERT_TRUE(reader.ok());
  Manifest manifest;
  manifest.store = kStore;
  manifest.job = kIdentity.job;
  manifest.epoch = kIdentity.epoch;
  manifest.step = kIdentity.step;
  manifest.commit_seq = 1;
  manifest.created_at = {1'795'252'800'000'000'000};
  manifest.spec_json = R"({"name":"example"})";
  manifest.spec_digest = digest_of(as_bytes(manifest.spec_json));
  manifest.layout = "pipeline 1, data 1, expert 1";
  manifest.build = "0.1.0";
  manifest.segments = {{name_, kIdentity.rank, reader->byte_count(), reader->footer_digest()}};
  for (const SegmentSlice& entry : reader->slices()) {
    manifest.tensors.push_back({entry.slice.name,
                                entry.slice.dtype,
                                entry.slice.shape,
                                {{0, entry.slice.box, entry.digest}}});
  }
  std::sort(manifest.tensors.begin(), manifest.tensors.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto text = encode_manifest(manifest);
  ASSERT_TRUE(text.ok());
  EXPECT_TRUE(check_segments(directory_.path(), manifest).ok());
  EXPECT_EQ(example("manifest"), *text);
}

TEST_F(FormatDocumentTest, TheDocumentListsEveryElementType) {
  const std::string text = document();
  for (uint8_t number = 1; dtype_from_number(number).ok(); ++number) {
    const DType dtype = *dtype_from_number(number);
    const std::string row =
        fmt::format("| {} | {} | {} |", number, dtype_name(dtype), dtype_bytes(dtype));
    EXPECT_NE(text.find(row), std::string::npos) << row;
  }
}

}  // namespace
}  // namespace penstock
