// The fast host backend: matrix products from a BLAS-class library (which one, and why:
// docs/benchmarks/matmul.md), everything else vectorised with Highway, instruction set chosen at
// run time.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace penstock {

// One instance computes on the calling thread alone: ranks are processes that share cores, and a
// second thread pool would only make them wait for each other.
std::unique_ptr<Kernels> make_cpu_kernels();

}  // namespace penstock
