// Random valid messages of every kind, a function of the seed.
#pragma once

#include "comm/base/random.h"
#include "comm/control/message.h"

namespace penstock {

// `kind`: index in ControlMessage. What it returns passes check_message() and has no NaN.
ControlMessage random_message(size_t kind, Random& random);

inline constexpr size_t kMessageKinds = std::variant_size_v<ControlMessage>;

}  // namespace penstock
