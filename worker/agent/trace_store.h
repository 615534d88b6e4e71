// The traces of this host's ranks: one file per (job, rank), which the rank writes through shared
// memory (comm/run/trace_file.h), and which is served over HTTP without asking the rank:
//
//   GET /traces?job=J
//       {"items": [{"rank", "epoch", "first_step", "last_step"}]}: whole steps
//   GET /trace?job=J&rank=R&first=A&last=B
//       bytes for decode_trace(): of steps A to B those that are there
//
// The newest files are kept, so that the trace of a rank that died can still be read.
#pragma once

#include <cstddef>

#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/control/http_server.h"

namespace penstock {

// Single-threaded. An answer reads one file of at most 16 MiB.
class TraceStore {
 public:
  static constexpr size_t kFilesMin = 32;

  // Keeps the newest max(kFilesMin, 2 · device_count) files in `folder`.
  TraceStore(Path folder, size_t device_count);

  // The file of a rank that is about to start; the oldest ones beyond the bound are removed.
  Result<Path> make_room(JobId job, Rank rank) const;
  HttpResponse answer(const HttpRequest& request) const;

 private:
  Path file_of(uint64_t job, uint64_t rank) const;
  HttpResponse list(uint64_t job) const;

  const Path folder_;
  const size_t files_max_;
};

}  // namespace penstock
