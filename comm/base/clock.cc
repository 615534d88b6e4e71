#include "comm/base/clock.h"

#include <fmt/format.h>

#include <ctime>

namespace penstock {

Instant wall_now() {
  const auto since_epoch = std::chrono::system_clock::now().time_since_epoch();
  return {std::chrono::duration_cast<Duration>(since_epoch).count()};
}

int64_t monotonic_ns() {
  const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<Duration>(since_start).count();
}

double to_seconds(Duration span) {
  return std::chrono::duration<double>(span).count();
}

std::string format_utc(Instant at) {
  const std::time_t seconds = at.nanoseconds / 1'000'000'000;
  const int64_t milliseconds = at.nanoseconds % 1'000'000'000 / 1'000'000;
  std::tm parts{};
  gmtime_r(&seconds, &parts);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", parts.tm_year + 1900,
                     parts.tm_mon + 1, parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec,
                     milliseconds);
}

}  // namespace penstock
