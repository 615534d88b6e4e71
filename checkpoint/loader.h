// Loads any boxes of any tensors from a checkpoint: whatever layout saved it, whatever layout asks.
#pragma once

#include <span>
#include <vector>

#include "checkpoint/disk_ring.h"
#include "checkpoint/manifest.h"
#include "checkpoint/slice.h"
#include "comm/base/bytes.h"
#include "comm/base/file.h"

namespace penstock {

// Where one slice shall go. Borrowed memory; element 0 is the box's first element.
struct LoadTarget {
  TensorSlice slice;  // dtype and shape must equal the checkpoint's
  MutableBytes bytes;
  std::vector<int64_t>
      strides;  // elements, one per dimension, none negative; empty: dense row-major
  // Other processes of this host load it, too: it is read through the page cache, so that the disk
  // reads it once. All else goes past it, which costs no memory and less time.
  bool shared = false;
};

struct LoadReport {
  uint64_t bytes_loaded = 0;  // put into targets
  uint64_t bytes_read = 0;  // of blocks from disk, each counted once per read; footers not included
  uint64_t read_count = 0;
  uint32_t segment_count = 0;
};

// Fills every target, each element exactly once, proven before the first read; each block is
// verified before any of its bytes is copied. Opens only the segments that hold something needed,
// and reads each needed block once. Uses 16 MiB of memory beside the targets.
//   kNotFound         the checkpoint has no such tensor
//   kInvalidArgument  dtype, shape, byte count or strides do not fit
//   kDataLoss         a gap or overlap, or a damaged or missing segment: names file, rank, tensor.
//                     Targets then hold a mixture; discard them
Result<LoadReport> load_slices(const Path& directory, const Manifest& manifest,
                               std::span<const LoadTarget> targets, const DiskOptions& disk = {});

}  // namespace penstock
