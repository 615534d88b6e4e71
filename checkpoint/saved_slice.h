// Segments in control messages: SegmentSaved as comm/control knows it, SegmentSummary as this
// folder does.
#pragma once

#include "checkpoint/segment.h"
#include "checkpoint/store.h"
#include "comm/control/message.h"

namespace penstock {

SavedSlice to_saved_slice(const SegmentSlice& slice);
// kInvalidArgument unless the slice passes check_slice and the byte count fits.
Result<SegmentSlice> from_saved_slice(const SavedSlice& saved);

SegmentSaved to_segment_saved(const SegmentIdentity& identity, const SegmentSummary& summary);
// kInvalidArgument unless the file name is a segment's, of this epoch and rank.
Result<CommitSegment> to_commit_segment(const SegmentSaved& saved);

}  // namespace penstock
