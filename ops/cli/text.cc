#include "ops/cli/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <ctime>

namespace penstock {

std::string format_seconds(double seconds) {
  constexpr double kSecondsMax = 1e12;
  const int64_t whole =
      std::isfinite(seconds) ? std::llround(std::clamp(seconds, 0.0, kSecondsMax)) : 0;
  if (whole < 60) return fmt::format("{}s", whole);
  if (whole < 3600) return fmt::format("{}m{}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h{}m", whole / 3600, whole % 3600 / 60);
  return fmt::format("{}d{}h", whole / 86400, whole % 86400 / 3600);
}

std::string format_quantity(double value) {
  constexpr const char* kSuffixes[] = {"", "k", "M", "G", "T", "P"};
  size_t suffix = 0;
  while (std::abs(value) >= 999.5 && suffix + 1 < std::size(kSuffixes)) value /= 1000, ++suffix;
  // One decimal while there are fewer than three digits before it.
  if (suffix == 0 || std::abs(value) >= 99.95)
    return fmt::format("{:.0f}{}", value, kSuffixes[suffix]);
  return fmt::format("{:.1f}{}", value, kSuffixes[suffix]);
}

Result<std::chrono::milliseconds> parse_duration(std::string_view text) {
  double number = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string_view unit = text.substr(end - text.data());
  const double scale = unit.empty() || unit == "s" ? 1.0
                       : unit == "ms"              ? 1e-3
                       : unit == "m"               ? 60.0
                       : unit == "h"               ? 3600.0
                       : unit == "d"               ? 86400.0
                                                   : 0.0;
  constexpr double kSecondsMax = 1e9;
  const bool in_range = std::isfinite(number) && number >= 0 && number * scale <= kSecondsMax;
  if (error != std::errc() || scale == 0.0 || !in_range) {
    return invalid_argument(fmt::format("\"{}\" is not a duration such as 90s, 10m or 2h", text));
  }
  return std::chrono::milliseconds(std::llround(number * scale * 1000));
}

Result<Instant> parse_utc(std::string_view text) {
  std::tm parts = {};
  int milliseconds = 0;
  int consumed = 0;
  const std::string copy(text);
  const int count = std::sscanf(copy.c_str(), "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ%n", &parts.tm_year,
                                &parts.tm_mon, &parts.tm_mday, &parts.tm_hour, &parts.tm_min,
                                &parts.tm_sec, &milliseconds, &consumed);
  if (count != 7 || consumed != static_cast<int>(copy.size())) {
    return invalid_argument(fmt::format("\"{}\" is not a UTC time", text));
  }
  parts.tm_year -= 1900;
  parts.tm_mon -= 1;
  return Instant{timegm(&parts) * 1'000'000'000 + milliseconds * 1'000'000};
}

namespace {

// The bytes of the colour code that begins at `at`, or 0.
size_t colour_code_size(std::string_view text, size_t at) {
  if (text[at] != '\x1b') return 0;
  const size_t end = text.find('m', at);
  return (end == std::string_view::npos ? text.size() : end + 1) - at;
}

}  // namespace

size_t character_count(std::string_view text) {
  size_t count = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t code = colour_code_size(text, at);
    if (code == 0 && (text[at] & 0xc0) != 0x80) ++count;
    at += std::max<size_t>(code, 1);
  }
  return count;
}

std::string cut_text(std::string_view text, size_t characters_max) {
  if (character_count(text) <= characters_max) return std::string(text);
  size_t at = 0;
  bool coloured = false;
  for (size_t seen = 0; at < text.size();) {
    const size_t code = colour_code_size(text, at);
    coloured |= code > 0;
    if (code == 0 && (text[at] & 0xc0) != 0x80 && seen++ + 1 == characters_max) break;
    at += std::max<size_t>(code, 1);
  }
  return std::string(text.substr(0, at)) + "…" + (coloured ? "\x1b[0m" : "");
}

namespace {

std::string padded(const std::string& text, size_t width) {
  const size_t count = character_count(text);
  return count < width ? text + std::string(width - count, ' ') : text;
}

std::string format_row(const std::vector<std::string>& cells, const std::vector<size_t>& widths,
                       int width_max) {
  std::string line;
  size_t used = 0;
  for (size_t c = 0; c + 1 < cells.size(); ++c) {
    line += padded(cells[c], widths[c]) + "  ";
    used += widths[c] + 2;
  }
  const std::string& last = cells.back();
  const size_t room = width_max <= 0                          ? character_count(last)
                      : static_cast<size_t>(width_max) > used ? width_max - used
                                                              : 1;
  line += cut_text(last, room);
  line.erase(line.find_last_not_of(' ') + 1);
  return line + "\n";
}

}  // namespace

std::string format_table(const std::vector<std::string>& headers,
                         const std::vector<std::vector<std::string>>& rows, bool with_headers,
                         int width_max, std::vector<size_t>* widths_before) {
  std::vector<size_t> widths(headers.size());
  if (widths_before != nullptr && !widths_before->empty()) widths = *widths_before;
  for (size_t c = 0; with_headers && c < headers.size(); ++c) {
    widths[c] = std::max(widths[c], character_count(headers[c]));
  }
  for (const auto& row : rows) {
    for (size_t c = 0; c < row.size(); ++c) {
      widths[c] = std::max(widths[c], character_count(row[c]));
    }
  }
  if (widths_before != nullptr) *widths_before = widths;
  std::string text = with_headers ? format_row(headers, widths, width_max) : "";
  for (const auto& row : rows) text += format_row(row, widths, width_max);
  return text;
}

}  // namespace penstock
