// What programs compute, as one digest: every value is a symbol made from the symbols it depends
// on, and every sum remembers the order of its terms. Programs of equal meaning give a model the
// same bits. Written without check_programs(), to judge it by.
#pragma once

#include <optional>
#include <vector>

#include "comm/run/program.h"
#include "coordinator/plan/virtual_time.h"

namespace penstock {

// Nothing when the programs have no meaning: they wait for ever, use a value that is not there, run
// a pass twice, or leave a sent value or a queued weight part lying. REQUIRES: directions below 2.
std::optional<uint64_t> meaning_of(const ParallelismSpec& parallelism,
                                   const std::vector<Program>& programs, ProgramKind kind);

}  // namespace penstock
