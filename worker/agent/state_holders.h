// The memory in which this host's ranks keep their state (comm/run/held_state.h), held by the
// daemon so that it outlives them: files without a name, one per rank, which the rank opens through
// the daemon's descriptor. They take memory from when the rank fills them until they are dropped,
// and are gone with the daemon.
#pragma once

#include <map>
#include <vector>

#include "comm/base/file.h"
#include "comm/control/message.h"

namespace penstock {

// Single-threaded.
class StateHolders {
 public:
  // The path under which the rank opens its memory: of the attempt before it when `from_memory`,
  // and there is some, else new and empty.
  Result<Path> hold(JobId job, Epoch epoch, Rank rank, bool from_memory);
  // The memory of a rank of this attempt, to read; not valid: there is none.
  FileDescriptor share(JobId job, Epoch epoch, Rank rank) const;
  // Of those ranks that the order has this worker send.
  std::map<Rank, FileDescriptor> share(const MirrorRanks& order) const;
  // What is whole of the ranks of this job. REQUIRES: none of them runs.
  std::vector<HeldRank> held(JobId job) const;
  // The process may have written anything to it: it is not to be used.
  void distrust(JobId job, Rank rank) { holders_.erase({job, rank}); }
  // What was held for attempts before `epoch`.
  void drop_before(JobId job, Epoch epoch);
  size_t size() const { return holders_.size(); }

 private:
  struct Holder {
    FileDescriptor memory;
    Epoch epoch;  // the last one it was for
  };
  std::map<std::pair<JobId, Rank>, Holder> holders_;
};

}  // namespace penstock
