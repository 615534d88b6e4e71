#include "checkpoint/manifest.h"

#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

Manifest example() {
  Manifest manifest;
  manifest.store = {1, 2};
  manifest.job = JobId{UINT64_MAX};
  manifest.epoch = Epoch{3};
  manifest.step = 60;
  manifest.commit_seq = 12;
  manifest.previous_commit_seq = 11;
  manifest.previous_digest = {5, 6};
  manifest.created_at = {1'790'000'000'123'456'789};
  manifest.spec_json = R"({"name":"größer \"quoted\""})";
  manifest.spec_digest = digest_of(as_bytes(manifest.spec_json));
  manifest.layout = "pipeline 2, data 1, expert 1";
  manifest.build = "0.1.0";
  for (int rank = 0; rank < 2; ++rank) {
    manifest.segments.push_back(
        {segment_file_name(manifest.epoch, Rank{rank}, {7, 8}), Rank{rank}, 8192, {9, 10}});
  }
  manifest.tensors = {
      {"a", DType::kBf16, {4, 2}, {{0, {{0, 0}, {3, 2}}, {1, 2}}, {1, {{3, 0}, {1, 2}}, {3, 4}}}},
      {"state|step", DType::kI64, {}, {{1, {{}, {}}, {5, 6}}}}};
  return manifest;
}

// Text with its digest line made right again, as a forger would.
std::string resigned(std::string text) {
  text.resize(text.rfind("digest "));
  return text + "digest " + to_hex(digest_of(as_bytes(text))) + "\n";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return resigned(text.replace(at, from.size(), to));
}

TEST(ManifestTest, RoundTripsExactly) {
  const std::string text = *encode_manifest(example());
  const auto decoded = decode_manifest(text);
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(*decoded, example());
  EXPECT_EQ(*encode_manifest(*decoded), text);
}

TEST(ManifestTest, FindsTensorsByNameAndCountsPayload) {
  const Manifest manifest = example();
  ASSERT_NE(manifest.find("state|step"), nullptr);
  EXPECT_EQ(manifest.find("state|step")->dtype, DType::kI64);
  EXPECT_EQ(manifest.find("b"), nullptr);
  EXPECT_EQ(manifest.payload_bytes(), 4u * 2 * 2 + 8);
}

TEST(ManifestTest, EveryFlippedBitIsDetected) {
  const std::string text = *encode_manifest(example());
  for (size_t i = 0; i < text.size(); ++i) {
    std::string damaged = text;
    damaged[i] ^= 4;
    EXPECT_EQ(decode_manifest(damaged).status().code(), Code::kDataLoss) << "byte " << i;
  }
}

TEST(ManifestTest, EveryTruncationIsDetected) {
  const std::string text = *encode_manifest(example());
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_EQ(decode_manifest(text.substr(0, size)).status().code(), Code::kDataLoss) << size;
  }
  EXPECT_FALSE(decode_manifest(text + "\n").ok());
}

