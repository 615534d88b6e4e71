// gpu_test [--list] [--seed N] [PREFIX...]: runs the cases whose names begin with a PREFIX, all
// without one. Exit code 0: all passed, 1: one failed, 2: wrong use, 77: there is no device to run
// them on.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/cuda/device.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

constexpr int kSkipped = 77;  // what CTest is told to take for it

struct Options {
  bool list = false;
  uint64_t seed = std::random_device{}();
  std::vector<std::string> prefixes;
};

bool chosen(const Case& one, const Options& options) {
  return options.prefixes.empty() ||
         std::any_of(options.prefixes.begin(), options.prefixes.end(),
                     [&](const auto& prefix) { return std::string(one.name).starts_with(prefix); });
}

int run_cases(const Options& options) {
  int run_count = 0;
  int failures = 0;
  for (const Case& one : cases()) {
    if (!chosen(one, options)) continue;
    ++run_count;
    Run run(options.seed);
    one.run(run);
    run.finish();
    failures += run.failed();
    std::printf("%-44s %-6s %5.1f%% of the tolerance  %s\n", one.name,
                run.failed() ? "FAILED" : "ok", 100 * run.worst_error(), run.failure().c_str());
    std::fflush(stdout);
    // An illegal access leaves a context in which nothing runs any more.
    if (cudaGetLastError() != cudaSuccess) {
      std::printf("the device is unusable after %s; the cases behind it did not run\n", one.name);
      return 1;
    }
  }
  std::printf("%d of %d cases passed, seed %llu\n", run_count - failures, run_count,
              static_cast<unsigned long long>(options.seed));
  return failures == 0 && run_count > 0 ? 0 : 1;
}

}  // namespace
}  // namespace penstock::gpu_test

int main(int argc, char** argv) {
  using namespace penstock;
  using namespace penstock::gpu_test;
  Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--list") == 0) {
      options.list = true;
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      options.seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argv[i][0] == '-') {
      std::fprintf(stderr, "gpu_test: unknown flag %s; gpu_test [--list] [--seed N] [PREFIX...]\n",
                   argv[i]);
      return 2;
    } else {
      options.prefixes.emplace_back(argv[i]);
    }
  }
  if (options.list) {
    for (const Case& one : cases()) std::puts(one.name);
    return 0;
  }
  const cuda::DeviceList list = cuda::list_devices();
  if (list.devices.empty()) {
    std::printf("SKIPPED: no CUDA device: %s\n", list.reason.c_str());
    return kSkipped;
  }
  std::printf("device 0: %s, compute capability %d.%d\n", list.devices[0].name.c_str(),
              list.devices[0].major, list.devices[0].minor);
  return run_cases(options);
}
