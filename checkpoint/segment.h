// Segment files: what one rank saved for one step. Written once under a random name, never changed.
//
//   | header 4 KiB | slices, aligned, zero padding between | footer | trailer 64 B |
//                  ^ blocks of block_bytes, each with a CRC-32C in the footer, padding included
//
// A block's checksum is salted with the segment's uuid and the block's index, so that a block moved
// within the file or brought from another one does not pass. Byte by byte: docs/checkpoint-
// format.md. Writing: segment_writer.h. Reading: segment_reader.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/slice.h"
#include "checkpoint/uuid.h"
#include "comm/base/hash.h"
#include "comm/base/ids.h"

namespace penstock {

// Written; older ones are read. Format 1 differs in one thing: a slice's digest is the XXH3-128 of
// its bytes.
inline constexpr uint32_t kSegmentFormat = 2;
inline constexpr uint64_t kSegmentHeaderBytes = 4096;
inline constexpr uint64_t kSegmentTrailerBytes = 64;
// Slices of this size and more start on a 4 KiB boundary; smaller ones on 64 bytes.
inline constexpr uint64_t kAlignedSliceBytesMin = 64 << 10;
inline constexpr uint64_t kSliceAlignment = 4096;
inline constexpr uint64_t kSmallSliceAlignment = 64;
// Small enough that a resharded read, widened to whole blocks, wastes little; 4 B of checksum per
// 16 KiB.
inline constexpr uint32_t kBlockBytes = 16 << 10;
inline constexpr uint32_t kBlockBytesMax = 1 << 20;
inline constexpr uint64_t kFooterBytesMax = 256 << 20;
inline constexpr uint32_t kSegmentSlicesMax = 1 << 20;

// Who wrote it, at which step.
struct SegmentIdentity {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t step = 0;
  bool operator==(const SegmentIdentity&) const = default;
};

struct SegmentHeader {
  uint32_t format = kSegmentFormat;
  uint32_t block_bytes = kBlockBytes;
  Uuid segment;
  Uuid store;
  SegmentIdentity identity;
};

// One slice in a segment.
struct SegmentSlice {
  TensorSlice slice;
  uint64_t file_offset = 0;
  uint64_t byte_count = 0;
  Digest digest;  // slice_digest.h; adds up over boxes
};

// What a finished segment is known by; the footer digest covers header, slice table and block sums,
// and through these every byte of the file.
struct SegmentSummary {
  std::string file;  // name within the job's checkpoint directory
  Rank rank;
  uint64_t byte_count = 0;
  Digest footer_digest;
  std::vector<SegmentSlice> slices;
};

// "e0000000003-r0000000002-<32 hex digits>.segment"
std::string segment_file_name(Epoch epoch, Rank rank, const Uuid& uuid);
struct SegmentFileName {
  Epoch epoch;
  Rank rank;
  Uuid uuid;
};
// kInvalidArgument for anything else, paths included.
Result<SegmentFileName> parse_segment_file_name(std::string_view name);

// Checksum of one block: CRC-32C of (uuid low, uuid high, index, bytes), all little-endian.
uint32_t block_sum(const Uuid& segment, uint64_t block_index, Bytes bytes);

// The wire forms, shared by writer, reader and tests.
namespace segment_format {

struct Footer {
  uint64_t data_end = 0;  // first byte after the last block
  std::vector<SegmentSlice> slices;
  std::vector<uint32_t> block_sums;
};

std::vector<std::byte> encode_header(const SegmentHeader& header);
// Bytes must be the first kSegmentHeaderBytes of a file.
Result<SegmentHeader> decode_header(Bytes bytes);

// Bytes that a footer of these slices and blocks takes, trailer excluded.
uint64_t footer_bytes(const std::vector<SegmentSlice>& slices, uint64_t block_count);
std::vector<std::byte> encode_footer(const SegmentHeader& header, const Footer& footer);
// Checks every count, name, box, offset and length against the bounds above and data_end.
Result<Footer> decode_footer(const SegmentHeader& header, Bytes bytes);

struct Trailer {
  uint64_t footer_offset = 0;
  uint64_t footer_byte_count = 0;
  uint64_t file_byte_count = 0;
  Digest footer_digest;              // of header, then footer
  uint32_t format = kSegmentFormat;  // the header's
};
std::vector<std::byte> encode_trailer(const Trailer& trailer);
Result<Trailer> decode_trailer(Bytes bytes);

uint64_t block_count(uint64_t data_end, uint32_t block_bytes);

}  // namespace segment_format
}  // namespace penstock
