// How a rank is reached: the text, and the bytes under it with a checksum that is right.
#include "comm/base/check.h"
#include "comm/base/hash.h"
#include "comm/data/ucx_address.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

void try_text(const std::string& text) {
  const auto address = decode_ucx_address(text);
  if (!address.ok()) {
    PENSTOCK_CHECK(address.status().code() == Code::kInvalidArgument);
    return;
  }
  PENSTOCK_CHECK(encode_ucx_address(*address) == text, text);
}

}  // namespace

void fuzz::ucx_address(Bytes input) {
  try_text(std::string(as_text(input)));
  ByteWriter writer;
  writer.put_bytes(input);
  writer.put(crc32c(input));
  std::string text;
  for (const std::byte byte : writer.data()) {
    text += fmt::format("{:02x}", static_cast<unsigned>(byte));
  }
  try_text(text);
}

}  // namespace penstock
