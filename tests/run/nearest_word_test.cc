#include "comm/run/nearest_word.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

const std::vector<std::string> kWords = {"hidden_size", "vocab_size", "lr", "seed", "steps"};

TEST(NearestWordTest, FindsOneLetterMissingSwappedOrReplaced) {
  EXPECT_EQ(nearest_word("hiden_size", kWords), "hidden_size");
  EXPECT_EQ(nearest_word("sede", kWords), "seed");
  EXPECT_EQ(nearest_word("stepz", kWords), "steps");
}

TEST(NearestWordTest, IgnoresCaseAndDashes) {
  EXPECT_EQ(nearest_word("Hidden-Size", kWords), "hidden_size");
}

TEST(NearestWordTest, IsSilentWhenNothingIsNear) {
  EXPECT_EQ(nearest_word("colour", kWords), "");
  EXPECT_EQ(nearest_word("xy", kWords), "");
}

TEST(NearestWordTest, IgnoresWordsTooLongToBeATypo) {
  EXPECT_EQ(nearest_word(std::string(100'000, 'a'), kWords), "");
}

}  // namespace
}  // namespace penstock
