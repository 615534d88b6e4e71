// Marks on checkpoints: small files beside a manifest, named after it. Their names say everything.
//
//   000000000012.pin                 retention never removes this checkpoint
//   000000000012.manifest.damaged    its manifest, renamed: it is damaged and must not be used
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>

#include "comm/base/file.h"

namespace penstock {

std::string pin_file_name(uint64_t commit_seq);
std::string set_aside_file_name(uint64_t commit_seq);
// kInvalidArgument for any other name.
Result<uint64_t> parse_pin_file_name(std::string_view name);
Result<uint64_t> parse_set_aside_file_name(std::string_view name);

// Commit numbers that are pinned; whether they still exist is another question.
Result<std::set<uint64_t>> pinned_checkpoints(const Path& directory);

}  // namespace penstock
