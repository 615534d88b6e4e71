// Element types that models travel in, to fp32. Back to bf16: comm/base/minifloat.h.
#pragma once

#include <cstdint>
#include <span>

#include "checkpoint/slice.h"

namespace penstock {

// F32, BF16, F16 and F8_E4M3 (finite form: no infinities, S.1111.111 is NaN) have an fp32 value.
bool converts_to_float(DType dtype);
// Exact for every value. REQUIRES: converts_to_float(dtype), and `from` holds one element for each
// of `into`.
void to_floats(DType dtype, Bytes from, std::span<float> into);

}  // namespace penstock
