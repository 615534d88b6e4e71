// Speed of the matrix product on the shapes of a small model, beside the BLAS-class libraries that
// were found when this was built.
#pragma once

namespace penstock::bench {

// Prints one line per shape; `round_count` alternations each.
void run_matmul_bench(int round_count);

}  // namespace penstock::bench
