// Safetensors files: what is written is read; whatever breaks a rule is refused with tensor and
// rule named.
#include "checkpoint/safetensors.h"

#include "comm/base/random.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

std::string file_of(std::string json, const std::string& data) {
  const uint64_t length = json.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + json + data;
}

// What opening a file with this header and `data_bytes` bytes of data says; "" when it opens.
std::string refusal(const std::string& json, size_t data_bytes) {
  TempDirectory folder;
  const Path path = folder.path() / "x.safetensors";
  replace_file(path, file_of(json, std::string(data_bytes, '\1')));
  const auto file = SafetensorsFile::open(path);
  if (file.ok()) return "";
  EXPECT_EQ(file.status().code(), Code::kDataLoss) << file.status().to_string();
  EXPECT_NE(file.status().message().find(path.string()), std::string::npos)
      << "the file is not named: " << file.status().message();
  return file.status().message();
}

#define EXPECT_REFUSED(json, data_bytes, words)                                  \
  do {                                                                           \
    const std::string message = refusal(json, data_bytes);                       \
    EXPECT_NE(message.find(words), std::string::npos) << "message: " << message; \
  } while (false)

TEST(SafetensorsTest, AFileIsReadAsItWasWritten) {
  TempDirectory folder;
  const Path path = folder.path() / "model.safetensors";
  const auto header = lay_out_safetensors({{"z", DType::kF32, {2}},
                                           {"half", DType::kBf16, {3}},
                                           {"a", DType::kF32, {2, 2}},
                                           {"scalar", DType::kI64, {}},
                                           {"nothing", DType::kU8, {0, 7}}});
  auto writer = SafetensorsWriter::create(path, header, real_file_system());
  ASSERT_TRUE(writer.ok()) << writer.status().to_string();
  std::string data;
  for (size_t i = 0; i < header.data_bytes(); ++i) data.push_back(static_cast<char>(i * 7));
  ASSERT_TRUE(writer->append(as_bytes(data).first(5)).ok());
  ASSERT_TRUE(writer->append(as_bytes(data).subspan(5)).ok());
  ASSERT_TRUE(writer->finish().ok());

  const auto file = SafetensorsFile::open(path);
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  EXPECT_EQ(file->header().metadata.at("format"), "pt");
  ASSERT_EQ(file->header().tensors.size(), 5u);
  for (const SafetensorsEntry& tensor : file->header().tensors) {
    std::string bytes(tensor.byte_count(), '\0');
    ASSERT_TRUE(file->read(tensor, 0, std::as_writable_bytes(std::span(bytes))).ok());
    EXPECT_EQ(bytes, data.substr(tensor.begin, tensor.byte_count())) << tensor.name;
    EXPECT_EQ(tensor.begin % dtype_bytes(tensor.dtype), 0u) << tensor.name << " is not aligned";
  }
  EXPECT_EQ((size_of_file(path) - header.data_bytes()) % 8, 0u) << "data begins at 8 bytes";
}

TEST(SafetensorsTest, TheKnownExampleHasTheKnownBytes) {
  const SafetensorsHeader header{.tensors = {{"a", DType::kF32, {2}, 0, 8}}, .metadata = {}};
  const std::string bytes = encode_safetensors_header(header);
  ASSERT_EQ(bytes.size(), 8u + 56u);
  EXPECT_EQ(bytes[0], 56);
  const auto decoded =
      decode_safetensors_header(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  )", 8);
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(encode_safetensors_header(*decoded), bytes);
}

TEST(SafetensorsTest, TheOrderOfTheHeaderIsFree) {
  EXPECT_EQ(refusal(R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                    R"("a":{"dtype":"U8","shape":[3],"data_offsets":[2,5]},)"
                    R"("n":{"dtype":"F32","shape":[0],"data_offsets":[2,2]}})",
                    5),
            "");
}

TEST(SafetensorsTest, FilesTooShortForTheirHeaderAreRefused) {
  TempDirectory folder;
  const Path path = folder.path() / "x.safetensors";
  for (const std::string& content :
       {std::string(), std::string("1234567"), std::string("\xff\0\0\0\0\0\0\0", 8),
        std::string(8, '\xff'), std::string("\x03\0\0\0\0\0\0\0{}", 10)}) {
    replace_file(path, content);
    const auto file = SafetensorsFile::open(path);
    EXPECT_EQ(file.status().code(), Code::kDataLoss) << content.size();
    EXPECT_NE(file.status().message().find(path.string()), std::string::npos);
  }
}

TEST(SafetensorsTest, WhatIsNoFileOrNotThereIsRefused) {
  TempDirectory folder;
  EXPECT_EQ(SafetensorsFile::open(folder.path()).status().code(), Code::kDataLoss);
  EXPECT_EQ(SafetensorsFile::open(folder.path() / "none").status().code(), Code::kNotFound);
}

TEST(SafetensorsTest, BadJsonIsRefused) {
  EXPECT_REFUSED("", 0, "does not begin with '{'");
  EXPECT_REFUSED(" {}", 0, "does not begin with '{'");
  EXPECT_REFUSED("{", 0, "not valid JSON");
  EXPECT_REFUSED("{} x", 0, "not valid JSON from byte 4");
  EXPECT_REFUSED("{\"\xff\": 1}", 0, "not valid JSON");
  EXPECT_REFUSED(R"({"a":{"dtype":{"x":{}}}})", 0, "nested deeper than 3");
  EXPECT_REFUSED(R"({"a":1})", 0, "tensor a: its entry is not an object");
}

