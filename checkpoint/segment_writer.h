// Writes one segment file durably. Runs on the caller's (background) thread.
#pragma once

#include <memory>
#include <span>

#include "checkpoint/disk_buffers.h"
#include "checkpoint/file_system.h"
#include "checkpoint/segment.h"

namespace penstock {

// A slice and its bytes: dense, row-major, borrowed; they must not change until write_segment
// returns.
struct SliceSource {
  TensorSlice slice;
  Bytes bytes;
};

// Saves `sources` as one new segment in the job's checkpoint directory (which exists) and returns
// what SegmentSaved reports. When it returns ok, data and name are on the disk; when not, the file
// is gone again. `buffers` are written to: one call at a time may have them.
//   kInvalidArgument    a slice or its byte count is wrong, or a name and box are given twice
//   kResourceExhausted  the disk or a quota is full; found before the first byte is written
//   other codes         the write, sync or close failed. Never retried on the same file: call
//                       again, which makes a new one
// Cost: one pass over the bytes (copy to a buffer, CRC-32C, digest) while the disk writes the
// buffers before; no memory but the buffers and 4 bytes of sums for each 16 KiB.
Result<SegmentSummary> write_segment(const Path& directory, const SegmentIdentity& identity,
                                     std::span<const SliceSource> sources,
                                     const DiskBuffers& buffers,
                                     FileSystem& files = real_file_system());
// The same with buffers of its own.
Result<SegmentSummary> write_segment(const Path& directory, const SegmentIdentity& identity,
                                     std::span<const SliceSource> sources,
                                     FileSystem& files = real_file_system());

}  // namespace penstock
