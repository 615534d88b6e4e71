#include "tests/gpu/harness.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace penstock::gpu_test {
namespace {

constexpr unsigned char kGuard = 0xa5;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 in integers

}  // namespace

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void Run::expect(bool holds, const std::string& what) {
  if (!holds && failure_.empty()) failure_ = what;
}

void Run::finish() {
  const cuda::Failure* const failure = stream_.wait();
  expect(failure == nullptr, failure == nullptr ? "" : failure->to_string());
}

void Run::compare(const std::string& what, const std::vector<double>& got,
                  const std::vector<double>& want, double tolerance) {
  expect(got.size() == want.size(), what + ": other sizes");
  if (failed()) return;
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const bool same = std::isnan(got[i]) == std::isnan(want[i]);
    if (!same) {
      return expect(false, what + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) +
                               ", not " + std::to_string(want[i]));
    }
    if (std::isnan(want[i])) continue;
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  const double relative = error == 0 ? 0 : std::sqrt(error / norm);
  worst_ = std::max(worst_, relative / tolerance);
  expect(relative <= tolerance, what + ": relative error " + std::to_string(relative));
}

GuardedBytes::GuardedBytes(Run& run, int64_t bytes) : bytes_(bytes) {
  const auto size = static_cast<size_t>(bytes + 2 * kGuardBytes);
  void* base = nullptr;
  run.stream().note("memory", cudaMalloc(&base, size));
  base_ = static_cast<char*>(base);
  run.stream().note("memory", cudaMemset(base_, kGuard, size));
  run.stream().note("memory", cudaMemset(data(), kPoison, static_cast<size_t>(bytes)));
}

GuardedBytes::~GuardedBytes() {
  cudaFree(base_);
}

void GuardedBytes::write(const void* from) {
  cudaMemcpy(data(), from, static_cast<size_t>(bytes_), cudaMemcpyHostToDevice);
}

void GuardedBytes::read(Run& run, void* to) const {
  run.finish();
  std::vector<unsigned char> all(static_cast<size_t>(bytes_ + 2 * kGuardBytes));
  run.stream().note("read", cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost));
  const auto intact = [&](int64_t begin) {
    return std::all_of(all.begin() + begin, all.begin() + begin + kGuardBytes,
                       [](unsigned char byte) { return byte == kGuard; });
  };
  run.expect(intact(0), "something was written before the data");
  run.expect(intact(kGuardBytes + bytes_), "something was written behind the data");
  std::memcpy(to, all.data() + kGuardBytes, static_cast<size_t>(bytes_));
}

}  // namespace penstock::gpu_test
