// Marks on checkpoints: small files beside a manifest, named after it. Their names say everything.
//
//   000000000012.pin                 retention never removes this checkpoint
//   000000000012.manifest.damaged    its manifest, renamed: it is damaged and must not be used
//   000000000012.removed             it was removed where no index was at hand; goes with the row
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/file_system.h"

namespace penstock {

std::string pin_file_name(uint64_t commit_seq);
std::string set_aside_file_name(uint64_t commit_seq);
std::string removed_file_name(uint64_t commit_seq);
// kInvalidArgument for any other name.
Result<uint64_t> parse_pin_file_name(std::string_view name);
Result<uint64_t> parse_set_aside_file_name(std::string_view name);
Result<uint64_t> parse_removed_file_name(std::string_view name);

// Commit numbers that are pinned; whether they still exist is another question.
Result<std::set<uint64_t>> pinned_checkpoints(const Path& directory);

// Commit numbers that were removed and of which an index may still have rows. Not those whose
// manifest is there: somebody has put it back, and it may yet be lost.
Result<std::vector<uint64_t>> removed_checkpoints(const Path& directory);
// Durable on return.
Status mark_removed(const Path& directory, const std::vector<uint64_t>& commit_seqs,
                    FileSystem& files);
// All of them. REQUIRES: the rows of removed_checkpoints() are gone.
Status unmark_removed(const Path& directory, FileSystem& files);

}  // namespace penstock
