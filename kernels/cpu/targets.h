// Include first in every Highway source: the instruction sets that are compiled, one from each x86
// generation that matters here. The sets in between add nothing to fp32 loops but compile time.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
