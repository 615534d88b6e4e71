// Frames of the control plane: one ControlMessage <-> one Cap'n Proto message (message.capnp).
#pragma once

#include <cstddef>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/status.h"
#include "comm/control/message.h"

namespace penstock {

// The rules of message.h that types cannot express: bounded strings and lists, ranks >= 0, epochs
// and jobs given, boxes inside their tensors, finite figures. Everything decode() returns passes;
// channels refuse to send what does not, so that the sender learns the reason and not the
// receiver's log.
Status check_message(const ControlMessage& message);

// The frame of `message`. Total: any message encodes, also one that check_message() refuses.
std::vector<std::byte> encode(const ControlMessage& message);

// Turns one untrusted frame into one owned, checked message. kInvalidArgument names the field or
// the bound it breaks. Copies the frame, because ZeroMQ promises no alignment; kFrameBytesMax keeps
// the copy cheap. Pure and thread-safe.
Result<ControlMessage> decode(Bytes frame);

}  // namespace penstock
