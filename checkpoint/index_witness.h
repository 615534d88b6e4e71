// What the checkpoint index was last changed to, remembered outside of it. RocksDB opens an older
// state of itself without a word (its log emptied, an older MANIFEST put back), so somebody else
// has to know. Every change of the index is one link of a chain of digests; the index holds its
// newest link, and so does the name of an empty file beside it:
//
//   checkpoint-index.head-00000000000000000042-<32 hex digits>
//
// The index is written first. So it is equal to the witness or, after a crash, one link ahead.
#pragma once

#include "checkpoint/file_system.h"
#include "comm/base/hash.h"

namespace penstock {

struct ChainHead {
  uint64_t count = 0;  // changes so far; 0: none ever
  Digest digest;       // of the head before it, then of the change
  bool operator==(const ChainHead&) const = default;
};

ChainHead next_head(const ChainHead& head, Bytes change);

// The highest head that a file beside `index` names; count 0 when there is none. REQUIRES here and
// below: `index` is absolute, so that it has a parent.
Result<ChainHead> read_witness(const Path& index);
// Durable on return. Older files are removed, those that cannot be stay without harm.
Status write_witness(const Path& index, const ChainHead& head, FileSystem& files);

}  // namespace penstock
