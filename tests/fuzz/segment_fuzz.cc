// The tables of a segment file. Checksums of header and trailer are made right first: a fuzzer does
// not find them by itself, and whoever forges a file does.
#include <cstring>

#include "checkpoint/segment.h"
#include "comm/base/check.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

// The last four of `bytes` become the CRC-32C of those before.
void seal(std::vector<std::byte>& bytes, size_t sum_at) {
  const uint32_t sum = crc32c(Bytes(bytes).first(sum_at));
  std::memcpy(bytes.data() + sum_at, &sum, sizeof(sum));
}

std::vector<std::byte> padded(Bytes bytes, size_t size) {
  std::vector<std::byte> copy(bytes.begin(), bytes.begin() + std::min(size, bytes.size()));
  copy.resize(size);
  return copy;
}

void try_header(Bytes bytes) {
  std::vector<std::byte> text = padded(bytes, kSegmentHeaderBytes);
  seal(text, kSegmentHeaderBytes - 4);
  const auto header = segment_format::decode_header(text);
  if (header.ok()) PENSTOCK_CHECK(segment_format::encode_header(*header) == text);
}

void try_trailer(Bytes bytes) {
  std::vector<std::byte> text = padded(bytes, kSegmentTrailerBytes);
  seal(text, 52);
  const auto trailer = segment_format::decode_trailer(text);
  if (trailer.ok()) PENSTOCK_CHECK(segment_format::encode_trailer(*trailer) == text);
}

void try_footer(Bytes bytes) {
  for (const uint32_t format : {1u, 2u}) {
    SegmentHeader header{.format = format, .segment = {}, .store = {}, .identity = {}};
    // The footer names its segment: take it from there, as the reader takes it from the header.
    if (bytes.size() >= 24) std::memcpy(&header.segment, bytes.data() + 8, 16);
    const auto footer = segment_format::decode_footer(header, bytes);
    if (!footer.ok()) continue;
    for (const SegmentSlice& entry : footer->slices) {
      PENSTOCK_CHECK(check_slice(entry.slice).ok());
      PENSTOCK_CHECK(entry.file_offset + entry.byte_count <= footer->data_end);
    }
    const auto again = segment_format::encode_footer(header, *footer);
    PENSTOCK_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  }
}

}  // namespace

void fuzz::segment(Bytes input) {
  try_header(input);
  try_trailer(input);
  try_footer(input);
}

}  // namespace penstock
