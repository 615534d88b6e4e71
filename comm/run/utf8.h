// Is this text? Every text that comes from a user's file is checked once, where it is read.
#pragma once

#include <cstddef>
#include <string_view>

namespace penstock {

// Offset of the first byte that is not part of valid UTF-8 (RFC 3629: no overlong forms, no
// surrogates, nothing above U+10FFFF), or text.size() when all of it is.
size_t utf8_valid_prefix(std::string_view text);

}  // namespace penstock
