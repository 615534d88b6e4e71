// Speed of every other operation against the reference and against copying memory.
#pragma once

namespace penstock::bench {

// Prints one line per operation; `round_count` alternations each.
void run_operation_bench(int round_count);

}  // namespace penstock::bench
