#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "comm/base/random.h"
#include "tests/worker/data_files.h"

namespace penstock {
namespace {

std::string hex(std::string_view bytes) {
  std::string text;
  for (const unsigned char byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

class IndexedDatasetTest : public testing::Test {
 protected:
  // Documents {1, 2, 3} and {4, 65535 or 4}, as u16.
  void write_two_documents(TokenType type = TokenType::kU16) {
    auto writer = IndexedDatasetWriter::create(directory_.path("d"), type);
    ASSERT_TRUE(writer.ok()) << writer.status().message();
    ASSERT_TRUE(writer->add_document(std::vector<int32_t>{1, 2, 3}).ok());
    ASSERT_TRUE(writer->add_document(std::vector<int32_t>{4, 65535}).ok());
    ASSERT_TRUE(writer->finish().ok());
  }

  // Opens after putting `value` at `at` of the file; "" when it opened.
  template <typename T>
  std::string error_after_patch(const std::string& file, size_t at, T value) {
    write_two_documents();
    std::string bytes = directory_.read(file);
    EXPECT_LE(at + sizeof(T), bytes.size());
    std::memcpy(bytes.data() + at, &value, sizeof(T));
    directory_.write(file, bytes);
    return open_error();
  }
  std::string open_error() {
    const auto data = IndexedDataset::open(directory_.path("d"));
    if (data.ok()) return "";
    EXPECT_EQ(data.status().code(), Code::kDataLoss);
    return data.status().message();
  }

  DataDirectory directory_;
};

TEST_F(IndexedDatasetTest, TheWriterProducesMegatronsBytes) {
  write_two_documents();
  EXPECT_EQ(hex(directory_.read("d.bin")), "0100020003000400ffff");
  EXPECT_EQ(hex(directory_.read("d.idx")),
            "4d4d49444944580000"                                  // MMIDIDX, two zeros
            "0100000000000000"                                    // version
            "08"                                                  // u16
            "0200000000000000"                                    // sequences
            "0300000000000000"                                    // documents + 1
            "0300000002000000"                                    // lengths
            "00000000000000000600000000000000"                    // byte pointers
            "000000000000000001000000000000000200000000000000");  // document indices
}

TEST_F(IndexedDatasetTest, I32TokensTakeFourBytes) {
  write_two_documents(TokenType::kI32);
  EXPECT_EQ(hex(directory_.read("d.bin")), "01000000020000000300000004000000ffff0000");
  EXPECT_EQ(directory_.read("d.idx")[17], 4);
}

TEST_F(IndexedDatasetTest, WhatWasWrittenIsRead) {
  for (const TokenType type : {TokenType::kU16, TokenType::kI32, TokenType::kI64}) {
    write_two_documents(type);
    const auto data = IndexedDataset::open(directory_.path("d"));
    ASSERT_TRUE(data.ok()) << data.status().message();
    EXPECT_EQ(data->type(), type);
    EXPECT_EQ(data->document_count(), 2);
    EXPECT_EQ(data->token_count(), 5);
    EXPECT_EQ(data->document_begin(1), 3);
    EXPECT_EQ(data->document_begin(2), 5);
    std::vector<int32_t> tokens(3);
    ASSERT_TRUE(data->read(2, tokens, 65536).ok());
    EXPECT_EQ(tokens, (std::vector<int32_t>{3, 4, 65535}));
  }
}

TEST_F(IndexedDatasetTest, TheDigestNamesTheContentWhereverItLies) {
  const Digest digest = directory_.counting("d", 1000)->digest();
  EXPECT_EQ(directory_.counting("e", 1000)->digest(), digest);
  EXPECT_NE(directory_.counting("e", 1001)->digest(), digest);
  EXPECT_NE(directory_.counting("e", 1000, 999)->digest(), digest) << "only the last token differs";
  auto writer = IndexedDatasetWriter::create(directory_.path("e"), TokenType::kU16);
  std::vector<int32_t> tokens(500);
  for (int32_t half = 0; half < 2; ++half) {  // the same tokens, as two documents
    std::iota(tokens.begin(), tokens.end(), 500 * half);
    ASSERT_TRUE(writer->add_document(tokens).ok());
  }
  ASSERT_TRUE(writer->finish().ok());
  EXPECT_EQ(directory_.read("d.bin"), directory_.read("e.bin"));
  EXPECT_NE(IndexedDataset::open(directory_.path("e"))->digest(), digest);
}

TEST_F(IndexedDatasetTest, TheDigestOfALargeFileCoversBlocksFromItsFirstToItsLastByte) {
  constexpr int64_t kTokens = 10'000'001;  // 19 MiB, of which 16 MiB are read
  const Digest digest = directory_.counting("d", kTokens)->digest();
  EXPECT_EQ(IndexedDataset::open(directory_.path("d"))->digest(), digest);
  std::fstream file(directory_.path("d.bin"), std::ios::in | std::ios::out | std::ios::binary);
  // The middle begins block 128, of 256 that begin evenly between 0 and the last.
  const int64_t middle = (2 * kTokens - (64 << 10)) / 255 * 128;
  for (const int64_t at : {int64_t{0}, middle + 1000, 2 * kTokens - 1}) {
    file.seekg(at);
    const int byte = file.get();
    file.seekp(at);
    file.put(static_cast<char>(byte ^ 1)).flush();
    EXPECT_NE(IndexedDataset::open(directory_.path("d"))->digest(), digest) << at;
    file.seekp(at);
    file.put(static_cast<char>(byte)).flush();
  }
  EXPECT_EQ(IndexedDataset::open(directory_.path("d"))->digest(), digest);
}

TEST_F(IndexedDatasetTest, ATokenOutsideTheVocabularyIsNamedWithItsPosition) {
  write_two_documents();
  const auto data = IndexedDataset::open(directory_.path("d"));
  ASSERT_TRUE(data.ok());
  std::vector<int32_t> tokens(5);
  const Status status = data->read(0, tokens, 1000);
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("token 65535 at position 4 is not in the vocabulary of 1000"),
            std::string::npos);
  EXPECT_FALSE(data->verify_tokens(1000).ok());
  EXPECT_TRUE(data->verify_tokens(65536).ok());
}

TEST_F(IndexedDatasetTest, ReadingPastTheEndIsABug) {
  write_two_documents();
  const auto data = IndexedDataset::open(directory_.path("d"));
  ASSERT_TRUE(data.ok());
  std::vector<int32_t> tokens(3);
  EXPECT_DEATH((void)data->read(3, tokens, 65536), "token_count");
}

TEST_F(IndexedDatasetTest, AMissingFileIsNotFound) {
  EXPECT_EQ(IndexedDataset::open(directory_.path("none")).status().code(), Code::kNotFound);
  write_two_documents();
  std::filesystem::remove(directory_.path("d.bin"));
  EXPECT_EQ(IndexedDataset::open(directory_.path("d")).status().code(), Code::kNotFound);
}

TEST_F(IndexedDatasetTest, ADamagedMagicIsRefused) {
  EXPECT_NE(error_after_patch<uint8_t>("d.idx", 2, 'X').find("does not start with MMIDIDX"),
            std::string::npos);
}

TEST_F(IndexedDatasetTest, AnotherVersionIsRefused) {
  EXPECT_NE(error_after_patch<uint64_t>("d.idx", 9, 2).find("version 2, not 1"), std::string::npos);
}

TEST_F(IndexedDatasetTest, FloatingPointAndUnknownTypesAreRefused) {
  EXPECT_NE(error_after_patch<uint8_t>("d.idx", 17, 6).find("floating point"), std::string::npos);
  EXPECT_NE(error_after_patch<uint8_t>("d.idx", 17, 9).find("none of 1 to 8"), std::string::npos);
}

TEST_F(IndexedDatasetTest, CountsThatDoNotFitTheFileAreRefusedWithoutOverflow) {
  for (const uint64_t count : {uint64_t{1}, uint64_t{3}, uint64_t{1} << 61, ~uint64_t{0}}) {
    EXPECT_NE(error_after_patch<uint64_t>("d.idx", 18, count).find("do not fit"),
              std::string::npos);
    EXPECT_NE(error_after_patch<uint64_t>("d.idx", 26, count + 7).find("do not fit"),
              std::string::npos);
  }
}

TEST_F(IndexedDatasetTest, PointersMustBeTheSumsOfTheLengths) {
  EXPECT_NE(error_after_patch<int64_t>("d.idx", 50, 8).find("sequence 1 starts at byte 8"),
            std::string::npos);
  EXPECT_NE(error_after_patch<int32_t>("d.idx", 34, -3).find("sequence 0 has length -3"),
            std::string::npos);
}

TEST_F(IndexedDatasetTest, TheTokenFileMustHaveTheSizeTheIndexSays) {
  write_two_documents();
  const std::string tokens = directory_.read("d.bin");
  directory_.write("d.bin", tokens.substr(0, 8));
  EXPECT_NE(open_error().find("d.bin: 8 bytes"), std::string::npos);
  directory_.write("d.bin", tokens + "xx");
  EXPECT_NE(open_error().find("d.bin: 12 bytes"), std::string::npos);
  directory_.write("d.bin", "");
  EXPECT_NE(open_error().find("d.bin: 0 bytes"), std::string::npos);
}

TEST_F(IndexedDatasetTest, DocumentIndicesMustAscendFromZeroToTheEnd) {
  for (const size_t at : {58u, 66u, 74u}) {
    EXPECT_NE(error_after_patch<int64_t>("d.idx", at, 5).find("document index"), std::string::npos);
    EXPECT_NE(error_after_patch<int64_t>("d.idx", at, -1).find("document index"),
              std::string::npos);
  }
}

TEST_F(IndexedDatasetTest, EveryTruncationOfTheIndexIsRefused) {
  write_two_documents();
  const std::string index = directory_.read("d.idx");
  for (size_t size = 0; size < index.size(); ++size) {
    directory_.write("d.idx", index.substr(0, size));
    EXPECT_NE(open_error(), "") << size;
  }
}

TEST_F(IndexedDatasetTest, RandomDamageNeverReadsOutsideTheFiles) {
  write_two_documents();
  const std::string index = directory_.read("d.idx");
  for (uint64_t i = 0; i < 1000; ++i) {
    Random random(7, i);
    std::string damaged = index;
    for (int flips = 0; flips < 3; ++flips)
      damaged[random.below(damaged.size())] ^= 1 + random.below(255);
    directory_.write("d.idx", damaged);
    const auto data = IndexedDataset::open(directory_.path("d"));
    if (!data.ok()) continue;
    std::vector<int32_t> tokens(data->token_count());
    (void)data->read(0, tokens, 65536);  // under the address sanitizer a stray read fails the test
    for (int64_t d = 0; d <= data->document_count(); ++d) {
      EXPECT_LE(data->document_begin(d), data->token_count());
    }
  }
}

TEST_F(IndexedDatasetTest, TheWriterRefusesWhatTheTypeCannotHold) {
  auto writer = IndexedDatasetWriter::create(directory_.path("d"), TokenType::kU16);
  ASSERT_TRUE(writer.ok());
  EXPECT_EQ(writer->add_document(std::vector<int32_t>{1, 65536}).code(), Code::kInvalidArgument);
  EXPECT_EQ(writer->add_document(std::vector<int32_t>{-1}).code(), Code::kInvalidArgument);
  EXPECT_EQ(writer->add_document({}).code(), Code::kInvalidArgument);
  EXPECT_EQ(writer->finish().code(), Code::kFailedPrecondition);
}

TEST_F(IndexedDatasetTest, AnUnfinishedWriterLeavesTheOldDataSetAndNoOtherFile) {
  write_two_documents();
  {
    auto writer = IndexedDatasetWriter::create(directory_.path("d"), TokenType::kU16);
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer->add_document(std::vector<int32_t>{9}).ok());
  }
  EXPECT_EQ(open_error(), "");
  EXPECT_EQ(IndexedDataset::open(directory_.path("d"))->token_count(), 5);
  EXPECT_FALSE(std::filesystem::exists(directory_.path("d.bin.tmp")));
}

TEST_F(IndexedDatasetTest, SmallVocabulariesUseU16AsMegatronDoes) {
  EXPECT_EQ(token_type_for(257), TokenType::kU16);
  EXPECT_EQ(token_type_for(65499), TokenType::kU16);
  EXPECT_EQ(token_type_for(65500), TokenType::kI32);
  EXPECT_EQ(token_type_for(129280), TokenType::kI32);
}

}  // namespace
}  // namespace penstock
