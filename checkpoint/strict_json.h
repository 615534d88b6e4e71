// JSON from files that others wrote: bounded in depth and number of values, and no key twice.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "comm/base/status.h"

namespace penstock {

struct JsonLimits {
  size_t depth_max = 8;         // of objects and lists in each other
  size_t values_max = 1 << 16;  // of any kind, so that a small text cannot ask for much memory
};

// kDataLoss says what is wrong and at which byte; a key given twice is wrong.
Result<nlohmann::json> parse_strict_json(std::string_view text, const JsonLimits& limits = {});

}  // namespace penstock
