// The definition of right: every operation as the plain loop of its formula, sums in double. Slow.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace penstock {

std::unique_ptr<Kernels> make_reference_kernels(Fp8Accumulator accumulator = Fp8Accumulator::kFp32);

}  // namespace penstock
