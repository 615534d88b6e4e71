#include "comm/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace penstock {

void check_failed(const char* file, int line, const char* condition, const std::string& values) {
  std::fprintf(stderr, "check failed: %s at %s:%d;%s\n", condition, file, line, values.c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace penstock
