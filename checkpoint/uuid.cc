#include "checkpoint/uuid.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <cerrno>

namespace penstock {
namespace {

std::optional<uint64_t> parse_word(std::string_view digits) {
  uint64_t word = 0;
  for (const char c : digits) {
    const bool decimal = c >= '0' && c <= '9';
    if (!decimal && !(c >= 'a' && c <= 'f')) return std::nullopt;
    word = word << 4 | static_cast<uint64_t>(decimal ? c - '0' : c - 'a' + 10);
  }
  return word;
}

}  // namespace

Uuid random_uuid() {
  Uuid uuid;
  ssize_t count = 0;
  do {
    count = ::getrandom(&uuid, sizeof(uuid), 0);  // up to 256 bytes never come back short
  } while (count < 0 && errno == EINTR);
  PENSTOCK_CHECK(count == sizeof(uuid), count, errno);
  return uuid;
}

std::string to_hex(const Uuid& uuid) {
  return fmt::format("{:016x}{:016x}", uuid.high, uuid.low);
}

Result<Uuid> parse_uuid(std::string_view text) {
  if (text.size() == 32) {
    const auto high = parse_word(text.substr(0, 16));
    const auto low = parse_word(text.substr(16));
    if (high && low) return Uuid{.low = *low, .high = *high};
  }
  return invalid_argument(
      fmt::format("\"{}\" is not 32 lower-case hexadecimal digits", text.substr(0, 64)));
}

}  // namespace penstock
