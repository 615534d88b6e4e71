#include "kernels/bench/measure.h"

#include <ctime>

#include <algorithm>

#include "comm/base/check.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/bench/measure.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace penstock::bench::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Returns the floating-point operations done. Twelve chains hide the latency of any core so far.
double multiply_add_chains(int64_t steps, float* sink) {
  constexpr int kChains = 12;
  const hn::CappedTag<float, 16> d;
  const auto factor = hn::Set(d, 0.999F);
  const auto term = hn::Set(d, 0.001F);
  // Different starts, or the compiler would compute one chain and copy it.
  const auto start = [&](int chain) HWY_ATTR { return hn::Set(d, static_cast<float>(chain)); };
  auto c0 = start(0), c1 = start(1), c2 = start(2), c3 = start(3), c4 = start(4), c5 = start(5);
  auto c6 = start(6), c7 = start(7), c8 = start(8), c9 = start(9), c10 = start(10);
  auto c11 = start(11);
  for (int64_t step = 0; step < steps; ++step) {
    c0 = hn::MulAdd(c0, factor, term);
    c1 = hn::MulAdd(c1, factor, term);
    c2 = hn::MulAdd(c2, factor, term);
    c3 = hn::MulAdd(c3, factor, term);
    c4 = hn::MulAdd(c4, factor, term);
    c5 = hn::MulAdd(c5, factor, term);
    c6 = hn::MulAdd(c6, factor, term);
    c7 = hn::MulAdd(c7, factor, term);
    c8 = hn::MulAdd(c8, factor, term);
    c9 = hn::MulAdd(c9, factor, term);
    c10 = hn::MulAdd(c10, factor, term);
    c11 = hn::MulAdd(c11, factor, term);
  }
  auto sum = hn::Add(hn::Add(hn::Add(c0, c1), hn::Add(c2, c3)), hn::Add(c4, c5));
  sum = hn::Add(sum, hn::Add(hn::Add(hn::Add(c6, c7), hn::Add(c8, c9)), hn::Add(c10, c11)));
  *sink = hn::GetLane(sum);
  return 2.0 * kChains * static_cast<double>(hn::Lanes(d)) * static_cast<double>(steps);
}

}  // namespace penstock::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::bench {

HWY_EXPORT(multiply_add_chains);

namespace {

double thread_seconds() {
  timespec now{};
  PENSTOCK_CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double seconds_of(const Candidate& candidate, int64_t calls) {
  const double start = thread_seconds();
  for (int64_t i = 0; i < calls; ++i) candidate.run();
  return (thread_seconds() - start) / static_cast<double>(calls);
}

}  // namespace

double peak_gflops() {
  volatile float keep = 0;
  float sink = 0;
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const double start = thread_seconds();
    const double operations = HWY_DYNAMIC_DISPATCH(multiply_add_chains)(200'000, &sink);
    best = std::max(best, operations / (thread_seconds() - start) * 1e-9);
    keep = sink;
  }
  static_cast<void>(keep);
  return best;
}

std::vector<Measured> alternate(const std::vector<Candidate>& candidates, int round_count,
                                double round_seconds) {
  std::vector<int64_t> calls;
  for (const Candidate& candidate : candidates) {
    candidate.run();  // first touch, packing buffers, generated code
    const double once = std::max(seconds_of(candidate, 1), 1e-8);
    calls.push_back(std::max<int64_t>(1, static_cast<int64_t>(round_seconds / once)));
  }
  std::vector<std::vector<double>> seconds(candidates.size()), ratios(candidates.size());
  for (int round = 0; round < round_count; ++round) {
    for (size_t i = 0; i < candidates.size(); ++i) {
      seconds[i].push_back(seconds_of(candidates[i], calls[i]));
      ratios[i].push_back(seconds[0].back() / seconds[i].back());
    }
  }
  std::vector<Measured> measured;
  for (size_t i = 0; i < candidates.size(); ++i) {
    measured.push_back({median(seconds[i]), median(ratios[i])});
  }
  return measured;
}

}  // namespace penstock::bench
#endif  // HWY_ONCE
