#include "worker/data/tokenizer.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <sentencepiece_trainer.h>

#include "tests/worker/data_files.h"

namespace penstock {
namespace {

TEST(TokenizerTest, BytesAreTheirOwnTokens) {
  const auto tokenizer = make_tokenizer("bytes");
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_EQ((*tokenizer)->vocab_size(), 257);
  EXPECT_EQ((*tokenizer)->end_of_document(), 256);
  std::vector<int32_t> tokens = {7};
  ASSERT_TRUE((*tokenizer)->encode("A\xc3\xa9", tokens).ok());
  EXPECT_EQ(tokens, (std::vector<int32_t>{7, 65, 0xc3, 0xa9}));
}

TEST(TokenizerTest, AnyBytesSurviveTheRoundTrip) {
  const auto tokenizer = make_tokenizer("bytes");
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_TRUE(rc::check([&](const std::string& text) {
    std::vector<int32_t> tokens;
    RC_ASSERT((*tokenizer)->encode(text, tokens).ok());
    tokens.push_back((*tokenizer)->end_of_document());
    const auto back = (*tokenizer)->decode(tokens);
    RC_ASSERT(back.ok());
    RC_ASSERT(*back == text);
  }));
}

TEST(TokenizerTest, ATokenOutsideTheVocabularyIsRefused) {
  const auto tokenizer = make_tokenizer("bytes");
  ASSERT_TRUE(tokenizer.ok());
  for (const int32_t token : {-1, 257}) {
    const auto text = (*tokenizer)->decode(std::vector<int32_t>{token});
    EXPECT_EQ(text.status().code(), Code::kInvalidArgument);
  }
}

TEST(TokenizerTest, AMissingModelFileIsNamed) {
  const auto tokenizer = make_tokenizer("/nonexistent/t.model");
  EXPECT_EQ(tokenizer.status().code(), Code::kNotFound);
  EXPECT_NE(tokenizer.status().message().find("/nonexistent/t.model"), std::string::npos);
}

TEST(TokenizerTest, AFileThatIsNoModelIsRefused) {
  const DataDirectory directory;
  const auto tokenizer = make_tokenizer(directory.write("t.model", "this is not a model"));
  EXPECT_EQ(tokenizer.status().code(), Code::kDataLoss);
  EXPECT_NE(tokenizer.status().message().find("not a SentencePiece model"), std::string::npos);
}

TEST(TokenizerTest, ASentencePieceModelRoundTripsText) {
  const DataDirectory directory;
  std::string corpus;
  for (int i = 0; i < 200; ++i)
    corpus += "the water wheel turns the mill and the mill grinds the corn\n";
  const std::string input = directory.write("corpus.txt", corpus);
  const auto trained = sentencepiece::SentencePieceTrainer::Train(
      fmt::format("--input={} --model_prefix={} --vocab_size=40 --hard_vocab_limit=false "
                  "--minloglevel=2",
                  input, directory.path("t")));
  ASSERT_TRUE(trained.ok()) << trained.ToString();

  const auto tokenizer = make_tokenizer(directory.path("t.model"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  std::vector<int32_t> tokens;
  ASSERT_TRUE((*tokenizer)->encode("the mill turns", tokens).ok());
  EXPECT_LT(tokens.size(), std::string("the mill turns").size());
  for (const int32_t token : tokens) EXPECT_LT(token, (*tokenizer)->vocab_size());
  tokens.push_back((*tokenizer)->end_of_document());
  const auto text = (*tokenizer)->decode(tokens);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(*text, "the mill turns");
  EXPECT_FALSE((*tokenizer)->decode(std::vector<int32_t>{100000}).ok());
}

}  // namespace
}  // namespace penstock
