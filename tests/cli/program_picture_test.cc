#include "ops/cli/program_picture.h"

#include <gtest/gtest.h>

#include <regex>
#include <sstream>

#include "coordinator/plan/schedule.h"
#include "ops/cli/text.h"

namespace penstock {
namespace {

std::string picture(const ParallelismSpec& layout, const PictureStyle& style = {},
                    ProgramKind kind = ProgramKind::kTraining) {
  const std::vector<Program> programs = *make_programs(layout);
  const Timeline timeline = *run_in_virtual_time(layout, programs, kind, {});
  return draw_programs(layout, programs, kind, timeline, style);
}

ParallelismSpec layout_of(Schedule schedule, int64_t pipeline, int64_t microbatches) {
  return {.pipeline = pipeline, .schedule = schedule, .microbatches = microbatches};
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

std::string without_colour(const std::string& text) {
  return std::regex_replace(text, std::regex("\x1b\\[[0-9;]*m"), "");
}

TEST(ProgramPictureTest, ARowShowsEveryPassInItsPlaceAndTheIdleShare) {
  const auto lines = lines_of(picture(layout_of(Schedule::kOneForwardOneBackward, 2, 2)));
  ASSERT_GE(lines.size(), 3u);
  EXPECT_EQ(lines[0], "rank 0  F0F1....B0--..B1--  33.3%");
  EXPECT_EQ(lines[1], "rank 1  ..F0B0--F1B1--....  33.3%");
  EXPECT_EQ(lines[2], "        |0");
}

TEST(ProgramPictureTest, APairShowsBothItsHalvesAndDirectionsHaveTheirOwnCharacters) {
  const auto lines = lines_of(picture(layout_of(Schedule::kDualPipe, 2, 4)));
  ASSERT_GE(lines.size(), 2u);
  EXPECT_EQ(lines[0], "rank 0  F0FaF1Ba--FbB0==Bb--b1W1   0.0%");
  EXPECT_EQ(lines[1], "rank 1  FaF0FbB0--F1Ba==B1--bbWb   0.0%");
}

TEST(ProgramPictureTest, AnEvaluationShowsForwardsOnly) {
  const auto lines =
      lines_of(picture(layout_of(Schedule::kDualPipeV, 2, 4), {}, ProgramKind::kEvaluation));
  EXPECT_EQ(lines[0].find_first_of("BW="), std::string::npos) << lines[0];
  EXPECT_EQ(lines[4].find("weight"), std::string::npos) << lines[4];
}

TEST(ProgramPictureTest, ColourAddsNothingButColourAndShading) {
  const PictureStyle wide{.columns = 200, .colour = true};
  const std::string coloured = picture(layout_of(Schedule::kZeroBubble, 4, 6), wide);
  EXPECT_NE(coloured.find("\x1b[38;5;16;48;5;208mF"), std::string::npos);
  std::string plain = picture(layout_of(Schedule::kZeroBubble, 4, 6), {.columns = 200});
  std::string bare = std::regex_replace(without_colour(coloured), std::regex("·"), ".");
  std::replace(plain.begin(), plain.end(), '-', ' ');
  std::replace(bare.begin(), bare.end(), '-', ' ');
  EXPECT_EQ(bare, plain);
}

TEST(ProgramPictureTest, NoLineIsWiderThanTheTerminal) {
  for (const Schedule schedule : kSchedules) {
    for (const bool colour : {false, true}) {
      for (const int columns : {40, 80, 133}) {
        for (const int64_t microbatches : {8, 20, 300}) {
          const std::string text =
              picture(layout_of(schedule, 4, microbatches), {.columns = columns, .colour = colour});
          const auto lines = lines_of(without_colour(text));
          for (size_t i = 0; i + 3 < lines.size(); ++i) {  // all but the explanation
            EXPECT_LE(character_count(lines[i]), static_cast<size_t>(columns)) << lines[i];
          }
        }
      }
    }
  }
}

TEST(ProgramPictureTest, AStepTooLongForTheTerminalGoesOnBelowAndLeavesItsMiddleOut) {
  const auto rows = [](const std::string& text) {
    const auto lines = lines_of(text);
    return std::count_if(lines.begin(), lines.end(),
                         [](const std::string& line) { return line.starts_with("rank 0"); });
  };
  EXPECT_EQ(rows(picture(layout_of(Schedule::kDualPipe, 2, 4), {.columns = 40})), 1);
  EXPECT_EQ(rows(picture(layout_of(Schedule::kDualPipe, 2, 8), {.columns = 40})), 2);
  const std::string longest = picture(layout_of(Schedule::kDualPipe, 2, 200), {.columns = 40});
  EXPECT_EQ(rows(longest), 4);
  EXPECT_NE(longest.find("… 46 more like these …"), std::string::npos) << longest;
}

}  // namespace
}  // namespace penstock
