#include "ops/cli/program_picture.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "comm/run/layout.h"

namespace penstock {
namespace {

enum class Look : uint8_t { kForward, kBackward, kInput, kWeight, kIdle };

// Of the 256-colour palette: forward orange, backward green, its input part turquoise, its weight
// part blue, as the schedule is usually drawn; by direction.
constexpr int kIdleColour = 240;
constexpr int kPassColours[4][2] = {{208, 222}, {71, 150}, {37, 116}, {68, 147}};

constexpr double kForwardShare = 1.0 / 3;  // of a pair's cell; the rest is the backward's
constexpr int64_t kBandsMax = 4;           // of one picture on a terminal
constexpr double kPictureColumnsMax = 100'000;

// One character of a row.
struct Glyph {
  char character = '.';
  Look look = Look::kIdle;
  Look below = Look::kIdle;  // in an overlapped pair: what the lower half shows
  uint8_t direction = 0;
  uint8_t direction_below = 0;
};

int colour_of(Look look, uint8_t direction) {
  return kPassColours[static_cast<int>(look)][direction];
}

char microbatch_letter(uint8_t direction, int32_t microbatch) {
  return direction == 0 ? static_cast<char>('0' + microbatch % 10)
                        : static_cast<char>('a' + microbatch % 26);
}

// One pass that takes place in some columns of a row.
struct Pass {
  Look look = Look::kIdle;
  uint8_t direction = 0;
  int32_t microbatch = 0;
};

char pass_letter(Look look) {
  return "FBbW."[static_cast<int>(look)];
}

// A rank's row in full length.
class Row {
 public:
  Row(const std::vector<Instruction>& program, const RankTimeline& timeline, double scale,
      bool letters)
      : scale_(scale), letters_(letters) {
    for (size_t i = 0; i < program.size(); ++i) draw(program[i], timeline.spans[i]);
  }
  const std::vector<Glyph>& glyphs() const { return glyphs_; }

 private:
  void draw(const Instruction& i, const Span& span) {
    const auto begin = static_cast<int64_t>(std::lround(span.begin * scale_));
    const auto end = static_cast<int64_t>(std::lround(span.end * scale_));
    const Pass forward{Look::kForward, i.direction, i.microbatch};
    switch (i.op) {
      case Op::kForward:
        return put(begin, end, forward, '-');
      case Op::kBackward:
        return put(begin, end, {Look::kBackward, i.direction, i.microbatch}, '-');
      case Op::kBackwardInput:
        weights_.push_back({Look::kWeight, i.direction, i.microbatch});
        return put(begin, end, {Look::kInput, i.direction, i.microbatch}, '-');
      case Op::kBackwardWeight:
        put(begin, end, weights_.front(), '-');
        weights_.pop_front();
        return;
      case Op::kOverlapped: {
        const auto columns = static_cast<double>(end - begin);
        const int64_t middle = begin + std::lround(columns * kForwardShare);
        const Pass backward{Look::kBackward, i.backward_direction, i.backward_microbatch};
        put(begin, middle, forward, '=');
        put(middle, end, backward, '=');
        for (int64_t c = begin; c < end; ++c) {  // fill, in two colours one above the other
          Glyph& glyph = glyphs_[static_cast<size_t>(c)];
          if (glyph.character != '=') continue;
          glyph.look = forward.look;
          glyph.direction = forward.direction;
          glyph.below = backward.look;
          glyph.direction_below = backward.direction;
        }
        return;
      }
      default:
        return;
    }
  }

  void put(int64_t begin, int64_t end, const Pass& pass, char fill) {
    resize(end);
    for (int64_t c = begin; c < end; ++c) {
      Glyph& glyph = glyphs_[static_cast<size_t>(c)];
      glyph = {.character = fill, .look = pass.look, .direction = pass.direction};
      const int64_t at = c - begin + (letters_ && end - begin > 1 ? 0 : 1);
      if (at == 0) glyph.character = pass_letter(pass.look);
      if (at == 1) glyph.character = microbatch_letter(pass.direction, pass.microbatch);
    }
  }

