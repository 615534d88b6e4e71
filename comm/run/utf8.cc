#include "comm/run/utf8.h"

#include <cstdint>

namespace penstock {

namespace {

// Bytes of the character that starts at `at`, or 0 when there is no valid one.
size_t character_bytes(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(at);
  if (lead < 0x80) return 1;
  size_t count = 0;
  uint32_t point = 0;
  uint32_t point_min = 0;  // below it the same character has a shorter form
  if ((lead & 0xe0) == 0xc0) {
    count = 2, point = lead & 0x1f, point_min = 0x80;
  } else if ((lead & 0xf0) == 0xe0) {
    count = 3, point = lead & 0x0f, point_min = 0x800;
  } else if ((lead & 0xf8) == 0xf0) {
    count = 4, point = lead & 0x07, point_min = 0x10000;
  } else {
    return 0;
  }
  if (text.size() - at < count) return 0;
  for (size_t i = 1; i < count; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return 0;
    point = point << 6 | (byte(at + i) & 0x3f);
  }
  const bool surrogate = point >= 0xd800 && point <= 0xdfff;
  return point < point_min || point > 0x10ffff || surrogate ? 0 : count;
}

}  // namespace

size_t utf8_valid_prefix(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t count = character_bytes(text, at);
    if (count == 0) return at;
    at += count;
  }
  return at;
}

}  // namespace penstock
