// What tests of operations on a device are written with. They need the CUDA toolkit and nothing
// else, so that they can be built where it is all there is: a program of named cases, one line
// each.
//
//   GPU_CASE(rms_norm_bf16) {
//     Data<Bf16> x(run, rows * width), y(run, rows * width);
//     const auto host_x = x.fill_random(run);
//     rms_norm(run.stream(), …);
//     run.compare("y", y.read(run), expected, kBf16Tolerance);
//   }
//
// Every Data lies between guard bytes and begins as NaN, so that what an operation does not write,
// or writes beside it, is found. A case fails at the first thing that is wrong; the others still
// run.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::gpu_test {

// Relative Frobenius error, |got - want| / |want|, that an operation may have against the reference
// in double on the same inputs.
inline constexpr double kBf16Tolerance = 1e-2;
inline constexpr double kFp32Tolerance = 1e-5;

template <typename T>
constexpr double tolerance_of() {
  return sizeof(T) == 2 ? kBf16Tolerance : kFp32Tolerance;
}

// One case being run.
class Run {
 public:
  explicit Run(uint64_t seed) : random_(seed) {}

  cuda::Stream& stream() { return stream_; }
  double normal() { return normal_(random_); }
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(bound));
  }

  // Both in row-major order; NaN equals NaN only.
  void compare(const std::string& what, const std::vector<double>& got,
               const std::vector<double>& want, double tolerance);
  void expect(bool holds, const std::string& what);
  // Waits for the stream; a failure of it is one of the case.
  void finish();

  bool failed() const { return !failure_.empty(); }
  const std::string& failure() const { return failure_; }
  double worst_error() const { return worst_; }  // share of the tolerance that compare() saw

 private:
  cuda::Stream stream_;
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  std::string failure_;
  double worst_ = 0.0;
};

// Bytes of device memory between guards. Host copies are exact.
class GuardedBytes {
 public:
  GuardedBytes(Run& run, int64_t bytes);
  ~GuardedBytes();
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  void* data() const { return base_ + kGuardBytes; }
  void write(const void* from);
  // Waits for the stream; checks the guards.
  void read(Run& run, void* to) const;

 private:
  static constexpr int64_t kGuardBytes = 4096;
  char* base_ = nullptr;
  int64_t bytes_ = 0;
};

// `count` elements: bf16, float, or integers.
template <typename T>
class Data {
 public:
  Data(Run& run, int64_t count)
      : count_(count), bytes_(run, count * static_cast<int64_t>(sizeof(T))) {}
  T* get() const { return static_cast<T*>(bytes_.data()); }
  cuda::View<T> view(int64_t stride) const { return {get(), stride}; }
  void write(const std::vector<T>& values) { bytes_.write(values.data()); }
  // Normal with this deviation; returns what the device got, after rounding.
  std::vector<double> fill_random(Run& run, double deviation = 1.0) {
    std::vector<T> values(static_cast<size_t>(count_));
    for (T& value : values) value = T(static_cast<float>(deviation * run.normal()));
    write(values);
    return widened(values);
  }
  std::vector<T> read_exact(Run& run) const {
    std::vector<T> values(static_cast<size_t>(count_));
    bytes_.read(run, values.data());
    return values;
  }
  std::vector<double> read(Run& run) const { return widened(read_exact(run)); }

 private:
  static std::vector<double> widened(const std::vector<T>& values) {
    std::vector<double> wide;
    wide.reserve(values.size());
    for (const T& value : values) wide.push_back(static_cast<double>(static_cast<float>(value)));
    return wide;
  }
  int64_t count_;
  GuardedBytes bytes_;
};

struct Case {
  const char* name;
  void (*run)(Run& run);
};
std::vector<Case>& cases();
struct Registration {
  Registration(const char* name, void (*run)(Run&)) { cases().push_back({name, run}); }
};

}  // namespace penstock::gpu_test

#define GPU_CASE(name)                                                                         \
  static void gpu_case_##name(::penstock::gpu_test::Run& run);                                 \
  static const ::penstock::gpu_test::Registration registration_##name(#name, gpu_case_##name); \
  static void gpu_case_##name([[maybe_unused]] ::penstock::gpu_test::Run& run)