  void resize(int64_t columns) {
    if (std::ssize(glyphs_) < columns) glyphs_.resize(static_cast<size_t>(columns));
  }

  const double scale_;
  const bool letters_;
  std::vector<Glyph> glyphs_;
  std::deque<Pass> weights_;  // queued weight parts, oldest first
};

// With colour, fill is blank, and a pair's is an upper half block of the forward's colour on the
// backward's.
void append(std::string& text, const Glyph& glyph, const PictureStyle& style) {
  if (!style.colour) {
    text += glyph.character;
  } else if (glyph.look == Look::kIdle) {
    text += fmt::format("\x1b[38;5;{}m·\x1b[0m", kIdleColour);
  } else if (glyph.below != Look::kIdle) {
    text += fmt::format("\x1b[38;5;{};48;5;{}m▀\x1b[0m", colour_of(glyph.look, glyph.direction),
                        colour_of(glyph.below, glyph.direction_below));
  } else {
    text += fmt::format("\x1b[38;5;16;48;5;{}m{}\x1b[0m", colour_of(glyph.look, glyph.direction),
                        glyph.character == '-' || glyph.character == '=' ? ' ' : glyph.character);
  }
}

// The ruler under columns [begin, end): "|0" at 0, "|10" ten seconds later, ….
std::string ruler(int64_t begin, int64_t end, double scale) {
  constexpr double kColumnsPerTick = 12;
  const double decade = std::pow(10.0, std::floor(std::log10(kColumnsPerTick / scale)));
  double tick = decade;
  for (const double factor : {2.0, 5.0, 10.0}) {
    if (tick * scale < kColumnsPerTick) tick = decade * factor;
  }
  std::string text(static_cast<size_t>(end - begin), ' ');
  for (int64_t k = 0;; ++k) {
    const int64_t column = std::lround(static_cast<double>(k) * tick * scale);
    const std::string mark = fmt::format("|{:g}", static_cast<double>(k) * tick);
    if (column + std::ssize(mark) > end) break;
    if (column >= begin) text.replace(static_cast<size_t>(column - begin), mark.size(), mark);
  }
  return text.substr(0, text.find_last_not_of(' ') + 1);
}

double shortest_pass(const std::vector<Program>& programs, ProgramKind kind,
                     const Timeline& timeline) {
  double shortest = std::numeric_limits<double>::infinity();
  for (size_t r = 0; r < programs.size(); ++r) {
    const std::vector<Instruction>& list = instructions_of(programs[r], kind);
    for (size_t i = 0; i < list.size(); ++i) {
      const Span& span = timeline.ranks[r].spans[i];
      const bool pass = list[i].peer < 0 && list[i].op < Op::kReduceGradients;
      if (pass && span.end > span.begin) shortest = std::min(shortest, span.end - span.begin);
    }
  }
  return std::isfinite(shortest) ? shortest : timeline.makespan;
}

// Columns a second: whole columns for the shortest pass, at least what its cell needs, and as many
// as let the step fit.
double scale_of(double shortest, double makespan, int64_t room, bool colour) {
  constexpr double kWidestShortest = 4;
  const double needed = colour ? 1 : 2;
  const double fitting = std::floor(shortest * static_cast<double>(room) / makespan + 1e-9);
  const double columns = room == 0 ? 2 : std::clamp(fitting, needed, kWidestShortest);
  return std::min(columns / shortest, kPictureColumnsMax / makespan);
}

std::string legend(const ParallelismSpec& parallelism, const std::vector<Program>& programs,
                   ProgramKind kind, const PictureStyle& style) {
  const bool two = direction_count(parallelism) == 2;
  const auto runs = [&](Op op) {
    const auto has = [&](const Program& program) {
      const std::vector<Instruction>& list = instructions_of(program, kind);
      return std::any_of(list.begin(), list.end(),
                         [&](const Instruction& i) { return i.op == op; });
    };
    return std::any_of(programs.begin(), programs.end(), has);
  };
  std::string text;
  const auto explain = [&](Op op, const std::vector<Glyph>& sample, std::string_view meaning) {
    if (!runs(op)) return;
    for (const Glyph& glyph : sample) append(text, glyph, style);
    text += fmt::format(" {}   ", meaning);
  };
  const auto pass = [&](Op op, Look look, std::string_view meaning) {
    std::vector<Glyph> sample = {{.character = pass_letter(look), .look = look},
                                 {.character = '0', .look = look}};
    if (two) {
      sample.push_back({.character = pass_letter(look), .look = look, .direction = 1});
      sample.push_back({.character = 'a', .look = look, .direction = 1});
    }
    explain(op, sample, meaning);
  };
  pass(Op::kForward, Look::kForward, "forward");
  pass(Op::kBackward, Look::kBackward, "backward");
  pass(Op::kBackwardInput, Look::kInput, "its input part");
  pass(Op::kBackwardWeight, Look::kWeight, "its weight part");
  const Glyph both{.character = '=',
                   .look = Look::kForward,
                   .below = Look::kBackward,
                   .direction = 0,
                   .direction_below = 1};
  explain(Op::kOverlapped, {both, both}, "overlapped");
  text.erase(text.find_last_not_of(' ') + 1);
  text += "\ndigits: micro-batches";
  if (parallelism.schedule == Schedule::kDualPipeV) {
    text += " on the way down; letters: on the way back, a is 0";
  } else if (two) {
    text += " from the first rank; letters: from the last";
  }
  return text + "; %: idle share\n";
}

}  // namespace

std::string draw_programs(const ParallelismSpec& parallelism, const std::vector<Program>& programs,
                          ProgramKind kind, const Timeline& timeline, const PictureStyle& style) {
  const std::string widest = fmt::format("rank {}  ", programs.size() - 1);
  constexpr int64_t kShareColumns = 8;  // "  11.1%" and a free last column
  const int64_t room =
      style.columns == 0
          ? 0
          : std::max<int64_t>(20, style.columns - std::ssize(widest) - kShareColumns);
  const double shortest = shortest_pass(programs, kind, timeline);
  const double scale = scale_of(shortest, timeline.makespan, room, style.colour);
  const auto total = static_cast<int64_t>(std::ceil(timeline.makespan * scale - 1e-9));
  const int64_t band = room == 0 ? total : std::min(room, total);
  const int64_t bands = (total + band - 1) / band;
  const bool letters = shortest * scale > 1.5;
  std::vector<Row> rows;
  for (size_t r = 0; r < programs.size(); ++r) {
    rows.emplace_back(instructions_of(programs[r], kind), timeline.ranks[r], scale, letters);
  }
  std::string text;
  for (int64_t b = 0; b < bands; ++b) {
    if (bands > kBandsMax && b == kBandsMax / 2) {
      text += fmt::format("{:{}}… {} more like these …\n\n", "", widest.size(), bands - kBandsMax);
      b = bands - kBandsMax / 2;
    }
    const int64_t begin = b * band, end = std::min(total, begin + band);
    for (size_t r = 0; r < rows.size(); ++r) {
      text += fmt::format("{:<{}}", fmt::format("rank {}", r), widest.size());
      for (int64_t c = begin; c < end; ++c) {
        const auto& glyphs = rows[r].glyphs();
        append(text, c < std::ssize(glyphs) ? glyphs[static_cast<size_t>(c)] : Glyph{}, style);
      }
      if (b + 1 == bands)
        text += fmt::format("  {:4.1f}%", 100 * timeline.ranks[r].idle / timeline.makespan);
      text += "\n";
    }
    text += fmt::format("{:{}}{}\n", "", widest.size(), ruler(begin, end, scale));
  }
  return text + "\n" + legend(parallelism, programs, kind, style);
}

}  // namespace penstock
