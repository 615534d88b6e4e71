// 128 random bits from the operating system: names of segment files and stores, never reused.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "comm/base/status.h"

namespace penstock {

struct Uuid {
  uint64_t low = 0;
  uint64_t high = 0;
  auto operator<=>(const Uuid&) const = default;
};

// Fresh from getrandom(2). Aborts when the kernel has no entropy source at all.
Uuid random_uuid();

// 32 lower-case hexadecimal digits, high word first.
std::string to_hex(const Uuid& uuid);
// Accepts exactly what to_hex writes.
Result<Uuid> parse_uuid(std::string_view text);

}  // namespace penstock
