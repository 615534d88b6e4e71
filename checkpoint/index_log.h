// A look at RocksDB's logs before RocksDB reads them: a disk that wrote a block twice leaves a
// record twice, and RocksDB with assertions, as Debian builds it, aborts on that.
#pragma once

#include "comm/base/bytes.h"
#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

// kDataLoss when a record stands in it twice: each has a sequence number or a file's number of its
// own. Whatever else may be wrong with a log RocksDB says itself.
Status check_log(Bytes log);
// The same of the write-ahead logs and MANIFESTs, which are logs too, of the database in `folder`.
Status check_logs(const Path& folder);

}  // namespace penstock
