#include "worker/data/prepare.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/worker/data_files.h"
#include "worker/data/tokenizer.h"

namespace penstock {
namespace {

class PrepareTest : public testing::Test {
 protected:
  std::string corpus(int document_count) {
    std::string text;
    for (int i = 0; i < document_count; ++i) text += fmt::format("document number {}\n\n", i);
    return directory_.write("corpus.txt", text);
  }
  PrepareOptions options(int document_count) {
    PrepareOptions options;
    options.inputs = {corpus(document_count)};
    options.output = directory_.path("out");
    return options;
  }
  // All of a data set's text, with "|" for the end of a document.
  std::string text_of(const std::string& prefix) {
    const auto data = IndexedDataset::open(prefix);
    EXPECT_TRUE(data.ok()) << data.status().message();
    std::vector<int32_t> tokens(data->token_count());
    EXPECT_TRUE(data->read(0, tokens, 257).ok());
    std::string text;
    for (const int32_t token : tokens) {
      text += token == kByteEndOfDocument ? '|' : static_cast<char>(token);
    }
    return text;
  }
  DataDirectory directory_;
};

TEST_F(PrepareTest, EveryDocumentGoesToExactlyOneSide) {
  const auto report = prepare_corpus(options(400));
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->train.documents + report->heldout.documents, 400);
  const std::string train = text_of(report->train.prefix);
  const std::string heldout = text_of(report->heldout.prefix);
  EXPECT_EQ(report->train.tokens, static_cast<int64_t>(train.size()));
  for (int i = 0; i < 400; ++i) {
    const std::string document = fmt::format("document number {}|", i);
    const bool in_train = ("|" + train).find("|" + document) != std::string::npos;
    const bool in_heldout = ("|" + heldout).find("|" + document) != std::string::npos;
    EXPECT_NE(in_train, in_heldout) << document;
  }
}

TEST_F(PrepareTest, TheHeldOutShareIsNearWhatWasAsked) {
  auto asked = options(4000);
  asked.holdout = 0.05;
  const auto report = prepare_corpus(asked);
  ASSERT_TRUE(report.ok());
  EXPECT_NEAR(report->heldout.documents, 200, 60);  // four standard deviations
}

TEST_F(PrepareTest, SameSeedSameBytesAndAnotherSeedAnotherSplit) {
  ASSERT_TRUE(prepare_corpus(options(400)).ok());
  const std::string first = directory_.read("out_heldout.bin");
  ASSERT_TRUE(prepare_corpus(options(400)).ok());
  EXPECT_EQ(directory_.read("out_heldout.bin"), first);
  auto other = options(400);
  other.seed = 1;
  ASSERT_TRUE(prepare_corpus(other).ok());
  EXPECT_NE(directory_.read("out_heldout.bin"), first);
}

TEST_F(PrepareTest, NoHoldoutWritesNoHeldOutSet) {
  auto whole = options(10);
  whole.holdout = 0.0;
  const auto report = prepare_corpus(whole);
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->train.documents, 10);
  EXPECT_EQ(report->heldout.prefix, "");
  EXPECT_FALSE(std::filesystem::exists(directory_.path("out_heldout.bin")));
}

TEST_F(PrepareTest, TwoDocumentsGiveOneToEachSide) {
  const auto report = prepare_corpus(options(2));
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->train.documents, 1);
  EXPECT_EQ(report->heldout.documents, 1);
}

TEST_F(PrepareTest, TooFewDocumentsAreRefusedAndLeaveNothing) {
  const auto report = prepare_corpus(options(1));
  EXPECT_EQ(report.status().code(), Code::kInvalidArgument);
  EXPECT_NE(report.status().message().find("1 document in"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(directory_.path("out_train.bin")));
  EXPECT_FALSE(std::filesystem::exists(directory_.path("out_train.bin.tmp")));
}

TEST_F(PrepareTest, AnEmptyCorpusIsRefused) {
  auto empty = options(2);
  empty.inputs = {directory_.write("empty.txt", "")};
  EXPECT_EQ(prepare_corpus(empty).status().code(), Code::kInvalidArgument);
}

TEST_F(PrepareTest, AMissingInputIsNotFound) {
  auto missing = options(2);
  missing.inputs.push_back(directory_.path("none.txt"));
  const auto report = prepare_corpus(missing);
  EXPECT_EQ(report.status().code(), Code::kNotFound);
  EXPECT_NE(report.status().message().find("none.txt"), std::string::npos);
}

TEST_F(PrepareTest, AHoldoutOutsideItsRangeIsRefused) {
  for (const double holdout : {-0.1, 1.0, std::nan("")}) {
    auto wrong = options(10);
    wrong.holdout = holdout;
    EXPECT_EQ(prepare_corpus(wrong).status().code(), Code::kInvalidArgument);
  }
}

TEST_F(PrepareTest, TheUnigramEntropyIsThatOfTheHeldOutTokens) {
  PrepareOptions two = options(2);
  two.inputs = {directory_.write("two.txt", "zzzz\n\naab\n")};  // held out: a a b end
  const auto report = prepare_corpus(two);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_NEAR(report->unigram_entropy, 0.5 * std::log(2.0) + 2 * 0.25 * std::log(4.0), 1e-12);
}

TEST_F(PrepareTest, EntropyOfEqualCountsIsTheLogarithmOfTheirNumber) {
  EXPECT_NEAR(entropy_nats({5, 5, 5, 5, 0}), std::log(4.0), 1e-12);
  EXPECT_EQ(entropy_nats({7}), 0.0);
  EXPECT_EQ(entropy_nats({}), 0.0);
}

}  // namespace
}  // namespace penstock
