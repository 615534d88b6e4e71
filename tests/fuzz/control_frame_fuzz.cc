// A frame of the control plane, as it comes from a socket: the bytes as they are, and as changes to
// a frame that is right, for a fuzzer hardly finds one by itself.
#include <cstring>

#include "comm/base/check.h"
#include "comm/control/codec.h"
#include "tests/control/random_message.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

void try_frame(Bytes frame) {
  const auto message = decode(frame);
  if (!message.ok()) {
    PENSTOCK_CHECK(message.status().code() == Code::kInvalidArgument);
    return;
  }
  PENSTOCK_CHECK(check_message(*message).ok());
  const std::vector<std::byte> encoded = encode(*message);
  const auto again = decode(encoded);
  PENSTOCK_CHECK(again.ok(), again.status().message());
  PENSTOCK_CHECK(encode(*again) == encoded);
}

// Kind and seed of a message, then any number of changes: position (two bytes) and new byte.
std::vector<std::byte> changed_frame(Bytes recipe) {
  Random random(static_cast<uint64_t>(recipe[1]), 0);
  const size_t kind = static_cast<size_t>(recipe[0]) % kMessageKinds;
  std::vector<std::byte> frame = encode(random_message(kind, random));
  for (recipe = recipe.subspan(2); recipe.size() >= 3; recipe = recipe.subspan(3)) {
    const size_t at = static_cast<size_t>(recipe[0]) + 256 * static_cast<size_t>(recipe[1]);
    frame[at % frame.size()] = recipe[2];
  }
  return frame;
}

}  // namespace

void fuzz::control_frame(Bytes input) {
  try_frame(input);
  if (input.size() >= 2) try_frame(changed_frame(input));
}

}  // namespace penstock