TEST(ManifestTest, ForgedManifestsAreRefusedThoughTheirDigestIsRight) {
  const std::string text = *encode_manifest(example());
  ASSERT_TRUE(decode_manifest(resigned(text)).ok());
  const std::string file = example().segments[0].file;
  const std::vector<std::pair<std::string, std::string>> forgeries = {
      {file, "../../etc/passwd"},             // path traversal
      {file, "/etc/passwd"},                  //
      {file, example().segments[1].file},     // a segment twice
      {"\"rank\":0", "\"rank\":4294967296"},  // out of range
      {"\"rank\":0", "\"rank\":-1"},          //
      {"\"bytes\":8192", "\"bytes\":18446744073709551615"},
      {"\"segment\":1", "\"segment\":2"},  // no such segment
      {"\"shape\":[4,2]", "\"shape\":[9223372036854775807,9223372036854775807]"},
      {"\"shape\":[4,2]", "\"shape\":[4]"},          //
      {"\"size\":[3,2]", "\"size\":[5,2]"},          // leaves the shape
      {"\"size\":[3,2]", "\"size\":[3.5,2]"},        //
      {"\"offset\":[0,0]", "\"offset\":[-1,0]"},     //
      {"\"dtype\":\"bf16\"", "\"dtype\":\"bf17\""},  //
      {"\"name\":\"a\"", "\"name\":\"z\""},          // order
      {"\"name\":\"a\"", "\"name\":\"\""},           //
      {"\"commit_seq\": 12", "\"commit_seq\": 0"},   //
      {"\"epoch\": 3", "\"epoch\": 4"},              // its segments are of 3
      {"\"previous_commit_seq\": 11", "\"previous_commit_seq\": 12"},
      {"\"version\": 2", "\"version\": 3"},  //
      {"\"build\": \"0.1.0\",\n", ""},       // missing
      {to_hex(example().tensors[0].digest()), to_hex(Digest{1, 2})},
      {"\"format\": \"penstock-manifest\"", "\"format\": \"other\""},
      {"\"step\": 60", "\"step\": \"60\""},  // wrong type
      {"\"step\": 60,\n", ""},               // missing
      {"\"layout\": \"pipeline 2", "\"layout\": {}, \"x\": \"pipeline 2"},
      {"größer", "groesser"},  // spec no longer matches its digest
  };
  for (const auto& [from, to] : forgeries) {
    const auto decoded = decode_manifest(replaced(text, from, to));
    EXPECT_EQ(decoded.status().code(), Code::kDataLoss) << from << " -> " << to;
  }
  const auto code = [](auto change) {
    Manifest manifest = example();
    change(manifest);
    return decode_manifest(*encode_manifest(manifest)).status().code();
  };
  EXPECT_EQ(code([](Manifest& m) { m.segments[1] = m.segments[0]; }), Code::kDataLoss) << "twice";
  EXPECT_EQ(code([](Manifest& m) { m.segments.clear(); }), Code::kDataLoss);
  EXPECT_EQ(code([](Manifest& m) { m.tensors[0].pieces.clear(); }), Code::kDataLoss);
}

TEST(ManifestTest, JsonBombsAreRefused) {
  const std::string deep = std::string(1'000'000, '[') + std::string(1'000'000, ']');
  const Status refused = decode_manifest(resigned(deep + "digest ")).status();
  EXPECT_EQ(refused.code(), Code::kDataLoss);
  EXPECT_NE(refused.message().find("nested too deeply"), std::string::npos) << refused.message();
  EXPECT_EQ(decode_manifest(resigned("{}digest ")).status().code(), Code::kDataLoss);
  EXPECT_EQ(decode_manifest(resigned("not json digest ")).status().code(), Code::kDataLoss);
}

TEST(ManifestTest, TextThatIsNotUtf8CannotBeWritten) {
  Manifest manifest = example();
  manifest.layout = "\xff\xfe";
  EXPECT_EQ(encode_manifest(manifest).status().code(), Code::kInvalidArgument);
}

TEST(ManifestTest, AnotherCommitsCopyUnderThisNameIsRefused) {
  TempDirectory directory;
  const Path path = directory.path() / manifest_file_name(13);
  replace_file(path, *encode_manifest(example()));
  const auto stored = read_manifest(path);
  EXPECT_EQ(stored.status().code(), Code::kDataLoss);
  EXPECT_NE(stored.status().message().find("copy of commit 12"), std::string::npos);
}

TEST(ManifestTest, ASymbolicLinkIsRefused) {
  TempDirectory directory;
  replace_file(directory.path() / "real", *encode_manifest(example()));
  const Path path = directory.path() / manifest_file_name(12);
  std::filesystem::create_symlink(directory.path() / "real", path);
  EXPECT_EQ(read_manifest(path).status().code(), Code::kDataLoss);
}

TEST(ManifestTest, FileNamesRoundTripAndNothingElseParses) {
  EXPECT_EQ(manifest_file_name(12), "000000000012.manifest");
  EXPECT_EQ(*parse_manifest_file_name("000000000012.manifest"), 12u);
  for (const char* bad : {"12.manifest", "000000000000.manifest", "000000000012.manifest.tmp",
                          "../000000000012.manifest", "", "00000000001x.manifest"}) {
    EXPECT_FALSE(parse_manifest_file_name(bad).ok()) << bad;
  }
}

TEST(ManifestTest, AGapOrOverlapInATensorIsNamed) {
  EXPECT_TRUE(prove_whole(example()).ok());
  Manifest gap = example();
  gap.tensors[0].pieces.pop_back();
  EXPECT_NE(prove_whole(gap).message().find("tensor a: no slice holds [3:4, 0:2]"),
            std::string::npos)
      << prove_whole(gap).message();
  Manifest overlap = example();
  overlap.tensors[0].pieces[1].box = {{2, 0}, {2, 2}};
  EXPECT_NE(prove_whole(overlap).message().find("overlap"), std::string::npos);
}

}  // namespace
}  // namespace penstock
