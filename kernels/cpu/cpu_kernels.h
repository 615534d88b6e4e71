// The fast host backend, vectorised with Highway, instruction set chosen at run time. Matrix
// products are its own (measured against BLAS libraries in docs/benchmarks/matmul.md): a row's
// result has the same bits whichever rows it is batched with, and AVX2 and AVX-512 hosts agree bit
// for bit.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace penstock {

// One instance computes on the calling thread alone: ranks are processes that share cores, and a
// second thread pool would only make them wait for each other.
std::unique_ptr<Kernels> make_cpu_kernels(Fp8Accumulator accumulator = Fp8Accumulator::kFp32);

}  // namespace penstock
