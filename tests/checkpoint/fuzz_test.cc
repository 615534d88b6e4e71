// Random damage to every file format: never a crash, never wrong bytes. Seeds are fixed, so a
// failure repeats.
#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// Changes 1 to 4 places: a flipped bit, a random or extreme byte, a copied or removed stretch.
std::string mutated(std::string text, Random& random) {
  const uint64_t count = 1 + random.below(4);
  for (uint64_t i = 0; i < count && !text.empty(); ++i) {
    const size_t at = random.below(text.size());
    const size_t length = 1 + random.below(std::min<uint64_t>(16, text.size() - at));
    switch (random.below(6)) {
      case 0:
        text[at] ^= static_cast<char>(1 << random.below(8));
        break;
      case 1:
        text[at] = static_cast<char>(random.next());
        break;
      case 2:
        text.replace(at, length, std::string(length, '\xff'));
        break;
      case 3:
        text.replace(at, length, std::string(length, '\0'));
        break;
      case 4:
        text.erase(at, length);
        break;
      case 5:
        text.insert(at, text.substr(random.below(text.size()), length));
        break;
    }
  }
  return text;
}

struct Parts {
  SegmentHeader header;
  std::string footer;
};

Parts example_segment() {
  SegmentHeader header{
      .segment = {1, 2}, .store = {3, 4}, .identity = {JobId{7}, Epoch{1}, Rank{0}, 5}};
  segment_format::Footer footer{.data_end = 3 * 4096, .slices = {}, .block_sums = {0x12345678}};
  uint64_t offset = kSegmentHeaderBytes;
  for (const OwnedSlice& owned : {known_slice("w", DType::kF32, {8, 16}, {{0, 0}, {4, 16}}),
                                  known_slice("w", DType::kF32, {8, 16}, {{4, 0}, {4, 16}}),
                                  known_slice("state|step", DType::kI64, {}, {{}, {}}),
                                  known_slice("empty", DType::kBf16, {0, 3}, {{0, 0}, {0, 3}})}) {
    footer.slices.push_back({owned.slice, offset, owned.bytes.size(), digest_of(owned.bytes)});
    offset += owned.bytes.size();
  }
  const auto bytes = segment_format::encode_footer(header, footer);
  return {header, std::string(as_text(bytes))};
}

TEST(FuzzTest, MutatedFootersParseToSomethingConsistentOrAreRefused) {
  const Parts parts = example_segment();
  ASSERT_TRUE(segment_format::decode_footer(parts.header, as_bytes(parts.footer)).ok());
  Random random(1, 0);
  int refused = 0;
  for (int i = 0; i < 100'000; ++i) {
    const std::string text = mutated(parts.footer, random);
    const auto footer = segment_format::decode_footer(parts.header, as_bytes(text));
    refused += !footer.ok();
    if (!footer.ok()) continue;
    // Whatever was accepted obeys the bounds readers rely on, and encodes to the same bytes.
    for (const SegmentSlice& entry : footer->slices) {
      ASSERT_TRUE(check_slice(entry.slice).ok());
      ASSERT_LE(entry.file_offset + entry.byte_count, footer->data_end);
    }
    const auto again = segment_format::encode_footer(parts.header, *footer);
    ASSERT_EQ(as_text(again), text);
  }
  EXPECT_GT(refused, 50'000);
}

TEST(FuzzTest, MutatedHeadersAndTrailersAreRefused) {
  const auto header = segment_format::encode_header(example_segment().header);
  const auto trailer = segment_format::encode_trailer({4096, 100, 4096 + 164, {5, 6}});
  Random random(2, 0);
  for (int i = 0; i < 50'000; ++i) {
    std::string text = mutated(std::string(as_text(header)), random);
    text.resize(kSegmentHeaderBytes);
    if (text != as_text(header)) {
      ASSERT_FALSE(segment_format::decode_header(as_bytes(text)).ok()) << i;
    }
    std::string end = mutated(std::string(as_text(trailer)), random);
    end.resize(kSegmentTrailerBytes);
    if (end != as_text(trailer)) {
      ASSERT_FALSE(segment_format::decode_trailer(as_bytes(end)).ok()) << i;
    }
  }
}

TEST(FuzzTest, MutatedManifestsWithARightDigestNeverCrashAReader) {
  TempDirectory directory;
  auto store = CheckpointStore::open(directory.path(), JobId{7}, nullptr);
  ASSERT_TRUE(store.ok());
  const CheckpointInfo info = commit_model(*store, JobId{7}, Epoch{1}, 10, 1);
  const std::string text = file_text(directory.path() / info.manifest_file);
  const std::string body = text.substr(0, text.rfind("digest "));
  Random random(3, 0);
  int accepted = 0;
  for (int i = 0; i < 40'000; ++i) {
    const std::string forged = mutated(body, random);
    const auto manifest =
        decode_manifest(forged + "digest " + to_hex(digest_of(as_bytes(forged))) + "\n");
    if (!manifest.ok()) continue;
    ++accepted;
    const Status whole = prove_whole(*manifest);
    ASSERT_TRUE(whole.ok() || whole.code() == Code::kDataLoss);
  }
  EXPECT_GT(accepted, 100) << "some mutations only touch the layout text or spaces";
}

TEST(FuzzTest, MutatedSegmentFilesNeverGiveWrongBytes) {
  TempDirectory directory(memory_directory());
  std::vector<OwnedSlice> slices = {known_slice("w", DType::kF32, {64, 64}, {{0, 0}, {64, 64}}),
                                    known_slice("b", DType::kBf16, {33}, {{0}, {33}})};
  const SegmentSummary summary =
      save_segment(directory.path(), {JobId{7}, Epoch{1}, Rank{0}, 5}, slices);
  const Path path = directory.path() / summary.file;
  const std::string text = file_text(path);
  Random random(4, 0);
  int detected = 0;
  for (int i = 0; i < 8'000; ++i) {
    // Half of the damage goes to the last kilobyte, where the structure is.
    const size_t cut = random.below(2) == 0 ? 0 : text.size() - 1024;
    replace_file(path, text.substr(0, cut) + mutated(text.substr(cut), random));
    const auto reader = SegmentReader::open(path);
    if (!reader.ok()) {
      ++detected;
      continue;
    }
    for (const OwnedSlice& owned : slices) {
      const auto index = reader->find(owned.slice.name, owned.slice.box);
      if (!index.ok()) continue;
      std::vector<std::byte> bytes(owned.bytes.size());
      const Status read = reader->read_box(*index, owned.slice.box, owned.slice.box, bytes);
      detected += !read.ok();
      if (read.ok()) {
        ASSERT_EQ(bytes, owned.bytes) << i;
      }
    }
  }
  EXPECT_GT(detected, 6'000);
}

TEST(FuzzTest, MutatedRemovalFilesOnlyEverNameOurFiles) {
  const std::string text =
      encode_removal({{manifest_file_name(3)}, {segment_file_name(Epoch{1}, Rank{0}, {1, 2})}});
  const std::string body = text.substr(0, text.rfind("digest "));
  Random random(5, 0);
  for (int i = 0; i < 50'000; ++i) {
    const std::string forged = mutated(body, random);
    const auto removal =
        decode_removal(forged + "digest " + to_hex(digest_of(as_bytes(forged))) + "\n");
    if (!removal.ok()) continue;
    for (const std::string& name : removal->manifests) {
      ASSERT_TRUE(parse_manifest_file_name(name).ok());
    }
    for (const std::string& name : removal->segments) {
      ASSERT_TRUE(parse_segment_file_name(name).ok());
    }
  }
}

}  // namespace
}  // namespace penstock
