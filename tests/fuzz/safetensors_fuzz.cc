// The header of a safetensors file: two bytes that say how much data follows, then the JSON.
#include "checkpoint/safetensors.h"
#include "comm/base/check.h"
#include "tests/fuzz/targets.h"

namespace penstock {

void fuzz::safetensors(Bytes input) {
  if (input.size() < 2) return;
  const uint64_t data_bytes =
      static_cast<uint64_t>(input[0]) + 256 * static_cast<uint64_t>(input[1]);
  const auto header = decode_safetensors_header(as_text(input.subspan(2)), data_bytes);
  if (!header.ok()) return;
  uint64_t end = 0;
  for (const SafetensorsEntry& tensor : header->tensors) {
    PENSTOCK_CHECK(tensor.begin == end, tensor.name);
    const auto elements = static_cast<uint64_t>(element_count(tensor.shape));
    PENSTOCK_CHECK(tensor.byte_count() == elements * dtype_bytes(tensor.dtype), tensor.name);
    end = tensor.end;
  }
  PENSTOCK_CHECK(end == data_bytes, end, data_bytes);
}

}  // namespace penstock
