// Reads of a segment's blocks that go on while their caller works on those before: past the page
// cache (O_DIRECT) and several at once (io_uring), or through it, and then the disk is told ahead.
#pragma once

#include <deque>

#include "checkpoint/disk_ring.h"
#include "checkpoint/segment_reader.h"
#include "comm/base/bytes.h"

namespace penstock {

// Reads under way at a time.
inline constexpr size_t kStartedReadsMax = 32;

// Owned by one thread. Destroying it waits for what is under way.
class BlockReads {
 public:
  // Borrows all. `memory` is aligned to kDirectAlignment and holds the largest read. `ring` is for
  // kStartedReadsMax; null: all goes through the page cache.
  BlockReads(const SegmentReader& reader, MutableBytes memory, DiskRing* ring);
  ~BlockReads();
  BlockReads(const BlockReads&) = delete;
  BlockReads& operator=(const BlockReads&) = delete;

  // Starts to read blocks [first, last) and returns true; false when there is no room until an
  // earlier one is finished.
  bool start(uint64_t first, uint64_t last, bool through_cache);
  // Waits for the oldest that is not finished. Result: its bytes, each block verified, valid until
  // the next start(). Errors as SegmentReader::read_blocks(). REQUIRES: one was started.
  Result<Bytes> finish();

 private:
  struct Started {
    uint64_t first = 0;
    uint64_t last = 0;
    MutableBytes into;
    bool in_ring = false;
    int64_t result = 0;  // of the ring, when it is out of it
  };

  MutableBytes room_for(uint64_t byte_count) const;
  bool submit(const Started& read);
  void wait_for_one();

  const SegmentReader& reader_;
  const MutableBytes memory_;  // used as a circle, in the order of started_
  DiskRing* const ring_;
  FileDescriptor direct_;        // not valid: all goes through the page cache
  std::deque<Started> started_;  // oldest first; tags count from first_tag_
  uint64_t first_tag_ = 0;
};

}  // namespace penstock
