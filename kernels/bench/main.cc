// penstock-bench-kernels [matmul|operations] [rounds]: both parts, 21 alternations each, by
// default.
#include <fmt/format.h>

#include <charconv>
#include <string_view>

#include "comm/base/exit_codes.h"
#include "kernels/bench/matmul_bench.h"
#include "kernels/bench/operation_bench.h"

int main(int argc, char** argv) {
  std::string_view part = "all";
  int round_count = 21;
  bool valid = argc <= 3;
  for (int i = 1; i < argc && valid; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "matmul" || argument == "operations") {
      part = argument;
      continue;
    }
    const auto [end, error] =
        std::from_chars(argument.data(), argument.data() + argument.size(), round_count);
    valid = error == std::errc() && end == argument.data() + argument.size() && round_count > 0 &&
            round_count <= 10'000;
  }
  if (!valid) {
    fmt::print(stderr, "usage: penstock-bench-kernels [matmul|operations] [rounds, 1 to 10000]\n");
    return static_cast<int>(penstock::ExitCode::kUsage);
  }
  if (part != "operations") penstock::bench::run_matmul_bench(round_count);
  if (part != "matmul") penstock::bench::run_operation_bench(round_count);
  return static_cast<int>(penstock::ExitCode::kOk);
}