TEST(SafetensorsTest, KeysGivenTwiceAreRefused) {
  const std::string a = R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  EXPECT_REFUSED("{" + a + "," + a + "}", 1, "the key \"a\" is there twice");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
                 "the key \"dtype\" is there twice");
}

TEST(SafetensorsTest, EntriesWithWrongFieldsAreRefused) {
  const auto entry = [](const std::string& fields) { return R"({"w":{)" + fields + "}}"; };
  EXPECT_REFUSED(entry(R"("shape":[1],"data_offsets":[0,1])"), 1, "tensor w: it has no \"dtype\"");
  EXPECT_REFUSED(entry(R"("dtype":"U8","data_offsets":[0,1])"), 1, "tensor w: it has no \"shape\"");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[1])"), 1, "it has no \"data_offsets\"");
  EXPECT_REFUSED(entry(R"("dtype":"u8","shape":[1],"data_offsets":[0,1])"), 1,
                 "its dtype \"u8\" is unknown");
  EXPECT_REFUSED(entry(R"("dtype":"F4","shape":[1],"data_offsets":[0,1])"), 1, "\"F4\" is unknown");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"), 1,
                 "\"shape\" holds something that is not a size");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), 1, "not a size");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":1,"data_offsets":[0,1])"), 1, "not a list");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"), 1,
                 "not a list of at most 8");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[1],"data_offsets":[0])"), 1, "not [begin, end]");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), 1, "not [begin, end]");
  EXPECT_REFUSED(entry(R"("dtype":"U8","shape":[1],"data_offsets":[0,1],"strides":[1])"), 1,
                 "unknown key \"strides\"");
  EXPECT_REFUSED(R"({"__metadata__":{"n":1}})", 0, "__metadata__ \"n\" is not a text");
  EXPECT_REFUSED(R"({"__metadata__":7})", 0, "__metadata__ is not an object");
}

TEST(SafetensorsTest, ShapesThatOverflowAreRefused) {
  EXPECT_REFUSED(R"({"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
                 "tensor w");
  EXPECT_REFUSED(R"({"w":{"dtype":"F32","shape":[0,9223372036854775807,8],"data_offsets":[0,0]}})",
                 0, "overflows");
  EXPECT_REFUSED(R"({"w":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0,
                 "not a size");
}

TEST(SafetensorsTest, RangesThatDoNotTileTheDataAreRefused) {
  const auto two = [](const std::string& b, const std::string& e) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],)"
           R"("data_offsets":[)" +
           b + "," + e + "]}}";
  };
  EXPECT_EQ(refusal(two("4", "8"), 8), "");
  EXPECT_REFUSED(two("5", "9"), 9, "tensor b: its data begins at byte 5, a gap after byte 4");
  EXPECT_REFUSED(two("3", "7"), 7, "tensor b: its data begins at byte 3, inside the tensor");
  EXPECT_REFUSED(two("4", "7"), 7, "tensor b: its shape takes 4 bytes of U8");
  EXPECT_REFUSED(two("4", "8"), 7, "it is truncated");
  EXPECT_REFUSED(two("4", "8"), 9, "it is too long");
  EXPECT_REFUSED("{}", 1, "it is too long");
}

TEST(SafetensorsTest, ADiskWithoutRoomIsFoundBeforeTheFirstTensor) {
  TempDirectory folder;
  const auto header = lay_out_safetensors({{"huge", DType::kU8, {int64_t{1} << 59}}});
  const auto writer =
      SafetensorsWriter::create(folder.path() / "x.safetensors", header, real_file_system());
  EXPECT_EQ(writer.status().code(), Code::kResourceExhausted) << writer.status().to_string();
}

// Every accepted mutation still describes data that lies within the file, each byte once.
TEST(SafetensorsTest, MutatedHeadersAreRefusedOrConsistent) {
  const std::string json =
      encode_safetensors_header(lay_out_safetensors({{"model.a", DType::kF32, {3, 4}},
                                                     {"model.b", DType::kBf16, {10}},
                                                     {"model.c", DType::kF8E4m3, {2, 2}}}))
          .substr(8);
  constexpr uint64_t kDataBytes = 48 + 20 + 4;
  ASSERT_TRUE(decode_safetensors_header(json, kDataBytes).ok());
  Random random(11, 0);
  int refused = 0;
  for (int i = 0; i < 50'000; ++i) {
    std::string text = json;
    for (uint64_t n = 1 + random.below(3); n > 0; --n) {
      const size_t at = random.below(text.size());
      if (random.below(2) == 0) {
        text[at] = static_cast<char>(random.next());
      } else {
        text[at] = "0123456789[]{},:\"-"[random.below(18)];
      }
    }
    const auto header = decode_safetensors_header(text, kDataBytes);
    refused += !header.ok();
    if (!header.ok()) continue;
    uint64_t end = 0;
    for (const SafetensorsEntry& tensor : header->tensors) {
      ASSERT_EQ(tensor.begin, end) << text;
      end = tensor.end;
      ASSERT_EQ(byte_count(whole_tensor(tensor.name, tensor.dtype, tensor.shape)),
                tensor.byte_count());
    }
    ASSERT_EQ(end, kDataBytes) << text;
  }
  EXPECT_GT(refused, 25'000);
}

}  // namespace
}  // namespace penstock
