#include "ops/cli/text.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "comm/base/counted.h"
#include "ops/cli/output.h"

#include <cmath>

namespace penstock {
namespace {

using std::chrono::milliseconds;

TEST(TextTest, SecondsAreWrittenInTheirTwoLargestUnits) {
  EXPECT_EQ(format_seconds(0.4), "0s");
  EXPECT_EQ(format_seconds(59.4), "59s");
  EXPECT_EQ(format_seconds(75), "1m15s");
  EXPECT_EQ(format_seconds(7300), "2h1m");
  EXPECT_EQ(format_seconds(200'000), "2d7h");
  EXPECT_EQ(format_seconds(-5), "0s");
  EXPECT_EQ(format_seconds(NAN), "0s");
}

TEST(TextTest, QuantitiesHaveThreeDigits) {
  EXPECT_EQ(format_quantity(0), "0");
  EXPECT_EQ(format_quantity(950), "950");
  EXPECT_EQ(format_quantity(999.6), "1.0k");
  EXPECT_EQ(format_quantity(8123.4), "8.1k");
  EXPECT_EQ(format_quantity(249'856), "250k");
  EXPECT_EQ(format_quantity(1.5e9), "1.5G");
}

TEST(TextTest, BytesUsePowersOfTwo) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1536), "1.5 KiB");
  EXPECT_EQ(format_bytes(3.0 * (1 << 30)), "3.0 GiB");
}

TEST(TextTest, DurationsAreRead) {
  EXPECT_EQ(*parse_duration("90"), milliseconds(90'000));
  EXPECT_EQ(*parse_duration("90s"), milliseconds(90'000));
  EXPECT_EQ(*parse_duration("1.5m"), milliseconds(90'000));
  EXPECT_EQ(*parse_duration("2h"), milliseconds(7'200'000));
  EXPECT_EQ(*parse_duration("250ms"), milliseconds(250));
}

TEST(TextTest, WhatIsNoDurationIsRefused) {
  for (const char* text : {"", "s", "-1s", "1 s", "1x", "nan", "inf", "1e300h"}) {
    EXPECT_EQ(parse_duration(text).status().code(), Code::kInvalidArgument) << text;
  }
}

TEST(TextTest, UtcTimesRoundTrip) {
  const Instant at{1'763'758'789'123'000'000};
  EXPECT_EQ(*parse_utc(format_utc(at)), at);
  EXPECT_FALSE(parse_utc("yesterday").ok());
  EXPECT_FALSE(parse_utc("2026-11-21T20:59:49.123Z?").ok());
}

TEST(TextTest, ColumnsAreTwoSpacesApartAndLinesHaveNoTrailingSpace) {
  EXPECT_EQ(format_table({"A", "LONG"}, {{"xyz", "1"}, {"é", ""}}, true, 0),
            "A    LONG\nxyz  1\né\n");
  EXPECT_EQ(format_table({"A", "B"}, {{"x", "y"}}, false, 0), "x  y\n");
  EXPECT_EQ(format_table({"A", "B"}, {}, false, 0), "");
}

TEST(TextTest, TheLastColumnIsCutToTheTerminal) {
  EXPECT_EQ(format_table({"A", "B"}, {{"x", "abcdefgh"}}, false, 8), "x  abcd…\n");
  EXPECT_EQ(format_table({"A", "B"}, {{"x", "äöüäöüäö"}}, false, 8), "x  äöüä…\n");
  // Colour takes no room, and ends where its text is cut.
  EXPECT_EQ(format_table({"STATE", "B"}, {{"\x1b[31mx\x1b[0m", "y"}}, true, 0),
            "STATE  B\n\x1b[31mx\x1b[0m      y\n");
  EXPECT_EQ(cut_text("\x1b[31mabcdef\x1b[0m", 4), "\x1b[31mabc…\x1b[0m");
}

TEST(TextTest, LongTextIsCutBetweenCharacters) {
  EXPECT_EQ(cut_text("abc", 3), "abc");
  EXPECT_EQ(cut_text("abcd", 3), "ab…");
  EXPECT_EQ(cut_text("äöüß", 3), "äö…");
  EXPECT_EQ(cut_text("ab", 1), "…");
}

TEST(TextTest, OneOfAThingIsNotSeveral) {
  EXPECT_EQ(counted(1, "rank"), "1 rank");
  EXPECT_EQ(counted(0, "rank"), "0 ranks");
  EXPECT_EQ(counted(4, "micro-batch"), "4 micro-batches");
  EXPECT_EQ(field_counted({{"steps", 1}}, "steps", "step"), "1 step");
}

TEST(TextTest, RowsThatComeLaterStandUnderTheFirst) {
  std::vector<size_t> widths;
  EXPECT_EQ(format_table({"STEP", "LOSS", "NOTE"}, {{"9", "5.1234", "a"}}, true, 0, &widths),
            "STEP  LOSS    NOTE\n9     5.1234  a\n");
  EXPECT_EQ(format_table({"STEP", "LOSS", "NOTE"}, {{"10", "-", "b"}}, false, 0, &widths),
            "10    -       b\n");
  EXPECT_EQ(format_table({"STEP", "LOSS", "NOTE"}, {{"10", "12.1234", "b"}}, false, 0, &widths),
            "10    12.1234  b\n");
  EXPECT_EQ(format_table({"STEP", "LOSS", "NOTE"}, {{"11", "-", "b"}}, false, 0, &widths),
            "11    -        b\n");
}

}  // namespace
}  // namespace penstock
