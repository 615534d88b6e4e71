#include "checkpoint/saved_slice.h"

#include <fmt/format.h>

namespace penstock {

SavedSlice to_saved_slice(const SegmentSlice& entry) {
  return {.name = entry.slice.name,
          .dtype = std::string(dtype_name(entry.slice.dtype)),
          .shape = entry.slice.shape,
          .box_offset = entry.slice.box.offset,
          .box_size = entry.slice.box.size,
          .file_offset = entry.file_offset,
          .byte_count = entry.byte_count,
          .digest = entry.digest};
}

Result<SegmentSlice> from_saved_slice(const SavedSlice& saved) {
  PENSTOCK_TRY_ASSIGN(const DType dtype, parse_dtype(saved.dtype));
  SegmentSlice entry{.slice = {saved.name, dtype, saved.shape, {saved.box_offset, saved.box_size}},
                     .file_offset = saved.file_offset,
                     .byte_count = saved.byte_count,
                     .digest = saved.digest};
  PENSTOCK_TRY(check_slice(entry.slice));
  if (entry.byte_count != byte_count(entry.slice)) {
    return invalid_argument(fmt::format("tensor {}: {} takes {} bytes, not {}", saved.name,
                                        to_string(entry.slice.box), byte_count(entry.slice),
                                        saved.byte_count));
  }
  return entry;
}

SegmentSaved to_segment_saved(const SegmentIdentity& identity, const SegmentSummary& summary) {
  SegmentSaved saved{.job = identity.job,
                     .epoch = identity.epoch,
                     .rank = identity.rank,
                     .step = identity.step,
                     .file = summary.file,
                     .byte_count = summary.byte_count,
                     .footer_digest = summary.footer_digest,
                     .slices = {}};
  for (const SegmentSlice& entry : summary.slices) saved.slices.push_back(to_saved_slice(entry));
  return saved;
}

Result<CommitSegment> to_commit_segment(const SegmentSaved& saved) {
  PENSTOCK_TRY_ASSIGN(const SegmentFileName name, parse_segment_file_name(saved.file));
  if (name.epoch != saved.epoch || name.rank != saved.rank) {
    return invalid_argument(fmt::format("{} is not a segment of epoch {}, rank {}", saved.file,
                                        saved.epoch, saved.rank));
  }
  return CommitSegment{saved.file, saved.rank, saved.byte_count, saved.footer_digest};
}

}  // namespace penstock
