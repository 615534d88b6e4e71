// What the checkpoint index keeps under its keys, as bytes. Used by the index only.
#pragma once

#include <string>
#include <string_view>

#include "checkpoint/index.h"
#include "checkpoint/index_witness.h"

namespace penstock {

std::string encode_row(const CheckpointInfo& info);
// kDataLoss for anything that encode_row() did not write.
Result<CheckpointInfo> decode_row(std::string_view bytes);

// The newest link of the chain of changes, as the index itself holds it.
struct ChainLink {
  ChainHead head;
  Digest previous;  // of the head before
};
std::string encode_link(const ChainLink& link);
Result<ChainLink> decode_link(std::string_view bytes);

}  // namespace penstock
