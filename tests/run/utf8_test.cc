#include "comm/run/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace penstock {
namespace {

bool valid(std::string_view text) {
  return utf8_valid_prefix(text) == text.size();
}

TEST(Utf8Test, AcceptsTheFirstAndLastCharacterOfEveryLength) {
  for (const char* text :
       {"", "a", "\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80",
        "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(valid(text)) << text;
  }
}

TEST(Utf8Test, RefusesOverlongForms) {
  for (const char* text : {"\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf"}) {
    EXPECT_FALSE(valid(text));
  }
}

TEST(Utf8Test, RefusesSurrogatesAndWhatIsAboveUnicode) {
  for (const char* text :
       {"\xed\xa0\x80", "\xed\xbf\xbf", "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80"}) {
    EXPECT_FALSE(valid(text));
  }
}

TEST(Utf8Test, RefusesTruncatedAndStrayBytesAtTheirPlace) {
  EXPECT_EQ(utf8_valid_prefix("ab\xe2\x82"), 2u);
  EXPECT_EQ(utf8_valid_prefix("ab\x80z"), 2u);
  EXPECT_EQ(utf8_valid_prefix("\xe2\x82\xac\xff"), 3u);
}

}  // namespace
}  // namespace penstock
