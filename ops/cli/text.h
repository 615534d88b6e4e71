// How the command line writes and reads quantities. Pure functions.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/byte_text.h"
#include "comm/base/clock.h"
#include "comm/base/status.h"

namespace penstock {

// 0.4 s -> "0s", 75 -> "1m15s", 7300 -> "2h1m", 200000 -> "2d7h". Never negative.
std::string format_seconds(double seconds);
// 950 -> "950", 8123.4 -> "8.1k", 249856 -> "250k", 1.5e9 -> "1.5G".
std::string format_quantity(double value);
// "90", "90s", "10m", "2h", "1.5h" as a duration. kInvalidArgument otherwise, and for what is
// negative or not finite.
Result<std::chrono::milliseconds> parse_duration(std::string_view text);
// "2026-11-21T20:59:49.123Z" as nanoseconds since 1970. kInvalidArgument for anything else.
Result<Instant> parse_utc(std::string_view text);

// Columns under upper-case headers, two spaces apart, no borders; the last column is not padded.
// `width_max`: rows wider than the terminal are cut in the last column; 0 cuts nothing.
// `widths`, where given: of the columns of the rows before, which these rows are to stand under;
// wider ones widen them. Empty: there are none before.
std::string format_table(const std::vector<std::string>& headers,
                         const std::vector<std::vector<std::string>>& rows, bool with_headers,
                         int width_max, std::vector<size_t>* widths = nullptr);

// Characters of UTF-8 text (not bytes); colour codes take no room.
size_t character_count(std::string_view text);
// The text, or as much of it as leaves room for "…" within `characters_max`, which is at least 1.
std::string cut_text(std::string_view text, size_t characters_max);

}  // namespace penstock
