// A count and its noun: "1 rank", "4 ranks", "2 micro-batches".
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace penstock {

// REQUIRES: the noun's plural is formed with -s, or with -es after -ch.
inline std::string counted(int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : noun.ends_with("ch") ? "es" : "s");
}

}  // namespace penstock
