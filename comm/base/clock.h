// Time. Pure code takes an Instant as an argument; only process mains, drivers and probes call the
// functions below (ops/tidy.py refuses std::chrono clocks elsewhere).
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace penstock {

using Duration = std::chrono::nanoseconds;

// A point in wall-clock time, nanoseconds since the Unix epoch. For records and events.
struct Instant {
  int64_t nanoseconds = 0;
  auto operator<=>(const Instant&) const = default;
};
inline Instant operator+(Instant at, Duration span) {
  return {at.nanoseconds + span.count()};
}
inline Duration operator-(Instant a, Instant b) {
  return Duration(a.nanoseconds - b.nanoseconds);
}

Instant wall_now();

// Nanoseconds of the monotonic clock: for measuring spans, never for records.
int64_t monotonic_ns();

double to_seconds(Duration span);

// "2026-11-21T20:59:49.123Z"
std::string format_utc(Instant at);

}  // namespace penstock
