// Removing checkpoints so that a crash between any two steps loses neither a kept checkpoint nor,
// for good, the space of a removed one. Used by the store only.
//
//   1. GC file naming manifests and segments, durable     4. index rows, or marks (marks.h)
//   2. manifests unlinked                                 5. segments unlinked, directory synced
//   3. directory synced                                   6. GC file unlinked
//
// After a crash finish_removal() continues from the GC file.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/file_system.h"
#include "checkpoint/manifest.h"

namespace penstock {

struct Removal {
  std::vector<std::string> manifests;  // file names
  std::vector<std::string> segments;
};

// "text, then a digest line", like a manifest. Names are checked: never a path.
std::string encode_removal(const Removal& removal);
Result<Removal> decode_removal(std::string_view text);

// Whether a store calls a file so that it is writing: what is left of one is of no use to anybody.
bool is_temporary_file_name(std::string_view name);

// Numbers of the checkpoints that the GC file names: they are gone, or soon will be, and so must
// their index rows be before finish_removal(). None when there is no GC file, or a damaged one.
Result<std::vector<uint64_t>> removal_in_progress(const Path& directory);

// Steps 1 to 3. REQUIRES: no GC file exists.
Status begin_removal(const Path& directory, const Removal& removal, FileSystem& files);
// Steps 2, 3, 5 and 6 of the removal the GC file names; nothing when there is none. A damaged GC
// file is dropped: its segments are orphans then, which sweep_orphans() finds.
Status finish_removal(const Path& directory, FileSystem& files);

}  // namespace penstock
