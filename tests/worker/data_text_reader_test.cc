#include "worker/data/text_reader.h"

#include <gtest/gtest.h>

#include "tests/worker/data_files.h"

namespace penstock {
namespace {

class TextReaderTest : public testing::Test {
 protected:
  std::vector<std::string> documents(const std::string& name, std::string_view content,
                                     DocumentSplit split = DocumentSplit::kBlankLine) {
    std::vector<std::string> found;
    status_ =
        read_documents(directory_.write(name, content), split, [&](std::string_view document) {
          found.emplace_back(document);
          return Status();
        });
    return found;
  }
  std::string error_of(const std::string& name, std::string_view content) {
    documents(name, content);
    EXPECT_EQ(status_.code(), Code::kInvalidArgument) << status_.to_string();
    return status_.message();
  }

  using Documents = std::vector<std::string>;
  DataDirectory directory_;
  Status status_;
};

TEST_F(TextReaderTest, BlankLinesSeparateDocuments) {
  EXPECT_EQ(documents("a.txt", "one\ntwo\n\n\n  \nthree\n"), (Documents{"one\ntwo", "three"}));
  EXPECT_TRUE(status_.ok());
}

TEST_F(TextReaderTest, PercentLinesSeparateFortunes) {
  EXPECT_EQ(documents("a.txt", "one\n\ntwo\n%\n50% off\n%\n", DocumentSplit::kPercent),
            (Documents{"one\n\ntwo", "50% off"}));
}

TEST_F(TextReaderTest, AWholeFileCanBeOneDocument) {
  EXPECT_EQ(documents("a.txt", "one\n\n%\ntwo\n", DocumentSplit::kFile),
            (Documents{"one\n\n%\ntwo"}));
}

TEST_F(TextReaderTest, WindowsLineBreaksSeparateToo) {
  EXPECT_EQ(documents("a.txt", "one\r\n\r\ntwo\r\n"), (Documents{"one", "two"}));
}

TEST_F(TextReaderTest, AFileOfBlankLinesHasNoDocuments) {
  EXPECT_EQ(documents("a.txt", "\n\n\n"), Documents{});
  EXPECT_EQ(documents("a.txt", ""), Documents{});
  EXPECT_TRUE(status_.ok());
}

TEST_F(TextReaderTest, JsonLinesGiveTheirText) {
  EXPECT_EQ(
      documents("a.jsonl", "{\"text\": \"one\\n\\ntwo\", \"id\": 3}\n\n{\"text\":\"\\u00e9\"}"),
      (Documents{"one\n\ntwo", "\xc3\xa9"}));
}

TEST_F(TextReaderTest, BrokenJsonNamesItsLine) {
  EXPECT_NE(
      error_of("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \n").find("a.jsonl:2: not valid JSON"),
      std::string::npos);
}

TEST_F(TextReaderTest, JsonWithoutTextNamesItsLine) {
  EXPECT_NE(error_of("a.jsonl", "{\"body\": \"a\"}\n").find("a.jsonl:1: has no key \"text\""),
            std::string::npos);
  EXPECT_NE(error_of("a.jsonl", "{\"text\": 5}\n").find("\"text\" is not a string"),
            std::string::npos);
  EXPECT_NE(error_of("a.jsonl", "[1]\n").find("not an object"), std::string::npos);
}

TEST_F(TextReaderTest, DeepJsonIsRefused) {
  const std::string deep = "{\"text\":" + std::string(100'000, '[');
  EXPECT_NE(error_of("a.jsonl", deep).find("nested deeper than 32"), std::string::npos);
}

TEST_F(TextReaderTest, BytesThatAreNotUtf8NameTheirLine) {
  EXPECT_NE(error_of("a.txt", "one\ntwo\n\xff\n").find("a.txt:3: byte 0xff is not UTF-8"),
            std::string::npos);
}

TEST_F(TextReaderTest, AMissingFileAndADirectoryAreErrors) {
  const auto ignore = [](std::string_view) { return Status(); };
  EXPECT_EQ(read_documents(directory_.path("none"), DocumentSplit::kFile, ignore).code(),
            Code::kNotFound);
  EXPECT_FALSE(read_documents(directory_.path("."), DocumentSplit::kFile, ignore).ok());
}

TEST_F(TextReaderTest, AnErrorOfTheTakerStopsTheReading) {
  int taken = 0;
  const Status status =
      read_documents(directory_.write("a.txt", "a\n\nb\n\nc\n"), DocumentSplit::kBlankLine,
                     [&](std::string_view) { return ++taken == 2 ? aborted("enough") : Status(); });
  EXPECT_EQ(status.code(), Code::kAborted);
  EXPECT_EQ(taken, 2);
}

TEST_F(TextReaderTest, AnUnknownSplitListsTheKnownOnes) {
  EXPECT_TRUE(parse_document_split("percent").ok());
  EXPECT_EQ(parse_document_split("line").status().message(),
            "split \"line\" is none of blank-line, percent, file");
}

}  // namespace
}  // namespace penstock
