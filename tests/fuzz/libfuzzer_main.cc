// What libFuzzer calls. PENSTOCK_FUZZ_TARGET: a function of targets.h.
#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  penstock::fuzz::PENSTOCK_FUZZ_TARGET({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
